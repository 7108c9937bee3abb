"""Suffix-scored targets against enumeration: what they are exactly, and what they are not."""

import oracles
import pytest
import tiny
import torch
from tiny_run import ar_teacher
from transformers import DynamicCache

from mdm.train.targets import TargetSettings
from mdm.train.teachers.suffix import last_scored, score_branches, suffix_scored

V, L = 5, 6
X0 = [0, 3, 1, 4, 2, 2]  # position 0 is given: nothing stands to its left
EVERYWHERE = range(1, L)
EXACT = {"atol": 1e-5, "rtol": 0}  # the head answers in float32


def dense(targets):
    """(N, V) probabilities; a candidate listed twice would count twice and fail."""
    p_NV = torch.zeros(len(targets), V, dtype=torch.float64)
    return p_NV.scatter_add_(1, targets.token_ids_NK, targets.log_probs_NK.double().exp())


def at(*positions, length=L):
    return torch.tensor([[i in positions for i in range(length)]])


def ask(model, x0_BL, wanted_BL, ids_BL=None, *, temperature=1.0, **settings):
    """The targets; by default of every candidate and the whole right side."""
    x0_BL = torch.tensor(x0_BL)
    ids_BL = torch.zeros_like(x0_BL) if ids_BL is None else torch.tensor(ids_BL)
    settings = TargetSettings(**{"kind": "suffix", "candidates": V, "window": 0, **settings})
    return suffix_scored(
        ar_teacher(model), x0_BL, wanted_BL, ids_BL, settings=settings, temperature=temperature
    )


def posterior(model, masked, position, end=None):
    next_log_probs = tiny.next_log_probs(model)
    return oracles.posterior_marginal(next_log_probs, X0, masked, position, V, start=1, end=end)


def total_variation(p_V, q_V):
    return float((p_V - q_V).abs().sum() / 2)


# --- against enumeration -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("position", EVERYWHERE)
def test_one_masked_token_is_the_posterior(family, position):
    # Gemma's logits are capped after the head, so it goes the way without a plain head.
    overrides = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    model = tiny.tiny_model(family, V, layers=1, hidden=16, dtype=torch.float64, **overrides)
    assert ar_teacher(model).plain_head == (family != "gemma3")
    found = dense(ask(model, [X0], at(position)))[0]
    torch.testing.assert_close(found, posterior(model, [position], position), **EXACT)


@pytest.mark.parametrize("candidates", range(1, V + 1))
@pytest.mark.parametrize("seed", range(3))
def test_candidates_renormalise_the_posterior_and_err_by_what_they_miss(candidates, seed):
    model = tiny.toy_ar(V, seed)
    next_log_probs = tiny.next_log_probs(model)
    targets = ask(model, [X0], at(*EVERYWHERE), candidates=candidates)
    for row, i in enumerate(EVERYWHERE):
        ids = targets.token_ids_NK[row].tolist()
        likeliest = oracles.left_only(next_log_probs, X0, i).argsort(descending=True).tolist()
        assert len(set(ids)) == candidates
        # S: the likeliest by the prior; the true token takes the last place if it is not there.
        expected = likeliest[:candidates]
        if X0[i] not in expected:
            expected[-1] = X0[i]
        assert set(ids) == set(expected)

        q_V = posterior(model, [i], i)
        kept_mass = float(q_V[ids].sum())
        found = dense(targets)[row]
        torch.testing.assert_close(found[ids], q_V[ids] / kept_mass, **EXACT)
        assert total_variation(found, q_V) == pytest.approx(1 - kept_mass, abs=1e-5)
        looped = oracles.suffix_score_loop(next_log_probs, X0, i, ids)
        torch.testing.assert_close(targets.log_probs_NK[row].double(), looped, **EXACT)


def test_several_masks_give_the_full_conditional_and_not_the_posterior():
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    masked = [1, 2, 4]
    found = dense(ask(model, [X0], at(*masked)))
    distances = []
    for row, i in enumerate(masked):
        conditional = oracles.full_conditional(next_log_probs, X0, i, V, start=1)
        torch.testing.assert_close(found[row], conditional, **EXACT)
        distances.append(total_variation(found[row], posterior(model, masked, i)))
    assert max(distances) > 0.1


def test_window_cuts_the_evidence():
    model = tiny.toy_ar(V)
    for window in (1, 2, 4):
        targets = ask(model, [X0], at(*EVERYWHERE), window=window)
        for row, i in enumerate(EVERYWHERE):
            expected = posterior(model, [i], i, end=min(L, i + 1 + window))
            torch.testing.assert_close(dense(targets)[row], expected, **EXACT)
    whole = dense(ask(model, [X0], at(*EVERYWHERE)))
    near = dense(ask(model, [X0], at(*EVERYWHERE), window=1))
    assert total_variation(whole[0], near[0]) > 0.01


def test_the_last_token_of_a_document_has_only_its_prior():
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    packed, ids = [[0, 3, 1, 0, 4, 2]], [[0, 0, 0, 1, 1, 1]]
    found = dense(ask(model, packed, at(2, 5), ids))
    for row, document in enumerate(([0, 3, 1], [0, 4, 2])):
        prior = oracles.left_only(next_log_probs, document, 2)
        torch.testing.assert_close(found[row], prior, **EXACT)


