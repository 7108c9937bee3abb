"""Questions as fill-in-the-middle rows: what the end mark makes of them, and the way there and back.

Toy words: 0 opens a document, 1 2 3 are text, 4 5 6 the marks before, suffix and middle, 7 closes both
the middle and the document.
"""

import dataclasses
import itertools
import math
import random

import oracles
import pytest
import tiny
import torch

from mdm.errors import RequestError
from mdm.fim import Slot, Template
from mdm.train.targets import Question, SoftTargets
from mdm.train.teachers.infill import arrange, holes_of, restore

V, START, PRE, SUF, MID, END = 8, 0, 4, 5, 6, 7
PSM = Template("toy", "psm", (PRE, Slot.PREFIX, SUF, Slot.SUFFIX, MID), (END,), START, END)
SPM = Template("toy", "spm", (PRE, SUF, Slot.SUFFIX, MID, Slot.PREFIX), (END,), START, END)
X0 = [START, 1, 3, 2, 2, 1, END]


def ask(x0, masked, wanted=None, ids=None, proposals=None):
    """A question about rows; masked and wanted are strings of "_" (hidden) and "." (visible)."""
    x0_BL = torch.tensor(x0)
    masked_BL = torch.tensor([[mark == "_" for mark in row] for row in masked])
    wanted_BL = torch.tensor([[mark == "_" for mark in row] for row in wanted or masked])
    ids_BL = torch.zeros_like(x0_BL) if ids is None else torch.tensor(ids)
    keys = tuple((7, row) for row in range(len(x0)))
    return Question(x0_BL, masked_BL, wanted_BL, ids_BL, keys, proposals)


def rows(question):
    """(ids, masked, wanted) of every row without its padding."""
    found = []
    for b, ids in enumerate(question.document_ids_BL.tolist()):
        length = ids.index(-1) if -1 in ids else len(ids)
        assert ids == [0] * length + [-1] * (len(ids) - length)
        assert not question.masked_BL[b, length:].any()
        found.append(
            (
                question.x0_BL[b, :length].tolist(),
                question.masked_BL[b].nonzero()[:, 0].tolist(),
                question.wanted_BL[b].nonzero()[:, 0].tolist(),
            )
        )
    return found


def numbered(count, name="left"):
    """Targets whose n-th row says n everywhere."""
    n_N = torch.arange(count).float()
    return SoftTargets(
        torch.arange(count)[:, None].repeat(1, 2), -n_N[:, None] - torch.tensor([[0.0, 1.0]]),
        n_N / 100, 1.0, name, {"ess": n_N + 1},
    )  # fmt: skip


