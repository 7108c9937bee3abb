"""All kinds of target side by side: what any of them must do, and which of them decode in any order."""

import itertools
import math

import oracles
import pytest
import tiny
import torch
from tiny_run import ar_teacher
from tiny_targets import EXACT, V, ask, dense, question, random_proposals, total_variation

from mdm.errors import ConfigError, TrainingError
from mdm.train.targets import MEASURES, TargetSettings
from mdm.train.teachers.kinds import TARGETS, asks_student, check_target

X0 = [0, 3, 1, 4, 2, 2]
BLIND = {"left", "mc_literal"}  # to what stands to the right
KINDS = pytest.mark.parametrize("kind", TARGETS)


@pytest.fixture(scope="module")
def model():
    return tiny.toy_ar(V)


def with_student(x0, masked, wanted=None, *, seed=0):
    """A question that any kind can answer."""
    asked = question(x0, masked, wanted, seed=seed)
    random = torch.Generator().manual_seed(seed)
    proposals = random_proposals(int(asked.masked_BL.sum()), random)
    return question(x0, masked, wanted, seed=seed, proposals=proposals)


# --- what any of them must do -----------------------------------------------------------------------


@KINDS
def test_answers_are_distributions_in_the_order_of_the_positions(kind, model):
    asked = with_student([X0, X0], [[1, 2, 5], [3]])
    targets = ask(model, asked, kind, top_k=3, candidates=3)
    assert len(targets) == 4
    total_N = dense(targets).sum(1).float() + targets.tail_mass_N
    torch.testing.assert_close(total_N, torch.ones(4))
    assert targets.token_ids_NK.shape[1] <= 3
    assert targets.measures.keys() <= MEASURES.keys()
    assert all(values.shape == (4,) for values in targets.measures.values())
    assert all(values.dtype == torch.float32 for values in targets.measures.values())


