"""`mdm bench targets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Number = TypeVar("Number", int, float)


@click.command("targets")
@click.option("--teacher", default="embedded", show_default=True, help="AR model that is asked.")
@click.option("--student", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--no-student", is_flag=True, help="Leave the student's proposals out.")
@click.option("--text", default="stdlib", show_default=True,
              help="stdlib, humaneval, or teacher (its own samples after stdlib contexts).")  # fmt: skip
@click.option("--rows", default=4, show_default=True, help="Texts.")
@click.option("--context", default=64, show_default=True, help="Clean tokens before the block.")
@click.option("--block", default=16, show_default=True, help="Tokens of the block.")
@click.option("--levels", default="0.2,0.5,0.8", show_default=True, help="Share that is masked.")
@click.option("--fills", default="4,8,16,32", show_default=True, help="Ways to fill the masks (K).")
@click.option("--candidates", default=16, show_default=True, help="Of suffix scoring.")
@click.option("--prune", default=1e-3, show_default=True, help="Mass that suffix_pruned may drop.")
@click.option("--draws", default=1, show_default=True, help="Answers of each estimator.")
@click.option("--reference", default="adaptive", show_default=True,
              help="adaptive, importance, smc, i_sir or csmc.")  # fmt: skip
@click.option("--reference-fills", default=256, show_default=True, help="In two halves.")
@click.option("--dtype", default="fp32", show_default=True, help="Of the teacher: fp32 or bf16.")
@click.option("--seed", default=0, show_default=True, help="Of texts, masks and fills.")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for all lines.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/targets.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def targets(
    student: str | None,
    no_student: bool,
    levels: str,
    fills: str,
    table: Path | None,
    picture: Path | None,
    path: Path,
    **others: Any,
) -> None:
    """Price and error of every soft target on a real teacher, against a high-budget reference.

    Real code, a block with some masks after clean text. Positions with visible tokens to their right
    (holes) and without (tails) are asked for separately.
    """
    from mdm.errors import CheckpointError, ConfigError
    from mdm.runs import last_finished

    from . import targets as measured
    from .targets_report import describe, markdown
    from .targets_report import plot as draw

    if student and no_student:
        raise ConfigError("--student and --no-student cannot both be given")
    if not student and not no_student:
        try:
            student = str(last_finished())
        except CheckpointError:
            student = None  # the card says so
    settings = measured.TargetsBench(
        student=student,
        levels=_numbers("--levels", levels, float),
        fills=_numbers("--fills", fills, int),
        **others,
    )
    record = measured.run(settings, path, lambda text: click.echo(text, err=True))
    if table is not None:
        table.write_text(markdown(record), encoding="utf-8")
    if picture is not None:
        draw(record, picture)
    click.echo(describe(record))


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list such as "8,16,32"; raises ConfigError."""
    from mdm.errors import ConfigError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} must be {'whole ' if kind is int else ''}numbers with commas; got {text!r}"
        ) from error
