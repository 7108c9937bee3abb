"""Questions to small teachers, their dense answers, and what the slow definitions answer.

`expected` asks `oracles` for every wanted position of a question, document by document, with the same
uniform numbers that the fast code takes: so the two must agree to rounding, draw by draw.
Shapes: B batch, L length, N positions asked for, V vocabulary, K fills.
"""

from __future__ import annotations

import math

import oracles
import tiny
import torch
from tiny_run import ar_teacher

from mdm.diffusion import generator
from mdm.train.targets import NOT_KEPT, Question, SoftTargets, TargetSettings
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.fills import uniforms_LK
from mdm.train.teachers.kinds import answer

V = 5
EXACT = {"atol": 2e-5, "rtol": 0}  # the head answers in float32
SLOW = {
    "importance": oracles.importance_estimate,
    "smc": oracles.smc_estimate,
    "i_sir": oracles.i_sir_estimate,
    "csmc": oracles.csmc_estimate,
    "mc_literal": oracles.mc_literal_estimate,
}


def rows_of(places, like):
    """(B, L) bool from positions: the same for all rows, or a list for each row."""
    result = torch.zeros(like.shape, dtype=torch.bool)
    each = places if places and isinstance(places[0], list) else [places] * len(like)
    for row, positions in enumerate(each):
        result[row, positions] = True
    return result


def question(x0, masked, wanted=None, ids=None, *, seed=0, proposals=None) -> Question:
    """A question about rows given as lists; by default every mask is asked for."""
    x0_BL = torch.tensor(x0)
    masked_BL = masked if torch.is_tensor(masked) else rows_of(masked, x0_BL)
    wanted_BL = masked_BL if wanted is None else rows_of(wanted, x0_BL)
    ids_BL = torch.zeros_like(x0_BL) if ids is None else torch.tensor(ids)
    keys = tuple((seed, 0, row) for row in range(len(x0)))
    return Question(x0_BL, masked_BL, wanted_BL, ids_BL, keys, proposals)


def settings(kind, **changes) -> TargetSettings:
    """Everything is a candidate, and the whole document is evidence."""
    return TargetSettings(**{"kind": kind, "window": 0, "candidates": V, **changes})


def ask(model, asked, kind, *, temperature=1.0, **changes) -> SoftTargets:
    """The answer of a model or teacher."""
    teacher = model if isinstance(model, ARTeacher) else ar_teacher(model)
    return answer(teacher, asked, settings=settings(kind, **changes), temperature=temperature)


def dense(targets, vocab_size=V):
    """(N, V) probabilities; a token listed twice would count twice and fail."""
    p_NV = torch.zeros(len(targets), vocab_size, dtype=torch.float64)
    return p_NV.scatter_add_(1, targets.token_ids_NK, targets.log_probs_NK.double().exp())


def total_variation(p_V, q_V):
    return float((p_V - q_V).abs().sum() / 2)


def random_question(seed, *, rows=3, length=9, vocab_size=V, rate=0.5, proposals=False):
    """Packed documents, padding, random masks of which most are asked for, and other extremes.

    The first token of a document is never masked: nothing stands to its left.
    """
    random = torch.Generator().manual_seed(seed)
    x0_BL = torch.randint(vocab_size, (rows, length), generator=random)
    u_BL = torch.rand(rows, length, generator=random)
    ids_BL = torch.zeros(rows, length).long()
    for row in range(rows):
        cut = int(torch.randint(2, length, (), generator=random))
        ids_BL[row, cut:] = row % 2  # every second row is two documents
        if row % 3 == 2:
            ids_BL[row, length - 2 :] = -1
    first_BL = torch.ones_like(ids_BL).bool()
    first_BL[:, 1:] = ids_BL[:, 1:] != ids_BL[:, :-1]
    masked_BL = (u_BL < rate) & ~first_BL & (ids_BL >= 0)
    if seed % 4 == 1:
        masked_BL[0] = ~first_BL[0] & (ids_BL[0] >= 0)  # everything is masked
    wanted_BL = masked_BL & (torch.rand(rows, length, generator=random) < 0.8)
    if seed % 4 == 2:
        wanted_BL[1] = False
    keys = tuple((seed, 3, row) for row in range(rows))
    given = random_proposals(int(masked_BL.sum()), random, vocab_size) if proposals else None
    return Question(x0_BL, masked_BL, wanted_BL, ids_BL, keys, given)


def random_proposals(count, random, vocab_size=V):
    """A student's distributions in a random order of tokens, with unused slots."""
    ids_MK = torch.rand(count, vocab_size, generator=random).argsort(-1)
    log_r_MK = torch.randn(count, vocab_size, generator=random).log_softmax(-1)
    log_r_MK[::3, -1] = NOT_KEPT
    return SoftTargets(ids_MK, log_r_MK, torch.zeros(count), 1.0, "visible tokens")


