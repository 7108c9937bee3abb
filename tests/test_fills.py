"""Monte-Carlo targets: equal to the slow definitions draw by draw, and those against enumeration.

First the fast code gives what `oracles` gives with the same uniform numbers. Then the expectation of
the slow estimates is summed over everything that can be drawn. Both together are the claim.
Shapes: V vocabulary, N positions, K fills.
"""

import dataclasses
import math

import oracles
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_run import ar_teacher
from tiny_targets import (
    EXACT,
    SLOW,
    V,
    ask,
    assert_equal_to_slow,
    cut_teacher,
    dense,
    expected,
    posterior,
    question,
    random_question,
    total_variation,
)

from mdm.errors import TrainingError
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.fills import distinct, draw_tokens, ess, inverse_cdf
from mdm.train.teachers.tree import Branch

X0 = [0, 3, 1, 4, 2, 2]
LIMITS = [
    {},
    {"block": 3},
    {"window": 2},
    {"fill": "span"},
    {"block": 4, "window": 1, "fill": "span"},
]


@pytest.fixture(scope="module")
def model():
    return tiny.toy_ar(V)


@pytest.fixture(scope="module")
def log_probs(model):
    return tiny.next_log_probs(model)


@pytest.fixture(scope="module")
def surprising():
    """A teacher whose fills differ so much in weight that they are often drawn anew."""
    return tiny.tiny_model("llama", V, layers=1, hidden=32, seed=3, dtype=torch.float64)


# --- the fast code is the slow definition ---------------------------------------------------------


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", SLOW)
def test_equals_the_slow_definition(kind, limits, model, log_probs):
    for seed in range(4):
        asked = random_question(seed)
        slow = expected(log_probs, asked, kind, fills=1 + 2 * seed, **limits)
        assert_equal_to_slow(ask(model, asked, kind, fills=1 + 2 * seed, **limits), slow)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3"])
@pytest.mark.parametrize("kind", ["i_sir", "csmc"])
def test_families(kind, family):
    # Gemma's logits are capped after the head, so it goes the way without a plain head.
    capped = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    model = tiny.tiny_model(family, V, layers=1, hidden=16, dtype=torch.float64, **capped)
    assert ar_teacher(model).plain_head == (family != "gemma3")
    for seed in range(3):
        asked = random_question(seed)
        slow = expected(tiny.next_log_probs(model), asked, kind, fills=3)
        assert_equal_to_slow(ask(model, asked, kind, fills=3), slow)


@pytest.mark.parametrize("kind", ["smc", "csmc"])
def test_fills_are_drawn_anew_as_in_the_slow_definition(kind, surprising):
    log_probs = tiny.next_log_probs(surprising)
    resampled = 0
    for seed, fills in enumerate((3, 5, 20, 8)):
        asked = random_question(seed, rows=4, length=12, rate=0.4)
        slow = expected(log_probs, asked, kind, fills=fills)
        assert_equal_to_slow(ask(surprising, asked, kind, fills=fills), slow)
        resampled += sum(estimate.resampled for estimate in slow)
    assert resampled > 10


@pytest.mark.parametrize("kind", SLOW)
def test_a_teacher_with_other_tokens_and_a_mask_among_them(kind, log_probs, model):
    asked = random_question(7, vocab_size=3)
    teacher = ar_teacher(model, num_tokens=4, mask_id=3)
    slow = expected(log_probs, asked, kind, fills=4, num_tokens=4, mask_id=3)
    targets = ask(teacher, asked, kind, fills=4, temperature=1.0)
    assert_equal_to_slow(targets, slow)
    assert not dense(targets)[:, 3:].any()


@pytest.mark.parametrize("kind", SLOW)
def test_a_temperature_sharpens_the_finished_target(kind, model, log_probs):
    """The fills are the same at every temperature."""
    asked = random_question(3)
    for temperature in (0.5, 2.0):
        slow = expected(log_probs, asked, kind, fills=4)
        targets = ask(model, asked, kind, fills=4, temperature=temperature)
        assert_equal_to_slow(targets, slow, temperature=temperature)
        assert targets.temperature == temperature


@pytest.mark.parametrize("kind", SLOW)
def test_nothing_asked_for(kind, model):
    for asked in (question([X0], []), question([X0, X0], [[1, 2], []], [[], []])):
        targets = ask(model, asked, kind)
        assert len(targets) == 0
        assert targets.token_ids_NK.ndim == 2


