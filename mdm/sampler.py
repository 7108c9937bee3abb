"""The denoising loop: one for full canvas, blocks of either kind and infilling.

A `Canvas` is one row on its way from masks to text. `denoise` takes canvases of any length and
settings and yields a `DenoisingStep` per forward pass: generation drains it, a server streams it, a
benchmark counts it. A prompt is just positions that are given, so infilling is the same loop. Each
canvas has its own random numbers, so its tokens do not depend on its neighbours in the batch.
A model with blocks reads the clean tokens before the current block once and keeps them (cache.py).
Shapes: B canvases, L length, n open positions of a block, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from .cache import Prefix, Row, read_blocks
from .canvas import NOTHING_READ, Canvas, Commit, Prefixes, SamplerSettings
from .denoiser import Denoiser
from .diffusion import generator
from .errors import ConfigError
from .grid import BlockGrid
from .llada import published_commits
from .remasking import REMASKING, keep_highest
from .rules import kept
from .schedule import shared_steps

Key = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class DenoisingStep:
    """One forward pass and what came of it."""

    step: int
    commits: tuple[Commit, ...]


def make_canvas(
    denoiser: Denoiser,
    ids: Sequence[int],
    settings: SamplerSettings,
    *,
    key: Key = (0, 0),
    padding: int = 0,
    tokens_per_step: int = 1,
) -> Canvas:
    """A canvas from tokens in which the mask id marks the open positions.

    `key` names its random numbers: equal keys, equal text, whatever else is in the batch. `padding`
    leading positions are ignored by attention (full canvas only). Where the settings give neither steps
    nor a rule, `tokens_per_step` are decided in each, fewer in the last one of a block. A model with
    blocks sees of the text after a hole what stands in the hole's last block and nothing further on: it was
    trained so.
    Raises ConfigError if the canvas is longer than the context or has no token before its first mask,
    steps cannot be shared out over the blocks, or the settings do not go with the model's blocks.
    """
    check_blocks(denoiser, settings)
    assert not padding or denoiser.block_size is None, "blocks are counted from position 0"
    if len(ids) > denoiser.max_length:
        raise ConfigError(
            f"the canvas has {len(ids)} tokens, but the model was built for at most"
            f" {denoiser.max_length}; shorten the prompt or gen_length"
        )
    ids_L = torch.tensor(list(ids), dtype=torch.long, device=denoiser.device)
    open_L = ids_L == denoiser.mask_id
    where = open_L.nonzero()[:, 0].tolist()
    if where and where[0] == 0 and denoiser.shift:
        raise ConfigError(
            "a canvas must begin with a token: this model predicts from the left neighbour"
        )
    start, end = (where[0], where[-1] + 1) if where else (0, 0)
    grid = decoding_grid(denoiser, start, end, settings.block_length)
    counts = Counter((position - grid.start) // grid.block_length for position in where)
    blocks = [slice(max(start, b.start), b.stop) for b in map(grid.block, sorted(counts))]
    open_counts = [counts[number] for number in sorted(counts)]
    steps = block_steps(denoiser, open_counts, settings, tokens_per_step)
    valid_L = torch.ones_like(open_L)
    valid_L[:padding] = False
    return Canvas(
        ids_L=ids_L,
        valid_L=valid_L,
        given_L=~open_L,
        open_L=open_L,
        mask_id=denoiser.mask_id,
        settings=settings,
        random=generator("sample", *key),
        blocks=blocks,
        block_steps=steps,
    )


def block_steps(
    denoiser: Denoiser, counts: list[int], settings: SamplerSettings, tokens_per_step: int = 1
) -> list[int]:
    """Denoising steps of each block, of which `counts` positions are open; in all they are `steps`.

    Equally many for each, as LLaDA has it. How many blocks of a model with blocks a hole lies in depends on
    the length of the prompt, and the first may be nearly full, so there they go by open positions.
    """
    steps = settings.steps
    if steps is None:
        # By a rule this is how many steps there are at most.
        each = tokens_per_step if settings.rule is None else 1
        return [-(-count // each) for count in counts]
    if denoiser.block_size is not None:
        return shared_steps(counts, steps)
    if counts and steps % len(counts):
        raise ConfigError(
            f"steps is {steps}, but there are {len(counts)} blocks of {settings.block_length} tokens;"
            f" make steps a multiple of {len(counts)}, it is the total over all blocks"
        )
    return [steps // len(counts) for _ in counts]


def check_blocks(denoiser: Denoiser, settings: SamplerSettings) -> None:
    """Raise ConfigError if these settings do not go with the blocks of the model."""
    size, length = denoiser.block_size, settings.block_length
    if size is None:
        return
    if settings.cache != "none":
        raise ConfigError(
            f"cache={settings.cache} is an approximation for models without blocks; this one denoises in"
            f" blocks of {size} and has an exact cache, so leave cache out"
        )
    if settings.compat != "default":
        raise ConfigError(
            f"compat={settings.compat} is a sampler for models without blocks, but this one denoises"
            f" in blocks of {size}; use compat=default"
        )
    if length is not None and size % length:
        raise ConfigError(
            f"block_length is {length}, but this model denoises in blocks of {size} tokens; leave"
            f" block_length out, or give a divisor of {size} to decode a block in parts"
        )


def decoding_grid(denoiser: Denoiser, start: int, end: int, block_length: int | None) -> BlockGrid:
    """What is decoded in turn of the open positions, which lie in [start, end).

    A model with blocks counts them from position 0 of the text, as in training and in likelihoods: the
    end of a prompt may lie in the first block that is decoded. Otherwise they begin at `start`.
    """
    if denoiser.block_size is not None:
        return BlockGrid(0, end, block_length or denoiser.block_size)
    return BlockGrid(start, end, block_length or max(1, end - start))


def denoise(
    denoiser: Denoiser, canvases: Sequence[Canvas], *, batch_size: int | None = None
) -> Iterator[DenoisingStep]:
    """Denoise all canvases to the end, in place; yields after every forward pass.

    At most `batch_size` are in a pass; as soon as one is finished, the next in line joins.
    """
    modes = {canvas.settings.compat for canvas in canvases}
    if len(modes) > 1:
        raise ConfigError("canvases of one batch must have the same compat mode")
    step = 0
    while any(not canvas.finished for canvas in canvases):
        unfinished = ((row, canvas) for row, canvas in enumerate(canvases) if not canvas.finished)
        active = dict(itertools.islice(unfinished, batch_size))
        yield DenoisingStep(step, take_step(denoiser, active))
        step += 1


def take_step(denoiser: Denoiser, canvases: dict[int, Canvas]) -> tuple[Commit, ...]:
    """One forward pass for these unfinished canvases (of one compat mode), whatever they were in before.

    What comes of a canvas does not depend on the others. If it raises (out of memory, say), the
    canvases are as they were, random numbers included, so that the step can be tried again.
    """
    first = next(iter(canvases.values()))
    random_states = [canvas.random.get_state() for canvas in canvases.values()]
    try:
        decision = STEPS[first.settings.compat](denoiser, canvases)
    except BaseException:
        for canvas, state in zip(canvases.values(), random_states, strict=True):
            canvas.random.set_state(state)
        raise
    for row, prefixes in decision.prefixes.items():
        canvases[row].prefixes = prefixes
    for commit in decision.commits:
        canvas = canvases[commit.row]
        canvas.nfe += 2 if canvas.settings.cfg_scale > 0 else 1
        canvas.commit(commit.positions_k, commit.tokens_k)
        ends = canvas.settings.stop_at_eos and canvas.settings.compat == "default"
        if ends and reached_end(canvas, denoiser.vocab.eos_id):
            canvas.end(denoiser.vocab.eos_id)
    return decision.commits


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one forward pass came to, before any canvas is changed.

    prefixes  by row: what a model with blocks has read of its clean tokens
    """

    commits: tuple[Commit, ...]
    prefixes: dict[int, Prefixes]


