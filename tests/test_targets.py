"""SoftTargets and keep_top: which tokens are kept, at what probability, and what is left over."""

import pytest
import torch

from mdm.errors import ConfigError
from mdm.train.targets import SoftTargets, TargetSettings, keep_top

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


def test_no_rows():
    targets = kept(torch.empty(0, V), top_k=3)
    assert len(targets) == 0
    assert targets.token_ids_NK.shape == (0, 3)


def test_shapes_are_checked():
    with pytest.raises(AssertionError, match="log-probability"):
        SoftTargets(torch.zeros(2, 3).long(), torch.zeros(2, 4), torch.zeros(2), 1.0, "left")
    with pytest.raises(AssertionError, match="tail"):
        SoftTargets(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(3), 1.0, "left")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("candidates", 0),
        ("window", -1),
        ("branch_tokens", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"target.{name}"):
        TargetSettings(**{name: value})
