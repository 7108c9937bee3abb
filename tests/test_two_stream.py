"""One pass over [x_t ; x_0] against one forward for every block, and what may depend on what.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15. Two packed rows of 13 tokens; all of their
blocks have masks somewhere. Logits of the mask are -inf and left out where logits are compared.
Shapes: B rows, L length, N wanted positions, S tokens of [x_t ; x_0], V vocabulary.
"""

import oracles
import pytest
import torch
from students import random_student, special_model
from tiny import tiny_model

from mdm.attention import BLOCK_ATTENTIONS, positions, two_stream

START, PAD, MASK = 12, 14, 15
X0 = torch.tensor(
    [
        [START, 3, 1, 5, 2, 7, 7, START, 4, 11, 9, 9, 1],
        [START, 6, 8, 2, START, 10, 0, 3, 5, 5, 2, PAD, PAD],
    ]
)
IDS = torch.tensor([[0] * 7 + [1] * 6, [0] * 4 + [1] * 7 + [-1] * 2])
HEADS = ["llama", "granite"]  # a plain head, and one that is more than a matrix


def student(family="llama", *, attention="block", block_size=3, **settings):
    layers = {} if family in ("granite", "gemma2") else {"layers": 2}
    denoiser = random_student(family, block_size=block_size, **layers, **settings)
    denoiser.attention = attention
    return denoiser


def noised(seed=0, rate=0.6, rows=2):
    """(masked_BL, xt_BL); the first token of a document is never masked."""
    generator = torch.Generator().manual_seed(seed)
    masked_BL = torch.rand(rows, X0.shape[1], generator=generator) < rate
    x0_BL, ids_BL = X0.repeat(rows // 2, 1), IDS.repeat(rows // 2, 1)
    masked_BL &= (x0_BL != START) & (ids_BL >= 0)
    return masked_BL, x0_BL.masked_fill(masked_BL, MASK)


def by_hand(denoiser, xt_BL, wanted_BL, block_size):
    """(N, V) logits: for every block a forward over the clean tokens before it and the noisy block."""
    logits_of = oracles.block_logits(
        denoiser.model,
        block_size=block_size,
        attention=denoiser.attention,
        shift=denoiser.shift,
        mask_id=MASK,
    )
    found = []
    for b, i in wanted_BL.nonzero().tolist():
        inside = (IDS[b] == IDS[b, i]).nonzero()[:, 0].tolist()
        place = i - inside[0]
        start = place // block_size * block_size
        clean, noisy = X0[b, inside].tolist(), xt_BL[b, inside].tolist()
        found.append(logits_of(clean[:start] + noisy[start : start + block_size])[place])
    return torch.stack(found)


def compared(found_NV, expected_NV, atol=1e-4):
    assert found_NV.shape == expected_NV.shape
    assert (found_NV[:, MASK:] == -torch.inf).all()
    torch.testing.assert_close(
        found_NV[:, :MASK].double(), expected_NV[:, :MASK].double(), atol=atol, rtol=1e-4
    )


# --- one pass is a forward for every block ---------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", [*HEADS, "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_one_pass_is_a_forward_for_every_block(attention, family, shift):
    denoiser = student(family, attention=attention, shift=shift)
    masked_BL, xt_BL = noised()
    found_NV = denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS)
    compared(found_NV, by_hand(denoiser, xt_BL, masked_BL, 3))


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 99])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_another_block_size_takes_the_place_of_its_own(attention, shift, block_size):
    denoiser = student(attention=attention, shift=shift)
    masked_BL, xt_BL = noised(seed=block_size)
    options = {"x0_bL": X0, "document_ids_BL": IDS}
    found_NV = denoiser(xt_BL, masked_BL, block_size=block_size, **options)
    compared(found_NV, by_hand(denoiser, xt_BL, masked_BL, block_size))
    own_NV = denoiser(xt_BL, masked_BL, **options)
    assert not torch.allclose(found_NV[:, :MASK], own_NV[:, :MASK], atol=1e-2)
    assert denoiser.block_size == 3


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_copies_are_calls_of_their_own(attention, family, shift):
    """They share clean outputs, which a shifted model reads for several of them."""
    denoiser = student(family, attention=attention, shift=shift)
    masked_BL, xt_BL = noised(seed=1, rows=6)
    found_NV = denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS.repeat(3, 1))
    calls = [
        denoiser(xt_BL[rows], masked_BL[rows], x0_bL=X0, document_ids_BL=IDS)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    compared(found_NV, torch.cat(calls), atol=1e-5)


@torch.no_grad()
def test_any_positions_can_be_wanted_in_any_rows():
    """Not only masks; a subset gives the same rows as all of them."""
    denoiser = student(shift=True)
    _, xt_BL = noised()
    all_BL = (positions(IDS) > 0) & (IDS >= 0)
    whole_NV = denoiser(xt_BL, all_BL, x0_bL=X0, document_ids_BL=IDS)
    some_BL = all_BL & (torch.rand(2, 13) < 0.4)
    some_BL[0] = False
    assert some_BL.any()
    some_NV = denoiser(xt_BL, some_BL, x0_bL=X0, document_ids_BL=IDS)
    compared(some_NV, whole_NV[some_BL[all_BL]], atol=1e-5)
    assert denoiser(xt_BL, all_BL & False, x0_bL=X0, document_ids_BL=IDS).shape == (0, 16)


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_without_document_ids_a_row_is_a_document(attention):
    denoiser = student(attention=attention)
    masked_BL, xt_BL = noised()
    one = denoiser(xt_BL, masked_BL, x0_bL=X0)
    other = denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=torch.zeros_like(IDS))
    assert one.equal(other)
    apart = denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS)
    assert not torch.allclose(one[:, :MASK], apart[:, :MASK], atol=1e-2)


