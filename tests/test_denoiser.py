"""Logits for the positions asked for: the shift, the head, documents apart, and the probes."""

import math

import pytest
import torch
from students import random_student, word_vocab
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

import mdm.denoiser
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser, probe_attention
from mdm.errors import CheckpointError

# Families whose head is more than a matrix: scaled logits, and capped ones.
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPECIAL_HEADS = {
    "granite": lambda rows: GraniteConfig(vocab_size=rows, logits_scaling=7.0, **SMALL),
    "gemma2": lambda rows: Gemma2Config(
        vocab_size=rows, head_dim=4, final_logit_softcapping=2.0, sliding_window=64, **SMALL
    ),
}


def special_student(family):
    vocab = word_vocab()
    model = AutoModelForCausalLM.from_config(SPECIAL_HEADS[family](len(vocab)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=False).eval()


def student(family="llama", **settings):
    return (
        special_student(family) if family in SPECIAL_HEADS else random_student(family, **settings)
    )


def tokens(*shape):
    return torch.randint(0, 12, shape)


def compared(logits, expected):
    """Equal where a token can be sampled, -inf elsewhere."""
    assert (logits[..., 15:] == -math.inf).all()  # the mask is the last token; unused rows follow
    assert torch.allclose(logits[..., :15], expected[..., :15], atol=2e-5, rtol=1e-4)


# --- which rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_HEADS])
@torch.no_grad()
def test_wanted_rows_equal_the_full_logits_at_those_rows(family):
    denoiser = student(family)
    assert denoiser.plain_head is (family not in SPECIAL_HEADS)
    x_BL = tokens(3, 9)
    wanted_BL = torch.rand(3, 9) < 0.4
    logits_NV = denoiser(x_BL, wanted_BL)
    full_BLV = denoiser.model(x_BL, use_cache=False).logits
    assert logits_NV.dtype == torch.float32
    compared(logits_NV, full_BLV[wanted_BL])  # row-major order
    assert denoiser(x_BL, torch.zeros_like(wanted_BL)).shape == (0, 16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
@torch.no_grad()
def test_a_shifted_model_reads_position_i_from_output_i_minus_1(family):
    denoiser = student(family)
    x_BL = tokens(2, 7)
    full_BLV = denoiser.model(x_BL, use_cache=False).logits
    for i in range(7):
        wanted_BL = torch.zeros(2, 7, dtype=torch.bool)
        wanted_BL[:, i] = True
        denoiser.shift = False
        compared(denoiser(x_BL, wanted_BL), full_BLV[:, i])
        denoiser.shift = True
        if i > 0:
            compared(denoiser(x_BL, wanted_BL), full_BLV[:, i - 1])


def test_position_0_of_a_shifted_model_cannot_be_asked_for():
    with pytest.raises(AssertionError, match="position 0"):
        random_student(shift=True)(tokens(1, 4), torch.ones(1, 4, dtype=torch.bool))


@torch.no_grad()
def test_mask_and_unused_rows_of_the_head_cannot_be_sampled():
    denoiser = random_student(unused_rows=3)
    x_BL, wanted_BL = tokens(1, 5), torch.ones(1, 5, dtype=torch.bool)
    logits_NV = denoiser(x_BL, wanted_BL)
    assert logits_NV.shape == (5, 19)
    forbidden = logits_NV == -math.inf
    assert forbidden.any(0).nonzero().flatten().tolist() == [15, 16, 17, 18]
    assert forbidden.all(0)[15:].all()
    # The published sampler wants them all.
    assert denoiser.raw_head(denoiser.rows(x_BL, wanted_BL)).isfinite().all()


# --- scores in chunks ----------------------------------------------------------------------------


def cross_entropy(logits_nV, target_n, weight_n):
    return weight_n * torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="none")


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 4, 1000])
def test_scores_in_chunks_equal_scores_at_once(monkeypatch, family, rows_per_chunk):
    monkeypatch.setattr(mdm.denoiser, "CHUNK_BYTES", rows_per_chunk * 4 * 16)
    denoiser = student(family)
    x_BL = tokens(2, 8)
    wanted_BL = torch.rand(2, 8) < 0.7
    count = int(wanted_BL.sum())
    inputs = (tokens(count), torch.rand(count))
    sizes = []
    head = denoiser.head
    monkeypatch.setattr(denoiser, "head", lambda rows: sizes.append(len(rows)) or head(rows))

    score_N = denoiser(x_BL, wanted_BL, score=cross_entropy, score_inputs=inputs)
    chunked = torch.autograd.grad(score_N.sum(), list(denoiser.parameters()))
    # Never more rows of logits than a chunk, and once more in the backward pass.
    assert max(sizes) == min(rows_per_chunk, count)
    assert len(sizes) == 2 * -(-count // rows_per_chunk)

    expected_N = cross_entropy(denoiser(x_BL, wanted_BL), *inputs)
    at_once = torch.autograd.grad(expected_N.sum(), list(denoiser.parameters()))
    assert torch.allclose(score_N, expected_N, atol=1e-5)
    for one, other in zip(chunked, at_once, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        without_N = denoiser(x_BL, wanted_BL, score=cross_entropy, score_inputs=inputs)
    assert torch.allclose(without_N, expected_N, atol=1e-5)


def test_a_score_of_no_rows_is_empty():
    denoiser = random_student()
    nothing_BL = torch.zeros(1, 4, dtype=torch.bool)
    inputs = (tokens(0), torch.rand(0))
    score_N = denoiser(tokens(1, 4), nothing_BL, score=cross_entropy, score_inputs=inputs)
    assert score_N.shape == (0,)
    score_N.sum().backward()  # a batch in which nothing is masked must not stop training


# --- documents and padding -----------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_HEADS])
@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_packed_and_padded_documents_equal_separate_ones(family, shift):
    denoiser = student(family)
    denoiser.shift = shift
    first_L, second_L = tokens(5), tokens(7)
    alone = []
    for x_L in (first_L, second_L):
        wanted_BL = torch.ones(1, len(x_L), dtype=torch.bool)
        wanted_BL[:, 0] = False
        alone.append(denoiser(x_L[None], wanted_BL))

    pad = torch.full((2,), 14)
    layouts = {
        "packed": ([first_L, second_L], [0, 1]),
        "left": ([pad, second_L], [-1, 1]),
        "right": ([first_L, pad, pad], [0, -1, -1]),
        "all": ([pad, second_L, first_L, pad], [-1, 4, 2, -1]),
    }
    for name, (parts, ids) in layouts.items():
        x_BL = torch.cat(parts)[None]
        document_ids = [i for part, i in zip(parts, ids, strict=True) for _ in part]
        document_ids_BL = torch.tensor([document_ids])
        wanted_BL = document_ids_BL >= 0
        wanted_BL[:, 1:] &= document_ids_BL[:, 1:] == document_ids_BL[:, :-1]
        wanted_BL[:, 0] = False
        logits_NV = denoiser(x_BL, wanted_BL, document_ids_BL=document_ids_BL)
        present = [alone[0] if part is first_L else alone[1] for part in parts if part is not pad]
        assert torch.allclose(
            logits_NV[:, :15], torch.cat(present)[:, :15], atol=1e-4, rtol=1e-4
        ), name


@torch.no_grad()
def test_one_full_document_takes_the_path_without_a_mask(monkeypatch):
    denoiser = random_student()
    seen = []
    inner = denoiser.model.base_model.forward
    monkeypatch.setattr(
        denoiser.model.base_model, "forward", lambda *a, **k: seen.append(k) or inner(*a, **k)
    )
    wanted_BL = torch.ones(2, 4, dtype=torch.bool)
    for ids in (None, torch.zeros(2, 4, dtype=torch.long)):
        denoiser(tokens(2, 4), wanted_BL, document_ids_BL=ids)
    assert all("attention_mask" not in kwargs for kwargs in seen)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@torch.no_grad()
def test_an_explicit_mask_lifts_a_sliding_window(family):
    settings = {"sliding_window": 8}
    if family == "gemma3":
        settings["layer_types"] = ["sliding_attention"]
    denoiser = random_student(family, **settings)  # one layer: nothing is seen through another
    x_BL = tokens(1, 24)
    changed_BL = x_BL.clone()
    changed_BL[0, -1] = (x_BL[0, -1] + 1) % 12
    wanted_BL = torch.zeros(1, 24, dtype=torch.bool)
    wanted_BL[0, 1] = True

    def change(logits_of):
        return (logits_of(x_BL) - logits_of(changed_BL))[..., :15].abs().max()

    assert denoiser.always_mask
    assert change(lambda x: denoiser.model(x, use_cache=False).logits[:, 1]) == 0  # the window
    assert change(lambda x: denoiser(x, wanted_BL)) > 1e-3


# --- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_same_weights_are_causal_ancestor_and_bidirectional_student(family):
    ancestor = tiny_model(family, 16)
    x_BL = tokens(2, 6)
    ar_BLV = ancestor(x_BL, use_cache=False).logits
    probe_attention(ancestor, causal=True)
    with pytest.raises(CheckpointError, match="should be bidirectional but is causal"):
        Denoiser(ancestor, word_vocab(), shift=True)

    make_bidirectional(ancestor)
    Denoiser(ancestor, word_vocab(), shift=True)
    with pytest.raises(CheckpointError, match="should be causal but is bidirectional"):
        probe_attention(ancestor, causal=True)
    assert not torch.allclose(ancestor(x_BL, use_cache=False).logits, ar_BLV, atol=1e-2)
    ancestor.config.is_causal = True
    assert torch.equal(ancestor(x_BL, use_cache=False).logits, ar_BLV)


def test_equal_embeddings_do_not_fool_the_probe():
    # In SmolLM2 rows 3 to 16, never trained, are exactly equal.
    denoiser = random_student(unused_rows=1)
    with torch.no_grad():
        weight_VD = denoiser.model.get_input_embeddings().weight
        weight_VD[3:17] = weight_VD[3].clone()
    probe_attention(denoiser.model, causal=False)
    denoiser.model.config.is_causal = True
    with pytest.raises(CheckpointError, match="should be bidirectional but is causal"):
        probe_attention(denoiser.model, causal=False)


def test_probes_leave_the_mode_of_the_model():
    model = random_student().model.train()
    Denoiser(model, word_vocab(), shift=False)
    assert model.training


def test_max_length_is_that_of_the_model():
    assert random_student().max_length == 1024
