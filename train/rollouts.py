"""Rollouts: prompts continued by the student with mdm's own sampler, and when each token was decided.

Written in the process that trains, with the weights as they are at that step: no other engine, no weights
on disk, and no text: token ids and steps are what states.py makes training states of. With several
processes each writes its share and has all of them in the end. They are kept in the run's folder, since a
run that is resumed between two batches has other weights than those that wrote the last one:

    runs/<name>/rollouts/batch-000007.safetensors   tokens (T,), steps (T,), lengths (R,), numbers (R, 4)

Shapes: R rollouts, T tokens of all of them, L length of a row.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mdm.canvas import Canvas, SamplerSettings
from mdm.denoiser import Denoiser
from mdm.errors import CheckpointError
from mdm.sampler import Key, denoise, make_canvas

from . import processes
from .states import GIVEN, NEVER


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A prompt and what the student wrote behind it.

    tokens_L  prompt and response; end tokens to the end of the last block if the text ended there
    step_L    denoising step at which each was decided, from 0; GIVEN in the prompt, NEVER if the text had
              ended before
    ended     whether the student ended it, or the limit did
    nfe       forwards of this row
    decided   tokens it decided
    log_prob  sum of the log-probabilities at which they were decided, nats
    """

    tokens_L: torch.Tensor
    step_L: torch.Tensor
    ended: bool
    nfe: int
    decided: int
    log_prob: float

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return int((self.step_L == GIVEN).sum())

    def response(self, eos_id: int) -> list[int]:
        """The tokens the student wrote, before the first end token."""
        ids = self.tokens_L[self.prompt_length :].tolist()
        return ids[: ids.index(eos_id)] if eos_id in ids else ids


