"""SoftTargets: which tokens are kept, at what probability, and what is left over; questions; settings."""

import math

import oracles
import pytest
import torch

from mdm.errors import ConfigError
from mdm.train.targets import (
    MEASURES,
    NOT_KEPT,
    Measured,
    Question,
    SoftTargets,
    TargetSettings,
    keep_fills,
    keep_top,
    no_targets,
    stack_targets,
)

OFF = {"top_k": 10**6, "top_p": 1.0, "temperature": 1.0, "conditioned_on": "left"}
V = 12


def scores(seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(4, V, generator=generator)


def kept(scores_NV, **settings):
    return keep_top(scores_NV, **{**OFF, **settings})


def dense(targets, vocab_size=V):
    """(N, V) probabilities of the kept tokens, 0 elsewhere."""
    p_NV = torch.zeros(len(targets), vocab_size)
    return p_NV.scatter_add_(1, targets.token_ids_NK, targets.log_probs_NK.exp())


def nucleus_by_hand(p_V, top_p):
    """Ids of the smallest set of likeliest tokens whose mass reaches top_p."""
    ids, mass = [], 0.0
    for v in p_V.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        ids.append(v)
        mass += float(p_V[v])
    return ids


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_everything_kept_is_the_softmax_without_a_tail(temperature):
    targets = kept(scores(), temperature=temperature)
    torch.testing.assert_close(dense(targets), (scores() / temperature).softmax(-1))
    assert (targets.tail_mass_N == 0).all()
    assert targets.temperature == temperature
    assert len(targets) == 4


@pytest.mark.parametrize("top_k", [1, 3, V - 1])
def test_top_k_keeps_the_likeliest_and_the_tail_is_the_rest(top_k):
    targets = kept(scores(), top_k=top_k, temperature=2.0)
    p_NV = (scores() / 2.0).softmax(-1)
    assert targets.token_ids_NK.shape == (4, top_k)
    for row, ids in enumerate(targets.token_ids_NK.tolist()):
        assert sorted(ids) == sorted(p_NV[row].argsort(descending=True)[:top_k].tolist())
    torch.testing.assert_close(targets.log_probs_NK.exp(), p_NV.gather(-1, targets.token_ids_NK))
    torch.testing.assert_close(targets.tail_mass_N, 1 - targets.log_probs_NK.exp().sum(-1))


def test_a_tiny_tail_is_exact():
    """1 - mass would be 0 or rounding, and the logarithm of it -inf or nonsense."""
    scores_NV = torch.tensor([[0.0, -40.0, -41.0, -60.0]])
    tail = kept(scores_NV, top_k=2).tail_mass_N
    torch.testing.assert_close(tail.log(), torch.tensor([-41.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_p_keeps_the_nucleus_at_temperature_1(top_p, temperature):
    targets = kept(scores(), top_p=top_p, temperature=temperature)
    for row, p_V in enumerate(scores().softmax(-1)):
        ids = nucleus_by_hand(p_V, top_p)
        used = targets.log_probs_NK[row] > -torch.inf
        assert sorted(targets.token_ids_NK[row][used].tolist()) == sorted(ids)
        expected_V = (scores()[row, ids] / temperature).softmax(-1)  # renormalised over the set
        torch.testing.assert_close(dense(targets)[row, ids], expected_V)
    assert (targets.tail_mass_N == 0).all()


def test_top_p_and_top_k_leave_as_tail_what_top_k_cuts_from_the_nucleus():
    targets = kept(scores(), top_p=0.95, top_k=2)
    whole = dense(kept(scores(), top_p=0.95))
    torch.testing.assert_close(targets.tail_mass_N, 1 - whole.topk(2).values.sum(-1))
    assert targets.tail_mass_N.max() > 0.01  # not all nuclei have two tokens or fewer


def test_columns_can_have_names():
    names_NV = torch.randperm(100)[:V].expand(4, V)
    plain, named = kept(scores(), top_k=3), kept(scores(), top_k=3, token_ids_NV=names_NV)
    assert torch.equal(named.token_ids_NK, names_NV.gather(-1, plain.token_ids_NK))
    assert torch.equal(named.log_probs_NK, plain.log_probs_NK)


def test_half_precision_scores_are_raised_first():
    targets = kept(scores().bfloat16(), top_k=3)
    assert targets.log_probs_NK.dtype == targets.tail_mass_N.dtype == torch.float32
    exact = scores().bfloat16().float().softmax(-1).topk(3).values
    torch.testing.assert_close(targets.log_probs_NK.exp(), exact)


def test_columns_of_the_tail_are_never_kept():
    """Their mass is tail, whatever top_k, and it takes part in the temperature."""
    tail_NV = torch.zeros(4, V).bool()
    tail_NV[:, [0, 5]] = True
    p_NV = (scores() / 2.0).softmax(-1)
    for top_k in (3, V):
        targets = kept(scores(), top_k=top_k, temperature=2.0, tail_NV=tail_NV)
        used_NK = targets.log_probs_NK > NOT_KEPT
        assert (used_NK.sum(1) == min(top_k, V - 2)).all()
        assert not (used_NK & torch.isin(targets.token_ids_NK, torch.tensor([0, 5]))).any()
        torch.testing.assert_close(
            targets.log_probs_NK.exp(), p_NV.gather(-1, targets.token_ids_NK) * used_NK
        )
        torch.testing.assert_close(targets.tail_mass_N, 1 - targets.log_probs_NK.exp().sum(1))
        assert (targets.tail_mass_N >= p_NV[:, [0, 5]].sum(1) - 1e-6).all()


def test_impossible_tokens_fill_unused_slots():
    scores_NV = torch.tensor([[0.0, NOT_KEPT, 1.0, NOT_KEPT]])
    targets = kept(scores_NV, top_k=3)
    assert targets.log_probs_NK.isneginf().tolist() == [[False, False, True]]
    assert targets.tail_mass_N.tolist() == [0]
    torch.testing.assert_close(dense(targets, 4), scores_NV.softmax(-1))


def test_no_rows():
    targets = kept(torch.empty(0, V), top_k=3)
    assert len(targets) == 0
    assert targets.token_ids_NK.shape == (0, 3)


# --- fills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equal_fills_are_merged_before_the_temperature(temperature):
    random = torch.Generator().manual_seed(1)
    tokens_NK = torch.randint(V, (4, 30), generator=random)
    log_w_NK = 3 * torch.randn(4, 30, generator=random).double() - 500  # normalised by nobody
    targets = keep_fills(tokens_NK, log_w_NK, **{**OFF, "temperature": temperature})
    for row in range(4):
        weights = (log_w_NK[row] + 500).exp().tolist()
        values = [oracles.one_hot(token, V) for token in tokens_NK[row].tolist()]
        want_V = oracles.averaged(values, weights) ** (1 / temperature)
        found_V = dense(targets)[row].double()
        torch.testing.assert_close(found_V, want_V / want_V.sum(), atol=1e-4, rtol=0)
    used_NK = targets.log_probs_NK > NOT_KEPT
    for ids_K, used_K in zip(targets.token_ids_NK, used_NK, strict=True):
        assert len(set(ids_K[used_K].tolist())) == int(used_K.sum())  # none is listed twice
    assert (targets.tail_mass_N == 0).all()


def test_impossible_fills_count_nothing():
    log_w_NK = torch.tensor([[0.0, NOT_KEPT, 0.0], [NOT_KEPT, 0.0, NOT_KEPT]])
    targets = keep_fills(torch.tensor([[1, 2, 3], [1, 1, 3]]), log_w_NK, **OFF)
    assert dense(targets, 4).tolist() == [[0, 0.5, 0, 0.5], [0, 1, 0, 0]]


def test_top_k_and_top_p_of_fills():
    tokens_NK = torch.tensor([[5, 7, 5, 9, 7, 5]])
    log_w_NK = torch.zeros(1, 6)
    cut = keep_fills(tokens_NK, log_w_NK, **{**OFF, "top_k": 2})
    assert cut.token_ids_NK.tolist() == [[5, 7]]
    assert float(cut.tail_mass_N) == pytest.approx(1 / 6)
    nucleus = keep_fills(tokens_NK, log_w_NK, **{**OFF, "top_p": 0.6})
    torch.testing.assert_close(dense(nucleus)[0, [5, 7, 9]], torch.tensor([0.6, 0.4, 0.0]))
    assert float(nucleus.tail_mass_N) == 0


# --- parts -----------------------------------------------------------------------------------------


def targets_of(rows, kept_tokens, **measures):
    values = torch.arange(float(rows * kept_tokens)).view(rows, kept_tokens)
    measures = {name: torch.tensor(value) for name, value in measures.items()}
    return SoftTargets(values.long(), -values, values[:, 0], 2.0, "left", measures)


def test_parts_are_stacked_and_padded():
    whole = stack_targets([targets_of(1, 3), targets_of(0, 2), targets_of(2, 1)])
    assert whole.token_ids_NK.tolist() == [[0, 1, 2], [0, 0, 0], [1, 0, 0]]
    assert whole.log_probs_NK[0].tolist() == [0, -1, -2]
    assert whole.log_probs_NK[1:].tolist() == [[0, NOT_KEPT, NOT_KEPT], [-1, NOT_KEPT, NOT_KEPT]]
    assert whole.tail_mass_N.tolist() == [0, 0, 1]
    assert (whole.temperature, whole.conditioned_on, dict(whole.measures)) == (2.0, "left", {})


def test_measures_that_a_part_lacks_are_nan():
    whole = stack_targets([targets_of(1, 2, ess=[3.0]), targets_of(2, 2, dropped=[0.1, 0.2])])
    assert whole.measures.keys() == {"ess", "dropped"}
    assert whole.measures["ess"][0] == 3.0
    assert whole.measures["ess"].isnan().tolist() == [False, True, True]
    assert whole.measures["dropped"].isnan().tolist() == [True, False, False]


def test_no_targets():
    none = no_targets(torch.device("cpu"), 2.0, "left")
    assert len(none) == 0
    assert none.token_ids_NK.dtype == torch.long
    assert none.log_probs_NK.dtype == none.tail_mass_N.dtype == torch.float32
    assert (none.temperature, none.conditioned_on) == (2.0, "left")
    assert len(stack_targets([none, targets_of(2, 3)])) == 2


def test_means_of_measures_are_over_the_positions_that_have_them():
    measured = Measured()
    assert measured.means(torch.device("cpu")) == {}
    measured.add(targets_of(2, 1, ess=[3.0, math.nan], fell_back=[0.0, 1.0]))
    measured.add(targets_of(1, 1))
    measured.add(targets_of(0, 1, ess=[]))
    measured.add(targets_of(2, 1, ess=[5.0, 7.0], outside=[math.nan, math.nan]))
    assert measured.means(torch.device("cpu")) == {"target_ess": 5.0, "target_fell_back": 0.5}


def test_a_measure_must_have_a_meaning():
    with pytest.raises(AssertionError, match="without a meaning"):
        targets_of(1, 1, speed=[1.0])
    assert all(MEASURES.values())


# --- questions ---------------------------------------------------------------------------------------


def test_only_masks_can_be_asked_for_and_every_row_has_a_key():
    x0_BL = torch.zeros(2, 3).long()
    masked_BL = torch.tensor([[0, 1, 0], [0, 1, 1]]).bool()
    Question(x0_BL, masked_BL, masked_BL, x0_BL, ((0,), (1,)))
    with pytest.raises(AssertionError, match="only masks"):
        Question(x0_BL, masked_BL, ~masked_BL, x0_BL, ((0,), (1,)))
    with pytest.raises(AssertionError, match="one key"):
        Question(x0_BL, masked_BL, masked_BL, x0_BL, ((0,),))


def test_a_part_of_the_rows_of_a_question():
    """Rows, keys and what the student proposes at their masks."""
    masked_BL = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()
    x0_BL = torch.arange(12).view(4, 3)
    proposals = targets_of(5, 2, ess=[0.0, 1.0, 2.0, 3.0, 4.0])
    keys = ((0,), (1,), (2,), (3,))
    asked = Question(x0_BL, masked_BL, masked_BL, x0_BL + 20, keys, proposals)
    for chosen, places in (
        (slice(0, 2), [0, 1]),
        (slice(1, 2), []),
        (slice(2, 9), [2, 3, 4]),
        (slice(0, 4), [0, 1, 2, 3, 4]),
    ):
        part = asked.rows(chosen)
        assert torch.equal(part.x0_BL, x0_BL[chosen])
        assert torch.equal(part.masked_BL, masked_BL[chosen])
        assert torch.equal(part.wanted_BL, masked_BL[chosen])
        assert torch.equal(part.document_ids_BL, x0_BL[chosen] + 20)
        assert part.keys == keys[chosen]
        assert torch.equal(part.proposals.token_ids_NK, proposals.token_ids_NK[places])
        assert part.proposals.measures["ess"].tolist() == places
    assert Question(x0_BL, masked_BL, masked_BL, x0_BL, keys).rows(slice(1, 3)).proposals is None


def test_some_rows_of_targets():
    whole = targets_of(3, 2, ess=[1.0, 2.0, 3.0])
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        part = whole.select(rows)
        for mine, all_of_it in zip(part.tensors, whole.tensors, strict=True):
            assert torch.equal(mine, all_of_it[rows])
        assert torch.equal(part.measures["ess"], whole.measures["ess"][rows])
        assert (part.temperature, part.conditioned_on) == (2.0, "left")


# --- settings ----------------------------------------------------------------------------------------


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="log-probability"):
        SoftTargets(torch.zeros(2, 3).long(), torch.zeros(2, 4), torch.zeros(2), 1.0, "left")
    with pytest.raises(AssertionError, match="tail"):
        SoftTargets(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(3), 1.0, "left")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("candidates", 0),
        ("fills", 0),
        ("window", -1),
        ("block", -1),
        ("student_candidates", -1),
        ("tail_draws", -1),
        ("prune", -0.1),
        ("prune", 1.0),
        ("uniform_mix", 0.0),
        ("uniform_mix", 1.1),
        ("fill", "regions"),
        ("infill", "pms"),
        ("branch_tokens", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"target.{name}"):
        TargetSettings(**{name: value})


def test_settings_at_the_ends_of_their_ranges():
    TargetSettings(top_p=1.0, prune=0.0, uniform_mix=1.0, window=0, block=0, fills=1, top_k=1)
    TargetSettings(top_p=0.01, prune=0.99, uniform_mix=1e-9, fill="span", infill="spm")


def test_a_tail_and_a_nucleus_do_not_go_together():
    with pytest.raises(ConfigError, match=r"tail_draws.*top_p=0\.9"):
        TargetSettings(tail_draws=1, top_p=0.9)
