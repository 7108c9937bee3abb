"""Fill-in-the-middle targets as a question about other rows: prompt, the hole's tokens, the end mark.

Every hole becomes a row "prompt(prefix, suffix) hole end" in which only the hole is masked, and any
estimator can answer it. The visible end mark makes the length of the hole evidence, which the student
knows and a fill-in-the-middle model does not:

    q(z | prefix, suffix, n)  ∝  p(z | prompt) · p(end | prompt, z)          for all fills z of n tokens

So it is the end mark that kind=suffix and the fills weigh by. kind=left does not look at it: the bare
next-token head is a mean over middles of any length, and this length bias is accepted with it.
The right side of a new row is the end mark and nothing else, so ask with window=0 and block=0.

This is another model's conditional, not that of the left-to-right joint. Where nothing visible stands
after a hole (in its document, in its block) there is nothing to tell, and an empty suffix would say that
the text ends with the hole: such a row is the plain text up to the end of the hole, without marks.
Other masks of the document hold their true tokens.
Shapes: B batch, L length, N positions asked for, M masked positions, K kept tokens, R holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby

import torch

from mdm.errors import RequestError
from mdm.fim import Template, nearest

from ..targets import Question, SoftTargets


@dataclasses.dataclass(frozen=True)
class Hole:
    """Neighbouring masks of a row: [start, end) in the text [first, last) that the student sees.

    `first` opens the document; `last` is where it ends, or the block of the hole.
    """

    row: int
    first: int
    start: int
    end: int
    last: int

    @property
    def places(self) -> list[tuple[int, int]]:
        """(row, position) of its masks."""
        return [(self.row, i) for i in range(self.start, self.end)]


@dataclasses.dataclass(frozen=True)
class Arranged:
    """A question about the rows of a template, and the way back.

    question  one row for each hole with a wanted position, the shortest row first
    order_N   order_N[n] is the place, among the positions of the original question (row-major), of the
              n-th position of the new one (row-major)
    label     how the teacher was asked, for SoftTargets.conditioned_on
    """

    question: Question
    order_N: torch.Tensor
    label: str


def arrange(question: Question, template: Template, max_length: int, *, block: int = 0) -> Arranged:
    """The question as rows of the template, none longer than `max_length` tokens.

    With a block size > 0 (counted from the start of the document) a hole and its suffix end with the
    student's block: it sees no more. A hole that goes on into the next block is one hole in each.
    Where a text is too long for the row, what is far from the hole is left out. Raises RequestError if
    a hole does not fit with its marks and a token on either side.
    """
    x0, wanted = question.x0_BL.tolist(), question.wanted_BL.tolist()
    found = [
        hole for hole in holes_of(question, block) if any(wanted[b][i] for b, i in hole.places)
    ]
    label = f"fim({template.family}, {template.order}{f', block {block}' if block else ''})"
    device = question.x0_BL.device
    if not found:
        return Arranged(question, torch.empty(0, dtype=torch.long, device=device), label)
    rows = {hole: _row(x0[hole.row], hole, template, max_length) for hole in found}
    # Rows of like length side by side: who cuts the question into batches has little padding.
    found.sort(key=lambda hole: len(rows[hole][0]))

    length = len(rows[found[-1]][0])
    x0_RL = torch.full((len(found), length), template.eos_id)
    masked_RL = torch.zeros_like(x0_RL, dtype=torch.bool)
    wanted_RL = torch.zeros_like(masked_RL)
    document_ids_RL = torch.full_like(x0_RL, -1)
    for r, hole in enumerate(found):
        ids, start = rows[hole]
        at = slice(start, start + hole.end - hole.start)
        x0_RL[r, : len(ids)] = torch.tensor(ids)
        document_ids_RL[r, : len(ids)] = 0
        masked_RL[r, at] = True
        wanted_RL[r, at] = torch.tensor([wanted[b][i] for b, i in hole.places])

    places = [place for hole in found for place in hole.places]
    proposals = question.proposals
    if proposals is not None:
        proposals = proposals.select(_numbers(question.masked_BL, places).to(device))
    asked = [(b, i) for b, i in places if wanted[b][i]]
    arranged = Question(
        x0_BL=x0_RL.to(device),
        masked_BL=masked_RL.to(device),
        wanted_BL=wanted_RL.to(device),
        document_ids_BL=document_ids_RL.to(device),
        keys=tuple((*question.keys[hole.row], hole.start) for hole in found),
        proposals=proposals,
    )
    return Arranged(arranged, _numbers(question.wanted_BL, asked).to(device), label)


def restore(targets: SoftTargets, arranged: Arranged) -> SoftTargets:
    """The answers to an arranged question as answers to the original one, in its order."""
    assert len(targets) == len(arranged.order_N), "one answer for each position asked for"
    said = f"{arranged.label}: {targets.conditioned_on}"
    return dataclasses.replace(targets.select(arranged.order_N.argsort()), conditioned_on=said)


def holes_of(question: Question, block: int = 0) -> Iterator[Hole]:
    """Maximal runs of masked positions of one document, and of one block of it if block > 0."""
    documents, masked = question.document_ids_BL.tolist(), question.masked_BL.tolist()
    for row, ids in enumerate(documents):
        for document, positions in groupby(range(len(ids)), key=ids.__getitem__):
            if document < 0:
                continue
            first, *rest = positions
            last = first + len(rest) + 1
            size = block or last - first
            for start in range(first, last, size):
                end = min(start + size, last)
                for hidden, run in groupby(range(start, end), key=masked[row].__getitem__):
                    if hidden:
                        inside = list(run)
                        yield Hole(row, first, inside[0], inside[-1] + 1, end)


def _row(
    tokens: list[int], hole: Hole, template: Template, max_length: int
) -> tuple[list[int], int]:
    """The new row of a hole, and where in it the hole begins."""
    before, middle = tokens[hole.first : hole.start], tokens[hole.start : hole.end]
    after = tokens[hole.end : hole.last]
    lead = before[:1] if before[:1] == [template.start_id] else []
    marks = template.num_marks + 1 if after else 0
    room = max_length - len(lead) - len(middle) - marks
    if room < (2 if after else 1):
        raise RequestError(
            f"a hole of {len(middle)} tokens with {marks} marks of the {template.family} template does"
            f" not fit into the teacher's {max_length} tokens with a token on either side; mask shorter"
            " spans, or use another teacher"
        )
    before, after = nearest(before[len(lead) :], after, room)
    if not after:
        assert lead or before, "nothing stands to the left of the hole"
        return [*lead, *before, *middle], len(lead) + len(before)
    prompt = template.prompt([*lead, *before], after)
    return [*prompt, *middle, template.end_ids[0]], len(prompt)


def _numbers(at_BL: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """(len(places),) the number of each place among the true positions of `at_BL`, row-major."""
    number = {(b, i): n for n, (b, i) in enumerate(at_BL.nonzero().tolist())}
    return torch.tensor([number[place] for place in places])
