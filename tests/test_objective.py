"""The training objective: masks, weights, denominators, and the sums of a micro-batch."""

import dataclasses
import itertools
import math

import oracles
import pytest
import tiny
import torch
from tiny_run import VOCAB, ar_folder, ar_teacher, tiny_denoiser

from mdm.errors import ConfigError
from mdm.train.asking import soft_targets
from mdm.train.checks import check_objective
from mdm.train.loss_sums import loss_sums
from mdm.train.masking import WEIGHTS, mask_batch
from mdm.train.objective import ObjectiveSettings, loss_meaning, term_weights
from mdm.train.placement import MaskSettings
from mdm.train.targets import SoftTargets, TargetSettings

START, PAD, MASK = 256, 258, VOCAB
EVERYTHING = TargetSettings(top_k=10**6)
UNIFORM = MaskSettings()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_denoiser(ar_folder(tmp_path_factory.mktemp("ar"), seed=1))


@pytest.fixture(scope="module")
def teacher():
    return ar_teacher(tiny.tiny_model("llama", VOCAB, hidden=16, seed=2))


def rows(count=4):
    """Packed rows: a document, a prompt with its response, padding."""
    tokens = [START, *b"abcdef", START, *b"ghij", PAD, PAD]
    ids = [0] * 7 + [1] * 5 + [-1] * 2
    maskable = [False] + [True] * 6 + [False] * 3 + [True] * 2 + [False] * 2
    classes = [0, 1, 1, 4, 2, 3, 1, 0, 1, 1, 5, 2, 0, 0]
    return [torch.tensor([line] * count) for line in (tokens, ids, maskable, classes)]


def drawn(data, *, step=0, samples=None, per_step=None, seed=0, masks=UNIFORM, **settings):
    samples = range(len(data[0])) if samples is None else samples
    return mask_batch(
        ObjectiveSettings(**settings),
        *data,
        masks=masks,
        mask_id=MASK,
        seed=seed,
        step=step,
        samples=samples,
        samples_per_step=per_step or len(data[0]),
    )


def four_standard_errors(values):
    return 4 * float(values.double().std() / math.sqrt(len(values)))


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["rate", "exact"])
def test_only_maskable_tokens_are_masked_and_nothing_else_changes(masking):
    data = rows(200)
    batch = drawn(data, masking=masking)
    tokens_BL, ids_BL, maskable_BL, _ = data
    assert not (batch.masked_BL & ~maskable_BL).any()
    assert (batch.masked_BL.sum(0) > 0).equal(maskable_BL[0])  # and every one of them sometimes
    assert (batch.xt_BL[batch.masked_BL] == MASK).all()
    assert batch.xt_BL[~batch.masked_BL].equal(tokens_BL[~batch.masked_BL])
    assert batch.x0_BL.equal(tokens_BL)
    assert batch.document_ids_BL.equal(ids_BL)
    assert not (batch.distilled_BL & ~batch.masked_BL).any()
    assert batch.num_tokens == 200 * 12
    for weight_BL in (batch.ce_weight_BL, batch.kd_weight_BL):
        assert (weight_BL[~batch.masked_BL] == 0).all()


ROTATING = {"kd_positions": 2, "ce_positions": "rest"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"masking": "exact"},
        {"kd_positions": 2},
        {"masks": MaskSettings(where="weighted")},
        {"masks": MaskSettings(where="spans")},
        {"masks": MaskSettings(where="tilted", distilled="weighted"), **ROTATING},
        {"masks": MaskSettings(where="tilted"), "masking": "exact"},
    ],
)
def test_masks_depend_on_seed_step_and_sample_alone(settings):
    whole = drawn(rows(8), per_step=8, **settings)
    for samples in ([0, 1, 2, 3, 4, 5, 6, 7], [3], [1, 3, 5, 7], [6, 2]):
        part = drawn(rows(len(samples)), samples=samples, per_step=8, **settings)
        for name in ("xt_BL", "distilled_BL", "ce_weight_BL", "kd_weight_BL"):
            assert getattr(part, name).equal(getattr(whole, name)[samples]), name
        assert part.keys == tuple((0, 0, sample) for sample in samples)
    again = {(seed, step): drawn(rows(8), per_step=8, seed=seed, step=step, **settings)
             for seed, step in itertools.product(range(2), range(2))}  # fmt: skip
    assert again[0, 0].xt_BL.equal(whole.xt_BL)
    for other in ((0, 1), (1, 0), (1, 1)):
        assert not again[other].xt_BL.equal(whole.xt_BL)


