"""Left-only targets of a teacher with another tokenizer: its probabilities, passed on to student tokens.

A student's token begins at byte s of the text. The teacher's token j holds that byte; π are the bytes of
it before s. Given the teacher's tokens before j, what comes at s has the distribution

    q(w) = Σ_{v begins with π and is longer} p(v | x_<j) [w is the first student token of v behind π] / Z

with Z the sum of p over the same v: the teacher's token is split into student tokens, and its mass goes
to the first. Where the text's own token j ends inside the student's token, the student's tokenizer would
not have stopped there, so the mass of that token is not passed on yet: it is spread by the teacher's next
distribution p(v' | x_≤j), over the first student token of (the rest of token j, then v'), and so on along
the text. Of the next distributions the likeliest `_NEXT` tokens are told apart; the mass of all others
goes to the first student token of the rest alone. Where the student cannot write a token at all its mass
is lost; what remains is renormalised, and `lost` says how much it was.

The end of a text is a token without bytes on both sides: the student's first end token behind a text gets
the teacher's distribution behind its own.

Exact for two tokenizers of single bytes, and for a student of bytes exact given the teacher's
tokenization of the text on the left. Otherwise an approximation: a student's longer token can swallow
bytes of what would come next, which is known for the text's own tokens only.
Shapes: N positions asked for, n a chunk of them, B batch, L length, M tokens of a reading, V the
teacher's tokens, W the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mdm.denoiser import row_chunks
from mdm.errors import VocabError
from mdm.token_bytes import token_bytes
from mdm.vocab import Vocab

from .. import processes
from ..readings import ReadingBatch
from ..targets import NOT_KEPT, SoftTargets, TargetSettings, keep_top, no_targets, stack_targets
from .ar import ARTeacher
from .pieces import NO_PIECE, Continuations, Pieces

_NEXT = 64
_ALL_LOST = 1 - 1e-6
CONDITIONED_ON = "left, mapped from another tokenizer"


class Place(NamedTuple):
    """Where a student's token lies in the teacher's reading of a row: the columns that cover it, in
    order, and how many bytes of the first of them come before it."""

    row: int
    columns: range
    before: int


@dataclass(frozen=True)
class Mapping:
    """The teacher, its tokens' continuations in student tokens, and how many of those there are."""

    teacher: ARTeacher
    continuations: Continuations
    num_student_tokens: int


def make_mapping(teacher: ARTeacher, student: Vocab) -> Mapping:
    """What mapping needs of the two vocabularies; takes seconds for a large one."""
    assert teacher.vocab is not None, "a teacher with a tokenizer of its own"
    for who, vocab in (("teacher", teacher.vocab), ("student", student)):
        if not any(token_bytes(vocab)):
            raise VocabError(
                f"the tokens of the {who} do not say which bytes they stand for, so target.kind=mapped"
                " cannot split them; set target.kind=embedding, or choose a byte-level or sentencepiece"
                " tokenizer"
            )
    ends = {teacher.vocab.eos_id: student.eos_id}  # the one token without text that both have
    pieces = Pieces(student)
    continuations = Continuations(teacher.vocab, teacher.num_tokens, pieces, ends)
    continuations.first_V = continuations.first_V.to(processes.device())
    return Mapping(teacher, continuations, len(student))


@torch.no_grad()
def mapped(
    mapping: Mapping,
    reading: ReadingBatch,
    wanted_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    *,
    settings: TargetSettings,
    temperature: float,
) -> SoftTargets:
    """The teacher's distribution over the student's next token at every wanted position.

    Measures: `answered`, and `lost` where there is an answer.
    """
    places = find_places(reading, wanted_BL, document_ids_BL, mapping.continuations.lengths_V)
    found = [place for place in places if place is not None]
    asked_BM = torch.zeros_like(reading.tokens_BM, dtype=torch.bool)
    for place in found:
        asked_BM[place.row, list(place.columns)] = True
    rows_TD = mapping.teacher.rows(reading.tokens_BM, asked_BM, reading.document_ids_BM)
    index_BM = asked_BM.flatten().cumsum(0).view(asked_BM.shape) - 1
    width = max(mapping.teacher.num_tokens, mapping.num_student_tokens)
    parts = [
        _answer(mapping, reading, found[chunk], rows_TD, index_BM, settings, temperature)
        for chunk in row_chunks(len(found), width)
    ]
    return _spread(stack_targets(parts), [place is not None for place in places])


def find_places(
    reading: ReadingBatch,
    wanted_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    lengths_V: torch.Tensor,
) -> list[Place | None]:
    """Where each wanted position (row-major) lies; None if the teacher has no tokens there, or some
    that are not exactly bytes of the text (`lengths_V`: how many bytes each token has).

    The first end token behind a text lies at the teacher's end token.
    """
    tokens_BM, documents_BM, starts_BM, ends_BM, student_starts_BL, student_ends_BL = (
        tensor.cpu().numpy() for tensor in reading
    )
    document_ids = document_ids_BL.cpu().numpy()
    exact_BM = (lengths_V.numpy()[tokens_BM] == ends_BM - starts_BM) & (starts_BM >= 0)
    places: list[Place | None] = []
    columns: dict[tuple[int, int], np.ndarray] = {}
    for row, column in wanted_BL.nonzero().tolist():
        start, end = int(student_starts_BL[row, column]), int(student_ends_BL[row, column])
        document = int(document_ids[row, column])
        if start < 0 <= int(student_ends_BL[row, column - 1]):
            last = int((documents_BM[row] == document).nonzero()[0][-1])
            places.append(Place(row, range(last, last + 1), 0))
            continue
        if (row, document) not in columns:
            text_M = (documents_BM[row] == document) & (starts_BM[row] >= 0)
            columns[row, document] = text_M.nonzero()[0]
        own = columns[row, document]
        ends = ends_BM[row, own]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        covering = own[first : last + 1]
        covered = (
            0 <= start < end
            and last < len(own)
            and starts_BM[row, covering[0]] <= start
            and exact_BM[row, covering].all()
        )
        if not covered:
            places.append(None)
            continue
        before = start - int(starts_BM[row, covering[0]])
        places.append(Place(row, range(int(covering[0]), int(covering[-1]) + 1), before))
    return places


