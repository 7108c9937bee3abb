"""The three sums of a micro-batch against slow definitions: whole distributions, chunks, next tokens.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15. The definitions take the student's logits from
the same model and do the rest position by position.
Shapes: B rows, L length, N masked positions, V vocabulary, C chunks.
"""

import dataclasses
import math
from decimal import Decimal, localcontext

import oracles
import pytest
import torch
from students import random_student

from mdm.train.lambdas import MixSettings, midrange
from mdm.train.loss_sums import loss_sums, next_tokens
from mdm.train.masking import mask_batch
from mdm.train.objective import ObjectiveSettings, with_mix
from mdm.train.placement import MaskSettings
from mdm.train.targets import (
    ChunkTargets,
    HeadTargets,
    SoftTargets,
    StateTargets,
    TargetSettings,
    keep_top,
)
from mdm.train.teachers.denoised import DiffusionTeacher, ask_denoised

START, PAD, MASK, V = 12, 14, 15, 16
X0 = torch.tensor(
    [
        [START, 3, 1, 5, 2, 7, 7, START, 4, 11, 9, 9, 1],
        [START, 6, 8, 2, START, 10, 0, 3, 5, 5, 2, PAD, PAD],
        [START, 1, 1, 2, 3, 5, 8, 4, 10, 0, 6, 2, 3],
    ]
)
IDS = torch.tensor([[0] * 7 + [1] * 6, [0] * 4 + [1] * 7 + [-1] * 2, [0] * 13])
LEARNT = (X0 != START) & (IDS >= 0)
TIDAL = MixSettings(first=0.1, last=0.9, by_noise=True, weight="midrange")


def blocks(attention="block", **settings):
    denoiser = random_student(block_size=3, layers=2, **{"shift": True, **settings})
    denoiser.attention = attention
    return denoiser.train()


def drawn(*, samples=(0, 1, 2), block_size=3, masks=None, chunk_BL=None, learnt=LEARNT, **settings):
    rows = [sample % 3 for sample in samples]
    block = {"noise": "block"} if block_size and "noise" not in settings else {}
    return mask_batch(
        ObjectiveSettings(**block, **settings),
        X0[rows],
        IDS[rows],
        learnt[rows],
        torch.zeros_like(X0[rows]),
        masks=masks or MaskSettings(),
        mask_id=MASK,
        seed=1,
        step=0,
        samples=samples,
        samples_per_step=8,
        block_size=block_size,
        chunk_BL=chunk_BL,
    )


def logits_at(denoiser, batch, wanted_BL):
    """(N, V) of the student, float64."""
    options = {"x0_bL": batch.x0_bL, "block_size": batch.block_size} if batch.block_size else {}
    found = denoiser(batch.xt_BL, wanted_BL, document_ids_BL=batch.document_ids_BL, **options)
    return found.double()


def made_up(batch, shared=V, never=(MASK,), seed=0):
    """A teacher that is a table: its rows are its logits."""
    generator = torch.Generator().manual_seed(seed)
    rows_NW = 3 * torch.randn(int(batch.distilled_BL.sum()), V + 2, generator=generator)

    def logits(rows_nW):
        return rows_nW[:, :shared].index_fill(1, torch.tensor(never).long(), -math.inf)

    return HeadTargets(rows_NW, logits, "a table")


def expected_kl(denoiser, batch, targets, settings, divergence=oracles.forward_kl):
    """Σ w T² D of the distilled positions; both distributions are over the ids that both can write."""
    temperature = settings.kd_temperature
    theirs_NV = targets.logits(targets.rows_NW).double()
    total = torch.zeros((), dtype=torch.float64)
    for s_V, u_V, weight in zip(
        logits_at(denoiser, batch, batch.distilled_BL),
        theirs_NV,
        batch.kd_weight_BL[batch.distilled_BL],
        strict=True,
    ):
        both = (u_V > -math.inf) & (s_V[: len(u_V)] > -math.inf)
        s_v, u_v = s_V[: len(u_V)][both], u_V[both]
        p_v, q_v = (u_v / temperature).softmax(-1), (s_v / temperature).softmax(-1)
        total = total + weight * temperature**2 * divergence(p_v, q_v)
    return total


