"""The denoising loop: one for full canvas, blocks of either kind and infilling.

A `Canvas` is one row on its way from masks to text. `denoise` takes canvases of any length and
settings and yields a `DenoisingStep` per forward pass: generation drains it, a server streams it, a
benchmark counts it. A prompt is just positions that are given, so infilling is the same loop. Each
canvas has its own random numbers, so its tokens do not depend on its neighbours in the batch.
A model with blocks reads the clean tokens before the current block once and keeps them (cache.py); one
without can keep old ones (approximate.py). Canvases are on the host: a step sends what is read and asks for
three numbers an open position, and that is the only time it waits for the device.
Shapes: B canvases, L length, D width, n open positions of a block, N of all canvases, M of guided ones,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from . import approximate
from .buffers import Prefix
from .cache import Row, read_blocks
from .canvas import NOTHING_READ, Canvas, Commit, Prefixes, SamplerSettings
from .denoiser import Denoiser
from .diffusion import generator
from .errors import ConfigError
from .grid import BlockGrid
from .llada import published_commits
from .proposals import guide, needs_uniforms, propose, uniforms
from .remasking import keep_highest
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
    assert not padding or settings.cache == "none", "what is kept knows of no padding in front"
    if len(ids) > denoiser.max_length:
        raise ConfigError(
            f"the canvas has {len(ids)} tokens, but the model was built for at most"
            f" {denoiser.max_length}; shorten the prompt or gen_length"
        )
    ids_L = torch.tensor(list(ids), dtype=torch.long)
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
        if canvas.settings.stop_at_eos and canvas.settings.compat == "default":
            eos_id = denoiser.vocab.eos_id
            canvas.has_end |= bool((commit.tokens_k == eos_id).any())
            if canvas.has_end and reached_end(canvas, eos_id):
                canvas.end(eos_id)
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
    rows = list(canvases.values())
    reading = read_open(denoiser, rows)
    found_3N = proposals(denoiser, rows, reading)
    commits = []
    for number, (row, canvas) in enumerate(canvases.items()):
        open_n = reading.opens[number]
        token_n, confidence_n, log_prob_n = found_3N[:, reading.places(number)]
        kept_k = keep_highest(confidence_n, number_kept(canvas, confidence_n))
        commits.append(
            Commit(
                row,
                open_n[kept_k],
                token_n[kept_k].long(),
                confidence_n[kept_k],
                log_prob_n[kept_k],
                reading.kinds[number],
                reading.tokens_read[number],
            )
        )
    return Decision(tuple(commits), dict(zip(canvases, reading.prefixes, strict=True)))


def number_kept(canvas: Canvas, confidence_n: torch.Tensor) -> int:
    """How many of the proposals with these confidences are kept now."""
    rule = canvas.settings.rule
    if rule is None:
        return canvas.due[0]
    return kept(rule, getattr(canvas.settings, rule), sorted(confidence_n.tolist(), reverse=True))


# --- reading -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """A canvas as one row of a forward: as it is, or with its given tokens masked (guidance)."""

    canvas: Canvas
    ids_L: torch.Tensor
    open_n: torch.Tensor
    prefix: Prefix


@dataclasses.dataclass(frozen=True)
class Read:
    """What a forward made of one stream: what it keeps, what kind of forward it was, positions computed."""

    prefix: Prefix
    kind: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """Inputs of the head at the open positions of the current block of every canvas, and how they were had.

    states_ND    of all canvases, one after the other
    without_MD   the same with the given tokens masked, of the guided canvases only
    opens        open positions of each canvas (host)
    prefixes     what each keeps from now on
    kinds        of forward each was in
    tokens_read  positions computed of each; of a guided one in both its rows
    """

    states_ND: torch.Tensor
    without_MD: torch.Tensor
    opens: list[torch.Tensor]
    guided: list[int]
    prefixes: list[Prefixes]
    kinds: list[str]
    tokens_read: list[int]

    def places(self, number: int) -> slice:
        """Rows of a canvas in `states_ND`."""
        return _place(self.opens, number)

    def places_without(self, number: int) -> slice:
        """Rows of a guided canvas in `without_MD`."""
        return _place([self.opens[i] for i in self.guided], self.guided.index(number))


def _place(parts: Sequence[torch.Tensor], number: int) -> slice:
    first = sum(len(part) for part in parts[:number])
    return slice(first, first + len(parts[number]))


@torch.no_grad()
def read_open(denoiser: Denoiser, canvases: Sequence[Canvas]) -> Reading:
    """One forward for all; guided canvases are in it a second time with their given tokens masked."""
    guided = [i for i, canvas in enumerate(canvases) if canvas.settings.cfg_scale > 0]
    opens = [canvas.open_positions() for canvas in canvases]
    streams = [
        Stream(canvas, canvas.ids_L, open_n, canvas.prefixes[0])
        for canvas, open_n in zip(canvases, opens, strict=True)
    ]
    for i in guided:
        canvas = canvases[i]
        without_L = canvas.ids_L.masked_fill(canvas.given_L & canvas.valid_L, denoiser.mask_id)
        streams.append(Stream(canvas, without_L, opens[i], canvas.prefixes[1]))
    states_ND, reads = read_streams(denoiser, streams)
    own = sum(len(open_n) for open_n in opens)
    prefixes = [(read.prefix, NOTHING_READ[1]) for read in reads[: len(canvases)]]
    tokens = [read.tokens for read in reads[: len(canvases)]]
    for i, second in zip(guided, reads[len(canvases) :], strict=True):
        prefixes[i] = (prefixes[i][0], second.prefix)
        tokens[i] += second.tokens
    kinds = [read.kind for read in reads[: len(canvases)]]
    return Reading(states_ND[:own], states_ND[own:], opens, guided, prefixes, kinds, tokens)


def read_streams(denoiser: Denoiser, streams: Sequence[Stream]) -> tuple[torch.Tensor, list[Read]]:
    """(N, D) inputs of the head at the open positions of all streams.

    One forward, but for canvases without a cache beside some with one: these have two.
    """
    if denoiser.block_size is not None:
        return _read_blocks(denoiser, streams)
    cached = [stream.canvas.settings.cache != "none" for stream in streams]
    parts: dict[int, torch.Tensor] = {}
    reads: dict[int, Read] = {}
    for flag, how in ((False, _read_all), (True, _read_parts)):
        chosen = [i for i, one in enumerate(cached) if one is flag]
        if not chosen:
            continue
        states_MD, found = how(denoiser, [streams[i] for i in chosen])
        if len(chosen) == len(streams):
            return states_MD, found
        own = states_MD.split([len(streams[i].open_n) for i in chosen])
        parts |= dict(zip(chosen, own, strict=True))
        reads |= dict(zip(chosen, found, strict=True))
    everything = range(len(streams))
    return torch.cat([parts[i] for i in everything]), [reads[i] for i in everything]


def _read_all(denoiser: Denoiser, streams: Sequence[Stream]) -> tuple[torch.Tensor, list[Read]]:
    """Whole canvases, without a cache; rows are padded to the longest. Host tensors go in."""
    length = max(len(stream.ids_L) for stream in streams)
    xt_BL = torch.full((len(streams), length), denoiser.vocab.pad_id)
    document_ids_BL = torch.full_like(xt_BL, -1)
    wanted_BL = torch.zeros_like(xt_BL, dtype=torch.bool)
    for i, stream in enumerate(streams):
        xt_BL[i, : len(stream.ids_L)] = stream.ids_L
        document_ids_BL[i, : len(stream.ids_L)][stream.canvas.valid_L] = 0
        wanted_BL[i, stream.open_n] = True
    states_ND = denoiser.rows(xt_BL, wanted_BL, document_ids_BL=document_ids_BL)
    reads = [Read(NOTHING_READ[0], "denoise", len(stream.ids_L)) for stream in streams]
    return states_ND, reads


def _read_parts(denoiser: Denoiser, streams: Sequence[Stream]) -> tuple[torch.Tensor, list[Read]]:
    """Canvases with an approximate cache."""
    rows = [
        approximate.row_of(s.canvas, s.ids_L, s.open_n, s.prefix, denoiser.shift) for s in streams
    ]
    states_ND, prefixes = approximate.read_canvases(denoiser, rows)
    reads = []
    for row, prefix in zip(rows, prefixes, strict=True):
        tokens = row.read.stop - row.read.start
        whole = row.stamp != row.prefix.stamp
        reads.append(Read(prefix, "refresh" if whole else "denoise", tokens))
    return states_ND, reads


def _read_blocks(denoiser: Denoiser, streams: Sequence[Stream]) -> tuple[torch.Tensor, list[Read]]:
    """Blocks of the model's grid, with the exact cache."""
    rows = []
    for stream in streams:
        grid = BlockGrid(0, len(stream.ids_L), denoiser.block_size or 1)
        first, last = (
            grid.block(part.start // grid.block_length)
            for part in (stream.canvas.blocks[0], stream.canvas.blocks[-1])
        )
        rows.append(Row(stream.ids_L, first, stream.open_n, stream.prefix, last.stop))
    states_ND, prefixes = read_blocks(denoiser, rows)
    reads = []
    for row, stream, prefix in zip(rows, streams, prefixes, strict=True):
        kind = "prefill" if not stream.canvas.step else "store" if row.new else "denoise"
        reads.append(Read(prefix, kind, row.read.stop - row.read.start))
    return states_ND, reads


@torch.no_grad()
def open_logits(denoiser: Denoiser, canvases: Sequence[Canvas]) -> list[torch.Tensor]:
    """(n, V) logits of the open positions of each canvas' current block, guided where asked.

    What the next step decides by, all of it at once; the canvases are left as they are.
    """
    reading = read_open(denoiser, canvases)
    return [
        _logits(denoiser, canvas.settings.cfg_scale, *_states(reading, [number]))
        for number, canvas in enumerate(canvases)
    ]


# --- choosing ----------------------------------------------------------------------------------------


def proposals(denoiser: Denoiser, canvases: Sequence[Canvas], reading: Reading) -> torch.Tensor:
    """(3, N) on the host: tokens, confidences, log-probabilities; canvases of equal settings together.

    The device is waited for once, here. Logits exist for a chunk of positions at a time.
    """
    groups: dict[SamplerSettings, list[int]] = {}
    for number, canvas in enumerate(canvases):
        groups.setdefault(canvas.settings, []).append(number)
    eos_id, order, parts = denoiser.vocab.eos_id, [], []
    for settings, numbers in groups.items():
        order += numbers
        states_nD, without_nD = _states(reading, numbers)
        drawn_2n = None
        if needs_uniforms(settings):
            draws = [uniforms(settings, len(reading.opens[i]), canvases[i].random) for i in numbers]
            drawn_2n = torch.cat(draws, dim=1).to(states_nD.device, non_blocking=True)
        for chunk in denoiser.chunks(len(states_nD)):
            own_nD = None if without_nD is None else without_nD[chunk]
            logits_nV = _logits(denoiser, settings.cfg_scale, states_nD[chunk], own_nD)
            own_2n = None if drawn_2n is None else drawn_2n[:, chunk]
            parts.append(propose(logits_nV, settings, eos_id, own_2n))
    found_3N = torch.cat(parts, dim=1).cpu()
    if len(groups) == 1:
        return found_3N
    sizes = [len(reading.opens[i]) for i in order]
    own = dict(zip(order, found_3N.split(sizes, dim=1), strict=True))
    return torch.cat([own[i] for i in range(len(canvases))], dim=1)


def _states(reading: Reading, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n, D) inputs of the head of these canvases, and those without the given tokens if all are guided."""
    if len(numbers) == len(reading.opens):
        states_nD = reading.states_ND
    else:
        states_nD = torch.cat([reading.states_ND[reading.places(i)] for i in numbers])
    if not set(numbers) <= set(reading.guided):
        return states_nD, None
    return states_nD, torch.cat([reading.without_MD[reading.places_without(i)] for i in numbers])


def _logits(
    denoiser: Denoiser, scale: float, states_nD: torch.Tensor, without_nD: torch.Tensor | None
) -> torch.Tensor:
    logits_nV = denoiser.head(states_nD)
    if without_nD is None:
        return logits_nV
    return guide(logits_nV, denoiser.head(without_nD), scale)


# --- the end of a text -------------------------------------------------------------------------------


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
