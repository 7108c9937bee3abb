"""The student's marginals as proposal: equal to the slow definition, and that against enumeration.

Shapes: V vocabulary, N positions, M masks, K fills.
"""

import math

import oracles
import pytest
import tiny
import torch
from tiny_run import ar_teacher
from tiny_targets import (
    EXACT,
    V,
    ask,
    assert_equal_to_slow,
    cut_teacher,
    dense,
    expected,
    posterior,
    question,
    random_proposals,
    random_question,
    total_variation,
)

from mdm.errors import TrainingError
from mdm.train.targets import NOT_KEPT, SoftTargets
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.student import mixture_draws

X0 = [0, 3, 1, 4, 2, 2]


@pytest.fixture(scope="module")
def model():
    return tiny.toy_ar(V)


@pytest.fixture(scope="module")
def log_probs(model):
    return tiny.next_log_probs(model)


def proposals_of(log_r_MV):
    """Dense proposals."""
    log_r_MV = torch.as_tensor(log_r_MV)
    ids_MV = torch.arange(log_r_MV.shape[1]).expand(log_r_MV.shape)
    return SoftTargets(ids_MV, log_r_MV, torch.zeros(len(log_r_MV)), 1.0, "visible tokens")


def alike(count):
    """A student without an opinion."""
    return proposals_of(torch.zeros(count, V).log_softmax(-1))


# --- the fast code is the slow definition ----------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block": 3, "uniform_mix": 0.3},
        {"window": 2, "reference": False},
        {"fill": "span", "uniform_mix": 1.0},
        {"block": 4, "window": 1, "fill": "span"},
    ],
    ids=str,
)
def test_equals_the_slow_definition(settings, model, log_probs):
    for seed in range(6):
        asked = random_question(seed, proposals=True)
        slow = expected(log_probs, asked, "student", fills=1 + seed, **settings)
        assert_equal_to_slow(ask(model, asked, "student", fills=1 + seed, **settings), slow)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3"])
def test_families(family):
    capped = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    model = tiny.tiny_model(family, V, layers=1, hidden=16, dtype=torch.float64, **capped)
    for seed in range(3):
        asked = random_question(seed, proposals=True)
        slow = expected(tiny.next_log_probs(model), asked, "student", fills=4)
        assert_equal_to_slow(ask(model, asked, "student", fills=4), slow)


def test_proposed_tokens_that_the_teacher_lacks_are_left_out(model, log_probs):
    """Tokens beyond its vocabulary, and the student's mask: the rest is renormalised."""
    teacher = ar_teacher(model, num_tokens=4, mask_id=2)
    for seed in range(4):
        asked = random_question(seed, vocab_size=2, proposals=True)
        slow = expected(log_probs, asked, "student", fills=6, num_tokens=4, mask_id=2)
        targets = ask(teacher, asked, "student", fills=6)
        assert_equal_to_slow(targets, slow)
        assert not dense(targets)[:, [2, 4]].any()


def test_a_temperature_sharpens_the_finished_target(model, log_probs):
    asked = random_question(3, proposals=True)
    slow = expected(log_probs, asked, "student", fills=4)
    targets = ask(model, asked, "student", fills=4, temperature=2.0)
    assert_equal_to_slow(targets, slow, temperature=2.0)


def test_which_proposal_belongs_to_a_position(model, log_probs):
    """Proposals are for all masks of all rows, answers for the wanted ones."""
    proposals = random_proposals(7, torch.Generator().manual_seed(2))
    masked, wanted = [[1, 2, 4], [2, 3, 4, 5]], [[2], [4]]
    asked = question([X0, X0[::-1]], masked, wanted, proposals=proposals)
    slow = expected(log_probs, asked, "student", fills=5)
    assert_equal_to_slow(ask(model, asked, "student", fills=5), slow)


def test_nothing_asked_for(model):
    targets = ask(model, question([X0], [], proposals=alike(0)), "student")
    assert len(targets) == 0
    assert targets.conditioned_on == "left+right(document)"


def test_the_student_must_have_been_asked(model):
    with pytest.raises(AssertionError, match="student was not asked"):
        ask(model, question([X0], [2]), "student")


def test_one_parallel_forward_for_all_rows_and_regions(model, monkeypatch):
    calls, call = [], ARTeacher.call

    def counted(self, x_BL, outputs_BL, cache, **layout):
        calls.append(int(outputs_BL.sum()))
        return call(self, x_BL, outputs_BL, cache, **layout)

    monkeypatch.setattr(ARTeacher, "call", counted)
    asked = question([X0, X0], [1, 2, 4], proposals=alike(6))
    ask(model, asked, "student", fills=8, block=3)
    assert len(calls) == 2  # the clean text, and the fills
    assert calls[1] <= 2 * 8 * (1 + 1)  # tokens 1; 4: the last one of a block is fed to nobody
    del calls[:]
    ask(model, question([X0], [5], proposals=alike(1)), "student", fills=8)
    assert len(calls) == 1  # nothing to weigh