@pytest.mark.parametrize("kind", SLOW)
def test_a_row_is_its_key_and_does_not_depend_on_the_batch(kind, model):
    asked = random_question(4, rows=4)
    together = dense(ask(model, asked, kind, fills=3))
    parts = []
    for row in range(4):
        parts.append(dense(ask(model, asked.rows(slice(row, row + 1)), kind, fills=3)))
    torch.testing.assert_close(together, torch.cat(parts), **EXACT)
    again = dataclasses.replace(asked, keys=tuple((9, *key) for key in asked.keys))
    assert not torch.equal(together, dense(ask(model, again, kind, fills=3)))


@pytest.mark.parametrize("kind", SLOW)
def test_a_wanted_position_does_not_depend_on_what_else_is_asked(kind, model):
    whole = dense(ask(model, question([X0], [1, 2, 4]), kind, fills=3))
    for row, position in enumerate((1, 2, 4)):
        alone = dense(ask(model, question([X0], [1, 2, 4], [position]), kind, fills=3))
        torch.testing.assert_close(alone, whole[row : row + 1], **EXACT)


def test_top_k_and_top_p_reach_the_sparse_form(model):
    whole = dense(ask(model, question([X0], [1, 2, 4]), "importance", fills=64))
    cut = ask(model, question([X0], [1, 2, 4]), "importance", fills=64, top_k=1)
    torch.testing.assert_close(cut.tail_mass_N.double(), 1 - whole.amax(1), **EXACT)
    nucleus = ask(model, question([X0], [1, 2, 4]), "importance", fills=64, top_p=0.3)
    assert (dense(nucleus).sum(1) - 1).abs().max() < 1e-5
    assert ((dense(nucleus) > 0).sum(1) < (whole > 0).sum(1)).any()


def test_says_what_it_conditioned_on(model):
    for kind, limits, words in (
        ("smc", {}, "left+right(document)"),
        ("i_sir", {"window": 3, "block": 4}, "left+right(window 3, block 4)"),
        ("mc_literal", {}, "left, masks filled"),
    ):
        assert ask(model, question([X0], [2]), kind, **limits).conditioned_on == words
        assert ask(model, question([X0], []), kind, **limits).conditioned_on == words


# --- what the estimates are on average -------------------------------------------------------------

TABLE_V = 3
TEXT = [0, 2, 1, 0, 2]  # the first token is given


@pytest.fixture(scope="module", params=[4, 7])
def table(request):
    return tiny.table_ar(TABLE_V, seed=request.param, concentration=0.6)


def mean(values):
    """Σ probability · value over all outcomes."""
    return sum(probability * value for probability, value in values)


def mean_target(estimate, log_probs, text, masked, position, fills, **options):
    """E[target] over everything that can be drawn, the text given."""
    holes, end = oracles.limits(masked, position, len(text))
    runs = oracles.outcomes(
        lambda choose: estimate(log_probs, text, holes, position, end, fills, choose, **options)
    )
    return mean((probability, run.target_V) for probability, run in runs)


def texts_of(log_probs, text, masked):
    """The ways to fill the masks, with their posterior probabilities."""
    fills = oracles.enumerate_fills(log_probs, text, masked, TABLE_V, start=1)
    log_joints = torch.tensor([fill.log_joint for fill in fills], dtype=torch.float64)
    weights = log_joints.softmax(0).tolist()
    return list(zip(weights, [list(fill.tokens) for fill in fills], strict=True))


def mean_over_texts(estimate, log_probs, text, masked, position, fills, **options):
    """The same, and over the text as a teacher sample given what is visible."""
    return mean(
        (p, mean_target(estimate, log_probs, filled, masked, position, fills, **options))
        for p, filled in texts_of(log_probs, text, masked)
    )


@pytest.mark.parametrize("fills", [1, 2, 3])
@pytest.mark.parametrize("masked", [[2], [1, 3], [2, 4]], ids=str)
def test_i_sir_is_exactly_unbiased_for_every_number_of_fills(table, masked, fills):
    for position in masked:
        q_V = posterior(table, TEXT, masked, position, TABLE_V)
        for heads in (True, False):
            estimate = oracles.i_sir_estimate
            found = mean_over_texts(estimate, table, TEXT, masked, position, fills, heads=heads)
            assert total_variation(found, q_V) < 1e-12