# --- against enumeration ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PSM, SPM])
@pytest.mark.parametrize("seed", range(2))
def test_the_end_mark_weighs_fills_by_their_length(template, seed):
    """q(z) ∝ p(z | prompt) p(end | prompt, z): summed here by hand, there over the new row."""
    p = tiny.next_log_probs(tiny.toy_ar(V, seed))
    arranged = arrange(ask([X0], ["..__..."]), template, 64)
    ((ids, masked, _),) = rows(arranged.question)
    prompt = list(template.prompt(X0[:2], X0[4:]))
    assert ids == [*prompt, 3, 2, END]
    assert masked == [len(prompt), len(prompt) + 1]

    weights = {}
    for fill in itertools.product(range(V), repeat=2):
        text = [*prompt, *fill, END]
        steps = range(len(prompt), len(text))
        weights[fill] = math.exp(math.fsum(float(p(text[:i])[text[i]]) for i in steps))
    total = math.fsum(weights.values())
    bare = p(prompt).exp()
    for place, position in enumerate(masked):
        found = oracles.posterior_marginal(p, ids, masked, position, V, start=1)
        expected = [
            math.fsum(w for fill, w in weights.items() if fill[place] == v) / total
            for v in range(V)
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    # The bare head takes middles of any length, above all the empty one.
    first = oracles.posterior_marginal(p, ids, masked, masked[0], V, start=1)
    assert float((first - bare).abs().sum() / 2) > 0.05


@pytest.mark.parametrize("block", [0, 4])
def test_nothing_after_the_hole_is_plain_text(block):
    """The end of the document or of the block: the posterior is then what it was without marks."""
    p = tiny.next_log_probs(tiny.toy_ar(V))
    x0 = X0[:4] if block == 0 else X0
    arranged = arrange(ask([x0], ["..__..."[: len(x0)]]), PSM, 64, block=block)
    ((ids, masked, _),) = rows(arranged.question)
    assert (ids, masked) == (X0[:4], [2, 3])
    for position in masked:
        found = oracles.posterior_marginal(p, ids, masked, position, V, start=1)
        expected = oracles.posterior_marginal(p, X0, masked, position, V, start=1, end=4)
        torch.testing.assert_close(found, expected)


# --- rows ------------------------------------------------------------------------------------------


def test_a_row_for_each_hole():
    arranged = arrange(ask([X0], ["._.__.."]), PSM, 64)
    assert rows(arranged.question) == [
        ([START, PRE, SUF, 3, 2, 2, 1, MID, 1, END], [8], [8]),
        ([START, PRE, 1, 3, SUF, 1, MID, 2, 2, END], [7, 8], [7, 8]),
    ]
    assert arranged.question.keys == ((7, 0, 1), (7, 0, 3))
    assert arranged.order_N.tolist() == [0, 1, 2]
    assert arranged.label == "fim(toy, psm)"


def test_only_holes_that_are_asked_for_and_only_their_wanted_positions():
    arranged = arrange(ask([X0], ["._.__.."], ["...._.."]), SPM, 64)
    assert rows(arranged.question) == [([START, PRE, SUF, 1, MID, 1, 3, 2, 2, END], [7, 8], [8])]
    assert arranged.order_N.tolist() == [0]


def test_documents_of_a_row_are_separate_and_padding_is_nothing():
    x0 = [[START, 1, 2, 3, END, START, 2, 3, 1, END, 3, 3]]
    ids = [[4, 4, 4, 4, 4, 9, 9, 9, 9, 9, -1, -1]]
    arranged = arrange(ask(x0, [".._.....__.."], ids=ids), PSM, 64)
    assert rows(arranged.question) == [
        ([START, 2, 3, 1, END], [3, 4], [3, 4]),  # up to the end of its document
        ([START, PRE, 1, SUF, 3, MID, 2, END], [6], [6]),
    ]


def test_padding_is_no_hole():
    question = ask([[START, 1, 2, 3]], ["..__"], ids=[[0, 0, 0, -1]])
    (hole,) = holes_of(question)
    assert (hole.first, hole.start, hole.end, hole.last) == (0, 2, 3, 3)


def test_a_hole_does_not_cross_documents():
    x0, ids = [[START, 1, 2, START, 1, 3]], [[0, 0, 0, 1, 1, 1]]
    found = [(h.first, h.start, h.end, h.last) for h in holes_of(ask(x0, ["..___."], ids=ids))]
    assert found == [(0, 2, 3, 3), (3, 3, 5, 6)]


def test_equal_neighbours_of_other_rows_are_other_documents():
    question = ask([X0, X0], ["......_", "_......"])
    assert [(h.row, h.start, h.end) for h in holes_of(question)] == [(0, 6, 7), (1, 0, 1)]


def test_a_suffix_ends_with_the_block():
    """Blocks of 3 from the start of each document: 0 1 2 | 3 4 5 | 6, and again behind it."""
    x0 = [[*X0, *X0]]
    ids = [[0] * 7 + [1] * 7]
    arranged = arrange(ask(x0, ["._._...._____."], ids=ids), PSM, 64, block=3)
    assert rows(arranged.question) == [
        ([START, 1, 3], [1, 2], [1, 2]),  # a hole that goes on: its first block
        ([START, 1, 3, 2, 2, 1], [3, 4, 5], [3, 4, 5]),  # and its second
        ([START, PRE, SUF, 3, MID, 1, END], [5], [5]),
        ([START, PRE, 1, 3, SUF, 2, 1, MID, 2, END], [8], [8]),
    ]
    assert arranged.question.keys == ((7, 0, 8), (7, 0, 10), (7, 0, 1), (7, 0, 3))
    assert arranged.order_N.tolist() == [2, 3, 4, 5, 6, 0, 1]
    assert arranged.label == "fim(toy, psm, block 3)"


def test_only_an_end_of_the_document_after_the_hole_is_an_empty_suffix():
    arranged = arrange(ask([X0], ["....._."]), PSM, 64)
    assert rows(arranged.question) == [([START, PRE, 1, 3, 2, 2, SUF, MID, 1, END], [8], [8])]


def test_the_first_end_token_of_a_template_is_the_mark():
    template = dataclasses.replace(PSM, end_ids=(3, END))
    ((ids, _, _),) = rows(arrange(ask([X0], ["..__..."]), template, 64).question)
    assert ids[-1] == 3


def test_a_text_without_a_start_token():
    arranged = arrange(ask([[1, 2, 3, 1]], [".._."]), PSM, 64)
    assert rows(arranged.question) == [([PRE, 1, 2, SUF, 1, MID, 3, END], [6], [6])]


def test_nothing_asked_for():
    question = ask([X0], ["..__..."], ["......."])
    arranged = arrange(question, PSM, 64)
    assert arranged.question is question
    assert len(restore(numbered(0), arranged)) == 0


# --- long texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PSM, SPM])
@pytest.mark.parametrize("length", range(9, 24))
def test_what_is_far_from_the_hole_is_left_out(template, length):
    before, after = [1, 2, 3, 1, 2, 3, 1], [2, 2, 1, 1, 3]
    x0 = [[START, *before, 3, 3, *after]]
    question = ask(x0, [[*"." * 8, *"__", *"." * 5]])
    ((ids, masked, _),) = rows(arrange(question, template, length).question)
    room = length - 7  # start, marks, hole, end
    assert len(ids) == min(length, 7 + len(before) + len(after))
    assert ids[0] == START
    assert [ids[i] for i in masked] == [3, 3]
    kept_before = min(len(before), max(room - room // 2, room - len(after)))
    kept_after = min(len(after), room - kept_before)
    prompt = template.prompt([START, *before[len(before) - kept_before :]], after[:kept_after])
    assert ids == [*prompt, 3, 3, END]
    assert kept_before >= 1
    assert kept_after >= 1


def test_plain_text_is_cut_as_well():
    x0 = [[START, 1, 2, 3, 1, 2]]
    for length, kept in ((8, [1, 2, 3]), (6, [1, 2, 3]), (5, [2, 3]), (4, [3])):
        ((ids, masked, _),) = rows(arrange(ask(x0, ["....__"]), PSM, length).question)
        assert ids == [START, *kept, 1, 2]
        assert masked == [len(ids) - 2, len(ids) - 1]


@pytest.mark.parametrize(
    ("masked", "length", "text"),
    [
        ("..__...", 8, "a hole of 2 tokens with 4 marks of the toy template.*teacher's 8 tokens"),
        ("..____.", 10, "a hole of 4 tokens with 4 marks.*mask shorter spans"),
        ("...____", 5, "a hole of 4 tokens with 0 marks"),
    ],
)
def test_a_hole_that_does_not_fit(masked, length, text):
    arrange(ask([X0], [masked]), PSM, length + 1)
    with pytest.raises(RequestError, match=text):
        arrange(ask([X0], [masked]), PSM, length)


# --- there and back --------------------------------------------------------------------------------


def test_answers_go_back_to_their_positions():
    arranged = arrange(ask([X0, X0], ["..__.._", "._..__."]), PSM, 64)
    order = arranged.order_N.tolist()
    assert order != sorted(order)
    targets = numbered(len(order), "left+right(document)")
    found = restore(targets, arranged)
    assert found.conditioned_on == "fim(toy, psm): left+right(document)"
    for n, place in enumerate(order):
        assert found.token_ids_NK[place].tolist() == [n, n]
        assert found.log_probs_NK[place].tolist() == [-n, -n - 1]
        assert found.tail_mass_N[place] == targets.tail_mass_N[n]
        assert found.measures["ess"][place] == n + 1
    assert found.temperature == targets.temperature


def test_an_answer_is_missing():
    with pytest.raises(AssertionError, match="one answer for each"):
        restore(numbered(1), arrange(ask([X0], ["..__..."]), PSM, 64))


def random_question(seed):
    """Packed rows with random masks, some of them wanted; every token tells its place."""
    draw = random.Random(seed)
    x0, ids, masked, wanted = [], [], [], []
    for row in range(3):
        tokens, documents, hidden = [], [], []
        for document in range(draw.randint(1, 3)):
            size = draw.randint(2, 7)
            tokens += [START, *(1000 * (row + 1) + len(tokens) + i for i in range(1, size))]
            documents += [document] * size
            hidden += ["."] + [draw.choice("._") for _ in range(size - 1)]
        padding = 24 - len(tokens)
        x0.append(tokens + [END] * padding)
        ids.append(documents + [-1] * padding)
        masked.append(hidden + ["."] * padding)
        wanted.append([mark if draw.random() < 0.6 else "." for mark in masked[-1]])
    count = sum(row.count("_") for row in masked)
    return ask(x0, masked, wanted, ids, numbered(count))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [0, 1, 3])
def test_whatever_the_masks(seed, block):
    question = random_question(seed)
    assert question.wanted_BL.any()
    arranged = arrange(question, PSM, 64, block=block)
    new = arranged.question
    # Every wanted position once, and its token with it.
    tokens = question.x0_BL[question.wanted_BL]
    assert sorted(arranged.order_N.tolist()) == list(range(len(tokens)))
    assert torch.equal(new.x0_BL[new.wanted_BL], tokens[arranged.order_N])
    back = restore(numbered(len(tokens)), arranged).token_ids_NK[:, 0]
    assert torch.equal(new.x0_BL[new.wanted_BL][back], tokens)
    # Proposals stand beside the same masked tokens as before.
    proposal_of = dict(
        zip(
            question.x0_BL[question.masked_BL].tolist(),
            question.proposals.token_ids_NK[:, 0].tolist(),
            strict=True,
        )
    )
    hidden = new.x0_BL[new.masked_BL].tolist()
    assert new.proposals.token_ids_NK[:, 0].tolist() == [proposal_of[token] for token in hidden]
    assert new.proposals.measures["ess"].tolist() == [proposal_of[token] + 1 for token in hidden]
    # Rows: short ones first, each one run of masks, keys different.
    lengths = (new.document_ids_BL >= 0).sum(1).tolist()
    assert lengths == sorted(lengths)
    assert len(set(new.keys)) == len(new.keys) == len(lengths)
    for ids, masked, wanted in rows(new):
        assert wanted
        assert masked == list(range(masked[0], masked[-1] + 1))
        inside = [ids[i] for i in masked]
        assert inside == list(range(inside[0], inside[-1] + 1))
        plain = masked[-1] == len(ids) - 1
        assert plain != (ids[-1] == END)
        assert ids[0] == START
        assert all(token not in inside for token in ids[: masked[0]])
