"""`mdm train`: from a recipe to a run folder."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(short_help="Distil an AR teacher into a student.")
@click.option("--recipe", default=None, help="Recipe by name or YAML file.  [default: demo]")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one setting of the recipe; may be repeated.",
)
@click.option("--name", help="Name of the run.  [default: the recipe's]")
@click.option("--runs", default="runs", show_default=True, help="Folder that holds the runs.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    help="Run folder to continue from its newest checkpoint, with the recipe stored there.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing run of this name.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done: parameters, tokens, memory, computing.",
)
@click.option(
    "--processes",
    "world_size",
    type=click.IntRange(min=1),
    help="With --dry-run: processes to share the work.  [default: those of torchrun, or 1]",
)
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="With --dry-run: what a process computes in a second, in 10^12 FLOPs; gives hours.",
)
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes that come with mdm.")
@click.option(
    "--settings", "show_settings", is_flag=True, help="Explain every setting of a recipe."
)
def train(
    recipe: str | None,
    assignments: tuple[str, ...],
    name: str | None,
    runs: str,
    resume: Path | None,
    overwrite: bool,
    dry_run: bool,
    world_size: int | None,
    tflops: float | None,
    list_recipes: bool,
    show_settings: bool,
) -> None:
    """Distil an autoregressive teacher into a masked diffusion student.

    Writes runs/NAME/: recipe.yaml, data, checkpoints, metrics.jsonl, loss.png and final/, the
    finished model. Works alone or under `torchrun -m mdm.cli train …`.

    \b
    mdm train                                           the demo recipe
    mdm train --recipe suffix --set train.steps=50 --name try
    mdm train --recipe mine.yaml --dry-run --processes 8 --tflops 150
    mdm train --resume runs/try
    """
    from mdm.errors import ConfigError

    from . import processes
    from .recipe import DEFAULT_RECIPE, describe_settings, named, read_recipe, shipped_recipes

    if list_recipes:
        click.echo("\n".join(shipped_recipes()))
        return
    if show_settings:
        click.echo(describe_settings())
        return
    if resume is not None and (recipe or assignments or name or overwrite):
        raise ConfigError(
            "--resume continues a run as it was; --recipe, --set, --name and --overwrite do not go"
            " with it"
        )
    if world_size is not None and not dry_run:
        raise ConfigError(
            "--processes goes with --dry-run; to train with several, start them by"
            f" `torchrun --nproc-per-node {world_size} -m mdm.cli train …`"
        )
    if tflops is not None and not dry_run:
        raise ConfigError("--tflops goes with --dry-run: how fast training is, it says itself")
    if dry_run:
        from .estimate import describe

        world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))

        if resume is not None:
            from .run import read_run

            click.echo(describe(read_run(resume), world_size, tflops))
        else:
            settings = named(read_recipe(recipe or DEFAULT_RECIPE, assignments), name)
            click.echo(describe(settings, world_size, tflops))
        return
    from .run import new_run, read_run
    from .trainer import train as run_training

    with processes.process_group():
        if resume is not None:
            folder, settings = resume, read_run(resume)
        else:
            settings = named(read_recipe(recipe or DEFAULT_RECIPE, assignments), name)
            folder = Path(runs) / settings.name
            if processes.rank() == 0:
                new_run(settings, Path(runs), overwrite=overwrite)
            processes.barrier()
        run_training(settings, folder)
