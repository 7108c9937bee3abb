"""`mdm serve`."""

from __future__ import annotations

from pathlib import Path

import click

from mdm.commands import MODEL_HELP


@click.command(short_help="Serve a student over HTTP.")
@click.option("--model", type=click.Path(path_type=Path), help=MODEL_HELP)
@click.option("--teacher", help='AR model to host beside it: folder, .gguf, hub name, "embedded".')
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0 = a free one.")
@click.option("--name", help="What requests call the student.  [default: the run's name]")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--quantization", default="",
              help="int8_dynamic: linear layers in 8 bits, on a CPU.  [default: none]")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a forward.")
@click.option("--max-rows", default=16, show_default=True, help="Texts in work at the same time.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens of one forward.")
@click.option("--max-queue", default=64, show_default=True, help="Requests that may wait.")
@click.option("--max-n", default=16, show_default=True, help="Texts one request may ask for.")
@click.option("--max-samples", default=4096, show_default=True, help="Masks of one likelihood.")
@click.option("--max-body-kib", default=1024, show_default=True, help="Size of a request.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds a request may take.")
@click.option("--workspace-mib", default=0,
              help="Memory for forwards beside the weights.  [default: half of what is free]")  # fmt: skip
@click.option("--trajectories", default=64, show_default=True, help="Requests kept for replay.")
@click.option("--drain-seconds", default=30.0, show_default=True,
              help="Time that requests in work get after SIGTERM.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File with one API key a line.  [default: MDM_API_KEY, or none]")  # fmt: skip
@click.option("--open-to-all", is_flag=True, help="Allow a public address without an API key.")
@click.option("--allow-host", multiple=True, help="Another name requests may call it by.")
@click.option("--allow-origin", multiple=True, help="Web origin whose pages may call it (CORS).")
@click.option("--log-requests", is_flag=True, help="Log prompts and texts too.")
def serve(
    model: Path | None,
    teacher: str | None,
    host: str,
    port: int,
    name: str | None,
    dtype: str,
    quantization: str,
    device: str | None,
    threads: int | None,
    max_rows: int,
    batch_tokens: int,
    max_queue: int,
    max_n: int,
    max_samples: int,
    max_body_kib: int,
    timeout: float,
    workspace_mib: int,
    trajectories: int,
    drain_seconds: float,
    api_key_file: Path | None,
    open_to_all: bool,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    log_requests: bool,
) -> None:
    """Serve a student over HTTP: /generate, /score, OpenAI's endpoints, a page to watch it think.

    \b
    mdm serve --model runs/demo/final --port 8000
    mdm serve --teacher embedded --dtype bfloat16
    curl localhost:8000/generate -H 'content-type: application/json' \\
         -d '{"prefix": "def add(a, b):\\n    return ", "suffix": "\\n", "span": 4}'
    """
    from .access import allowed_hosts, check_access, read_keys
    from .limits import Limits

    limits = Limits(
        max_rows=max_rows,
        batch_tokens=batch_tokens,
        max_queue=max_queue,
        max_n=max_n,
        max_samples=max_samples,
        max_body_bytes=max_body_kib * 1024,
        timeout_s=timeout,
        workspace_mib=workspace_mib,
        trajectories=trajectories,
    )
    keys = read_keys(api_key_file)
    check_access(host, keys, open_to_all=open_to_all)  # before the models are loaded
    from mdm.errors import ConfigError
    from mdm.runs import last_finished

    try:
        from .run import listen, open_service, run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"mdm serve needs the package {error.name}; install the extra: pip install"
            " 'mdm-code[serve]'"
        ) from error

    with listen(host, port) as listener:
        if model is None:
            model = last_finished()
            click.echo(f"model: {model} (the last finished run)", err=True)
        service = open_service(
            str(model),
            teacher,
            limits,
            name=name,
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
            log_requests=log_requests,
        )
        run(
            service,
            listener,
            keys=keys,
            hosts=allowed_hosts(host, allow_host),
            origins=allow_origin,
            drain_s=drain_seconds,
        )
