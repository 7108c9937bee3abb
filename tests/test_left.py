"""Left-only targets: the teacher's own next-token distribution, aligned with its position."""

import dataclasses

import oracles
import pytest
import tiny
import torch
from tiny_run import ar_teacher
from tiny_targets import V, dense

from mdm.train.targets import Question, TargetSettings
from mdm.train.teachers.left import left_only, left_whole

X0 = [[0, 3, 1, 4, 2, 2], [0, 1, 1, 3, 0, 4]]


def ask(model, x0_BL, wanted_BL=None, ids_BL=None, *, temperature=1.0, **settings):
    x0_BL = torch.tensor(x0_BL)
    if wanted_BL is None:
        wanted_BL = torch.ones_like(x0_BL).bool()
        wanted_BL[:, 0] = False
    ids_BL = torch.zeros_like(x0_BL) if ids_BL is None else torch.tensor(ids_BL)
    keys = tuple((0, 0, row) for row in range(len(x0_BL)))
    question = Question(x0_BL, wanted_BL, wanted_BL, ids_BL, keys)
    options = {"settings": TargetSettings(**settings), "temperature": temperature}
    return left_only(ar_teacher(model), question, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_equals_the_head_on_what_stands_to_the_left(family):
    model = tiny.toy_ar(V, family=family)
    next_log_probs = tiny.next_log_probs(model)
    expected = [oracles.left_only(next_log_probs, row, i) for row in X0 for i in range(1, 6)]
    targets = ask(model, X0)
    torch.testing.assert_close(dense(targets), torch.stack(expected), atol=1e-6, rtol=0)
    assert targets.conditioned_on == "left"


def test_is_not_the_posterior_where_something_visible_stands_to_the_right():
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    p_NV = dense(ask(model, X0[:1]))
    distance = []
    for i in range(1, 6):
        q_V = oracles.posterior_marginal(next_log_probs, X0[0], [i], i, V, start=1)
        distance.append(float((p_NV[i - 1] - q_V).abs().sum() / 2))
    assert min(distance[:-1]) > 0.05
    assert distance[-1] < 1e-6  # the last position has no right side


def test_masks_change_nothing():
    """Only the clean text to the left counts: one pass serves every mask."""
    model = tiny.toy_ar(V)
    x0_BL, ids_BL = torch.tensor(X0), torch.zeros(2, 6).long()
    wanted_BL = torch.zeros_like(ids_BL).bool()
    wanted_BL[:, 3] = True
    answers = []
    for more in ([], [1, 2], [4, 5]):
        masked_BL = wanted_BL.clone()
        masked_BL[:, more] = True
        question = Question(x0_BL, masked_BL, wanted_BL, ids_BL, ((0,), (1,)))
        options = {"settings": TargetSettings(), "temperature": 1.0}
        answers.append(dense(left_only(ar_teacher(model), question, **options)))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_packed_documents_are_separate_documents_and_padding_is_nothing():
    model = tiny.toy_ar(V)
    packed = [[0, 3, 1, 0, 4, 2, 1, 1]]
    ids = [[0, 0, 0, 1, 1, 1, -1, -1]]
    wanted = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0]]).bool()
    together = dense(ask(model, packed, wanted, ids))
    alone = [dense(ask(model, [row])) for row in ([0, 3, 1], [0, 4, 2])]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_settings_reach_the_sparse_form():
    model = tiny.toy_ar(V)
    whole = dense(ask(model, X0, temperature=1.0))
    cut = ask(model, X0, top_k=2, temperature=2.0)
    assert (cut.token_ids_NK.shape[1], cut.temperature) == (2, 2.0)
    tempered = (whole.log() / 2).softmax(-1)
    torch.testing.assert_close(
        cut.tail_mass_N.double(), 1 - tempered.topk(2).values.sum(-1), atol=1e-6, rtol=0
    )
    nucleus = ask(model, X0, top_p=0.5)
    assert (nucleus.log_probs_NK == -torch.inf).any()
    assert (nucleus.tail_mass_N == 0).all()


def test_asks_for_some_positions_only_and_none():
    model = tiny.toy_ar(V)
    wanted = torch.zeros(2, 6).bool()
    assert len(ask(model, X0, wanted)) == 0
    wanted[1, 4] = True
    torch.testing.assert_close(dense(ask(model, X0, wanted)), dense(ask(model, X0))[8:9])
    wanted[0, 0] = True
    with pytest.raises(AssertionError, match="position 0"):
        ask(model, X0, wanted)


def copied_question():
    """Two rows, three copies, which ask for different positions; some for none."""
    x0_BL = torch.tensor(X0).repeat(3, 1)
    wanted_BL = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted_BL[:, 0] = False
    wanted_BL[4] = False
    ids_BL = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]]).repeat(3, 1)
    keys = tuple((0, 0, row) for row in range(6))
    wanted_BL &= ids_BL >= 0
    return Question(x0_BL, wanted_BL, wanted_BL, ids_BL, keys, copies=3)


def test_copies_of_a_row_are_read_once(monkeypatch):
    model, question = tiny.toy_ar(V), copied_question()
    teacher, options = ar_teacher(model), {"settings": TargetSettings(), "temperature": 1.0}
    expected = dense(left_only(teacher, dataclasses.replace(question, copies=1), **options))
    read = []
    base = model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward", lambda x, **rest: (read.append(len(x)), base(x, **rest))[1]
    )
    found = dense(left_only(teacher, question, **options))
    assert read == [2]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    rows = question.rows(slice(0, 2))
    assert (len(rows.x0_BL), rows.copies) == (2, 1)


def test_whole_distributions_are_all_of_it():
    question, teacher = copied_question(), ar_teacher(tiny.toy_ar(V))
    sparse = left_only(teacher, question, settings=TargetSettings(top_k=V), temperature=1.0)
    whole = left_whole(teacher, question)
    assert len(whole) == len(sparse)
    assert whole.conditioned_on == "left"
    assert bool(whole.answered_N.all())
    torch.testing.assert_close(
        whole.logits(whole.rows_NW).softmax(-1), dense(sparse).float(), atol=1e-6, rtol=0
    )