class Uniforms:
    """The uniform numbers of one region of a row, by the name of the choice."""

    def __init__(self, asked, row, first_of_document, first_hole, fills):
        self._fill_LK = uniforms_LK(asked, row, fills).tolist()
        self._offset = first_of_document
        self._resampling = generator("resample", *asked.keys[row], first_hole)
        self._fills, self._events = fills, {}

    def __call__(self, name):
        kind, at, *k = name
        if kind == "fill":
            return self._fill_LK[at + self._offset][k[0]]
        if at not in self._events:
            shape = () if kind == "systematic" else (self._fills,)
            drawn = torch.rand(shape, dtype=torch.float64, generator=self._resampling)
            self._events[at] = drawn.tolist()
        return self._events[at] if kind == "systematic" else self._events[at][k[0]]


def cut_teacher(next_log_probs, num_tokens, mask_id=None):
    """The distribution over the first `num_tokens` tokens without the mask, others at -inf."""

    def cut(prefix):
        log_p_V = next_log_probs(prefix).clone()
        log_p_V[num_tokens:] = NOT_KEPT
        if mask_id is not None:
            log_p_V[mask_id] = NOT_KEPT
        return log_p_V.log_softmax(-1)

    return cut


def places(asked, chosen: TargetSettings):
    """For every wanted position: row, start of its document, text, position, holes, end of evidence.

    All but the row and the start count from the start of the document.
    """
    result = []
    for row, position in asked.wanted_BL.nonzero().tolist():
        ids = asked.document_ids_BL[row].tolist()
        start = position
        while start and ids[start - 1] == ids[position]:
            start -= 1
        stop = position + 1
        while stop < len(ids) and ids[stop] == ids[position]:
            stop += 1
        text = asked.x0_BL[row, start:stop].tolist()
        masked = [i - start for i in range(start, stop) if asked.masked_BL[row, i]]
        holes, end = oracles.limits(
            masked,
            position - start,
            stop - start,
            window=chosen.window,
            block=chosen.block,
            fill=chosen.fill,
        )
        result.append((row, start, text, position - start, holes, end))
    return result


def expected(next_log_probs, asked, kind, *, num_tokens=V, mask_id=None, **changes):
    """The slow estimate at every wanted position."""
    chosen = settings(kind, **changes)
    next_log_probs = cut_teacher(next_log_probs, num_tokens, mask_id)
    allowed = [v for v in range(num_tokens) if v != mask_id]
    found = []
    for row, start, text, position, holes, end in places(asked, chosen):
        uniforms = Uniforms(asked, row, start, holes[0] + start, chosen.fills)
        arguments = (next_log_probs, text, holes, position, end, chosen.fills)
        if kind != "student":
            found.append(SLOW[kind](*arguments, oracles.chosen_by(uniforms)))
            continue
        slots = {hole: slots_of(asked, row, hole + start) for hole in holes}
        mix = chosen.uniform_mix
        proposals = {}
        for hole in holes:
            r = oracles.mixture(slots[hole], allowed, mix)
            proposals[hole] = [r.get(v, 0.0) for v in range(len(next_log_probs(text[:1])))]

        def draw(_probs, name, slots=slots, uniforms=uniforms, mix=mix):
            return oracles.mixture_draw(slots[name[1]], allowed, mix, uniforms(name))

        options = {"proposals": proposals, "reference": chosen.reference}
        found.append(oracles.student_estimate(*arguments, draw, **options))
    return found


def slots_of(asked, row, position):
    """(token, probability) of the student at a masked position, in its order."""
    places = asked.masked_BL.nonzero().tolist()
    place = places.index([row, position])
    ids_K = asked.proposals.token_ids_NK[place].tolist()
    return list(
        zip(ids_K, asked.proposals.log_probs_NK[place].double().exp().tolist(), strict=True)
    )


def assert_equal_to_slow(targets, slow, vocab_size=V, temperature=1.0):
    """Target, effective number and fallback of every position."""
    assert len(targets) == len(slow)
    if not slow:
        return
    want_NV = torch.stack([estimate.target_V for estimate in slow])
    want_NV = (want_NV.log() / temperature).softmax(-1)
    torch.testing.assert_close(dense(targets, vocab_size), want_NV, **EXACT)
    ess_N = torch.tensor([estimate.ess for estimate in slow])
    torch.testing.assert_close(targets.measures["ess"], ess_N, atol=1e-4, rtol=1e-4, equal_nan=True)
    failed = [float(math.isnan(estimate.ess)) for estimate in slow]
    assert targets.measures["fell_back"].tolist() == failed
    assert not targets.tail_mass_N.any()


def posterior(next_log_probs, x0, masked, position, vocab_size=V, end=None):
    """q at a position of one document whose first token is given."""
    return oracles.posterior_marginal(
        next_log_probs, x0, masked, position, vocab_size, start=1, end=end
    )


def table_with_start(vocab_size=3, seed=0):
    """A lookup-table teacher for enumeration; fast, and without any model."""
    return tiny.table_ar(vocab_size, seed)
