"""`mdm demo` and `mdm bench …`."""

from __future__ import annotations

from pathlib import Path

import click

from .all_command import run_all, tables
from .cache_command import cache
from .cpu_command import cpu
from .drift_command import drift
from .latency_command import latency
from .likelihood_command import likelihood
from .on_policy_command import on_policy
from .serve_command import serve
from .study_command import study
from .suffix_command import suffix
from .targets_command import targets
from .tide_command import tide
from .tokenizers_command import tokenizers
from .train_step_command import train_step


@click.command(short_help="Train on this machine and show the gain.")
@click.option("--runs", default="runs", show_default=True, help="Folder that holds the runs.")
@click.option("--recipe", default="demo", show_default=True, help="Recipe by name or YAML file.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting of the recipe; may be repeated.")  # fmt: skip
@click.option(
    "--holes",
    type=click.IntRange(min=2),
    default=24,
    show_default=True,
    help="Holes filled before and after.",
)
def demo(runs: str, recipe: str, assignments: tuple[str, ...], holes: int) -> None:
    """Distil the embedded teacher on real Python code and show what was gained.

    Takes a few minutes on two CPU cores, replaces runs/demo, and prints one JSON object as its last
    line.
    """
    from rich.console import Console

    from mdm.train.recipe import read_recipe

    from .demo import last_line, run_demo

    settings = read_recipe(recipe, assignments)
    console = Console(highlight=False)
    numbers = run_demo(settings, Path(runs), num_holes=holes, console=console)
    click.echo(last_line(numbers))


@click.group(short_help="Measure time and memory.")
def bench() -> None:
    """Benchmarks: both sides in one run, a card for people, one JSON line last for programs."""


for command in (
    train_step,
    likelihood,
    serve,
    targets,
    study,
    suffix,
    cache,
    tide,
    tokenizers,
    on_policy,
    latency,
    drift,
    cpu,
    run_all,
    tables,
):
    bench.add_command(command)