@KINDS
def test_asking_twice_gives_the_same(kind, model):
    asked = with_student([X0], [1, 2, 4])
    first, second = (ask(model, asked, kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


@KINDS
def test_the_last_position_is_left_only_for_every_kind(kind, model):
    """One mask, nothing to its right: all kinds agree."""
    found_V = dense(ask(model, with_student([X0], [5]), kind))[0]
    want_V = oracles.left_only(tiny.next_log_probs(model), X0, 5)
    torch.testing.assert_close(found_V, want_V, **EXACT)


@KINDS
def test_a_token_behind_the_block_changes_nothing_and_one_inside_does(kind, model):
    """Many fills, so that the change is not lost in the draws (which are the same)."""
    options = {"block": 4, "fills": 200}
    inside, behind = [*X0[:3], (X0[3] + 1) % V, *X0[4:]], [*X0[:4], (X0[4] + 1) % V, X0[5]]
    base, near, far = (
        dense(ask(model, with_student([x], [1, 2]), kind, **options)) for x in (X0, inside, behind)
    )
    torch.testing.assert_close(far, base)
    assert (total_variation(near[1], base[1]) > 0.02) == (kind not in BLIND)


@KINDS
def test_where_both_sides_count_the_blind_kinds_are_far_off(kind, model):
    """One mask in the middle, mean over draws: .1 and more from the truth, or right."""
    asked = with_student([X0] * 12, [2])
    mean_V = dense(ask(model, asked, kind, fills=600)).mean(0)
    q_V = oracles.full_conditional(tiny.next_log_probs(model), X0, 2, V, start=1)
    if kind in BLIND:
        assert total_variation(mean_V, q_V) > 0.1
    else:
        assert total_variation(mean_V, q_V) < 0.03


# --- decoding in any order ---------------------------------------------------------------------------

WORDS, LENGTH = 3, 4  # the first token is given, three are decoded


@pytest.fixture(scope="module")
def language():
    """A teacher, all texts, and their probabilities."""
    model = tiny.toy_ar(WORDS, seed=2)
    texts_NL, log_joint_N = oracles.ar_log_joint(tiny.next_log_probs(model), LENGTH - 1, WORDS, [0])
    texts = [[0, *text] for text in texts_NL.tolist()]
    return model, texts, log_joint_N.exp()


def decoded(language, kind, order, **settings):
    """The law of texts of a perfect student of these targets, unmasked in this order, one at a time.

    In a state it has the mean target over the teacher's texts that look like it.
    """
    model, texts, share_N = language
    law_N = torch.ones(len(texts), dtype=torch.float64)
    for step, position in enumerate(order):
        masked = sorted(order[step:])
        asked = with_student(texts, masked, [position])
        p_NV = dense(ask(model, asked, kind, candidates=WORDS, **settings), WORDS)
        for n, text in enumerate(texts):
            alike = [m for m, other in enumerate(texts)
                     if all(other[i] == text[i] for i in range(LENGTH) if i not in masked)]  # fmt: skip
            student_V = (share_N[alike, None] * p_NV[alike]).sum(0) / share_N[alike].sum()
            law_N[n] *= student_V[text[position]]
    return law_N


ORDERS = list(itertools.permutations((1, 2, 3)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_right_aware_targets_decode_to_the_teachers_joint_in_every_order(order, language):
    law_N = decoded(language, "suffix", order)
    assert total_variation(law_N, language[2]) < 1e-5
    # Many fills of each text come near, too.
    law_N = decoded(language, "i_sir", order, fills=60)
    assert total_variation(law_N, language[2]) < 0.05


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_left_only_targets_decode_to_the_joint_from_left_to_right_only(order, language):
    """In other orders what was written on the right is not heard."""
    distance = total_variation(decoded(language, "left", order), language[2])
    if order == (1, 2, 3):
        assert distance < 1e-5
    else:
        assert distance > 0.05


# --- settings ------------------------------------------------------------------------------------------


def test_more_candidates_than_tokens_are_refused():
    for settings in (
        {"candidates": 60},
        {"candidates": 50, "tail_draws": 1},
        {"candidates": 1, "tail_draws": 50},
    ):
        with pytest.raises(ConfigError, match=r"candidates and tail_draws ask for \d+.*has 50"):
            check_target(TargetSettings(kind="suffix", **settings), 50)
    check_target(TargetSettings(kind="suffix", candidates=50), 50)
    check_target(TargetSettings(kind="suffix", candidates=40, tail_draws=10), 50)
    check_target(TargetSettings(kind="smc", candidates=60, fills=100), 50)  # not its setting


def test_a_misspelt_kind():
    with pytest.raises(ConfigError, match=r"target\.kind.*i_sr.*i_sir"):
        check_target(TargetSettings(kind="i_sr"), 50)


def test_who_asks_the_student():
    assert asks_student(TargetSettings(kind="student"))
    assert asks_student(TargetSettings(kind="suffix", student_candidates=2))
    for kind in set(TARGETS) - {"student"}:
        assert not asks_student(TargetSettings(kind=kind))
    assert not asks_student(TargetSettings(kind="left", student_candidates=2))


# --- broken teachers -----------------------------------------------------------------------------------


@KINDS
def test_logits_that_are_no_numbers_are_an_error_for_every_kind(kind):
    model = tiny.toy_ar(V)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = math.nan
    with pytest.raises(TrainingError, match="NaN"):
        ask(model, with_student([X0], [5]), kind)


@KINDS
def test_an_impossible_right_side_leaves_the_left_only_target(kind, model):
    """The teacher never says 4, but a visible token is one."""
    targets = ask(ar_teacher(model, mask_id=4), with_student([X0], [1, 2]), kind)
    assert not dense(targets).isnan().any()
    torch.testing.assert_close(dense(targets).sum(1), torch.ones(2).double())
    if kind not in BLIND:
        assert targets.measures["fell_back"].tolist() == [1, 1]