@pytest.mark.parametrize(("fills", "threshold"), [(2, 1.01), (3, 0.5)])
def test_conditional_smc_is_exactly_unbiased(table, fills, threshold):
    """With the rule of fills.py, by which two fills are never drawn anew, and drawing anew always."""
    masked = [1, 3]
    for position in masked:
        q_V = posterior(table, TEXT, masked, position, TABLE_V)
        options = {"threshold": threshold}
        found = mean_over_texts(
            oracles.csmc_estimate, table, TEXT, masked, position, fills, **options
        )
        assert total_variation(found, q_V) < 1e-12


@pytest.mark.parametrize(("fills", "threshold"), [(2, 1.01), (3, 0.5)])
def test_conditional_smc_leaves_the_posterior_as_it_is(table, fills, threshold):
    """π P = π, where P goes from the text to one of the fills, drawn by weight."""
    masked, events = [1, 3], 0
    texts = texts_of(table, TEXT, masked)
    moved = {tuple(text): 0.0 for _, text in texts}
    for p, text in texts:
        runs = oracles.outcomes(
            lambda choose, text=text: oracles.csmc_estimate(
                table, text, masked, 1, len(text), fills, choose, threshold=threshold
            )
        )
        for probability, run in runs:
            events += run.resampled
            for filled, weight in zip(run.texts, run.weights, strict=True):
                moved[tuple(filled)] += p * probability * weight / math.fsum(run.weights)
    assert events > 0
    for p, text in texts:
        assert moved[tuple(text)] == pytest.approx(p, abs=1e-12)


def test_the_rule_draws_anew_somewhere_in_these_tables(table):
    runs = oracles.outcomes(
        lambda choose: oracles.csmc_estimate(table, TEXT, [1, 3], 1, 5, 3, choose)
    )
    assert any(run.resampled for _, run in runs)


@pytest.mark.parametrize(
    ("estimate", "fills", "options"),
    [
        (oracles.importance_estimate, 1, {}),
        (oracles.importance_estimate, 2, {}),
        (oracles.smc_estimate, 2, {"threshold": 1.01}),
        (oracles.smc_estimate, 3, {}),
    ],
)
def test_the_evidence_estimate_is_unbiased(table, estimate, fills, options):
    masked, events = [1, 3], 0
    total = 0.0
    for probability, run in oracles.outcomes(
        lambda choose: estimate(table, TEXT, masked, 1, 5, fills, choose, **options)
    ):
        total += probability * run.evidence
        events += run.resampled
    fill_log_joints = [f.log_joint for f in oracles.enumerate_fills(table, TEXT, masked, 3, 1)]
    assert total == pytest.approx(math.fsum(map(math.exp, fill_log_joints)), rel=1e-12)
    assert (events > 0) == (estimate is oracles.smc_estimate)


def two_fills(log_probs, text, masked, position):
    """E of self-normalised importance sampling with two fills, as a double sum."""
    fills = oracles.enumerate_fills(log_probs, text, masked, TABLE_V, start=1)
    total_V = torch.zeros(TABLE_V, dtype=torch.float64)
    for a in fills:
        for b in fills:
            w, v = math.exp(a.log_weight), math.exp(b.log_weight)
            drawn = math.exp(a.log_proposal + b.log_proposal)
            total_V[a.tokens[position]] += drawn * w / (w + v)
            total_V[b.tokens[position]] += drawn * v / (w + v)
    return total_V


def test_importance_sampling_with_two_fills_is_its_double_sum_and_is_biased(table):
    masked = [1, 3]
    found_V = mean_target(oracles.importance_estimate, table, TEXT, masked, 1, 2)
    assert total_variation(found_V, two_fills(table, TEXT, masked, 1)) < 1e-12
    assert total_variation(found_V, posterior(table, TEXT, masked, 1, TABLE_V)) > 0.01


def test_the_bias_of_importance_sampling_falls_with_the_fills(table):
    q_V = posterior(table, TEXT, [1], 1, TABLE_V)
    bias = [
        total_variation(mean_target(oracles.importance_estimate, table, TEXT, [1], 1, k), q_V)
        for k in (1, 2, 5)
    ]
    assert bias[0] > bias[1] > bias[2]
    assert bias[2] < 0.7 * bias[0]