@torch.no_grad()
def test_kernels_and_windows_change_nothing():
    masked_BL, xt_BL = noised()
    for changes in ({"attn": "eager"}, {"sliding_window": 8}):
        plain, other = student("mistral"), student("mistral", **changes)
        one, two = (d(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS) for d in (plain, other))
        compared(two, one, atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_one_block_of_everything_is_the_full_canvas(shift):
    full = random_student(layers=2, shift=shift)
    masked_BL, xt_BL = noised()
    expected = full(xt_BL, masked_BL, document_ids_BL=IDS)
    found = student(block_size=13, shift=shift)(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS)
    compared(found, expected, atol=1e-5)


@torch.no_grad()
def test_reordered_is_causal_attention_over_tokens_that_were_moved():
    """Physically: clean tokens, what is observed in the block, its masks; positions move with them."""
    denoiser = student(attention="reordered")
    causal = tiny_model("llama", 16, layers=2, hidden=16)
    masked_BL, xt_BL = noised(seed=3)
    found_NV = denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS)
    count = 0
    for number, (b, i) in enumerate(masked_BL.nonzero().tolist()):
        first = int((IDS[b] == IDS[b, i]).nonzero()[0])
        start = first + (i - first) // 3 * 3
        end = min(start + 3, int((IDS[b] == IDS[b, i]).sum()) + first)
        block = range(start, end)
        moved = [j for j in block if not masked_BL[b, j]] + [j for j in block if masked_BL[b, j]]
        order = [*range(first, start), *moved]
        count += moved != list(block)
        tokens = [*X0[b, first:start].tolist(), *xt_BL[b, moved].tolist()]
        # Given, as transformers takes positions that fall for the beginning of another document.
        causal_LL = torch.full((len(order),) * 2, torch.finfo(torch.float32).min).triu(1)
        logits_LV = causal(
            torch.tensor([tokens]),
            position_ids=torch.tensor([order]) - first,
            attention_mask=causal_LL[None, None],
            use_cache=False,
        ).logits[0]
        compared_row = logits_LV[order.index(i)][None, :MASK]
        torch.testing.assert_close(
            found_NV[number, :MASK][None], compared_row, atol=1e-4, rtol=1e-4
        )
    assert count > 3  # and something did move