def same_with_gradients(found, expected, denoiser):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
    parameters = list(denoiser.parameters())
    one = torch.autograd.grad(found, parameters, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(expected.float(), parameters, retain_graph=True, allow_unused=True)
    scale = max(float(g.abs().max()) for g in other if g is not None)
    assert scale > 1e-4
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale)


# --- whole distributions ---------------------------------------------------------------------------

# Everything is shared; the vocabulary is cut; an id is the teacher's mask alone, a word to the student.
SHARED = {"all": (V, (MASK,)), "cut": (12, ()), "masks": (V, (5, MASK))}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("temperature", "kd_positions"), [(1.0, 0), (2.0, 0), (0.5, 2)])
def test_divergence_of_whole_distributions(shared, temperature, kd_positions):
    denoiser = blocks()
    form = {"kd_temperature": temperature, "kd_positions": kd_positions}
    batch = drawn(**form)
    targets = made_up(batch, *SHARED[shared])
    for divergence, slow in (
        ("forward_kl", oracles.forward_kl),
        ("reverse_kl", oracles.reverse_kl),
        ("jsd", lambda p, q: oracles.generalized_jsd(p, q, 0.5)),
    ):
        settings = ObjectiveSettings(divergence=divergence, **form)
        found_3 = loss_sums(denoiser, batch, targets, settings)
        expected = expected_kl(denoiser, batch, targets, settings, slow)
        same_with_gradients(found_3[1], expected, denoiser)
        ce_N = -logits_at(denoiser, batch, batch.masked_BL).log_softmax(-1)
        ce_N = ce_N.gather(1, batch.x0_BL[batch.masked_BL][:, None])[:, 0]
        ce = (ce_N * batch.ce_weight_BL[batch.masked_BL]).sum()
        same_with_gradients(found_3[0], ce, denoiser)
        assert found_3[2] == 0


def test_temperature_squared_can_be_left_out():
    denoiser, batch = blocks(), drawn()
    targets = made_up(batch)
    on = loss_sums(denoiser, batch, targets, ObjectiveSettings(kd_temperature=3.0))
    off = ObjectiveSettings(kd_temperature=3.0, temperature_squared=False)
    off = loss_sums(denoiser, batch, targets, off)
    torch.testing.assert_close(on[1], 9 * off[1])
    assert on[0] == off[0]


def test_a_student_of_the_full_canvas():
    denoiser = random_student(layers=2, shift=True)
    batch = drawn(block_size=0, complementary=True)
    targets, settings = made_up(batch), ObjectiveSettings(complementary=True)
    found_3 = loss_sums(denoiser, batch, targets, settings)
    same_with_gradients(found_3[1], expected_kl(denoiser, batch, targets, settings), denoiser)


# --- mixed targets ---------------------------------------------------------------------------------


def mixed_kl(s_V, u_V, share, temperature):
    """KL(r ‖ softmax(s/T)) T², r of raw logits and constant, as TIDAL is published."""
    r_V = oracles.mixed_logits(s_V.detach(), u_V, share, temperature)
    log_q_V = (s_V / temperature).log_softmax(-1)
    return temperature**2 * (r_V * (r_V.log() - log_q_V)).sum()


@pytest.mark.parametrize("weight", ["none", "midrange"])
@pytest.mark.parametrize(("temperature", "progress"), [(1.0, 0.0), (2.0, 0.5), (2.0, 1.0)])
def test_tidal_as_published(temperature, progress, weight):
    """λ_t and w(t) of the block of each position, by the formulas of the paper."""
    denoiser = blocks()
    settings = ObjectiveSettings(kd_temperature=temperature, kd_reduce="mean_masked")
    plain = drawn(kd_temperature=temperature, kd_reduce="mean_masked")
    mix = dataclasses.replace(TIDAL, weight=weight)
    batch = with_mix(plain, mix, progress)
    targets = made_up(batch, 12, ())
    found_3 = loss_sums(denoiser, batch, targets, settings)
    lambda_train = 0.1 + 0.8 * (1 - math.cos(math.pi * progress)) / 2
    expected, shares = torch.zeros((), dtype=torch.float64), set()
    for s_V, u_V, (b, i) in zip(
        logits_at(denoiser, batch, batch.masked_BL),
        targets.logits(targets.rows_NW).double(),
        batch.masked_BL.nonzero().tolist(),
        strict=True,
    ):
        t = float(plain.level_BL[b, i])
        w = math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)) if weight == "midrange" else 1.0
        shares.add(lambda_train * (1 - t))
        expected = expected + w * mixed_kl(s_V[:12], u_V, lambda_train * (1 - t), temperature)
    assert len(shares) > 5  # of blocks, not of rows
    same_with_gradients(found_3[1], expected, denoiser)
    assert found_3[0].item() == loss_sums(denoiser, plain, targets, settings)[0].item()


