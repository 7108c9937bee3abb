"""`mdm bench train-step`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("train-step")
@click.option("--kind", type=click.Choice(("mdlm", "bd3lm")), default="mdlm", show_default=True,
              help="Whole canvas and AR teacher, or blocks and diffusion teacher.")  # fmt: skip
@click.option("--model", default="embedded", show_default=True, help="AR model of both sides.")
@click.option("--layers", type=int, help="Layers of the student (bd3lm: of both).  [default: all]")
@click.option(
    "--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Rows in the batch."
)
@click.option(
    "--length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens in a row."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed steps of each side.",
)
@click.option("--no-checkpointing", is_flag=True, help="Keep all activations (both sides).")
@click.option("--block-size", type=click.IntRange(min=1),
              help="bd3lm: tokens a block.  [default: 32]")  # fmt: skip
@click.option("--vocab", type=click.IntRange(min=8),
              help="bd3lm: random weights in the shape of --model with this many tokens.")  # fmt: skip
@click.option("--tidal", is_flag=True, help="bd3lm: mixed targets (TIDAL).")
@click.option("--seed", default=0, show_default=True, help="Of masks and of random tokens.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/train_step.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def train_step(
    kind: str,
    no_checkpointing: bool,
    block_size: int | None,
    vocab: int | None,
    tidal: bool,
    path: Path,
    **common: Any,
) -> None:
    """Time and memory of one distillation step, against a straightforward twin.

    The twin computes full-vocabulary logits of student and teacher at all positions. Same model,
    same batch, same precision, same gradient checkpointing; memory is the peak above what stood
    before the step, each side in a fresh process.

    --kind bd3lm: student and teacher are block diffusion models of the same shape, and both sides have the
    same loss. What the logits take is also measured alone, as the peak less that of the same step without
    heads, and counted from the shapes: for this size and for 8 rows of 512 with Qwen3's vocabulary.
    """
    from mdm.config import require

    from . import train_step as canvas
    from . import train_step_blocks as blocks

    common["checkpointing"] = not no_checkpointing
    if kind == "bd3lm":
        asked = blocks.BlockStepSettings(
            **common,
            block_size=block_size or blocks.BlockStepSettings.block_size,
            vocab=vocab,
            tidal=tidal,
        )
        click.echo(blocks.describe(blocks.compare(asked, path)))
        return
    require(
        block_size is None and vocab is None and not tidal,
        "--block-size, --vocab and --tidal are for --kind bd3lm",
    )
    click.echo(canvas.describe(canvas.compare(canvas.StepSettings(**common), path)))