@torch.no_grad()
def denoise_step(denoiser: Denoiser, canvases: dict[int, Canvas]) -> Decision:
    """What one forward pass decides in the current block of every canvas; they are left as they are."""
    logits, prefixes = block_logits(denoiser, list(canvases.values()))
    commits = []
    for (row, canvas), logits_nV in zip(canvases.items(), logits, strict=True):
        block = canvas.blocks[0]
        open_n = canvas.open_L[block].nonzero()[:, 0] + block.start
        proposals_n, confidence_n, log_prob_n = propose(logits_nV, canvas, denoiser.vocab.eos_id)
        kept_k = keep_highest(confidence_n, number_kept(canvas, confidence_n))
        commits.append(
            Commit(
                row,
                open_n[kept_k],
                proposals_n[kept_k],
                confidence_n[kept_k],
                log_prob_n[kept_k],
            )
        )
    return Decision(tuple(commits), dict(zip(canvases, prefixes, strict=True)))


def number_kept(canvas: Canvas, confidence_n: torch.Tensor) -> int:
    """How many of the proposals with these confidences are kept now."""
    rule = canvas.settings.rule
    if rule is None:
        return canvas.due[0]
    return kept(rule, getattr(canvas.settings, rule), sorted(confidence_n.tolist(), reverse=True))


