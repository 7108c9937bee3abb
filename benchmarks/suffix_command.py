"""`mdm bench suffix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("suffix")
@click.option("--model", default="embedded", show_default=True, help="AR model of all sides.")
@click.option("--candidates", default=128, show_default=True, help="Candidates a position.")
@click.option("--length", default=256, show_default=True, help="Tokens of a text.")
@click.option("--rows", default=3, show_default=True, help="Texts, from the standard library.")
@click.option("--positions", default=6, show_default=True, help="Masked positions of each text.")
@click.option("--loop-positions", default=2, show_default=True,
              help="Of them, how many the plain loop is timed on.")  # fmt: skip
@click.option("--repeats", default=1, show_default=True, help="How often all is timed.")
@click.option("--prune", default=2e-3, show_default=True, help="Mass that the fast mode may drop.")
@click.option("--tail-draws", default=16, show_default=True,
              help="Draws for the mass outside the candidates, not timed.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of texts and positions.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/suffix.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def suffix(path: Path, **settings: Any) -> None:
    """Suffix scoring against the plain loop of one full forward for each candidate.

    The exact mode has to agree with the loop; the fast mode's distance from it is measured.
    """
    from . import suffix_cost as measured

    bench_settings = measured.SuffixBench(**settings)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    click.echo(measured.describe(record))