def test_exact_masking_covers_all_counts_evenly():
    data = rows(80)
    batch = drawn(data, masking="exact")
    count_B = batch.masked_BL.sum(1)
    assert count_B.bincount(minlength=9).tolist() == [0] + [10] * 8  # 8 maskable tokens
    weight_B = batch.ce_weight_BL.amax(1)
    torch.testing.assert_close(weight_B, 8 / count_B)
    assert batch.denominator == 80 * 8


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_weight_is_at_most_that_of_min_t(schedule):
    batch = drawn(rows(500), schedule=schedule, min_t=0.2)
    most = {"linear": 5.0, "cosine": math.pi / 2 * math.tan(math.pi / 2 * 0.8)}[schedule]
    assert 0.9 * most < float(batch.ce_weight_BL.max()) <= most * (1 + 1e-6)
    assert batch.denominator == 500 * 8


def test_a_row_without_anything_to_mask():
    data = rows(2)
    data[2][1] = False
    for masking in ("rate", "exact"):
        batch = drawn(data, masking=masking, kd_positions=2)
        assert not batch.masked_BL[1].any()
        assert batch.ce_weight_BL.isfinite().all()
        assert batch.kd_weight_BL.isfinite().all()


# --- the bound -----------------------------------------------------------------------------------


def scored_patterns(log_probs_of, x_L, maskable):
    """Σ of -log p over the masked tokens for every set of masks, as a table by bits."""
    table = torch.zeros(2 ** len(maskable), dtype=torch.float64)
    for bits in range(1, 2 ** len(maskable)):
        hidden = [i for b, i in enumerate(maskable) if bits >> b & 1]
        xt_L = [MASK if i in hidden else x for i, x in enumerate(x_L)]
        log_p_LV = log_probs_of(xt_L)
        table[bits] = -sum(float(log_p_LV[i, x_L[i]]) for i in hidden)
    return table


def samples_of_loss(x_L, maskable, table, count=20_000, **settings):
    """Σ w CE and the number of masks of `count` draws; w is the same at all masks of a row."""
    tokens_BL = torch.tensor([x_L] * count)
    maskable_BL = torch.tensor([[i in maskable for i in range(len(x_L))]] * count)
    zeros_BL = torch.zeros_like(tokens_BL)
    batch = drawn((tokens_BL, zeros_BL, maskable_BL, zeros_BL), kd_lambda=0.0, **settings)
    bits_B = (batch.masked_BL[:, maskable] * 2 ** torch.arange(len(maskable))).sum(1)
    return batch.ce_weight_BL.amax(1).double() * table[bits_B], batch


X, MASKABLE = [START, *b"abcab"], [1, 2, 4, 5]
SMALL_T = {"min_t": 1e-4}
FORMS = [{"masking": "exact"}, {"masking": "rate", **SMALL_T}]
FORMS += [{"masking": "rate", "schedule": "cosine", **SMALL_T}]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_masking_estimates_the_same_bound(student, form):
    def log_probs_of(xt_L):
        asked = torch.tensor([[i > 0 for i in range(len(xt_L))]])
        with torch.no_grad():
            rows_NV = student(torch.tensor([xt_L]), asked).double().log_softmax(-1)
        return torch.cat([torch.zeros(1, rows_NV.shape[1]), rows_NV])

    table = scored_patterns(log_probs_of, X, MASKABLE)
    loss_B, batch = samples_of_loss(X, MASKABLE, table, **form)
    bound = -oracles.exact_bound(log_probs_of, X, MASKABLE, MASK)
    assert abs(float(loss_B.mean()) - bound) < four_standard_errors(loss_B)
    assert four_standard_errors(loss_B) < 0.1 * bound  # or the line above says nothing
    assert batch.denominator == len(loss_B) * len(MASKABLE)