def test_gradient_of_tidal_wrt_logits():
    """T (softmax(s/T) - r), seen in the head's matrix: the outer product with its inputs."""
    denoiser = blocks()
    batch = with_mix(drawn(kd_temperature=2.0), MixSettings(first=0.4, last=0.4), 0.3)
    targets, settings = made_up(batch), ObjectiveSettings(kd_temperature=2.0)
    matrix = denoiser.model.get_output_embeddings().weight
    kd = loss_sums(denoiser, batch, targets, settings)[1]
    (found_VD,) = torch.autograd.grad(kd, [matrix])
    options = {"x0_bL": batch.x0_bL, "document_ids_BL": batch.document_ids_BL}
    rows_ND = denoiser.rows(batch.xt_BL, batch.masked_BL, **options).detach().double()
    expected_VD = torch.zeros_like(found_VD, dtype=torch.float64)
    weight_N = batch.kd_weight_BL[batch.masked_BL]
    for row_D, u_V, weight in zip(rows_ND, targets.rows_NW.double(), weight_N, strict=True):
        s_V = (matrix.detach().double() @ row_D)[:MASK]
        r_V = oracles.mixed_logits(s_V, u_V[:MASK], 0.4, 2.0)
        q_V = (s_V / 2.0).softmax(-1)
        expected_VD[:MASK] += weight * 2.0 * torch.outer(q_V - r_V, row_D)
    torch.testing.assert_close(found_VD.double(), expected_VD, atol=1e-3, rtol=1e-3)


def test_the_ends_of_a_mixture():
    """λ = 1 is the plain divergence, λ = 0 has neither a value nor a gradient."""
    denoiser, batch = blocks(), drawn()
    targets, settings = made_up(batch), ObjectiveSettings()
    plain = loss_sums(denoiser, batch, targets, settings)[1]
    teacher = dataclasses.replace(batch, share_BL=torch.ones_like(batch.level_BL))
    torch.testing.assert_close(loss_sums(denoiser, teacher, targets, settings)[1], plain)
    alone = dataclasses.replace(batch, share_BL=torch.zeros_like(batch.level_BL))
    nothing = loss_sums(denoiser, alone, targets, settings)[1]
    assert abs(float(nothing.detach())) < 1e-3
    nothing.backward()
    assert all(float(p.grad.abs().max()) < 1e-4 for p in denoiser.parameters())


def test_mix_settings_that_mix_nothing():
    batch = drawn()
    assert with_mix(batch, MixSettings(), 0.3).share_BL is None
    weighed = with_mix(batch, MixSettings(weight="midrange"), 0.3)
    assert weighed.share_BL is None
    torch.testing.assert_close(weighed.kd_weight_BL, batch.kd_weight_BL * midrange(batch.level_BL))
    assert weighed.ce_weight_BL.equal(batch.ce_weight_BL)
    assert weighed.kd_denominator == batch.kd_denominator  # not renormalised, as published
    mixed = with_mix(batch, MixSettings(first=0.2, last=0.6), 0.5)
    torch.testing.assert_close(mixed.share_BL, torch.full_like(batch.level_BL, 0.4))
    assert mixed.kd_weight_BL.equal(batch.kd_weight_BL)


