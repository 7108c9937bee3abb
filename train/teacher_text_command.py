"""`mdm data sample-teacher`: text by the teacher to train on."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mdm.autoregressive import Autoregressive

    from .teacher_text import Summary

_TELL_EVERY = 10.0  # seconds


@click.command("sample-teacher", short_help="Write text by the teacher to train on.")
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--teacher",
    default="embedded",
    show_default=True,
    help='AR model: folder, .gguf file, hub name or "embedded".',
)
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write, one JSON row a line.",
)
@click.option("--temperature", default=1.0, show_default=True, help="1 = the teacher, 0 = greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus to draw from; 1 = all.")
@click.option("--max-tokens", default=256, show_default=True, help="Longest response.")
@click.option(
    "--prompt-tokens",
    default=32,
    show_default=True,
    help="Of a plain text that are its prompt; 0 = the start token alone.",
)
@click.option("--samples", default=1, show_default=True, help="Responses a prompt.")
@click.option("--batch-size", default=16, show_default=True, help="Responses written together.")
@click.option("--limit", type=int, help="Read this many documents only.")
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp32"]),
    help="Of the teacher's weights.  [default: bf16 on a GPU, otherwise fp32]",
)
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option(
    "--overwrite", is_flag=True, help="Replace FILE, and rows that other settings have begun."
)
def sample_teacher(
    sources: tuple[str, ...],
    teacher: str,
    output: Path,
    temperature: float,
    top_p: float,
    max_tokens: int,
    prompt_tokens: int,
    samples: int,
    batch_size: int,
    limit: int | None,
    seed: int,
    dtype: str | None,
    device: str | None,
    overwrite: bool,
) -> None:
    """Let the teacher continue the prompts in SOURCES, and write rows to train on.

    Rows with a prompt are continued behind it, chats by the assistant's turn; a response that is there
    is not used. Plain text gives its first --prompt-tokens. At
    temperature 1 and top-p 1 the rows are the teacher's own samples: hard cross-entropy on them is
    an unbiased estimate of that to its conditionals.

    If it is interrupted, the same command goes on; with other settings it refuses. Works alone or
    under `torchrun -m mdm.cli data sample-teacher …`, with the same result.

    \b
    mdm data sample-teacher stdlib --limit 1000 --output text.jsonl
    mdm data sample-teacher prompts.jsonl --samples 4 --teacher path/to/model --output text.jsonl
    """
    from . import processes
    from .corpus import open_prompts
    from .dataset import DataSettings
    from .teacher_text import TextSettings, sample_text

    settings = TextSettings(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
        samples=samples,
        limit=limit,
        seed=seed,
    )
    usual = DataSettings()
    opened = {
        name: open_prompts(name, usual.extensions, usual.max_file_kib)
        for name in dict.fromkeys(sources)
    }
    with processes.process_group():
        leads = processes.rank() == 0
        if leads and not settings.unbiased:
            click.echo(
                f"with temperature {temperature:g} and top-p {top_p:g} these are no samples of the"
                " teacher itself: cross-entropy on them estimates that to a sharpened or flattened"
                " teacher",
                err=True,
            )
        ar, identity = _open_teacher(teacher, device, dtype)
        progress = _Progress(active=leads)
        try:
            summary = sample_text(
                ar,
                opened,
                settings,
                output,
                teacher=identity,
                batch_size=batch_size,
                overwrite=overwrite,
                tell=progress,
            )
        except KeyboardInterrupt:
            click.echo(
                f"\nfinished rows are kept beside {output}; the same command goes on", err=True
            )
            raise
        if summary is not None:
            click.echo("\n".join(_report(summary, output)))


def _open_teacher(
    source: str, device: str | None, dtype: str | None
) -> tuple[Autoregressive, dict[str, str]]:
    """The teacher on its device, and what tells it from others."""
    import torch

    from mdm.autoregressive import Autoregressive
    from mdm.checkpoint import load_ar, opens_as_denoiser, source_identity
    from mdm.commands import to_device
    from mdm.errors import ConfigError
    from mdm.vocab import read_vocab

    from . import processes

    if opens_as_denoiser(source):
        raise ConfigError(
            f"{source} is a diffusion model; --teacher needs an autoregressive one, which can be"
            " sampled exactly from left to right"
        )
    where = device or str(processes.device())
    dtype = dtype or ("bf16" if where.startswith("cuda") else "fp32")
    if processes.rank() != 0:
        processes.barrier()  # the first one may have to fill a cache
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model, tokenizer = load_ar(source, dtype=weights)
    if processes.rank() == 0:
        processes.barrier()
    to_device(model, where)
    identity = {"teacher": source_identity(source), "dtype": dtype}
    return Autoregressive(model, read_vocab(tokenizer)), identity


class _Progress:
    """A line now and then on stderr; in a terminal one line that changes."""

    def __init__(self, *, active: bool) -> None:
        self.active, self.live, self.told = active, sys.stderr.isatty(), 0.0

    def __call__(self, rows: int, tokens: int, seconds: float) -> None:
        if self.active and (self.live or seconds - self.told >= _TELL_EVERY):
            self.told = seconds
            text = f"{rows} rows, {tokens} tokens, {tokens / seconds:.0f} tokens/s"
            click.echo(f"\r{text}\033[K" if self.live else text, nl=not self.live, err=True)


def _report(found: Summary, output: Path) -> list[str]:
    error = f" ± {found.std_err:.4f}" if math.isfinite(found.std_err) else ""
    rate = f", {found.written / found.seconds:.0f} tokens/s" if found.written else ""
    lines = [
        f"{found.rows} rows, {found.tokens} tokens{rate} → {output}",
        f"log-probability of a token {found.mean_log_prob:.4f}{error} nats;"
        f" {found.cut:.1%} of the rows were cut by the length,"
        f" {found.same_tokens:.1%} are read back as the tokens that were drawn",
    ]
    if found.empty:
        lines.append(f"{found.empty} rows have no text and will be left out in training")
    if found.skips.counts:
        lines.append(f"documents left out: {found.skips}")
    return [*lines, f"to train on it: mdm train --set 'data.sources=[{output}]'"]
