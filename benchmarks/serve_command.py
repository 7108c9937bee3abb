"""`mdm bench serve`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--workload", default="short", show_default=True,
              help="short (16 + 16 tokens), medium (32 + 32) or long (64 + 64).")  # fmt: skip
@click.option("--concurrency", default="1,2,4,8,16,32", show_default=True, help="Clients at once.")
@click.option("--requests", default=4, show_default=True, help="Of each client at each level.")
@click.option("--repeats", default=3, show_default=True, help="How often all is measured.")
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--threads", type=int, help="CPU threads of each side.  [default: the cores]")
@click.option("--soak", default=0.0, show_default=True, help="Seconds of mixed load; 0 = none.")
@click.option("--seed", default=0, show_default=True, help="Of prompts and of the requests' seeds.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/serve.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def serve(
    model: str | None,
    workload: str,
    concurrency: str,
    requests: int,
    repeats: int,
    dtype: str,
    threads: int | None,
    soak: float,
    seed: int,
    picture: Path | None,
    path: Path,
) -> None:
    """Throughput, latency and memory of `mdm serve`, against the same weights without its engine.

    Clients of a second process ask a server whose requests share forwards, and in turn one that takes
    one request at a time; a single client is compared with calls of the library. With --soak, load
    of all kinds for a while: is anything lost, does memory grow?
    """
    from mdm.errors import ConfigError
    from mdm.record import device
    from mdm.runs import last_finished

    from . import serve as measured
    from .serve_report import describe
    from .serve_report import plot as draw
    from .serve_requests import ServeBench

    if not all(part.strip().isdecimal() for part in concurrency.split(",")):
        raise ConfigError(f"--concurrency must be whole numbers like 1,4,16; got {concurrency!r}")
    settings = ServeBench(
        model=model or str(last_finished()),
        workload=workload,
        concurrency=tuple(int(part) for part in concurrency.split(",")),
        requests=requests,
        repeats=repeats,
        dtype=dtype,
        threads=device()["cores"] if threads is None else threads,
        soak=soak,
        seed=seed,
    )
    record = measured.run(settings, path, lambda text: click.echo(text, err=True))
    if picture is not None:
        draw(record, picture)
    click.echo(describe(record))