@pytest.mark.parametrize("mix", [MixSettings(), TIDAL])
def test_a_sparse_target_mixed_over_its_outcomes(mix):
    """Kept tokens and "any other": the mixture is of those outcomes. Without an answer CE stands in."""
    denoiser, plain = blocks(), drawn(kd_temperature=2.0, kd_positions=3)
    batch, settings = with_mix(plain, mix, 0.6), ObjectiveSettings(kd_temperature=2.0)
    whole = made_up(batch).logits(made_up(batch).rows_NW)
    soft = keep_top(whole, top_k=3, top_p=1.0, temperature=2.0, conditioned_on="a table")
    soft.log_probs_NK[1] = -math.inf  # no answer
    found_3 = loss_sums(denoiser, batch, soft, settings)
    expected = torch.zeros((), dtype=torch.float64)
    for n, (b, i) in enumerate(batch.distilled_BL.nonzero().tolist()):
        at = torch.zeros_like(batch.masked_BL)
        at[b, i] = True
        s_V = logits_at(denoiser, batch, at)[0]
        weight = float(batch.kd_weight_BL[b, i])
        if n == 1:
            expected = expected - weight * s_V.log_softmax(-1)[batch.x0_BL[b, i]]
            continue
        kept = soft.token_ids_NK[n]
        log_q_V = (s_V / 2.0).log_softmax(-1)
        log_q_k = log_q_V[kept]
        log_q_k = torch.cat([log_q_k, (1 - log_q_k.exp().sum()).log()[None]])
        log_p_k = torch.cat([soft.log_probs_NK[n], soft.tail_mass_N[n].log()[None]]).double()
        share = 1.0 if batch.share_BL is None else float(batch.share_BL[b, i])
        r_k = ((1 - share) * log_q_k + share * log_p_k).detach().softmax(-1)
        expected = expected + weight * 4 * (r_k * (r_k.log() - log_q_k)).sum()
    same_with_gradients(found_3[1], expected, denoiser)


# --- chunks ----------------------------------------------------------------------------------------


def chunked(where="chunks", **settings):
    """Chunks of 1 to 3 tokens with gaps, numbered through the batch; and made-up likelihoods of them."""
    local = torch.tensor([-1, 0, 0, 1, 2, 2, 2, -1, 3, 3, -1, 4, 4])
    chunk_BL = torch.where((local < 0) | ~LEARNT, -1, local + 5 * torch.arange(3)[:, None])
    chunk_BL[2] = torch.tensor([-1, 10, 10, 10, 11, -1, 12, 12, -1, 13, 14, 14, 14])
    settings = {"noise": "row", "min_t": 0.3, **settings}
    batch = drawn(masks=MaskSettings(where=where), chunk_BL=chunk_BL, **settings)
    chunk_N = chunk_BL[batch.masked_BL]
    ids_C = chunk_N[chunk_N >= 0].unique()
    number_N = torch.tensor([ids_C.tolist().index(c) if c >= 0 else -1 for c in chunk_N.tolist()])
    first_C = torch.tensor([number_N.tolist().index(c) for c in range(len(ids_C))])
    log_t_C = -torch.rand(len(ids_C), generator=torch.Generator().manual_seed(3)) * 6
    return batch, ChunkTargets(log_t_C, number_N, first_C, "a table")


def expected_chunks(denoiser, batch, targets, settings):
    """Σ_c w(first token) loss(s_c, t_c), float, by a loop; the student's log-likelihoods, too."""
    log_p_N = logits_at(denoiser, batch, batch.masked_BL).log_softmax(-1)
    log_p_N = log_p_N.gather(1, batch.x0_BL[batch.masked_BL][:, None])[:, 0].tolist()
    weight_N = batch.kd_weight_BL[batch.masked_BL].tolist()
    share_N = None if batch.share_BL is None else batch.share_BL[batch.masked_BL].tolist()
    slow = {
        "forward_calm": oracles.forward_calm,
        "reverse_calm": oracles.reverse_calm,
        "bernoulli_kl": oracles.bernoulli_kl,
    }[settings.chunk_loss]
    total, temperature = 0.0, settings.kd_temperature
    with localcontext() as context:
        context.prec = 40
        for c, log_t in enumerate(targets.log_likelihood_C.tolist()):
            members = [n for n, number in enumerate(targets.chunk_N.tolist()) if number == c]
            p_s = oracles.coin(math.fsum(log_p_N[n] for n in members), temperature)
            p_t = oracles.coin(log_t, temperature)
            if share_N is not None:
                share = Decimal(share_N[members[0]])
                p_t = (1 - share) * p_s + share * p_t
            total += weight_N[members[0]] * float(slow(p_s, p_t))
    return total * (temperature**2 if settings.temperature_squared else 1.0)


