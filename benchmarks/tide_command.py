"""`mdm bench tide`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import numbers, parts


@click.command()
@click.option("--arms", default="", callback=parts,
              help="Names, like kl,tidal; controls come with them.  [default: all]")  # fmt: skip
@click.option("--seeds", default="0,1,2", show_default=True, callback=numbers,
              help="Of masks, rows and holes.")  # fmt: skip
@click.option("--steps", default=40, show_default=True, help="Of each student.")
@click.option("--teacher-steps", default=100, show_default=True, help="Of the teacher.")
@click.option("--first-steps", default=100, show_default=True,
              help="Of the student that all begin from; 0 = cut layers.")  # fmt: skip
@click.option("--layers", default=6, show_default=True, help="Of the students; 0 = all.")
@click.option("--block", default=8, show_default=True, help="Tokens a block, of all models.")
@click.option("--length", default=128, show_default=True, help="Tokens in a row.")
@click.option("--rows", default=4, show_default=True, help="Rows in a step.")
@click.option("--holes", default=64, show_default=True, help="Held-out holes to fill.")
@click.option("--tokens", default=2**13, show_default=True, help="Of the students' own tokenizer.")
@click.option("--documents", default=400, show_default=True, help="That it is learnt on.")
@click.option("--weight", default="bound", show_default=True,
              help="objective.weight of the students: bound or mean_masked.")  # fmt: skip
@click.option("--recipe", default="demo", show_default=True, help="What the arms change.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting of that recipe; may be repeated.")  # fmt: skip
@click.option("--runs", default="runs/tide", show_default=True, help="Folder that holds the runs.")
@click.option("--keep", is_flag=True, help="Keep the weights and rows of finished runs.")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for the tables.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/tide.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def tide(
    layers: int, runs: str, keep: bool, table: Path | None, path: Path, **settings: Any
) -> None:
    """The pipelines of TIDE in small: a diffusion teacher's losses against controls without it.

    A teacher with the student's tokenizer (KL, TIDAL, CompDemo) and one with another (CALM). The teacher
    is made first, and all is measured in pairs: held-out bound and infilled holes, with t-intervals over
    seeds. Finished runs are not repeated, so it may be stopped at any time.
    """
    from . import tide as measured
    from .tide_recipes import TideBench
    from .tide_report import describe, page

    bench_settings = TideBench(layers=layers or None, **settings)
    record = measured.run(
        bench_settings, Path(runs), path, lambda text: click.echo(text, err=True), keep=keep
    )
    if table is not None:
        table.write_text(page(record) + "\n", encoding="utf-8")
    click.echo(describe(record))