# --- the draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("mask_id", [None, 1])
def test_draws_have_the_probability_of_the_mixture(mix, mask_id, model):
    """Over an even grid of uniform numbers every token has its share."""
    teacher = ar_teacher(model, num_tokens=4, mask_id=mask_id)
    slots = [(3, 0.5), (0, 0.0), (2, 0.3), (0, 0.2)]
    ids_HS = torch.tensor([[token for token, _ in slots]])
    log_r_HS = torch.tensor([[prob for _, prob in slots]], dtype=torch.float64).log()
    size = 2**14
    u_KH = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) / size
    mix_H = torch.tensor([mix], dtype=torch.float64)
    tokens_K = mixture_draws(ids_HS, log_r_HS, u_KH, mix_H, teacher)[:, 0]
    allowed = [v for v in range(4) if v != mask_id]
    want = oracles.mixture(slots, allowed, mix)
    share = tokens_K.bincount(minlength=4) / size
    for v in range(4):
        assert float(share[v]) == pytest.approx(want.get(v, 0.0), abs=2e-3)
    by_hand = [oracles.mixture_draw(slots, allowed, mix, u) for u in u_KH[::97, 0].tolist()]
    assert tokens_K[::97].tolist() == by_hand


def test_the_largest_uniform_number_is_no_trap(model):
    ids_HS, log_r_HS = torch.tensor([[3, 0]]), torch.tensor([[0.0, NOT_KEPT]]).double()
    u_KH = torch.tensor([[1 - 2**-53], [0.06]], dtype=torch.float64)
    for mix in (0.01, 0.05, 0.055):
        mix_H = torch.tensor([mix], dtype=torch.float64)
        found_K = mixture_draws(ids_HS, log_r_HS, u_KH, mix_H, ar_teacher(model))[:, 0]
        assert found_K.tolist() == [3, 3]


# --- what the estimate is on average -----------------------------------------------------------------

TABLE_V, TEXT = 3, [0, 2, 1, 0, 2]
R = {1: [0.2, 0.5, 0.3], 2: [0.6, 0.1, 0.3], 3: [0.1, 0.1, 0.8], 4: [0.3, 0.4, 0.3]}


@pytest.fixture(scope="module", params=[4, 7])
def table(request):
    return tiny.table_ar(TABLE_V, seed=request.param, concentration=0.6)


def mean_target(table, text, masked, position, fills, **options):
    holes, end = oracles.limits(masked, position, len(text))
    runs = oracles.outcomes(
        lambda choose: oracles.student_estimate(
            table, text, holes, position, end, fills, choose, proposals=R, **options
        )
    )
    return sum(probability * run.target_V for probability, run in runs)


def mean_over_texts(table, masked, position, fills, **options):
    fills_of_text = oracles.enumerate_fills(table, TEXT, masked, TABLE_V, start=1)
    log_joints = torch.tensor([fill.log_joint for fill in fills_of_text], dtype=torch.float64)
    return sum(
        p * mean_target(table, list(fill.tokens), masked, position, fills, **options)
        for p, fill in zip(log_joints.softmax(0), fills_of_text, strict=True)
    )


@pytest.mark.parametrize("fills", [1, 2, 3])
@pytest.mark.parametrize("masked", [[2], [1, 3], [2, 4]], ids=str)
def test_with_the_reference_it_is_exactly_unbiased(table, masked, fills):
    for position in masked:
        q_V = posterior(table, TEXT, masked, position, TABLE_V)
        for heads in (True, False):
            found_V = mean_over_texts(table, masked, position, fills, heads=heads)
            assert total_variation(found_V, q_V) < 1e-12


def test_without_the_reference_it_is_biased_but_less_with_more_fills(table):
    q_V = posterior(table, TEXT, [1], 1, TABLE_V)
    bias = [
        total_variation(mean_target(table, TEXT, [1], 1, fills, reference=False), q_V)
        for fills in (1, 2, 5)
    ]
    assert bias[0] > bias[1] > bias[2]
    assert bias[1] > 0.02