def mean_of_many(model, masked, kind, fills, count=300, **changes):
    """(N, V) mean over rows with the same text and other draws, and its standard error."""
    asked = question([X0] * count, masked)
    p_NV = dense(ask(model, asked, kind, fills=fills, **changes)).view(count, len(masked), V)
    return p_NV.mean(0), p_NV.std(0) / math.sqrt(count)


def test_the_fast_code_with_two_fills_has_the_enumerated_expectation(model, log_probs):
    masked = [2, 5]
    for kind, estimate in (
        ("importance", oracles.importance_estimate),
        ("i_sir", oracles.i_sir_estimate),
    ):
        mean_NV, error_NV = mean_of_many(model, masked, kind, 2)
        for row, position in enumerate(masked):
            want_V = mean_target(estimate, log_probs, X0, masked, position, 2)
            assert ((mean_NV[row] - want_V).abs() < 5 * error_NV[row] + 1e-5).all()


@pytest.mark.parametrize("kind", ["importance", "smc", "i_sir", "csmc"])
def test_many_fills_are_the_posterior(kind, model, log_probs):
    masked = [1, 3, 5]
    mean_NV, error_NV = mean_of_many(model, masked, kind, 400, count=20)
    for row, position in enumerate(masked):
        q_V = posterior(log_probs, X0, masked, position)
        assert ((mean_NV[row] - q_V).abs() < 5 * error_NV[row] + 4e-3).all()


@pytest.mark.parametrize("kind", ["importance", "smc", "i_sir", "csmc"])
def test_everything_masked_is_the_marginal_of_the_teacher(kind, model, log_probs):
    masked = [1, 2, 3]
    asked = question([X0[:4]] * 8, masked)
    targets = ask(model, asked, kind, fills=300)
    p_NV = dense(targets).view(8, 3, V).mean(0)
    for row, position in enumerate(masked):
        q_V = posterior(log_probs, X0[:4], masked, position)
        assert total_variation(p_NV[row], q_V) < 0.02
    torch.testing.assert_close(p_NV[0], oracles.left_only(log_probs, X0, 1), **EXACT)
    assert (targets.measures["ess"] - 300).abs().max() < 1e-2


# --- Rao-Blackwell ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["i_sir", "csmc"])
def test_one_fill_is_the_hard_target_or_the_left_only_one(kind, model, log_probs):
    """One-hot where evidence stands to the right, the next-token head where none does."""
    found = dense(ask(model, question([X0], [1, 3, 5]), kind, fills=1))
    assert found[:2].tolist() == F.one_hot(torch.tensor([X0[1], X0[3]]), V).tolist()
    torch.testing.assert_close(found[2], oracles.left_only(log_probs, X0, 5), **EXACT)


@pytest.mark.parametrize("kind", SLOW)
def test_masks_after_the_last_visible_token_are_no_evidence(kind, model):
    """What they hold changes nothing, except through the fills' own true tokens."""
    other = [*X0[:4], (X0[4] + 1) % V, (X0[5] + 2) % V]
    answers = [dense(ask(model, question([x], [2, 4, 5], [2, 4]), kind)) for x in (X0, other)]
    torch.testing.assert_close(*answers)


def spread(log_probs, masked, position, fills, heads):
    """Σ_v variance of the target, over texts and draws."""
    holes, end = oracles.limits(masked, position, len(TEXT))
    first, second = 0.0, 0.0
    for p, text in texts_of(log_probs, TEXT, masked):
        for probability, run in oracles.outcomes(
            lambda choose, text=text: oracles.i_sir_estimate(
                log_probs, text, holes, position, end, fills, choose, heads=heads
            )
        ):
            first = first + p * probability * run.target_V
            second = second + p * probability * run.target_V**2
    return float((second - first**2).sum())


@pytest.mark.parametrize("fills", [1, 2])
def test_averaged_heads_vary_less_than_averaged_tokens(table, fills):
    rao_blackwell, tokens = (spread(table, [2, 4], 4, fills, heads) for heads in (True, False))
    assert rao_blackwell < 0.9 * tokens


# --- what is not true --------------------------------------------------------------------------------