@dataclasses.dataclass(frozen=True)
class Stream:
    """A canvas as one row of a forward: as it is, or with its given tokens masked (guidance)."""

    canvas: Canvas
    ids_L: torch.Tensor
    prefix: Prefix


def block_logits(
    denoiser: Denoiser, canvases: Sequence[Canvas]
) -> tuple[list[torch.Tensor], list[Prefixes]]:
    """(n, V) logits of the open positions of each canvas' current block, guided where asked.

    One forward for all; guided canvases are in it a second time with their given tokens masked.
    Beside them what a model with blocks has now read of each canvas.
    """
    guided = [i for i, canvas in enumerate(canvases) if canvas.settings.cfg_scale > 0]
    streams = [Stream(canvas, canvas.ids_L, canvas.prefixes[0]) for canvas in canvases]
    for canvas in (canvases[i] for i in guided):
        without_L = canvas.ids_L.masked_fill(canvas.given_L & canvas.valid_L, denoiser.mask_id)
        streams.append(Stream(canvas, without_L, canvas.prefixes[1]))
    if denoiser.block_size is None:
        logits_NV = full_canvas_logits(denoiser, streams)
        read = [stream.prefix for stream in streams]
    else:
        logits_NV, read = cached_logits(denoiser, streams)
    counts = [int(s.canvas.open_L[s.canvas.blocks[0]].sum()) for s in streams]
    parts = list(logits_NV.split(counts))
    prefixes = [(prefix, NOTHING_READ[1]) for prefix in read[: len(canvases)]]
    for second, i in enumerate(guided, start=len(canvases)):
        parts[i] = guide(parts[i], parts[second], canvases[i].settings.cfg_scale)
        prefixes[i] = (prefixes[i][0], read[second])
    return parts[: len(canvases)], prefixes


def full_canvas_logits(denoiser: Denoiser, streams: Sequence[Stream]) -> torch.Tensor:
    """(N, V) logits of the open positions of the current blocks; rows are padded to the longest."""
    length = max(len(stream.ids_L) for stream in streams)
    xt_BL = torch.full((len(streams), length), denoiser.vocab.pad_id, device=denoiser.device)
    document_ids_BL = torch.full_like(xt_BL, -1)
    wanted_BL = torch.zeros_like(xt_BL, dtype=torch.bool)
    for i, stream in enumerate(streams):
        canvas, block = stream.canvas, stream.canvas.blocks[0]
        xt_BL[i, : len(stream.ids_L)] = stream.ids_L
        document_ids_BL[i, : len(stream.ids_L)][canvas.valid_L] = 0
        wanted_BL[i, block] = canvas.open_L[block]
    return denoiser(xt_BL, wanted_BL, document_ids_BL=document_ids_BL)