def _answer(
    mapping: Mapping,
    reading: ReadingBatch,
    places: Sequence[Place],
    rows_TD: torch.Tensor,
    index_BM: torch.Tensor,
    settings: TargetSettings,
    temperature: float,
) -> SoftTargets:
    """The distributions at these places; `index_BM` says which of the head's rows a column has."""
    device = rows_TD.device
    if not places:
        return no_targets(device, temperature, CONDITIONED_ON)
    # One call of the head for all of them: for one row it takes as long as for many.
    index_BM = index_BM.cpu()
    used = [index_BM[place.row, list(place.columns)].tolist() for place in places]
    needed = sorted({row for rows in used for row in rows})
    at = {row: number for number, row in enumerate(needed)}
    logits_tV, tokens_BM = mapping.teacher.head(rows_TD[needed]), reading.tokens_BM.cpu()
    lost_column = mapping.num_student_tokens
    mass_nW = torch.zeros(len(places), lost_column + 1, device=device)
    for n, (place, rows) in enumerate(zip(places, used, strict=True)):
        tokens = tokens_BM[place.row, list(place.columns)].tolist()
        own = [logits_tV[at[row]] for row in rows]
        amounts, columns = _pass_on(mapping, tokens, place.before, own)
        mass_nW[n].index_add_(0, columns, amounts)
    lost_n = mass_nW[:, lost_column]
    targets = keep_top(
        mass_nW[:, :lost_column].log().masked_fill((lost_n > _ALL_LOST)[:, None], 0.0),
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=temperature,
        conditioned_on=CONDITIONED_ON,
    )
    return SoftTargets(
        targets.token_ids_NK,
        targets.log_probs_NK.masked_fill((lost_n > _ALL_LOST)[:, None], NOT_KEPT),
        targets.tail_mass_N.masked_fill(lost_n > _ALL_LOST, 0.0),
        temperature,
        CONDITIONED_ON,
        {"lost": lost_n},
    )


def _pass_on(
    mapping: Mapping,
    tokens: Sequence[int],
    before: int,
    logits: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(amounts, columns) that sum to one: probability, and the student token (or loss) it goes to.

    `logits` (V,) are those that predict the tokens.
    """
    continuations, logits_V, device = mapping.continuations, logits[0], logits[0].device
    spelt = continuations.bytes[tokens[0]] or b""
    if before:
        ids_v, pieces_v = (found.to(device) for found in continuations.behind(spelt[:before]))
        mass_v = logits_V[ids_v].softmax(-1)
    else:
        ids_v, pieces_v = None, continuations.first_V
        mass_v = logits_V.softmax(-1)
    amounts, columns = [mass_v], [pieces_v]
    rest = spelt[before:]
    held_back = tokens[0] if ids_v is None else int((ids_v == tokens[0]).nonzero()[0, 0])
    for token, next_V in zip(tokens[1:], logits[1:], strict=True):
        # What was passed on with this token of the text is spread over what follows it.
        share = amounts[-1][held_back].clone()
        amounts[-1] = amounts[-1].index_fill(0, torch.tensor([held_back], device=device), 0.0)
        probs_V = next_V.softmax(-1)
        ids_k = probs_V.topk(min(_NEXT, len(probs_V))).indices.tolist()
        ids_k += [] if token in ids_k else [token]
        probs_k = probs_V[ids_k]
        amounts += [share * (1 - probs_k.sum()).clamp(min=0)[None], share * probs_k]
        columns += [
            torch.tensor([continuations.alone(rest)], device=device),
            torch.tensor(continuations.joined(rest, ids_k), device=device),
        ]
        held_back, rest = ids_k.index(token), rest + (continuations.bytes[token] or b"")
    columns_v = torch.cat(columns)
    return torch.cat(amounts), columns_v.where(
        columns_v != NO_PIECE, torch.full_like(columns_v, mapping.num_student_tokens)
    )


def _spread(answers: SoftTargets, answered: Sequence[bool]) -> SoftTargets:
    """The answers at their places among all positions; the others are not answered."""
    answered_N = torch.tensor(answered, dtype=torch.bool, device=answers.tail_mass_N.device)
    shape = (len(answered), answers.token_ids_NK.shape[1])
    ids_NK = answers.token_ids_NK.new_zeros(shape)
    log_probs_NK = answers.log_probs_NK.new_full(shape, NOT_KEPT)
    tail_N = answers.tail_mass_N.new_zeros(len(answered))
    lost_N = answers.tail_mass_N.new_full((len(answered),), float("nan"))
    ids_NK[answered_N], log_probs_NK[answered_N] = answers.token_ids_NK, answers.log_probs_NK
    tail_N[answered_N] = answers.tail_mass_N
    lost_N[answered_N] = answers.measures.get("lost", tail_N[:0])
    measures = {"lost": lost_N, "answered": (log_probs_NK > NOT_KEPT).any(-1).float()}
    return SoftTargets(
        ids_NK, log_probs_NK, tail_N, answers.temperature, answers.conditioned_on, measures
    )