@pytest.mark.parametrize("where", ["chunks", "chunks_published", "chunks_corrected"])
@pytest.mark.parametrize("chunk_loss", ["forward_calm", "reverse_calm", "bernoulli_kl"])
@pytest.mark.parametrize("squared", [False, True])
def test_chunk_losses_are_those_of_a_loop(chunk_loss, where, squared):
    denoiser = blocks()
    form = {"chunk_loss": chunk_loss, "kd_temperature": 2.0, "temperature_squared": squared}
    batch, targets = chunked(where, **form)
    assert len(targets) > 6
    assert (targets.chunk_N < 0).any()
    settings = ObjectiveSettings(**form)
    found = loss_sums(denoiser, batch, targets, settings)[1].item()
    expected = expected_chunks(denoiser, batch, targets, settings)
    assert found == pytest.approx(expected, rel=1e-4)
    mean = dataclasses.replace(batch, kd_weight_BL=batch.masked_BL.float())
    found = loss_sums(denoiser, mean, targets, settings)[1].item()
    assert found == pytest.approx(expected_chunks(denoiser, mean, targets, settings), rel=1e-4)


def test_a_chunk_has_weight_and_share_of_its_first_token():
    denoiser = blocks()
    batch, targets = chunked(kd_temperature=2.0)
    random = torch.Generator().manual_seed(0)
    batch = dataclasses.replace(
        batch,
        kd_weight_BL=torch.rand(batch.level_BL.shape, generator=random),
        share_BL=torch.rand(batch.level_BL.shape, generator=random),
    )
    for chunk_loss in ("forward_calm", "bernoulli_kl"):
        settings = ObjectiveSettings(kd_temperature=2.0, chunk_loss=chunk_loss)
        found = loss_sums(denoiser, batch, targets, settings)[1].item()
        expected = expected_chunks(denoiser, batch, targets, settings)
        assert found == pytest.approx(expected, rel=1e-4)


def test_tokens_in_no_chunk_have_the_cross_entropy_alone():
    denoiser = blocks()
    batch, targets = chunked()
    weight_BL = batch.kd_weight_BL.clone()
    weight_BL[batch.chunk_BL < 0] = 1e6
    changed = dataclasses.replace(batch, kd_weight_BL=weight_BL)
    one, other = (loss_sums(denoiser, b, targets, ObjectiveSettings()) for b in (batch, changed))
    assert one.tolist() == other.tolist()
    ce_N = -logits_at(denoiser, batch, batch.masked_BL).log_softmax(-1)
    ce_N = ce_N.gather(1, batch.x0_BL[batch.masked_BL][:, None])[:, 0]
    expected = (ce_N * batch.ce_weight_BL[batch.masked_BL]).sum().item()
    assert one[0].item() == pytest.approx(expected, rel=1e-5)
    alone = ChunkTargets(
        torch.empty(0), torch.full_like(targets.chunk_N, -1), torch.empty(0).long(), ""
    )
    nothing = loss_sums(denoiser, batch, alone, ObjectiveSettings())
    assert nothing[1] == 0
    assert nothing[0] == one[0]


def test_label_smoothing_leaves_likelihoods_of_chunks_alone():
    denoiser = blocks()
    batch, targets = chunked()
    plain, smooth = (
        loss_sums(denoiser, batch, targets, ObjectiveSettings(label_smoothing=smoothing))
        for smoothing in (0.0, 0.3)
    )
    assert smooth[1].item() == plain[1].item()
    assert smooth[0].item() != plain[0].item()


def gradients(loss, denoiser):
    return torch.autograd.grad(loss, list(denoiser.parameters()))