@pytest.mark.parametrize("form", FORMS)
def test_mean_masked_is_not_the_bound(form):
    """A made-up denoiser that is worse the more is masked: high noise counts more in the mean."""

    def log_probs_of(xt_L):
        return torch.full((len(xt_L), VOCAB + 1), -1.0 * xt_L.count(MASK))

    table = scored_patterns(log_probs_of, X, MASKABLE)
    assert table[0b1111] == 16
    bound = -oracles.exact_bound(log_probs_of, X, MASKABLE, MASK) / len(MASKABLE)
    assert bound == pytest.approx(2.5)  # the mean of 1, 2, 3, 4 masks
    loss_B, batch = samples_of_loss(X, MASKABLE, table, weight="bound", **form)
    error = four_standard_errors(loss_B) / len(MASKABLE)
    assert float(loss_B.sum()) / batch.denominator == pytest.approx(bound, abs=error)
    loss_B, batch = samples_of_loss(X, MASKABLE, table, weight="mean_masked", **form)
    assert batch.denominator == int(batch.masked_BL.sum())
    assert float(loss_B.sum()) / batch.denominator > bound + 0.25  # exact: (1+4+9+16)/10 = 3


# --- subsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", ["uniform", "weighted"])
@pytest.mark.parametrize("kd_positions", [1, 3])
def test_a_chosen_subset_counts_for_the_whole(kd_positions, distilled):
    """Mean weight over the choice of the subset = weight of the position, at every position."""
    count = 20_000
    masks = MaskSettings(distilled=distilled)
    settings = {"kd_positions": kd_positions, "ce_positions": "rest", "masks": masks}
    batch = drawn(rows(count), masking="exact", **settings)
    masked_B = batch.masked_BL.sum(1)
    assert batch.distilled_BL.sum(1).equal(masked_B.clamp(max=kd_positions))
    weight_B = 8 / masked_B
    for i in (1, 6, 11):
        at_B = batch.masked_BL[:, i]
        ratio = (batch.kd_weight_BL[:, i] / weight_B)[at_B]
        assert abs(float(ratio.mean()) - 1) < four_standard_errors(ratio)
        # Rows whose masks are all distilled leave nothing for the cross-entropy; with weights, heavy
        # tokens are surely distilled in a few more.
        at_B = at_B & (masked_B > kd_positions * (1 if distilled == "uniform" else 2))
        ratio = (batch.ce_weight_BL[:, i] / weight_B)[at_B]
        assert abs(float(ratio.mean()) - 1) < four_standard_errors(ratio)
    assert not ((batch.ce_weight_BL > 0) & batch.distilled_BL).any()


def test_which_positions_get_which_term():
    plain = drawn(rows())
    assert plain.distilled_BL.equal(plain.masked_BL)
    assert plain.kd_weight_BL.equal(plain.ce_weight_BL)
    alone = drawn(rows(), kd_lambda=0.0, kd_positions=2, ce_positions="rest")
    assert not alone.distilled_BL.any()
    assert alone.ce_weight_BL.equal(plain.ce_weight_BL)
    some = drawn(rows(), kd_positions=2)
    assert some.ce_weight_BL.equal(plain.ce_weight_BL)  # ce_positions=all


