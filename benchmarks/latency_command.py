"""`mdm bench latency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import numbers, parts, shares


@click.command("latency")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--teacher", default="embedded", show_default=True, help="AR model to compare with.")
@click.option("--random-teacher", is_flag=True,
              help="Random weights in the shape of --teacher: for time, not for text.")  # fmt: skip
@click.option("--texts", default=5, show_default=True, help="Prompts of HumanEval.")
@click.option("--repeats", default=1, show_default=True, help="How often each is timed.")
@click.option("--prompt-length", default=64, show_default=True, help="Tokens of a prompt, at most.")
@click.option("--gen-length", default=256, show_default=True, help="New tokens of a text.")
@click.option("--ends", default="suppressed", show_default=True,
              help="suppressed: all texts have --gen-length tokens; natural: they may end.")  # fmt: skip
@click.option("--tokens-per-step", default="1,2,4", show_default=True, callback=numbers,
              help="Fixed schedules of the student.")  # fmt: skip
@click.option("--thresholds", default="0.5,0.7,0.9", show_default=True, callback=shares,
              help="Confidences to decide at.")  # fmt: skip
@click.option("--factors", default="", callback=shares, help="Parameters of the factor rule.")
@click.option("--entropy-bounds", default="", callback=shares,
              help="Parameters of the entropy-bounded rule, nats.")  # fmt: skip
@click.option("--block-length", type=int,
              help="Tokens decoded together.  [default: 32, or a block of the model]")  # fmt: skip
@click.option("--cache", default="none", show_default=True,
              help="Approximate, of a model without blocks: prefix or dual.")  # fmt: skip
@click.option("--refresh", type=int, help="Steps after which it is made anew.  [default: a block]")
@click.option("--mode", "modes", default="eager", show_default=True, callback=parts,
              help="eager, compile, graphs; several with commas.")  # fmt: skip
@click.option("--plain-texts", default=1, show_default=True,
              help="Prompts that the published loop without a cache writes; 0 = none.")  # fmt: skip
@click.option("--quality/--no-quality", default=True, show_default=True,
              help="Judge the texts and fill holes.")  # fmt: skip
@click.option("--holes", default=32, show_default=True, help="To fill; 0 = none.")
@click.option("--span", default=16, show_default=True, help="Tokens of a hole.")
@click.option("--batches", default="1,2,4,8,16,32", show_default=True, callback=numbers,
              help='Rows at once; "" = none.')  # fmt: skip
@click.option("--batch-length", default=64, show_default=True, help="New tokens of each row.")
@click.option("--batch-decoding", default="",
              help="Of the student there, like schedule=2 or threshold=0.9.  [default: the first schedule"
                   " with more than a token a step]")  # fmt: skip
@click.option("--contexts", default="64,256,1024", show_default=True, callback=numbers,
              help='Tokens of a prompt at which memory is read; "" = none.')  # fmt: skip
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--quantization", default="", help="int8_dynamic, of both sides.  [default: none]")
@click.option("--threads", type=int, help="CPU threads.  [default: the cores]")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--overhead", is_flag=True, help="Measure mdm's loop against the bare model, too.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of prompts and holes.")
@click.option("--against", type=click.Path(path_type=Path),
              help="JSONL file whose last record is shown beside this one.")  # fmt: skip
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for the tables.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--json", "whole", type=click.Path(path_type=Path), help="File for the record alone.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/latency.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def latency(
    model: str | None,
    threads: int | None,
    against: Path | None,
    table: Path | None,
    picture: Path | None,
    whole: Path | None,
    path: Path,
    **settings: Any,
) -> None:
    """Latency, tokens a second and memory of a student against its AR teacher, quality beside speed.

    All continue the same prompts in turn, in every mode: the student under every decoding, the teacher by
    mdm's loop and by `generate` of transformers, and a published sampler without a cache on the student's
    weights. Then batches, with the batch from which the teacher is ahead, and memory against context.
    """
    from mdm.errors import ConfigError
    from mdm.record import device, to_json
    from mdm.runs import last_finished

    from . import latency as measured
    from .latency_plot import plot, require_matplotlib
    from .latency_report import compared, describe, last_record, page
    from .latency_settings import LatencyBench

    bench_settings = LatencyBench(
        model=model or str(last_finished()),
        threads=device()["cores"] if threads is None else threads,
        **settings,
    )
    if picture is not None:
        require_matplotlib()
    before = None if against is None else last_record(against)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    if whole is not None:
        whole.write_text(to_json(record) + "\n", encoding="utf-8")
    if table is not None:
        table.write_text(page(record) + "\n", encoding="utf-8")
    if picture is not None:
        plot(record, picture)
    if before is not None:
        try:
            click.echo(compared(record, before) + "\n")
        except ConfigError as error:  # what was measured is worth having all the same
            click.echo(f"not compared: {error}", err=True)
    click.echo(describe(record))