# --- the clean stream as a causal model ------------------------------------------------------------


@pytest.mark.parametrize("family", [*HEADS, "gpt2"])
@pytest.mark.parametrize("attention", ["context_causal", "reordered"])
@torch.no_grad()
def test_a_causal_clean_stream_is_the_causal_model(attention, family):
    """The rows of next_bL come after the wanted ones, which they do not change."""
    denoiser = student(family, attention=attention, shift=True)
    if family == "granite":
        causal = special_model(family, 16)
    else:
        causal = tiny_model(family, 16, layers=2, hidden=16)
    masked_BL, xt_BL = noised(rows=4)
    options = {"x0_bL": X0, "document_ids_BL": IDS.repeat(2, 1)}
    next_bL = (IDS >= 0) & (torch.rand(2, 13) < 0.7)
    found = denoiser(xt_BL, masked_BL, next_bL=next_bL, **options)
    count = int(masked_BL.sum())
    compared(found[:count], denoiser(xt_BL, masked_BL, **options), atol=1e-5)
    expected = []
    for b, i in next_bL.nonzero().tolist():
        first = int((IDS[b] == IDS[b, i]).nonzero()[0])
        logits_LV = causal(X0[b : b + 1, first : i + 1], use_cache=False).logits[0]
        expected.append(logits_LV[-1])
    compared(found[count:], torch.stack(expected))
    assert len(denoiser(xt_BL, masked_BL, next_bL=next_bL & False, **options)) == count
    alone = denoiser(xt_BL, masked_BL & False, next_bL=next_bL, **options)
    compared(alone, torch.stack(expected))


@torch.no_grad()
def test_blocks_of_one_with_a_causal_context_are_the_causal_model():
    """Every token masked: each is predicted from the clean tokens before it, as the AR model does."""
    denoiser = student(attention="context_causal", block_size=1, shift=True)
    causal = tiny_model("llama", 16, layers=2, hidden=16)
    masked_BL = (positions(IDS) > 0) & (IDS >= 0)
    xt_BL = X0.masked_fill(masked_BL, MASK)
    nll_N = -denoiser(xt_BL, masked_BL, x0_bL=X0, document_ids_BL=IDS).log_softmax(-1)
    nll_N = nll_N.gather(1, X0[masked_BL][:, None])[:, 0]
    expected = []
    for b, i in masked_BL.nonzero().tolist():
        first = int((IDS[b] == IDS[b, i]).nonzero()[0])
        logits_V = causal(X0[b : b + 1, first:i], use_cache=False).logits[0, -1, :MASK]
        expected.append(-logits_V.log_softmax(-1)[X0[b, i]])
    torch.testing.assert_close(nll_N, torch.stack(expected), atol=1e-4, rtol=1e-4)


# --- leaks -----------------------------------------------------------------------------------------