def test_calm_tidal_is_forward_calm_at_another_weight():
    """Its gradient is λ_t w(t) times that of forward CALM (notes: nothing is gained by mixing)."""
    denoiser = blocks()
    batch, targets = chunked(kd_temperature=2.0)
    settings = ObjectiveSettings(kd_temperature=2.0, temperature_squared=False)
    mixed = with_mix(batch, TIDAL, 0.7)
    share_BL = mixed.share_BL * midrange(batch.level_BL)
    weighed = dataclasses.replace(batch, kd_weight_BL=batch.kd_weight_BL * share_BL)
    one = gradients(loss_sums(denoiser, mixed, targets, settings)[1], denoiser)
    other = gradients(loss_sums(denoiser, weighed, targets, settings)[1], denoiser)
    scale = max(float(g.abs().max()) for g in other)
    assert scale > 1e-4
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * scale, rtol=1e-2)


def test_gradient_of_a_chunk_goes_to_all_of_its_tokens():
    """d loss / d log p is (p_s - p_t) / (T (1 - p_s)) for every token of a chunk: finite differences."""
    denoiser = blocks().double()
    batch, targets = chunked()
    settings = ObjectiveSettings(temperature_squared=False, kd_temperature=2.0)
    weight = denoiser.model.get_output_embeddings().weight
    loss = loss_sums(denoiser, batch, targets, settings)[1]
    (slope_VD,) = torch.autograd.grad(loss, [weight])
    with torch.no_grad():
        for v, d in ((3, 2), (7, 5), (1, 0)):
            values = []
            for step in (1e-3, -1e-3):
                weight[v, d] += step
                values.append(expected_chunks(denoiser, batch, targets, settings))
                weight[v, d] -= step
            assert float(slope_VD[v, d]) == pytest.approx(
                (values[0] - values[1]) / 2e-3, rel=2e-3, abs=1e-4
            )


# --- next tokens on the clean stream ---------------------------------------------------------------