def roll_out(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    settings: SamplerSettings,
    *,
    tokens_per_step: int = 1,
    length: int,
    keys: Sequence[Key],
    decode_rows: int,
) -> list[Rollout]:
    """Continue each prompt by at most `length` tokens and, in a model with blocks, to the end of a block.

    `keys` name the random numbers, `tokens_per_step` is as in make_canvas. The model is in eval mode
    meanwhile. Raises ConfigError if prompt and response do not fit into the context.
    """
    vocab, block_size = denoiser.vocab, denoiser.block_size or 1
    canvases = []
    for prompt, key in zip(prompts, keys, strict=True):
        total = -(-(len(prompt) + length) // block_size) * block_size
        ids = [*prompt, *[denoiser.mask_id] * (total - len(prompt))]
        canvases.append(
            make_canvas(denoiser, ids, settings, key=key, tokens_per_step=tokens_per_step)
        )
    log_probs: list[list[torch.Tensor]] = [[] for _ in canvases]
    was_training = denoiser.training
    denoiser.eval()
    try:
        for step in denoise(denoiser, canvases, batch_size=decode_rows):
            for commit in step.commits:
                assert commit.log_prob_k is not None, "not the published sampler"
                log_probs[commit.row].append(commit.log_prob_k)
    finally:
        denoiser.train(was_training)
    return [
        finished(canvas, len(prompt), vocab.eos_id, denoiser.block_size, torch.cat(own))
        for canvas, prompt, own in zip(canvases, prompts, log_probs, strict=True)
    ]


def finished(
    canvas: Canvas,
    prompt: int,
    eos_id: int,
    block_size: int | None,
    log_prob_k: torch.Tensor,
) -> Rollout:
    """What is in a finished canvas; a text with blocks that has ended is cut behind its last block.

    `log_prob_k` are those of all its decided tokens.
    """
    tokens_L, decided_L = canvas.ids_L.cpu(), canvas.decided_L.cpu()
    step_L = torch.where(decided_L < 0, NEVER, decided_L)
    step_L[:prompt] = GIVEN
    own_ends = (tokens_L == eos_id) & (decided_L >= 0)
    ended, stop = bool(own_ends.any()), len(tokens_L)
    if ended and block_size is not None:
        first = int(own_ends.nonzero()[0])
        stop = min(stop, (first // block_size + 1) * block_size)
    return Rollout(
        tokens_L[:stop].clone(),
        step_L[:stop].clone(),
        ended,
        canvas.nfe,
        int((decided_L >= 0).sum()),
        float(log_prob_k.double().sum()),
    )


# --- several processes -------------------------------------------------------------------------------


def gathered(own: dict[int, Rollout], count: int) -> list[Rollout]:
    """All `count` rollouts, of which this process has written those in `own`; a collective."""
    device = processes.device()
    longest = torch.zeros(count, dtype=torch.long)
    for number, rollout in own.items():
        longest[number] = len(rollout.tokens_L)
    length_R = processes.total(longest.to(device)).cpu()
    packed_R2L = torch.zeros(count, 2, int(length_R.max()), dtype=torch.long)
    numbers_R4 = torch.zeros(count, 4, dtype=torch.float64)
    for number, rollout in own.items():
        size = len(rollout.tokens_L)
        packed_R2L[number, 0, :size], packed_R2L[number, 1, :size] = (
            rollout.tokens_L,
            rollout.step_L,
        )
        numbers_R4[number] = torch.tensor(_numbers(rollout), dtype=torch.float64)
    packed_R2L = processes.total(packed_R2L.to(device)).cpu()
    numbers_R4 = processes.total(numbers_R4.to(device)).cpu()
    return [
        _rollout(packed_2L[0, :size].clone(), packed_2L[1, :size].clone(), numbers_4.tolist())
        for packed_2L, size, numbers_4 in zip(
            packed_R2L, length_R.tolist(), numbers_R4, strict=True
        )
    ]


def _numbers(rollout: Rollout) -> list[float]:
    return [float(rollout.ended), float(rollout.nfe), float(rollout.decided), rollout.log_prob]


def _rollout(tokens_L: torch.Tensor, step_L: torch.Tensor, numbers: Sequence[float]) -> Rollout:
    ended, nfe, decided, log_prob = numbers
    return Rollout(tokens_L.long(), step_L.long(), bool(ended), int(nfe), int(decided), log_prob)


# --- on disk -----------------------------------------------------------------------------------------


def path_of(folder: Path, batch: int) -> Path:
    """Where a batch of rollouts is kept."""
    return folder / f"batch-{batch:06d}.safetensors"


def store(folder: Path, batch: int, rollouts: Sequence[Rollout]) -> None:
    """Write a batch, whole or not at all. Raises CheckpointError if that fails."""
    path = path_of(folder, batch)
    lengths = torch.tensor([len(rollout.tokens_L) for rollout in rollouts])
    tensors = {
        "tokens": torch.cat([rollout.tokens_L for rollout in rollouts]).int(),
        "steps": torch.cat([rollout.step_L for rollout in rollouts]).int(),
        "lengths": lengths,
        "numbers": torch.tensor([_numbers(rollout) for rollout in rollouts], dtype=torch.float64),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        save_file(tensors, draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load(folder: Path, batch: int) -> list[Rollout]:
    """Read a batch. Raises CheckpointError if it is not there or damaged."""
    path = path_of(folder, batch)
    try:
        tensors = load_file(path)
        sizes = tensors["lengths"].tolist()
        tokens, steps = tensors["tokens"].split(sizes), tensors["steps"].split(sizes)
        numbers = tensors["numbers"].tolist()
        return [_rollout(*parts) for parts in zip(tokens, steps, numbers, strict=True)]
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the rollouts {path} ({error}), without which the run cannot go on as it began;"
            " put the file back, or start a new run"
        ) from error


# --- what they tell ----------------------------------------------------------------------------------


def numbers_of(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Metrics of a batch of rollouts; the entropy is that at which tokens were decided, in nats."""
    forwards, decided = sum(r.nfe for r in rollouts), sum(r.decided for r in rollouts)
    return {
        "rollout_tokens_per_forward": decided / max(1, forwards),
        "rollout_length": decided / len(rollouts),
        "rollout_ended": sum(r.ended for r in rollouts) / len(rollouts),
        "rollout_entropy": -math.fsum(r.log_prob for r in rollouts) / max(1, decided),
    }