def outputs(denoiser, xt_BL, x0_bL, ids_bL, block_size):
    """(b, S, D) the outputs of all tokens, copies first and the clean ones last."""
    rows, length = x0_bL.shape
    copies = len(xt_BL) // rows
    rows_ND = denoiser.rows(
        xt_BL,
        torch.ones_like(xt_BL, dtype=torch.bool),
        x0_bL=x0_bL,
        document_ids_BL=ids_bL.repeat(copies, 1),
        block_size=block_size,
        next_bL=torch.ones_like(x0_bL, dtype=torch.bool),
    )
    return torch.cat(rows_ND.view(copies + 1, rows, length, -1).unbind(0), dim=1)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_a_token_changes_what_sees_it_and_nothing_else(attention, block_size):
    """Every token of [x_t ; x_t' ; x_0] is changed in turn; who may see whom is the slow definition's."""
    denoiser = student(attention=attention)
    masked_BL, _ = noised(seed=2, rows=4)
    tokens = two_stream(IDS, masked_BL)
    x_bS = torch.cat([*X0.repeat(2, 1).masked_fill(masked_BL, MASK).chunk(2), X0], dim=1)

    def run(x_bS):
        xt_BL = torch.cat(list(x_bS[:, :26].split(13, dim=1)))
        return outputs(denoiser, xt_BL, x_bS[:, 26:], IDS, block_size)

    before_bSD = run(x_bS)
    for row in range(2):
        places = [
            oracles.Place(*values)
            for values in zip(
                *(t[row].tolist() for t in (tokens.document, tokens.position, tokens.stream)),
                tokens.masked[row].tolist(),
                strict=True,
            )
        ]
        for at, key in enumerate(places):
            if key.masked:
                continue  # a mask that becomes a token would move it, too
            changed_bS = x_bS.clone()
            changed_bS[row, at] = (x_bS[row, at] + 1) % 12
            difference_bS = (run(changed_bS) - before_bSD).abs().amax(-1)
            assert not difference_bS[1 - row].any()
            expected = [
                oracles.sees_in_streams(query, key, block_size, attention) for query in places
            ]
            assert (difference_bS[row] > 1e-4).tolist() == expected, at
            assert not difference_bS[row][~torch.tensor(expected)].any(), at


# --- gradients -------------------------------------------------------------------------------------


def loss_of(denoiser, **options):
    masked_BL, xt_BL = noised(rows=4)
    next_bL = (IDS >= 0) & (X0 != PAD)
    ids = torch.cat([X0.repeat(2, 1)[masked_BL], X0.roll(-1, 1)[next_bL]])

    def score(logits_nV, ids_n):
        return torch.nn.functional.cross_entropy(logits_nV, ids_n, reduction="none")

    scores_N = denoiser(
        xt_BL,
        masked_BL,
        x0_bL=X0,
        document_ids_BL=IDS.repeat(2, 1),
        next_bL=next_bL,
        score=score,
        score_inputs=(ids,),
    )
    return (scores_N * torch.linspace(0.5, 1.5, len(scores_N))).sum()


def gradients(denoiser):
    loss = loss_of(denoiser)
    denoiser.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in denoiser.named_parameters()}
    assert all(g.isfinite().all() for g in found.values())
    return loss.detach(), found


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_activation_checkpointing_and_chunks_change_no_gradient(attention, family, monkeypatch):
    denoiser = student(family, attention=attention, shift=True).train()
    loss, plain = gradients(denoiser)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * 16 * 5)
    denoiser.model.activation_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in denoiser.model.modules())
    again, kept = gradients(denoiser)
    torch.testing.assert_close(again, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert float(plain["model.model.layers.0.self_attn.q_proj.weight"].abs().max()) > 1e-3


# --- what is refused -------------------------------------------------------------------------------


def test_calls_that_do_not_fit_the_model():
    masked_BL, xt_BL = noised()
    with pytest.raises(AssertionError, match="blocks need the clean tokens"):
        student()(xt_BL, masked_BL)
    with pytest.raises(AssertionError, match="blocks need the clean tokens"):
        random_student()(xt_BL, masked_BL, x0_bL=X0)
    with pytest.raises(AssertionError, match="only a model with blocks"):
        random_student()(xt_BL, masked_BL, next_bL=masked_BL)


@pytest.mark.parametrize("place", [(0, 0), (0, 7), (1, 4)])
def test_the_first_token_of_a_document_has_no_predecessor(place):
    """Not even one in the row before it, and not of a block of one."""
    wanted_BL = torch.zeros_like(IDS, dtype=torch.bool)
    wanted_BL[place] = True
    for block_size in (1, 3):
        with pytest.raises(AssertionError, match="position 0 of a shifted model"):
            student(shift=True)(X0, wanted_BL, x0_bL=X0, document_ids_BL=IDS, block_size=block_size)
    assert student()(X0, wanted_BL, x0_bL=X0, document_ids_BL=IDS).shape == (1, 16)