# --- sums over a micro-batch ---------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["rate", "exact"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("kd_lambda", "temperature"), [(0.3, 1.0), (1.0, 2.0), (0.7, 0.5)])
def test_the_loss_by_definition(student, teacher, masking, weight, kd_lambda, temperature):
    settings = {"masking": masking, "weight": weight, "kd_lambda": kd_lambda}
    settings |= {"kd_temperature": temperature}
    batch = drawn(rows(3), **settings)
    targets = soft_targets(teacher, batch, EVERYTHING, temperature)
    sums_3 = loss_sums(student, batch, targets, ObjectiveSettings(**settings))
    mix = torch.tensor([1 - kd_lambda, kd_lambda, 0])
    found = (sums_3 * mix).sum() / batch.denominator

    # Rows are packed: each document alone, without mask, through the plain modules.
    # The mask, the last token of the student, cannot occur and has no column.
    student_BLV, teacher_BLV = torch.zeros(3, 14, VOCAB), torch.zeros(3, 14, VOCAB)
    for b, (start, end) in itertools.product(range(3), [(0, 7), (7, 12)]):
        xt_L = batch.xt_BL[b : b + 1, start:end]
        logits = student.model(xt_L, use_cache=False).logits[0]
        student_BLV[b, start + 1 : end] = logits[:-1, :VOCAB]  # the AR shift
        with torch.no_grad():
            logits = teacher.model(batch.x0_BL[b : b + 1, start:end], use_cache=False).logits[0]
        teacher_BLV[b, start + 1 : end] = logits[:-1]
    expected = oracles.naive_kd_loss(
        student_BLV,
        teacher_BLV,
        batch.x0_BL,
        batch.masked_BL,
        kd_lambda,
        temperature,
        batch.ce_weight_BL,
        batch.denominator,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    parameters = list(student.model.parameters())
    got = torch.autograd.grad(found, parameters)
    want = torch.autograd.grad(expected.float(), parameters)
    scale = max(float(g.abs().max()) for g in want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 260 * 5])
def test_chunks_and_micro_batches_change_nothing(student, teacher, chunk_bytes, monkeypatch):
    settings = ObjectiveSettings(kd_positions=2, ce_positions="rest", label_smoothing=0.1)
    batch = drawn(rows(4), kd_positions=2, ce_positions="rest")
    targets = soft_targets(teacher, batch, TargetSettings(top_k=5), 1.0)
    whole = loss_sums(student, batch, targets, settings)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", chunk_bytes)
    torch.testing.assert_close(loss_sums(student, batch, targets, settings), whole)
    parts = torch.zeros(3)
    for samples in ([0], [1, 2], [3]):
        part = drawn(rows(len(samples)), samples=samples, per_step=4, kd_positions=2,
                     ce_positions="rest")  # fmt: skip
        targets = soft_targets(teacher, part, TargetSettings(top_k=5), 1.0)
        parts += loss_sums(student, part, targets, settings).detach()
    torch.testing.assert_close(parts, whole.detach())


def test_without_targets_there_is_no_second_term(student):
    batch = drawn(rows(2), kd_lambda=0.0)
    ce, kd, _ = loss_sums(student, batch, None, ObjectiveSettings(kd_lambda=0.0)).tolist()
    assert ce > 0
    assert kd == 0


def test_a_micro_batch_without_masks_still_has_gradients(student):
    """Otherwise the processes of a group would wait for one another's gradients."""
    data = rows(2)
    data[2][:] = False
    batch = drawn(data)
    none = SoftTargets(torch.empty(0, 4).long(), torch.empty(0, 4), torch.empty(0), 1.0, "left")
    sums_3 = loss_sums(student, batch, none, ObjectiveSettings())
    assert sums_3.tolist() == [0, 0, 0]
    sums_3.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())
    student.zero_grad(set_to_none=True)