def test_temperature_divides_the_whole_score():
    model = tiny.toy_ar(V)
    targets = ask(model, [X0], at(2), temperature=2.0)
    expected = (posterior(model, [2], 2).log() / 2).softmax(-1)
    torch.testing.assert_close(dense(targets)[0], expected, **EXACT)
    assert targets.temperature == 2.0


def test_top_k_keeps_the_best_candidates_by_posterior():
    targets = ask(tiny.toy_ar(V), [X0], at(2), top_k=2)
    q_V = posterior(tiny.toy_ar(V), [2], 2)
    assert targets.token_ids_NK[0].tolist() == q_V.argsort(descending=True)[:2].tolist()
    assert float(targets.tail_mass_N) == pytest.approx(
        1 - float(q_V.topk(2).values.sum()), abs=1e-5
    )


# --- the same, however it is computed ------------------------------------------------------------


@pytest.mark.parametrize("branch_tokens", [1, 7, 12])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_splitting_changes_nothing(branch_tokens, chunk_bytes, monkeypatch):
    model = tiny.toy_ar(V)
    x0, wanted = [X0, [0, 1, 1, 3, 0, 4]], torch.cat([at(*EVERYWHERE), at(1, 3)])
    whole = ask(model, x0, wanted, branch_tokens=10**6)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", chunk_bytes)
    split = ask(model, x0, wanted, branch_tokens=branch_tokens)
    torch.testing.assert_close(dense(split), dense(whole), atol=1e-6, rtol=0)


def test_a_batch_is_its_rows():
    model = tiny.toy_ar(V)
    rows = [X0, [0, 1, 1, 3, 0, 4], [0, 2, 2, 2, 1, 0], [0, 4, 3, 2, 1, 0]]
    wanted = torch.cat([at(2, 5), at(), at(1, 2, 3, 4, 5), at(5)])  # one row asks for nothing
    together = dense(ask(model, rows, wanted))
    alone = [dense(ask(model, [row], wanted[b : b + 1])) for b, row in enumerate(rows)]
    assert [len(part) for part in alone] == [2, 0, 5, 1]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [0, 2])
def test_packed_documents_are_separate_documents_and_padding_is_nothing(family, window):
    model = tiny.toy_ar(V, family=family)
    documents = [[0, 3, 1, 4], [0, 4, 2], [0, 1]]
    packed = [[*documents[0], *documents[1], *documents[2], 3, 3, 3]]
    ids = [[0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, -1]]
    wanted = at(1, 2, 3, 5, 6, 8, length=12)
    together = dense(ask(model, packed, wanted, ids, window=window))
    alone = [
        dense(ask(model, [d], at(*range(1, len(d)), length=len(d)), window=window))
        for d in documents
    ]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


def test_the_cache_is_left_as_it_was():
    model = tiny.toy_ar(V)
    teacher, cache = ar_teacher(model), DynamicCache()
    x0, ids = torch.tensor([X0]), torch.zeros(1, L).long()
    with torch.no_grad():
        teacher.rows(x0, at(2), ids, cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        arguments = (x0, ids, torch.tensor([2]), last_scored(ids, 0), torch.tensor([[0, 1]]), 3)
        first = score_branches(teacher, cache, *arguments)
        again = score_branches(teacher, cache, *arguments)
    assert torch.equal(first, again)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_branch_is_the_candidate_and_what_follows_but_the_last():
    """E - i tokens for a position i of a document that ends at E."""
    model = tiny.toy_ar(V)
    fed = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: fed.append(x[0]))
    ask(model, [X0], at(*EVERYWHERE))
    del fed[:2]  # ar_teacher looks at the head
    assert [tokens.numel() for tokens in fed] == [L, *(V * (L - 1 - i) for i in range(1, L - 1))]
    assert fed[1].view(V, -1)[:, 1:].unique(dim=0).tolist() == [X0[2:-1]]
    assert sorted(fed[1].view(V, -1)[:, 0].tolist()) == list(range(V))


def test_nothing_asked_for():
    assert len(ask(tiny.toy_ar(V), [X0], at())) == 0


def test_says_what_it_conditioned_on():
    model = tiny.toy_ar(V)
    assert ask(model, [X0], at(2)).conditioned_on == "left+right(document)"
    assert ask(model, [X0], at(2), window=3).conditioned_on == "left+right(window 3)"


def test_last_scored():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert last_scored(ids, 0).tolist() == [[2, 2, 2, 4, 4, 5]]
    assert last_scored(ids, 1).tolist() == [[1, 2, 2, 4, 4, 5]]


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_a_block_ends_the_evidence(block):
    """Changing a token after the block changes nothing; one inside it, to the right, does."""
    model = tiny.toy_ar(V)
    targets = ask(model, [X0], at(*EVERYWHERE), block=block)
    for row, i in enumerate(EVERYWHERE):
        expected = posterior(model, [i], i, end=min(L, (i // block + 1) * block))
        torch.testing.assert_close(dense(targets)[row], expected, **EXACT)
    assert targets.conditioned_on == f"left+right(block {block})"
    both = ask(model, [X0], at(2), block=block, window=3).conditioned_on
    assert both == f"left+right(window 3, block {block})"


def test_blocks_are_counted_from_the_start_of_a_document():
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    assert last_scored(ids, 0, 2).tolist() == [[1, 1, 2, 4, 4, 6, 6, 7]]
    assert last_scored(ids, 0, 0).tolist() == [[2, 2, 2, 6, 6, 6, 6, 7]]
    assert last_scored(ids, 1, 0).tolist() == [[1, 2, 2, 4, 5, 6, 6, 7]]
