"""`mdm data cache-targets`: ask the teacher once, train on its answers many times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .cache_targets import Cached


@click.command("cache-targets")
@click.option("--recipe", required=True, help="Recipe by name or YAML file.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one setting of the recipe; may be repeated.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the answers; an interrupted one is gone on with.",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(min=1),
    help="Rows the teacher reads at once.  [default: train.micro_rows]",
)
@click.option("--overwrite", is_flag=True, help="Replace the answers in --output.")
def cache_targets(
    recipe: str,
    assignments: tuple[str, ...],
    output: Path,
    batch_rows: int | None,
    overwrite: bool,
) -> None:
    """Write the teacher's answers for all training rows of a recipe, once for all masks and epochs.

    For targets that do not look at the masks (target.kind=left or mapped). Training with
    --set target.cache=OUTPUT then loads no teacher. Takes about 390 bytes a token at
    target.top_k=64. Works alone or under `torchrun -m mdm.cli data cache-targets …`; run it again
    after an interruption.
    """
    from . import processes
    from .cache_targets import cache_targets as write
    from .recipe import read_recipe

    made_by = ["--recipe", recipe]
    made_by += [word for assignment in assignments for word in ("--set", assignment)]
    if batch_rows is not None:
        made_by += ["--batch-rows", str(batch_rows)]
    with processes.process_group():
        first = processes.rank() == 0

        def tell(text: str) -> None:
            if first:
                click.echo(text, err=True)

        done = write(
            read_recipe(recipe, assignments),
            output,
            batch_rows=batch_rows,
            overwrite=overwrite,
            made_by=made_by,
            tell=tell,
        )
        if first:
            click.echo("\n".join(_summary(done)))


def _summary(done: Cached) -> list[str]:
    cache = done.cache
    lines = [
        f"targets   {cache.num_rows} rows of {cache.row_shape[0]}, {done.tokens} tokens,"
        f" {done.maskable} maskable, in {cache.num_shards} shards",
        f"disk      {done.bytes} bytes: {done.bytes / max(1, done.tokens):.1f} a token,"
        f" {done.bytes / max(1, done.maskable):.1f} a maskable one",
        f"speed     {done.asked / done.seconds:.0f} tokens/s ({done.asked} tokens asked for now)"
        if done.asked
        else "speed     nothing was missing",
    ]
    lines += [f"          {name} {value:.4f}" for name, value in done.measures.items()]
    return [*lines, f"train on  --set target.cache={cache.folder}"]
