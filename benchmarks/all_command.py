"""`mdm bench all` and `mdm bench tables`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import parts


@click.command("all")
@click.option("--only", default="", callback=parts, help="Names, like serve,cache.  [default: all]")
@click.option("--skip", default="", callback=parts, help="Names that are left out.")
@click.option("--list", "only_list", is_flag=True, help="Tell what there is, and stop.")
@click.option("--smoke", is_flag=True,
              help="Tiny random models and settings, minutes in all; numbers mean nothing.")  # fmt: skip
@click.option("--model", help="Student folder.  [default: the last finished run in --runs]")
@click.option("--teacher", help="AR model of those that ask for one.  [default: embedded]")
@click.option("--minutes", type=float,
              help="A benchmark that takes longer is ended.  [default: 720; smoke 10]")  # fmt: skip
@click.option("--results",
              help="Folder of records.  [default: benchmarks/results; smoke: see --runs]")  # fmt: skip
@click.option("--runs", default="runs", show_default=True,
              help="Folder of runs; logs and records of a smoke run are in its bench-all….")  # fmt: skip
@click.option("--no-tables", is_flag=True, help="Leave the tables in README.md and docs/ alone.")
def run_all(only_list: bool, no_tables: bool, **settings: Any) -> None:
    """Run every benchmark, one after the other, then make the tables in the docs anew.

    Each is a process of its own; one that fails is told at the end, and the exit status is 1. What was
    stopped goes on with --only NAME: finished trainings of a benchmark that did not end are not
    repeated. The settings are those of the records in benchmarks/results; hours on two CPU cores.
    --smoke makes its models itself (--model and --teacher name others), and touches no docs. Those that
    train (study, tide, tokenizers) take the models of their recipes, whatever --teacher says.
    """
    from . import all as everything
    from . import doc_tables

    asked = everything.AllBench(**settings)
    if only_list:
        click.echo(everything.listed(asked))
        return

    def say(text: str) -> None:
        click.echo(text, err=True)

    record, outcomes = everything.run(asked, say)
    if not asked.smoke and not no_tables:
        # Before the card, whose JSON line is last.
        _tell(*doc_tables.renew(doc_tables.pages(Path()), asked.records, write=True), "made anew")
    click.echo(everything.describe(record, outcomes))
    if any(own.problem for own in outcomes):
        raise SystemExit(1)


@click.command("tables")
@click.argument("pages", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if a table is stale.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("benchmarks/results"),
              show_default=True, help="Folder of records.")  # fmt: skip
def tables(pages: tuple[Path, ...], check: bool, results: Path) -> None:
    """Make the tables in PAGES anew from the newest records.  [default: README.md and docs/*.md]

    They stand between lines `<!-- bench:NAME -->` and `<!-- /bench -->`; names are those of
    `mdm bench all --list`.
    """
    from . import doc_tables

    found = list(pages) or doc_tables.pages(Path())
    stale, notes = doc_tables.renew(found, results, write=not check)
    _tell(stale, notes, "stale" if check else "made anew")
    if check and stale:
        raise SystemExit(1)


def _tell(stale: list[Path], notes: list[str], state: str) -> None:
    for note in notes:
        click.echo(note, err=True)
    for path in stale:
        click.echo(f"{path}: {state}", err=True)
