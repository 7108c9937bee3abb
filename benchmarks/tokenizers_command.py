"""`mdm bench tokenizers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import numbers, parts


@click.command()
@click.option("--arms", default="", callback=parts, help="Names, like ce,mapped.  [default: all]")
@click.option("--seeds", default="0,1,2", show_default=True, callback=numbers,
              help="Of masks, rows and first weights.")  # fmt: skip
@click.option("--sources", default="stdlib", show_default=True, callback=parts, help="The corpus.")
@click.option("--documents", default=400, show_default=True, help="That tokenizers are learnt on.")
@click.option("--small", default=2**10, show_default=True, help="Tokens of the student.")
@click.option("--large", default=2**12, show_default=True, help="Tokens of the other teacher.")
@click.option("--width", default=128, show_default=True, help="Of all models.")
@click.option("--layers", default=4, show_default=True, help="Of all models.")
@click.option("--length", default=96, show_default=True, help="Tokens in a row.")
@click.option("--rows", default=16, show_default=True, help="Rows in a step.")
@click.option("--teacher-steps", default=600, show_default=True, help="Of each teacher.")
@click.option("--steps", default=200, show_default=True, help="Of each student.")
@click.option("--kd-lambda", default=0.5, show_default=True, help="Share of distillation.")
@click.option("--runs", "folder", type=click.Path(path_type=Path),
              help="Empty folder for the runs.  [default: one that is deleted]")  # fmt: skip
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/tokenizers.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def tokenizers(folder: Path | None, path: Path, **settings: Any) -> None:
    """Distil across tokenizers: shared, mapped and embedding-space targets at equal tokens.

    Two tokenizers, two small teachers and the students are trained on the spot, on the standard library;
    some fifteen minutes on two CPU cores. Differences have a t-interval over seeds.
    """
    import tempfile

    from . import tokenizers as measured
    from .tokenizers_report import describe

    bench_settings = measured.TokenizersBench(**settings)
    with tempfile.TemporaryDirectory(prefix="mdm-tokenizers-") as temporary:
        record = measured.run(
            bench_settings,
            folder or Path(temporary) / "runs",
            path,
            lambda text: click.echo(text, err=True),
        )
    click.echo(describe(record))
