"""`mdm bench cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("cache")
@click.option("--model", default="embedded", show_default=True, help="AR model: both sides of it.")
@click.option("--source", default="stdlib", show_default=True, help="Text, as in data.sources.")
@click.option("--rows", default=4, show_default=True, help="Rows of a step.")
@click.option("--length", default=256, show_default=True, help="Tokens in a row.")
@click.option("--cached-rows", default=32, show_default=True, help="Rows of the cache.")
@click.option("--pairs", default=16, show_default=True, help="Timed steps of each side.")
@click.option("--top-k", default=64, show_default=True, help="Tokens kept a position.")
@click.option("--precision", default="bf16", show_default=True, help="bf16 or fp32, both models.")
@click.option("--seed", default=0, show_default=True, help="Of masks and of the order of rows.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/cache.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def cache(path: Path, **settings: Any) -> None:
    """Training steps with a teacher at work, against cached targets: time, bytes, same loss?

    Teacher and student are the same model. The sides take turns; about two minutes on two CPU cores.
    """
    from . import cache as measured

    bench_settings = measured.CacheBench(**settings)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    click.echo(measured.describe(record))
