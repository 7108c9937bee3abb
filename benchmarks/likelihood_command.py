"""`mdm bench likelihood`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("likelihood")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--items", default=6, show_default=True, help="Short answers, each with a wrong one.")
@click.option("--length", default=10, show_default=True, help="Tokens of a short answer.")
@click.option("--long-items", default=2, show_default=True, help="Long answers; 0 = none.")
@click.option("--long-length", default=32, show_default=True, help="Tokens of a long answer.")
@click.option("--context", default=32, show_default=True, help="Tokens of the prompt.")
@click.option("--budgets", default="8,16,32,64,128", show_default=True, help="Forwards an answer.")
@click.option("--draws", default=200, show_default=True, help="Draws a short answer.")
@click.option("--long-draws", default=8, show_default=True, help="Runs a long answer.")
@click.option("--seed", default=0, show_default=True, help="Of the masks.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/likelihood.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def likelihood(
    model: str | None, budgets: str, picture: Path | None, path: Path, **counts: int
) -> None:
    """Error of likelihood estimators against the truth, at equal forwards, on a real checkpoint.

    Short answers (HumanEval's solutions) are scored under every mask once; the estimators then draw
    from that table, so bias and spread are known exactly. Long answers are scored again and again.
    """
    from mdm.errors import ConfigError
    from mdm.runs import last_finished

    from . import likelihood as measured

    if not all(part.strip().isdigit() for part in budgets.split(",")):
        raise ConfigError(f"--budgets must be whole numbers like 8,16,32; got {budgets!r}")
    settings = measured.LikelihoodBench(
        model=model or str(last_finished()),
        budgets=tuple(int(part) for part in budgets.split(",")),
        **counts,
    )
    record = measured.run(settings, path)
    if picture is not None:
        measured.plot(record, picture)
    click.echo(measured.describe(record))