def test_the_mean_weight_is_the_evidence(table):
    """Without the reference: E[p / r] = P(visible)."""
    holes, end = oracles.limits([1, 3], 1, 5)
    runs = oracles.outcomes(
        lambda choose: oracles.student_estimate(
            table, TEXT, holes, 1, end, 2, choose, proposals=R, reference=False
        )
    )
    joints = [f.log_joint for f in oracles.enumerate_fills(table, TEXT, [1, 3], TABLE_V, start=1)]
    total = math.fsum(p * run.evidence for p, run in runs)
    assert total == pytest.approx(math.fsum(map(math.exp, joints)), rel=1e-12)


def test_averaged_heads_vary_less_than_averaged_tokens(table):
    holes, end = oracles.limits([2, 4], 4, 5)
    variance = []
    for heads in (True, False):
        runs = list(oracles.outcomes(
            lambda choose, heads=heads: oracles.student_estimate(
                table, TEXT, holes, 4, end, 2, choose, proposals=R, reference=False, heads=heads
            )
        ))  # fmt: skip
        first = sum(p * run.target_V for p, run in runs)
        variance.append(float(sum(p * (run.target_V - first) ** 2 for p, run in runs).sum()))
    assert variance[0] < variance[1]


@pytest.mark.parametrize("reference", [True, False])
def test_many_fills_are_the_posterior(reference, model, log_probs):
    masked, count = [1, 3, 5], 20
    asked = question([X0] * count, masked, proposals=alike(3 * count))
    targets = ask(model, asked, "student", fills=600, reference=reference)
    p_NV = dense(targets).view(count, 3, V)
    for row, position in enumerate(masked):
        q_V = posterior(log_probs, X0, masked, position)
        error_V = p_NV[:, row].std(0) / math.sqrt(count)
        assert ((p_NV[:, row].mean(0) - q_V).abs() < 5 * error_V + 0.01).all()


def test_proposals_that_are_the_posterior_make_all_weights_equal(model, log_probs):
    """One mask, and hardly any uniform share."""
    q_V = posterior(log_probs, X0, [2], 2)
    asked = question([X0], [2], proposals=proposals_of(q_V.log()[None].float()))
    targets = ask(model, asked, "student", fills=40, uniform_mix=1e-9)
    assert float(targets.measures["ess"]) == pytest.approx(40, abs=1e-3)
    worse = ask(model, question([X0], [2], proposals=alike(1)), "student", fills=40)
    assert float(worse.measures["ess"]) < 30


# --- degenerate proposals ----------------------------------------------------------------------------


def test_the_uniform_share_corrects_a_student_that_excludes_the_truth(model, log_probs):
    """It proposes one token only, and not the text's: nothing is infinite, and the limit is right."""
    wrong_V = torch.full((V,), NOT_KEPT)
    wrong_V[(X0[2] + 1) % V] = 0.0
    count = 40
    asked = question([X0] * count, [2], proposals=proposals_of(wrong_V.expand(count, V)))
    targets = ask(model, asked, "student", fills=600)
    assert targets.log_probs_NK.isnan().sum() == 0
    q_V = posterior(log_probs, X0, [2], 2)
    assert total_variation(dense(targets).mean(0), q_V) < 0.05
    alone = ask(model, asked, "student", fills=1)
    assert (dense(alone)[:, X0[2]] == 1).all()
    assert not alone.measures["fell_back"].any()


def test_a_student_that_proposes_nothing_the_teacher_has(model, log_probs):
    """Then the proposal is the uniform one."""
    outside = SoftTargets(
        torch.tensor([[V, V + 1]]), torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1), 1.0, ""
    )
    targets = ask(model, question([X0], [2], proposals=outside), "student", fills=2000)
    assert total_variation(dense(targets)[0], posterior(log_probs, X0, [2], 2)) < 0.1
    assert float(targets.measures["ess"]) > 200


def test_where_every_fill_is_impossible_left_only_stands_in_and_is_counted(model, log_probs):
    teacher = ar_teacher(model, mask_id=4)
    asked = question([X0, [0, 3, 1, 1, 2, 2]], [1, 2, 5], proposals=alike(6))
    targets = ask(teacher, asked, "student", fills=4)
    assert targets.measures["fell_back"].tolist() == [1, 1, 1, 0, 0, 0]
    assert targets.measures["ess"].isnan().tolist() == [True] * 3 + [False] * 3
    cut = cut_teacher(log_probs, V, mask_id=4)
    want = torch.stack([oracles.left_only(cut, X0, i) for i in (1, 2, 5)])
    torch.testing.assert_close(dense(targets)[:3], want, **EXACT)


def test_probabilities_that_are_no_numbers_are_an_error():
    model = tiny.toy_ar(V)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = math.nan
    with pytest.raises(TrainingError, match="NaN"):
        ask(model, question([X0], [2], proposals=alike(1)), "student")