def expected_next(denoiser, smoothing=0.0, rows=range(3)):
    """Σ CE of every learnt token of every document, by forwards over what is before it alone."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in rows:
        for i in LEARNT[b].nonzero()[:, 0].tolist():
            first = int((IDS[b] == IDS[b, i]).nonzero()[0])
            prefix_L = X0[b, first : i + 1]
            masked_BL = torch.zeros(1, len(prefix_L), dtype=torch.bool)
            masked_BL[0, -1] = True  # a block of one behind clean tokens: the causal model
            xt_BL = prefix_L[None].masked_fill(masked_BL, MASK)
            logits_NV = denoiser(xt_BL, masked_BL, x0_bL=prefix_L[None], block_size=1)[:, :MASK]
            total = total + oracles.label_smoothed_cross_entropy(
                logits_NV[0].double(), int(X0[b, i]), smoothing
            )
            count += 1
    return total, count


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("complementary", [False, True])
def test_next_tokens(complementary, smoothing):
    """Once for each row, however many noisy copies it has; the other sums do not change."""
    denoiser = blocks("context_causal")
    form = {"complementary": complementary, "label_smoothing": smoothing}
    batch = drawn(**form)
    targets = made_up(batch)
    without = loss_sums(denoiser, batch, targets, ObjectiveSettings(**form))
    settings = ObjectiveSettings(ar_weight=0.1, **form)
    found_3 = loss_sums(denoiser, batch, targets, settings)
    torch.testing.assert_close(found_3[:2], without[:2])
    assert without[2] == 0
    expected, count = expected_next(denoiser, smoothing)
    assert next_tokens(batch) == count == int(LEARNT.sum())
    same_with_gradients(found_3[2], expected, denoiser)


def test_next_tokens_go_with_every_kind_of_target():
    denoiser = blocks("context_causal")
    expected, _ = expected_next(denoiser)
    settings = ObjectiveSettings(ar_weight=0.1)
    batch = drawn()
    heads = made_up(batch)
    soft = keep_top(
        heads.logits(heads.rows_NW), top_k=4, top_p=1.0, temperature=1.0, conditioned_on=""
    )
    states = StateTargets(torch.randn(len(heads), 5), torch.ones(len(heads)).bool(), "")
    projection = torch.nn.Linear(16, 5, bias=False)
    by_chunk, chunks = chunked()
    for one, targets in ((batch, None), (batch, soft), (batch, states), (by_chunk, chunks)):
        found_3 = loss_sums(denoiser, one, targets, settings, projection)
        plain_3 = loss_sums(denoiser, one, targets, ObjectiveSettings(), projection)
        assert found_3[2].item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(found_3[:2], plain_3[:2])


def test_only_learnt_tokens_of_the_same_document_are_next():
    batch = drawn(learnt=LEARNT & (torch.arange(13) != 9))
    assert next_tokens(batch) == int((LEARNT & (torch.arange(13) != 9)).sum())
    # A document whose first token is learnt has nothing before it.
    batch = drawn(learnt=IDS >= 0)
    assert next_tokens(batch) == int(LEARNT.sum())


# --- micro-batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "mix", "target"),
    [
        ({"complementary": True, "ar_weight": 0.2}, TIDAL, TargetSettings(kind="denoised")),
        ({"masking": "clipped"}, MixSettings(), TargetSettings(kind="denoised")),
        (
            {"masking": "exact", "kd_positions": 2, "kd_reduce": "mean_masked"},
            TIDAL,
            TargetSettings(kind="denoised", comp_demo="exact"),
        ),
    ],
)
def test_eight_rows_at_once_are_eight_times_one(form, mix, target, monkeypatch):
    """Sums and denominators of the parts add up to the whole's; so do gradients; chunks of rows, too."""
    denoiser = blocks("context_causal")
    teacher = DiffusionTeacher(
        random_student(block_size=4, seed=5).requires_grad_(False), V, torch.tensor([MASK])
    )
    ask, settings = ask_denoised(teacher, target), ObjectiveSettings(noise="block", **form)

    def sums(samples):
        batch = with_mix(drawn(samples=samples, **form), mix, 0.4)
        found_3 = loss_sums(denoiser, batch, ask(batch, None), settings)
        denominators = (batch.denominator, batch.kd_denominator, next_tokens(batch))
        grads = gradients((found_3 * torch.tensor([1.0, 0.7, 0.2])).sum(), denoiser)
        return found_3.detach(), torch.tensor(denominators), grads

    whole = sums(range(8))
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * V * 5)
    for parts in ([[n] for n in range(8)], [[0, 1, 2], [5, 3], [7, 4, 6]]):
        found = [sums(samples) for samples in parts]
        torch.testing.assert_close(sum(f[0] for f in found), whole[0], rtol=1e-4, atol=1e-4)
        assert sum(f[1] for f in found).tolist() == whole[1].tolist()
        scale = max(float(g.abs().max()) for g in whole[2])
        for place, gradient in enumerate(whole[2]):
            total = sum(f[2][place] for f in found)
            torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-4 * scale)


NO_CHUNKS = ChunkTargets(torch.empty(0), torch.empty(0).long(), torch.empty(0).long(), "")
NO_HEADS = HeadTargets(torch.empty(0, V), lambda rows: rows[:, :12], "")
NO_SOFT = SoftTargets(torch.empty(0, 4).long(), torch.empty(0, 4), torch.empty(0), 1.0, "")


@pytest.mark.parametrize("targets", [None, NO_HEADS, NO_SOFT, NO_CHUNKS])
@pytest.mark.parametrize("ar_weight", [0.0, 0.1])
def test_a_micro_batch_without_masks_still_has_gradients(targets, ar_weight):
    """Otherwise the processes of a group would wait for one another's gradients."""
    denoiser = blocks("context_causal")
    batch = with_mix(drawn(learnt=LEARNT & False), TIDAL, 0.5)
    assert not batch.masked_BL.any()
    sums_3 = loss_sums(denoiser, batch, targets, ObjectiveSettings(ar_weight=ar_weight))
    assert sums_3.tolist() == [0, 0, 0]
    (sums_3 * torch.tensor([0.5, 0.5, 0.1])).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in denoiser.parameters())
