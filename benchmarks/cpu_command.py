"""`mdm bench cpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import numbers as whole_numbers
from .option_lists import parts


@click.command("cpu")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--teacher", default="embedded", show_default=True, help="AR model beside it.")
@click.option("--numbers", default="", callback=parts,
              help="float32, bfloat16, int8_dynamic; float32 comes along.  [default: all]")  # fmt: skip
@click.option("--threads", default="", callback=whole_numbers,
              help="CPU threads, like 1,2.  [default: powers of two up to the cores]")  # fmt: skip
@click.option("--compile", is_flag=True, help="Time compiled forwards, too: minutes more.")
@click.option("--kept", default=256, show_default=True, help="Tokens before those written.")
@click.option("--length", default=8, show_default=True,
              help="Open positions of a student without blocks.")  # fmt: skip
@click.option("--tokens", default=8, show_default=True, help="Forwards of the AR model a repeat.")
@click.option("--repeats", default=7, show_default=True, help="Texts of every side.")
@click.option("--texts", default=8, show_default=True, help="On which it is seen what it costs.")
@click.option("--text-length", default=256, show_default=True, help="Tokens of each.")
@click.option("--seed", default=0, show_default=True, help="Of texts and masks.")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for the tables.")
@click.option("--json", "whole", type=click.Path(path_type=Path), help="File for the record alone.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/cpu.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def cpu(
    model: str | None, table: Path | None, whole: Path | None, path: Path, **settings: Any
) -> None:
    """What helps on a CPU: number types, 8 bits, threads, compiled code, and what each costs.

    A step of the student in its block and a token of the AR model, after the same number of tokens of code;
    all take turns in one run. What the model then says of real code is compared with float32.
    """
    from mdm.record import to_json
    from mdm.runs import last_finished

    from . import cpu as measured
    from .cpu_report import describe, page

    bench_settings = measured.CpuBench(model=model or str(last_finished()), **settings)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    if table is not None:
        table.write_text(page(record) + "\n", encoding="utf-8")
    if whole is not None:
        whole.write_text(to_json(record) + "\n", encoding="utf-8")
    click.echo(describe(record))
