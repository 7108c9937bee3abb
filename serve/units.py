"""Units: the work of a request as the engine takes it on, with the memory it is predicted to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence

from mdm import autoregressive, likelihood
from mdm.autoregressive import Autoregressive, DecodingSettings
from mdm.blocks import answer_blocks, rows_of_forward
from mdm.canvas import Canvas, SamplerSettings
from mdm.denoiser import CHUNK_BYTES, Denoiser
from mdm.errors import MdmError
from mdm.generate import Hole, open_filling
from mdm.likelihood import Likelihood, LikelihoodSettings, Pair

from .errors import as_serve_error, too_large
from .jobs import Committed, FillUnit, Job, Pass, RowDone, Scored, StepsUnit, block_stop
from .memory import MIB, Footprint
from .models import Served
from .telemetry import Telemetry


def fill_unit(
    served: Served, denoiser: Denoiser, row: int, hole: Hole, settings: SamplerSettings
) -> FillUnit:
    """One row of the student. Raises ConfigError if the settings do not fit."""
    filling = open_filling(denoiser, hole, settings)
    rows = 2 if settings.cfg_scale > 0 else 1
    outputs = min(hole.length, settings.block_length or denoiser.block_size or hole.length)
    sizes = served.footprint
    canvas = filling.canvas
    if denoiser.block_size is not None:
        last = block_stop(canvas, canvas.blocks[-1], denoiser.block_size)
        held_bytes = sizes.buffer_bytes(rows, last)
        step_bytes = max(
            sizes.step_bytes(rows, read, outputs, canvas.settings, kept=kept, last=last)
            for kept, read in _reads(canvas, denoiser.block_size, last)
        )
    elif settings.cache != "none":
        last = hole.total
        held_bytes = sizes.buffer_bytes(rows, hole.total)
        step_bytes = sizes.step_bytes(rows, hole.total, outputs, canvas.settings, kept=0)
    else:
        held_bytes = last = 0
        step_bytes = sizes.step_bytes(rows, hole.total, outputs, canvas.settings)
    return FillUnit(
        row=row,
        filling=filling,
        start=len(hole.before),
        length=hole.total,
        rows=rows,
        outputs=outputs,
        step_bytes=step_bytes,
        held_bytes=held_bytes,
        last=last,
        block_size=denoiser.block_size,
    )


def _reads(canvas: Canvas, block_size: int, last: int) -> Iterator[tuple[int, int]]:
    """(tokens kept, tokens read) of the two forwards that can be the largest: the first, which reads the
    prompt, and one before the last block that stores a block and reads the next."""
    first = block_stop(canvas, canvas.blocks[0], block_size)
    yield 0, first
    if last > first:
        kept = max(0, last - 2 * block_size)
        yield kept, last - kept


def write_unit(
    served: Served,
    teacher: Autoregressive,
    all_holes: Sequence[Hole],
    batch: range,
    settings: DecodingSettings,
    telemetry: Telemetry,
) -> StepsUnit:
    """Rows `batch` of one request, written by the teacher in a batch of their own."""
    holes = [all_holes[row] for row in batch]
    for hole in holes:
        autoregressive.check_hole(teacher, hole)

    def advance(job: Job) -> Generator[Pass, None, None]:
        left = len(holes)
        for forward, written in enumerate(autoregressive.writing(teacher, holes, settings)):
            kind = "decode" if forward else "prefill"
            for token in written:
                row = batch[token.row]
                computed = 1 if forward else len(holes[token.row].before)
                job.usage.note(kind, 1, computed)
                telemetry.count_forwards(served.name, kind, 1, computed)
                position, confidence = (forward,), (token.confidence,)
                job.listener(Committed(row, forward, job.age, position, (token.token,), confidence))
                if token.result is not None:
                    left -= 1
                    job.listener(RowDone(row, token.result))
            yield Pass(kind, len(written), last=not left)

    sizes, rows, longest = served.footprint, len(holes), max(hole.total for hole in holes)
    prompt = max(len(hole.before) for hole in holes)
    return StepsUnit(
        advance,
        step_bytes=sizes.step_bytes(
            rows,
            prompt,
            rows,
            SamplerSettings(temperature=settings.temperature, top_p=settings.top_p),
            kept=0,
            last=longest,
        ),
        held_bytes=sizes.buffer_bytes(rows, longest),
        places=rows,
    )


def score_unit(
    served: Served,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    workspace: int,
    telemetry: Telemetry,
) -> StepsUnit:
    """The likelihood of all pairs, one forward at a time.

    Raises ServeError if memory is too small or a setting means nothing to the model.
    """
    sizes, model = served.footprint, served.model
    longest = max(len(pair.prompt) + len(pair.answer) for pair in pairs)
    size = served.block_size
    if isinstance(model, Denoiser):
        try:
            likelihood.check_settings(model, settings)
        except MdmError as error:
            raise as_serve_error(error) from error
    if size is None:
        rows = max(1, settings.batch_tokens // longest)
        forward, held_bytes = sizes.forward_bytes(rows, longest, padded=True), 0
    else:
        settings = _with_room(sizes, pairs, settings, size, workspace)
        forward, held_bytes = _blocks_bytes(sizes, pairs, settings, size)
    step_bytes = forward + 4 * CHUNK_BYTES
    if step_bytes + held_bytes > workspace:
        raise too_large(
            f"scoring {longest} tokens needs about {(step_bytes + held_bytes) // MIB} MiB beside the"
            f" weights of {served.name!r}, but this server may take {workspace // MIB} MiB; shorten"
            " the text",
            code="memory_limit",
        )

    def advance(job: Job) -> Generator[Pass, None, None]:
        left = len(pairs)

        def done(index: int, found: Likelihood) -> None:
            nonlocal left
            left -= 1
            pair = pairs[index]
            computed = found.nfe * (len(pair.prompt) + len(pair.answer))
            if size is not None:
                computed = len(pair.prompt) + len(pair.answer) + found.nfe * _noisy(pair, size)
            job.usage.note("score", found.nfe, computed)
            telemetry.count_forwards(served.name, "score", found.nfe, computed)
            job.listener(Scored(index, found))

        if isinstance(model, Denoiser):
            for computed in likelihood.scoring(model, pairs, settings, done):
                yield Pass("score", computed, last=not left)
            return
        for index, pair in enumerate(pairs):
            done(index, autoregressive.log_likelihood(model, [pair])[0])
            yield Pass("score", 1, last=not left)

    return StepsUnit(advance, step_bytes, held_bytes)


def _noisy(pair: Pair, block_size: int) -> int:
    """Tokens of a pair that a noisy row of it has: from the block in which the answer begins."""
    before = len(pair.prompt) // block_size * block_size
    return len(pair.prompt) + len(pair.answer) - before


def _masks(pair: Pair, settings: LikelihoodSettings, block_size: int) -> int:
    """Masks that the widest part of its answer in a block has at most; all blocks share the rows."""
    grid = answer_blocks(len(pair.prompt), len(pair.answer), block_size)
    widest = max(part.stop - part.start for part in grid)
    exact = likelihood.resolve(settings, widest) == "exact"
    return min(2**widest - 1, settings.mc_samples) if exact else settings.mc_samples


def _blocks_bytes(
    sizes: Footprint, pairs: Sequence[Pair], settings: LikelihoodSettings, block_size: int
) -> tuple[int, int]:
    """(largest forward, what is held between forwards) of the likelihoods of a model with blocks.

    The clean tokens are read once; noisy rows have their keys and values each, as attention needs them.
    """
    forward = held = 0
    for pair in pairs:
        total, noisy = len(pair.prompt) + len(pair.answer), _noisy(pair, block_size)
        at_once = rows_of_forward(settings.batch_tokens, total, noisy)
        rows = min(_masks(pair, settings, block_size), at_once)
        held = max(held, sizes.kept_bytes(1, total))
        forward = max(
            forward,
            sizes.forward_bytes(1, total, kept=0),
            sizes.forward_bytes(rows, noisy, kept=total) + sizes.kept_bytes(rows, total + noisy),
        )
    return forward, held


def _with_room(
    sizes: Footprint,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    block_size: int,
    workspace: int,
) -> LikelihoodSettings:
    """Settings with so few rows a forward that a quarter of the workspace will do, if that is possible.

    A short answer after a long prompt has many rows in a forward, and all have keys of the prompt.
    """
    room = min(workspace // 4, workspace - 4 * CHUNK_BYTES)
    while (
        settings.batch_tokens > 1 and sum(_blocks_bytes(sizes, pairs, settings, block_size)) > room
    ):
        settings = dataclasses.replace(settings, batch_tokens=settings.batch_tokens // 2)
    return settings