def test_the_teacher_sees_clean_text_in_its_own_precision(teacher):
    batch = drawn(rows(2), masking="exact")
    fed = []
    hook = teacher.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0])
    )
    plain = soft_targets(teacher, batch, EVERYTHING, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = soft_targets(teacher, batch, EVERYTHING, 1.0)
    hook.remove()
    assert all(tokens.equal(batch.x0_BL) for tokens in fed)
    assert under_autocast.log_probs_NK.equal(plain.log_probs_NK)


def test_the_settings_choose_the_divergence(student, teacher):
    batch = drawn(rows(2))
    targets = soft_targets(teacher, batch, TargetSettings(top_k=5), 1.0)
    values = {}
    for name, beta in itertools.product(("forward_kl", "reverse_kl", "jsd"), (0.0, 0.5, 1.0)):
        settings = ObjectiveSettings(divergence=name, jsd_beta=beta)
        values[name, beta] = loss_sums(student, batch, targets, settings)[1].item()
    assert values["jsd", 0.0] == values["forward_kl", 0.5]
    assert values["jsd", 1.0] == values["reverse_kl", 0.5]
    assert len(set(values.values())) == 3


# --- settings ------------------------------------------------------------------------------------


def test_what_the_loss_means_is_said():
    meanings = {where: loss_meaning(ObjectiveSettings(), MaskSettings(where=where))
                for where in ("uniform", "tilted", "weighted", "spans")}  # fmt: skip
    assert meanings["uniform"] == meanings["tilted"] == "the likelihood bound per token"
    assert meanings["weighted"].startswith("no likelihood bound")
    assert "fills a span at once" in meanings["spans"]
    mean = ObjectiveSettings(weight="mean_masked")
    assert all("no likelihood bound" in loss_meaning(mean, MaskSettings(where=w)) for w in meanings)


def test_kd_weight_ramps():
    settings = ObjectiveSettings(kd_lambda=0.8, kd_ramp_steps=4)
    found = [term_weights(settings, s, teacher=True) for s in range(5)]
    assert [kd for _, kd, _ in found] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert [ce for ce, _, _ in found] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    at_once = dataclasses.replace(settings, kd_ramp_steps=0)
    assert term_weights(at_once, 0, teacher=True)[1] == 0.8
    assert term_weights(at_once, 0, teacher=False) == (1, 0, 0)
    added = ObjectiveSettings(kd_weight=3.0, kd_ramp_steps=2, ar_weight=0.25)
    assert term_weights(added, 0, teacher=True) == (1, 1.5, 0.25)
    assert term_weights(added, 1, teacher=True) == (1, 3, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "rates"}, "did you mean 'rate'"),
        ({"schedule": "cos"}, "cosine"),
        ({"weight": "bounds"}, "did you mean 'bound'"),
        ({"divergence": "kl"}, "forward_kl"),
        ({"tail": "buckets"}, "did you mean 'bucket'"),
        ({"ce_positions": "none"}, "rest"),
        ({"min_t": 0.0}, "min_t"),
        ({"min_t": 1.0}, "min_t"),
        ({"kd_lambda": 1.5}, "kd_lambda"),
        ({"jsd_beta": -0.1}, "jsd_beta"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"kd_temperature": 0.0}, "kd_temperature"),
        ({"kd_positions": -1}, "kd_positions"),
        ({"kd_ramp_steps": -1}, "kd_ramp_steps"),
        ({"ce_positions": "rest"}, "leaves nothing"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveSettings(**settings)


def test_settings_that_do_not_fit_together():
    reverse = ObjectiveSettings(divergence="reverse_kl")
    check_objective(reverse, TargetSettings())
    check_objective(dataclasses.replace(reverse, kd_lambda=0.0), TargetSettings(kind="suffix"))
    check_objective(dataclasses.replace(reverse, tail="renormalise"), TargetSettings(kind="suffix"))
    for target in (TargetSettings(kind="suffix"), TargetSettings(top_p=0.9)):
        with pytest.raises(ConfigError, match="reverse_kl"):
            check_objective(reverse, target)
    with pytest.raises(ConfigError, match=r"target\.kind.*did you mean 'suffix'"):
        check_objective(reverse, TargetSettings(kind="sufix"))


@pytest.mark.parametrize("kind", ["importance", "i_sir", "student", "mc_literal"])
def test_a_random_target_needs_a_loss_that_is_linear_in_it(kind):
    check_objective(ObjectiveSettings(tail="partial"), TargetSettings(kind=kind))
    for settings, message in (
        ({"kd_temperature": 2.0}, r"kd_temperature=2\.0 with target\.kind="),
        ({"divergence": "jsd"}, "divergence=jsd"),
        ({"divergence": "reverse_kl", "tail": "renormalise"}, "divergence=forward_kl"),
        ({"tail": "renormalise"}, "tail=bucket"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_objective(ObjectiveSettings(**settings), TargetSettings(kind=kind))
        check_objective(ObjectiveSettings(**settings, kd_lambda=0.0), TargetSettings(kind=kind))