def cached_logits(
    denoiser: Denoiser, streams: Sequence[Stream]
) -> tuple[torch.Tensor, list[Prefix]]:
    """(N, V) logits of the open positions of the current blocks, and what was read of the clean tokens."""
    rows = []
    for stream in streams:
        canvas, current = stream.canvas, stream.canvas.blocks[0]
        grid = BlockGrid(0, len(stream.ids_L), denoiser.block_size or 1)
        block = grid.block(current.start // grid.block_length)
        wanted_n = canvas.open_L[current].nonzero()[:, 0] + current.start
        rows.append(Row(stream.ids_L, block, wanted_n, stream.prefix))
    rows_ND, prefixes = read_blocks(denoiser, rows)
    return denoiser.head(rows_ND), prefixes


def guide(
    conditional_nV: torch.Tensor, unconditional_nV: torch.Tensor, scale: float
) -> torch.Tensor:
    """Classifier-free guidance (1+s)·conditional - s·unconditional; -inf stays -inf."""
    guided_nV = unconditional_nV + (scale + 1) * (conditional_nV - unconditional_nV)
    return guided_nV.masked_fill(conditional_nV == float("-inf"), float("-inf"))


def propose(
    logits_nV: torch.Tensor, canvas: Canvas, eos_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token for each open position, the confidence that decides whether it is kept, and its
    log-probability at temperature 1."""
    settings = canvas.settings
    if settings.suppress_eos:
        logits_nV = logits_nV.index_fill(
            -1, torch.tensor([eos_id], device=logits_nV.device), float("-inf")
        )
    if settings.temperature > 0:
        noise_nV = torch.rand(logits_nV.shape, dtype=torch.float64, generator=canvas.random)
        allowed_nV = nucleus(logits_nV, settings.temperature, settings.top_p)
        proposals_n = gumbel_argmax(allowed_nV, noise_nV, settings.temperature)
    else:
        proposals_n = logits_nV.argmax(-1)
    log_probs_nV = logits_nV.log_softmax(-1)
    confidence_n = REMASKING[settings.remasking](log_probs_nV, proposals_n, canvas.random)
    if settings.eos_last:
        confidence_n = confidence_n.masked_fill(proposals_n == eos_id, float("-inf"))
    return proposals_n, confidence_n, log_probs_nV.gather(-1, proposals_n[:, None])[:, 0]


def nucleus(logits_nV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits with -inf outside the fewest tokens that hold `top_p` at this temperature.

    The likeliest token always stays (Holtzman et al. 2020, nucleus sampling).
    """
    if top_p >= 1:
        return logits_nV
    probs_nV, order_nV = (logits_nV.double() / temperature).softmax(-1).sort(-1, descending=True)
    before_nV = probs_nV.cumsum(-1) - probs_nV
    dropped_nV = torch.zeros_like(before_nV, dtype=torch.bool)
    dropped_nV.scatter_(-1, order_nV, before_nV >= top_p)
    return logits_nV.masked_fill(dropped_nV, float("-inf"))


def gumbel_argmax(
    logits_nV: torch.Tensor, uniforms_nV: torch.Tensor, temperature: float
) -> torch.Tensor:
    """A sample of softmax(logits / temperature): argmax of logits + T · Gumbel noise.

    In float64: 32-bit noise cuts the tail and acts as a lower temperature (arXiv 2409.02908).
    """
    noise_nV = -(-uniforms_nV.to(logits_nV.device).log()).log()
    return (logits_nV.double() + temperature * noise_nV).argmax(-1)


def reached_end(canvas: Canvas, eos_id: int) -> bool:
    """Is there a decided end token with no open position before it and nothing given after it?"""
    open_positions = canvas.open_L.nonzero()
    first_open = int(open_positions[0]) if len(open_positions) else len(canvas.ids_L)
    decided_L = canvas.decided_L[:first_open] >= 0
    given = canvas.given_L.nonzero()
    last_given = int(given[-1]) if len(given) else -1
    ends_L = decided_L & (canvas.ids_L[:first_open] == eos_id)
    return bool(ends_L[last_given + 1 :].any())


@torch.no_grad()
def published_step(denoiser: Denoiser, canvases: dict[int, Canvas]) -> Decision:
    """What one step of the published LLaDA sampler decides."""
    return Decision(tuple(published_commits(denoiser, canvases)), {})


# How a step decides: it reads the canvases (and draws from their random numbers), take_step commits.
Step = Callable[[Denoiser, dict[int, Canvas]], Decision]
STEPS: dict[str, Step] = {"default": denoise_step, "llada": published_step}