def test_the_literal_recipe_is_biased_for_every_number_of_fills(model, log_probs):
    """It converges to the law of forced decoding, .1 and more from the posterior."""
    masked = [1, 2, 4]
    few_NV, error_NV = mean_of_many(model, masked, "mc_literal", 2)
    many_NV, _ = mean_of_many(model, masked, "mc_literal", 2000, count=4)
    fills = oracles.enumerate_fills(log_probs, X0, masked, V, start=1)
    for row, position in enumerate(masked):
        forced_V = oracles.marginal_of_fills(fills, [f.log_proposal for f in fills], position, V)
        q_V = posterior(log_probs, X0, masked, position)
        assert total_variation(forced_V, q_V) > 0.1
        assert total_variation(many_NV[row], forced_V) < 0.02
        assert total_variation(many_NV[row], q_V) > 0.1
        # Two fills have the same expectation as two thousand: nothing is gained.
        assert ((few_NV[row] - forced_V).abs() < 5 * error_NV[row] + 1e-5).all()


def test_one_literal_fill_is_not_even_left_only(model, log_probs):
    """Left-only stands on the true tokens; the literal recipe on fills of its own."""
    mean_NV, _ = mean_of_many(model, [1, 2], "mc_literal", 1)
    assert total_variation(mean_NV[0], oracles.left_only(log_probs, X0, 1)) < 1e-5
    assert total_variation(mean_NV[1], oracles.left_only(log_probs, X0, 2)) > 0.02


def test_unweighted_histograms_and_posterior_heads_are_biased(table):
    """Weights without full conditionals do not help either: .02 and more on average."""
    masked = [1, 3]
    fills = oracles.enumerate_fills(table, TEXT, masked, TABLE_V, start=1)
    for position in masked:
        q_V = posterior(table, TEXT, masked, position, TABLE_V)
        forced = [fill.log_proposal for fill in fills]
        histogram_V = oracles.marginal_of_fills(fills, forced, position, TABLE_V)
        heads_V = mean(
            (p, oracles.left_only(table, text, position))
            for p, text in texts_of(table, TEXT, masked)
        )
        assert total_variation(histogram_V, q_V) > 0.02
        assert total_variation(heads_V, q_V) > 0.02


def test_a_reference_that_is_no_teacher_sample_biases_two_fills(table):
    """Text of somebody else: uniform tokens at the masks. Many fills repair it, two do not."""
    q_V = posterior(table, TEXT, [1], 1, TABLE_V)
    bias = []
    for fills in (1, 2, 5):
        found_V = mean(
            (
                1 / TABLE_V,
                mean_target(oracles.i_sir_estimate, table, [0, v, *TEXT[2:]], [1], 1, fills),
            )
            for v in range(TABLE_V)
        )
        bias.append(total_variation(found_V, q_V))
    assert bias[0] > bias[1] > 0.02
    assert bias[2] < bias[1]


def test_masks_that_look_at_the_text_bias_every_estimate(table):
    """Only tokens of one class are masked: what is masked says which class it is."""
    masked, position, inside = [1], 1, {0, 1}
    chosen = [(p, text) for p, text in texts_of(table, TEXT, masked) if text[position] in inside]
    share = math.fsum(p for p, _ in chosen)
    found_V = mean(
        (p / share, mean_target(oracles.i_sir_estimate, table, text, masked, position, 2))
        for p, text in chosen
    )
    assert total_variation(found_V, posterior(table, TEXT, masked, position, TABLE_V)) > 0.02


def test_fills_at_another_temperature_need_another_weight(table):
    """Drawn from p^(1/T) and weighed by the evidence alone: neither q nor q^(1/T)."""

    def tempered(prefix):
        return (table(prefix) / 2).log_softmax(-1)

    masked, position = [1, 3], 1
    fills = oracles.enumerate_fills(table, TEXT, masked, TABLE_V, start=1)
    softer = oracles.enumerate_fills(tempered, TEXT, masked, TABLE_V, start=1)
    weights = [a.log_proposal + b.log_weight for a, b in zip(softer, fills, strict=True)]
    found_V = oracles.marginal_of_fills(fills, weights, position, TABLE_V)
    q_V = posterior(table, TEXT, masked, position, TABLE_V)
    assert total_variation(found_V, q_V) > 0.02
    assert total_variation(found_V, (q_V.log() / 2).softmax(-1)) > 0.02
    corrected = [f.log_proposal - s.log_proposal for f, s in zip(fills, softer, strict=True)]
    right_V = oracles.marginal_of_fills(
        fills, [w + c for w, c in zip(weights, corrected, strict=True)], position, TABLE_V
    )
    assert total_variation(right_V, q_V) < 1e-12


# --- degenerate weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["importance", "smc", "i_sir", "csmc"])
def test_where_every_fill_is_impossible_left_only_stands_in_and_is_counted(kind, model, log_probs):
    """The teacher never says 4, but a visible token is one: no fill can run into it."""
    teacher = ar_teacher(model, mask_id=4)
    targets = ask(teacher, question([X0, [0, 3, 1, 1, 2, 2]], [1, 2, 4, 5]), kind, fills=4)
    cut = cut_teacher(log_probs, V, mask_id=4)
    # Position 3 of the first row is the visible 4, so nothing after it has a weight either.
    assert targets.measures["fell_back"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert targets.measures["ess"].isnan().tolist() == [True] * 4 + [False] * 4
    want = torch.stack([oracles.left_only(cut, X0, i) for i in (1, 2, 4, 5)])
    torch.testing.assert_close(dense(targets)[:4], want, **EXACT)
    assert not dense(targets).isnan().any()


def test_an_impossible_token_behind_the_block_hurts_nobody(model):
    targets = ask(ar_teacher(model, mask_id=4), question([X0], [1, 2]), "smc", block=3)
    assert targets.measures["fell_back"].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["importance", "smc", "i_sir", "csmc"])
def test_probabilities_that_are_no_numbers_are_an_error(kind):
    model = tiny.toy_ar(V)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = math.nan
    with pytest.raises(TrainingError, match=r"NaN.*teacher\.dtype=fp32"):
        ask(model, question([X0], [2]), kind)


# --- small parts -------------------------------------------------------------------------------------


def test_inverse_cdf_is_the_slow_one_and_never_gives_an_impossible_index():
    random = torch.Generator().manual_seed(0)
    probs_NV = torch.rand(200, 6, generator=random, dtype=torch.float64)
    probs_NV = probs_NV * (torch.rand(200, 6, generator=random) < 0.6)
    probs_NV[:, 2] += 0.01
    u_NM = torch.rand(200, 5, generator=random, dtype=torch.float64)
    u_NM[:, 0], u_NM[:, 1] = 0.0, 1 - 2**-53
    found_NM = inverse_cdf(probs_NV, u_NM)
    for probs, us, indices in zip(probs_NV.tolist(), u_NM.tolist(), found_NM.tolist(), strict=True):
        assert indices[2:] == [oracles.inverse_cdf(probs, u) for u in us[2:]]
        assert all(probs[index] > 0 for index in indices)


def test_a_token_for_each_fill():
    log_p_KV = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]], dtype=torch.float64).log()
    for u_K, tokens in (([0.0, 0.0], [0, 2]), ([0.49, 0.5], [0, 2]), ([0.51, 0.99], [1, 2])):
        assert draw_tokens(log_p_KV, torch.tensor(u_K, dtype=torch.float64)).tolist() == tokens


def test_the_head_is_asked_once_for_equal_fills(model, monkeypatch):
    """Before the first draw all fills are one, and after it there are at most V of them."""
    rows, head = [], ARTeacher.head
    monkeypatch.setattr(
        ARTeacher, "head", lambda self, x_ND: rows.append(len(x_ND)) or head(self, x_ND)
    )
    ask(model, question([X0], [1, 3, 5]), "importance", fills=500)
    first, visible, second, *_ = rows
    assert first == 1
    assert visible <= V
    assert second <= V
    branches = [Branch(0, 1) for _ in range(3)]
    found = distinct([branches[i] for i in (1, 0, 1, 2, 0)])
    assert found == ([0, 1, 3], [0, 1, 0, 2, 1])


def test_effective_number_of_fills():
    assert ess(torch.zeros(7).double()) == pytest.approx(7)
    assert ess(torch.tensor([1000.0, -math.inf, -math.inf]).double()) == pytest.approx(1)
    assert ess(torch.tensor([-2000.0, -2000.0, -3000.0]).double()) == pytest.approx(2)
    weights = [0.2, 0.5, 0.1]
    assert ess(torch.tensor(weights).log()) == pytest.approx(oracles.effective_number(weights))
