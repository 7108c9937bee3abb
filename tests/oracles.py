"""Slow, obviously correct references: what the fast code in `mdm` is compared with.

Everything here follows a definition word by word: sums over all sequences, losses over full
distributions, samplers without cache, early exit or clamping. Nothing is imported from `mdm`, and
no speed is asked for: keep vocabularies at 3-5 words and lengths at 6.

Conventions
* regions are half open, `[start, end)`; the notes' last index E is `end - 1`;
* `next_log_probs(prefix: list[int]) -> (V,)` is an autoregressive teacher (`tiny.next_log_probs`,
  `tiny.table_ar`); it is never given the mask token;
* p is the teacher's distribution, q the student's; log-probabilities are nats in float64.

Sources: LLaDA arXiv 2502.09992; GKD arXiv 2306.13649; the rest is elementary probability.
Shape letters: B batch, L length, V vocabulary, S denoising steps per block, N sequences.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

NextLogProbs = Callable[[list[int]], Tensor]
ModelFn = Callable[[Tensor, Tensor | None], Tensor]
Uniforms = Callable[[tuple[int, ...], torch.dtype], Tensor]
NEG_INF = float("-inf")


# --- 1. the published LLaDA sampler, odd behaviour included --------------------------------------


def llada_transfer_tokens(num_masks_B: Tensor, steps: int) -> Tensor:
    """(B,) masks -> (B, steps) int64 commits: n // steps each, the first n % steps one more."""
    rows = [
        [int(n) // steps + (1 if step < int(n) % steps else 0) for step in range(steps)]
        for n in num_masks_B
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), steps)


def default_uniforms(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """U[0, 1) from the global generator, as the published sampler draws it."""
    return torch.rand(shape, dtype=dtype)


def llada_noisy_logits(logits_BLV: Tensor, temperature: float, uniforms: Uniforms) -> Tensor:
    """exp(logits) / (-log u)^T in float64: its argmax samples softmax(logits / T).

    At T = 0 the *same object* comes back; trap T3 depends on that aliasing.
    """
    if temperature == 0:
        return logits_BLV
    u_BLV = uniforms(tuple(logits_BLV.shape), torch.float64)
    return logits_BLV.to(torch.float64).exp() / (-u_BLV.log()) ** temperature


def llada_confidence(logits_BLV: Tensor, proposals_BL: Tensor) -> Tensor:
    """Softmax probability of each proposal, in the dtype of the logits (trap T2)."""
    return logits_BLV.softmax(dim=-1).gather(-1, proposals_BL[..., None])[..., 0]


def llada_logits(
    model_fn: ModelFn,
    x_BL: Tensor,
    prompt_BL: Tensor,
    attention_mask_BL: Tensor | None,
    cfg_scale: float,
    mask_id: int,
) -> Tensor:
    """One forward; with guidance un + (s + 1)(cond - un), prompt masked in the second half.

    `prompt_BL` marks the positions that were not masks at the very start. A scale <= 0 means none.
    """
    if cfg_scale <= 0:
        return model_fn(x_BL, attention_mask_BL)
    without_prompt_BL = x_BL.clone()
    without_prompt_BL[prompt_BL] = mask_id
    if attention_mask_BL is not None:  # T1: the published code crashes on None, we pass it on
        attention_mask_BL = torch.cat([attention_mask_BL, attention_mask_BL])
    both = model_fn(torch.cat([x_BL, without_prompt_BL]), attention_mask_BL)
    conditional_BLV, unconditional_BLV = both.chunk(2)
    return unconditional_BLV + (cfg_scale + 1) * (conditional_BLV - unconditional_BLV)


def llada_generate(
    model_fn: ModelFn,
    prompt_BL: Tensor,
    *,
    attention_mask_BL: Tensor | None = None,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int,
    eos_id: int,
    eot_id: int,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    uniforms: Uniforms | None = None,
) -> Tensor:
    """The final canvas (B, prompt + gen_length) of the published LLaDA sampler.

    Kept on purpose: confidence in the logits' dtype (T2), aliasing of the two EOS/EoT
    assignments (T3), the mask may be proposed (T4), prompt masks compete for the budget of a
    block (T5), top-k over the whole row (T6), always S forwards (T7), the model's output is
    edited in place (T10). Not kept: the crash T1. Noise is drawn through
    `uniforms(shape, dtype)`: per step (B, L, V) float64 if T > 0, then (B, L) float32 if
    remasking is "random".
    """
    uniforms = uniforms or default_uniforms
    num_rows, prompt_length = prompt_BL.shape
    assert gen_length % block_length == 0
    num_blocks = gen_length // block_length
    assert steps % num_blocks == 0
    steps_per_block = steps // num_blocks

    x_BL = torch.full((num_rows, prompt_length + gen_length), mask_id, dtype=torch.int64)
    x_BL[:, :prompt_length] = prompt_BL
    if attention_mask_BL is not None:
        ones_BL = torch.ones((num_rows, gen_length), dtype=attention_mask_BL.dtype)
        attention_mask_BL = torch.cat([attention_mask_BL, ones_BL], dim=1)
    given_BL = x_BL != mask_id  # once: a mask id in the prompt is not "prompt"

    for block in range(num_blocks):
        start = prompt_length + block * block_length
        end = start + block_length
        num_masks_B = (x_BL[:, start:end] == mask_id).sum(dim=1)
        budget_BS = llada_transfer_tokens(num_masks_B, steps_per_block)
        for step in range(steps_per_block):
            masked_BL = x_BL == mask_id
            logits_BLV = llada_logits(
                model_fn, x_BL, given_BL, attention_mask_BL, cfg_scale, mask_id
            )
            if logits_eos_inf:
                logits_BLV[..., eos_id] = NEG_INF
            noisy_BLV = llada_noisy_logits(logits_BLV, temperature, uniforms)
            proposals_BL = noisy_BLV.argmax(dim=-1)
            if confidence_eos_eot_inf:
                # T3: one tensor at T = 0; at T > 0 EOS is removed where nobody looks any more.
                noisy_BLV[..., eos_id] = NEG_INF
                logits_BLV[..., eot_id] = NEG_INF
            if remasking == "low_confidence":
                confidence_BL = llada_confidence(logits_BLV, proposals_BL)
            elif remasking == "random":
                confidence_BL = uniforms(tuple(x_BL.shape), torch.float32)
            else:
                raise NotImplementedError(remasking)
            confidence_BL[:, end:] = NEG_INF  # the past stays eligible
            confidence_BL = confidence_BL.masked_fill(~masked_BL, NEG_INF)
            proposals_BL = torch.where(masked_BL, proposals_BL, x_BL)
            for row in range(num_rows):
                kept = confidence_BL[row].topk(int(budget_BS[row, step])).indices
                x_BL[row, kept] = proposals_BL[row, kept]
    return x_BL


# --- 2. teacher targets by enumeration -----------------------------------------------------------


def enumerate_sequences(vocab_size: int, length: int) -> Tensor:
    """All vocab_size^length sequences in lexicographic order, (N, L) int64."""
    rows = list(itertools.product(range(vocab_size), repeat=length))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)


def ar_log_prob(next_log_probs: NextLogProbs, x_L: Sequence[int], start: int, end: int) -> float:
    """log p(x_start..x_{end-1} | x_{<start}) = Σ_j log p(x_j | x_{<j})."""
    tokens = [int(token) for token in x_L]
    return math.fsum(float(next_log_probs(tokens[:j])[tokens[j]]) for j in range(start, end))


def ar_log_joint(
    next_log_probs: NextLogProbs, length: int, vocab_size: int, prefix: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """All continuations of `prefix` of this length (N, L) and their log-probabilities (N,)."""
    sequences_NL = enumerate_sequences(vocab_size, length)
    prefix = [int(token) for token in prefix]
    start, end = len(prefix), len(prefix) + length
    log_joint = [
        ar_log_prob(next_log_probs, prefix + row, start, end) for row in sequences_NL.tolist()
    ]
    return sequences_NL, torch.tensor(log_joint, dtype=torch.float64)


class Fill(NamedTuple):
    """One way to fill the masks of a region, split into what is drawn and what is weighted."""

    tokens: tuple[int, ...]  # the whole sequence up to the region's end
    log_proposal: float  # Σ over masked j of log p(x_j | x_<j): forced left-to-right decoding
    log_weight: float  # Σ over visible j of log p(x_j | x_<j): the evidence

    @property
    def log_joint(self) -> float:
        return self.log_proposal + self.log_weight


def enumerate_fills(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    masked: Iterable[int],
    vocab_size: int,
    start: int = 0,
    end: int | None = None,
) -> list[Fill]:
    """Every fill of the masks inside [start, end).

    Masks before `start` are seen clean, tokens from `end` on are not seen at all (block student).
    """
    tokens = [int(token) for token in x_L]
    end = len(tokens) if end is None else end
    holes = sorted(j for j in set(masked) if start <= j < end)
    fills = []
    for values in itertools.product(range(vocab_size), repeat=len(holes)):
        filled = tokens[:end]
        for j, value in zip(holes, values, strict=True):
            filled[j] = value
        term = {j: float(next_log_probs(filled[:j])[filled[j]]) for j in range(start, end)}
        log_proposal = math.fsum(term[j] for j in holes)
        log_weight = math.fsum(term[j] for j in term if j not in holes)
        fills.append(Fill(tuple(filled), log_proposal, log_weight))
    return fills


def marginal_of_fills(
    fills: Sequence[Fill], log_weights: Sequence[float], position: int, vocab_size: int
) -> Tensor:
    """Σ over fills of weight · onehot(token at position), normalised: (V,)."""
    weight_N = torch.tensor(log_weights, dtype=torch.float64).softmax(dim=0)
    marginal_V = torch.zeros(vocab_size, dtype=torch.float64)
    for fill, weight in zip(fills, weight_N, strict=True):
        marginal_V[fill.tokens[position]] += weight
    return marginal_V


def posterior_marginal(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    masked: Iterable[int],
    position: int,
    vocab_size: int,
    start: int = 0,
    end: int | None = None,
) -> Tensor:
    """q_i(v) = P(x_i = v | visible) = Σ over fills z with z_i = v of P(z | visible): (V,)."""
    fills = enumerate_fills(next_log_probs, x_L, masked, vocab_size, start, end)
    return marginal_of_fills(fills, [fill.log_joint for fill in fills], position, vocab_size)


def full_conditional(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    position: int,
    vocab_size: int,
    start: int = 0,
    end: int | None = None,
) -> Tensor:
    """P(x_i = v | every other token of [start, end) as in x_L): (V,)."""
    return posterior_marginal(next_log_probs, x_L, [position], position, vocab_size, start, end)


def left_only(next_log_probs: NextLogProbs, x_L: Sequence[int], position: int) -> Tensor:
    """p(v | x_<i), the teacher's next-token head; blind to everything right of i: (V,)."""
    return next_log_probs([int(token) for token in x_L][:position]).double().exp()


def suffix_score_loop(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    position: int,
    candidates: Sequence[int],
    end: int | None = None,
) -> Tensor:
    """log softmax over candidates of log p(v | x_<i) + Σ_{i<j<end} log p(x_j | x_<i, v, x_i+1..).

    One full forward per candidate and suffix position. Equals log(q / q(S)) for candidates S.
    """
    tokens = [int(token) for token in x_L]
    end = len(tokens) if end is None else end
    scores = []
    for candidate in candidates:
        branch = [*tokens[:position], int(candidate), *tokens[position + 1 : end]]
        scores.append(ar_log_prob(next_log_probs, branch, position, end))
    return torch.tensor(scores, dtype=torch.float64).log_softmax(dim=0)


# --- 3. losses by definition ---------------------------------------------------------------------


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = Σ_v p (log p - log q) over the last axis, with 0 log 0 = 0."""
    p, q = p.double(), q.double()
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(dim=-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p): the student's distribution first."""
    return forward_kl(q, p)


def generalized_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """GKD: β KL(p || m) + (1-β) KL(q || m), m = β p + (1-β) q, p teacher, q student.

    As defined, JSD_β -> 0 at both ends; what has a limit is the *ratio*: JSD_β / β -> KL(p || q)
    for β -> 0 and JSD_β / (1-β) -> KL(q || p) for β -> 1. So β = 0 and β = 1 are read as these
    two KLs, and the loss jumps by a factor of about β when β leaves an end.
    """
    if beta == 0:
        return forward_kl(p, q)
    if beta == 1:
        return reverse_kl(p, q)
    m = beta * p.double() + (1 - beta) * q.double()
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


def outside(vocab_size: int, ids: Sequence[int]) -> list[int]:
    """The ids that are not in `ids`; a repeated id is an error."""
    kept = [int(i) for i in ids]
    assert len(set(kept)) == len(kept), f"repeated ids: {kept}"
    return [v for v in range(vocab_size) if v not in kept]


def bucketed_kl(p_V: Tensor, q_V: Tensor, ids: Sequence[int]) -> Tensor:
    """KL(p || q) after merging all ids outside `ids` into one bucket; never above the full KL."""
    rest = outside(len(p_V), ids)
    ids = [int(i) for i in ids]
    p_bucketed = torch.cat([p_V[ids], p_V[rest].sum()[None]])
    q_bucketed = torch.cat([q_V[ids], q_V[rest].sum()[None]])
    return forward_kl(p_bucketed, q_bucketed)


def partial_kl(p_V: Tensor, q_V: Tensor, ids: Sequence[int]) -> Tensor:
    """Σ_{v in ids} p (log p - log q), nothing renormalised: can exceed the full KL, or be < 0."""
    outside(len(p_V), ids)
    ids = [int(i) for i in ids]
    return forward_kl(p_V[ids], q_V[ids])


def renormalised_kl(p_V: Tensor, q_V: Tensor, ids: Sequence[int]) -> Tensor:
    """KL between p and q both restricted to `ids` and renormalised: blind to mass outside."""
    outside(len(p_V), ids)
    ids = [int(i) for i in ids]
    return forward_kl(p_V[ids] / p_V[ids].sum(), q_V[ids] / q_V[ids].sum())


def label_smoothed_cross_entropy(logits_V: Tensor, target: int, eps: float) -> Tensor:
    """-Σ_v y_v log p_v with y = (1-eps) onehot(target) + eps/V (the target gets a share too)."""
    log_p_V = logits_V.double().log_softmax(dim=-1)
    num_words = len(log_p_V)
    smooth_V = torch.full_like(log_p_V, eps / num_words)
    smooth_V[target] += 1 - eps
    return -(smooth_V * log_p_V).sum()


# --- 4. the likelihood bound ---------------------------------------------------------------------


def masks_with_log_probs(
    denoise_log_probs: Callable[[list[int]], Tensor],
    x_L: Sequence[int],
    maskable: Sequence[int],
    mask_id: int,
) -> Iterator[tuple[int, float]]:
    """For every non-empty subset of `maskable`: its size, and Σ over it of log p(x_i | x_t)."""
    tokens = [int(token) for token in x_L]
    for size in range(1, len(maskable) + 1):
        for subset in itertools.combinations(maskable, size):
            noised = [mask_id if i in subset else token for i, token in enumerate(tokens)]
            log_p_LV = denoise_log_probs(noised)
            yield size, math.fsum(float(log_p_LV[i, tokens[i]]) for i in subset)


def exact_bound(denoise_log_probs, x_L, maskable: Sequence[int], mask_id: int) -> float:
    """Lower bound on log p(x_maskable | rest), nats: -E_{l ~ U{1..L}}[(L/l) E_{|M|=l} Σ_M CE].

    LLaDA's exact-l form with L = len(maskable): each of the 2^L - 1 masks M has weight
    (1/L)(L/l) / C(L, l) = 1 / (l C(L, l)). No maskable position: 0.
    """
    num = len(maskable)
    subsets = masks_with_log_probs(denoise_log_probs, x_L, maskable, mask_id)
    return math.fsum(log_p / (size * math.comb(num, size)) for size, log_p in subsets)


def bernoulli_bound(denoise_log_probs, x_L, maskable: Sequence[int], mask_id: int) -> float:
    """The same bound as -∫_0^1 (1/t) E_{M ~ Bernoulli(t)} Σ_M CE dt.

    A mask of size l has probability t^l (1-t)^(L-l), so its weight is the Beta integral
    ∫ t^(l-1) (1-t)^(L-l) dt = Γ(l) Γ(L-l+1) / Γ(L+1).
    """
    num = len(maskable)
    subsets = masks_with_log_probs(denoise_log_probs, x_L, maskable, mask_id)
    return math.fsum(
        log_p * math.exp(math.lgamma(size) + math.lgamma(num - size + 1) - math.lgamma(num + 1))
        for size, log_p in subsets
    )


def any_order_bound(denoise_log_probs, x_L, maskable: Sequence[int], mask_id: int) -> float:
    """The same bound as the mean over all L! orders of Σ_i log p(x_order(i) | earlier in order)."""
    tokens = [int(token) for token in x_L]
    totals = []
    for order in itertools.permutations(maskable):
        noised = [mask_id if i in maskable else token for i, token in enumerate(tokens)]
        total = 0.0
        for i in order:
            total += float(denoise_log_probs(noised)[i, tokens[i]])
            noised[i] = tokens[i]
        totals.append(total)
    return math.fsum(totals) / len(totals)


# --- 5. low-confidence greedy decoding of one row ------------------------------------------------


def slow_low_confidence_greedy(
    logits_fn: Callable[[list[int]], Tensor],
    canvas_L: Sequence[int],
    open_positions: Iterable[int],
    blocks: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    forbidden: Iterable[int] = (),
    threshold: float | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Canvas and, step by step, the positions committed (most confident first).

    `logits_fn(canvas) -> (L, V)` for one row; `blocks` are lists of positions decoded one after
    the other; `counts[b][s]` is the number due at step s of block b. Temperature 0; forbidden ids
    are removed *before* the softmax; float32; ties go to the lowest token and position. A step
    with nothing left to do in its block costs no forward and leaves no entry. With `threshold` a
    step also decides every other position at least that sure.
    """
    canvas = [int(token) for token in canvas_L]
    still_open = set(open_positions)
    assert still_open <= set(itertools.chain(*blocks)), "an open position lies in no block"
    committed_per_step = []
    for block, counts_of_block in zip(blocks, counts, strict=True):
        for count in counts_of_block:
            todo = sorted(still_open & set(block))
            if not todo:
                break
            logits_LV = logits_fn(canvas).float().clone()
            logits_LV[:, list(forbidden)] = NEG_INF
            ranked = []
            for i in todo:
                probs = logits_LV[i].softmax(dim=-1).tolist()
                token = probs.index(max(probs))
                ranked.append((-probs[token], i, token))
            sure = [entry for entry in sorted(ranked) if threshold and -entry[0] >= threshold]
            chosen = max(sorted(ranked)[:count], sure, key=len)
            for _, i, token in chosen:
                canvas[i] = token
                still_open.remove(i)
            committed_per_step.append([i for _, i, _ in chosen])
    return canvas, committed_per_step


# --- 6. the distillation loss over the full vocabulary -------------------------------------------


def naive_kd_loss(
    student_logits_BLV: Tensor,
    teacher_logits_BLV: Tensor,
    x0_BL: Tensor,
    masked_BL: Tensor,
    kd_lambda: float,
    temperature: float = 1.0,
    weight_BL: Tensor | None = None,
    denominator: float | None = None,
) -> Tensor:
    """(1/D) Σ_masked w · [(1-λ) CE(x0) + λ T² KL(teacher^(1/T) || student^(1/T))], float64.

    CE at temperature 1. Defaults w = 1 and D = number of masked positions: the plain pooled mean,
    which is *not* a likelihood bound. The bound is w = loss weight (1/t or L/l) and D = number of
    maskable tokens; both terms share w and D. Differentiable in the student's logits.
    """
    if denominator is None:
        denominator = int(masked_BL.sum())
    assert denominator > 0, "nothing to average over"
    total = torch.zeros((), dtype=torch.float64)
    for b, i in masked_BL.nonzero().tolist():
        student_V = student_logits_BLV[b, i].double()
        teacher_V = teacher_logits_BLV[b, i].double()
        ce = -student_V.log_softmax(dim=-1)[x0_BL[b, i]]
        p_V = (teacher_V / temperature).softmax(dim=-1)
        q_V = (student_V / temperature).softmax(dim=-1)
        term = (1 - kd_lambda) * ce + kd_lambda * temperature**2 * forward_kl(p_V, q_V)
        total = total + (1.0 if weight_BL is None else weight_BL[b, i].double()) * term
    return total / denominator


# --- 7. likelihoods: denoisers, block diffusion, decoding orders, autoregressive models -----------


@torch.no_grad()
def denoiser_log_probs(
    model,
    *,
    shift: bool,
    forbidden: Sequence[int],
    mask_id: int | None = None,
    given: Iterable[int] = (),
    scale: float = 0.0,
    block_size: int | None = None,
) -> Callable[[list[int]], Tensor]:
    """`noised tokens -> (L, V)` float64 log-probabilities by one full forward without a cache.

    Shift, guidance (the `given` positions masked in the second forward) and the forbidden tokens
    are done by hand; so is the block-causal mask, if there is a `block_size`. With a shift row 0
    is meaningless.
    """

    @torch.no_grad()
    def one(tokens: list[int]) -> Tensor:
        arguments = {}
        if block_size is not None:
            mask_LL = torch.zeros(len(tokens), len(tokens), dtype=model.dtype)
            for query, key in itertools.product(range(len(tokens)), repeat=2):
                if key // block_size > query // block_size:
                    mask_LL[query, key] = torch.finfo(model.dtype).min
            arguments["attention_mask"] = mask_LL[None, None]
        logits_LV = model(torch.tensor([tokens]), use_cache=False, **arguments).logits[0].double()
        return torch.cat([logits_LV[:1], logits_LV[:-1]]) if shift else logits_LV

    def answer(tokens: list[int]) -> Tensor:
        logits_LV = one(tokens)
        if scale > 0:
            hidden = set(given)
            without = [mask_id if i in hidden else token for i, token in enumerate(tokens)]
            logits_LV = (1 + scale) * logits_LV - scale * one(without)
        logits_LV[:, list(forbidden)] = NEG_INF
        return logits_LV.log_softmax(dim=-1)

    return answer


def llada_mask_sizes(k: int, length: int, rows: int = 8) -> list[int]:
    """The l of one round of LLaDA's estimator that starts at k.

    k, k + L/b, k + 2 L/b, … in exact fractions, rounded half to even, wrapped into 1…L.
    """
    places = [Fraction(k) + i * Fraction(length, rows) for i in range(rows)]
    return [(round(place) - 1) % length + 1 for place in places]


def llada_size_law(length: int, rows: int = 8) -> list[Fraction]:
    """P(l) for l = 1…L under LLaDA's estimator: all k are equally likely. Unbiased: 1/L each."""
    sizes = [l for k in range(1, length + 1) for l in llada_mask_sizes(k, length, rows)]
    return [Fraction(sizes.count(l), len(sizes)) for l in range(1, length + 1)]


def llada_expected_bound(
    denoise_log_probs, x_L, maskable: Sequence[int], mask_id: int, rows: int = 8
) -> float:
    """What LLaDA's estimator gives on average: `exact_bound` with its own law of l."""
    num = len(maskable)
    law = llada_size_law(num, rows)
    subsets = masks_with_log_probs(denoise_log_probs, x_L, maskable, mask_id)
    return math.fsum(
        float(law[size - 1]) * (num / size) * log_p / math.comb(num, size)
        for size, log_p in subsets
    )


def llada_estimate(
    denoise_log_probs, x_L, start: int, rounds: Sequence[Sequence[Sequence[bool]]], mask_id: int
) -> float:
    """LLaDA's estimate from the masks of its rounds: -mean over rounds of Σ CE / (l / L) / b."""
    tokens = [int(token) for token in x_L]
    length = len(tokens) - start
    losses = []
    for rows in rounds:
        loss = 0.0
        for flags in rows:
            holes = [start + i for i, flag in enumerate(flags) if flag]
            noised = [mask_id if i in holes else token for i, token in enumerate(tokens)]
            log_p_LV = denoise_log_probs(noised)
            for i in holes:
                loss += -float(log_p_LV[i, tokens[i]]) / (len(holes) / length)
        losses.append(loss / len(rows))
    return -sum(losses) / len(losses)


def block_bound(
    denoise_log_probs, x_L: Sequence[int], start: int, block_size: int, mask_id: int
) -> float:
    """The bound of block diffusion for x_{start..}: each block's own bound, given what is before it.

    Blocks are counted from position 0; of the block that holds the last prompt token only the
    answer is masked. What comes after a block is cut off, not hidden.
    """
    total = 0.0
    for first in range(0, len(x_L), block_size):
        end = min(first + block_size, len(x_L))
        maskable = [i for i in range(first, end) if i >= start]
        if maskable:
            total += exact_bound(denoise_log_probs, list(x_L)[:end], maskable, mask_id)
    return total


def surest(log_p_V: Tensor, rule: str) -> float:
    """How sure a position is of its likeliest token, by the rule's name."""
    probs = sorted((math.exp(value) for value in log_p_V.tolist()), reverse=True)
    if rule == "low_confidence":
        return probs[0]
    if rule == "margin":
        return probs[0] - probs[1]
    assert rule == "entropy"
    return math.fsum(p * math.log(p) for p in probs if p > 0)


def order_log_prob(
    denoise_log_probs,
    x_L: Sequence[int],
    start: int,
    mask_id: int,
    rule: str = "low_confidence",
    block_length: int | None = None,
) -> tuple[float, list[int], bool]:
    """log p of x_{start..} under decoding the surest position first, the order, and if it is greedy."""
    tokens = [int(token) for token in x_L]
    noised = [*tokens[:start], *[mask_id] * (len(tokens) - start)]
    log_prob, order, greedy = 0.0, [], True
    size = block_length or len(tokens)
    for first in range(start, len(tokens), size):
        left = list(range(first, min(first + size, len(tokens))))
        while left:
            log_p_LV = denoise_log_probs(noised)
            position = max(left, key=lambda i: surest(log_p_LV[i], rule))
            log_prob += float(log_p_LV[position, tokens[position]])
            greedy = greedy and int(log_p_LV[position].argmax()) == tokens[position]
            noised[position] = tokens[position]
            left.remove(position)
            order.append(position)
    return log_prob, order, greedy


def greedy_continuation(
    next_log_probs: NextLogProbs, prefix: Sequence[int], length: int, end_id: int
) -> tuple[list[int], float]:
    """At most `length` likeliest tokens, the end token included, and their mean log-probability."""
    tokens, log_prob = [int(token) for token in prefix], 0.0
    written: list[int] = []
    while len(written) < length and end_id not in written:
        log_p_V = next_log_probs(tokens)
        token = int(log_p_V.argmax())
        log_prob += float(log_p_V[token])
        tokens.append(token)
        written.append(token)
    return written, log_prob / len(written)


# --- 8. Monte-Carlo targets, one position at a time -----------------------------------------------
#
# Each estimate is a function of what is chosen on the way: `choose(probabilities, name)` answers with
# an index. `chosen_by(uniforms)` makes it the inverse of the distribution function at given numbers;
# `outcomes(run)` makes all choices there are, for exact expectations. Names of choices:
# ("fill", position, k), ("systematic", event), ("parent", event, k).

Choose = Callable[[Sequence[float], tuple], int]


def inverse_cdf(probs: Sequence[float], u: float) -> int:
    """The smallest index whose cumulative share exceeds u."""
    total, upto = math.fsum(probs), 0.0
    for index, prob in enumerate(probs):
        upto += prob
        if upto > u * total:
            return index
    raise AssertionError("u must be below 1")


def chosen_by(uniforms: Callable[[tuple], float]) -> Choose:
    """Choices from a uniform number for each name."""
    return lambda probs, name: inverse_cdf(probs, uniforms(name))


def outcomes(run: Callable[[Choose], object]) -> Iterator[tuple[float, object]]:
    """The result of `run` for every sequence of choices it can make, with its probability."""
    todo: list[tuple[int, ...]] = [()]
    while todo:
        made = todo.pop()
        taken: list[int] = []
        total = 1.0

        def choose(probs, _name, made=made, taken=taken):
            nonlocal total
            if len(taken) < len(made):
                index = made[len(taken)]
            else:
                index, *others = [i for i, prob in enumerate(probs) if prob > 0]
                todo.extend((*taken, other) for other in others)
            taken.append(index)
            total *= probs[index] / math.fsum(probs)
            return index

        result = run(choose)
        yield total, result


def limits(
    masked: Iterable[int], position: int, length: int, *, window=0, block=0, fill="region"
) -> tuple[list[int], int]:
    """The holes that are filled for the target of a position, and where its evidence ends.

    Positions count from the start of the document, which has `length` tokens. Evidence is visible and
    ends with the document, with the block, or `window` tokens to the right; the end is exclusive.
    """
    masked = set(masked)
    first, last = 0, length
    if block:
        first = position - position % block
        last = min(last, first + block)
    if window:
        last = min(last, position + window + 1)
    end = max([j for j in range(position + 1, last) if j not in masked], default=position) + 1
    holes = [j for j in range(first, end) if j in masked]
    if fill == "span":
        holes = [
            j for j in holes if masked.issuperset(range(min(j, position), max(j, position) + 1))
        ]
    return holes, end


class FillEstimate(NamedTuple):
    """A target and what it was made of."""

    target_V: Tensor
    ess: float  # (Σ w)² / Σ w²; NaN if every weight is 0, where the target is left-only
    texts: list[list[int]]
    weights: list[float]
    evidence: float  # estimate of P(visible tokens from the first hole to the end)
    resampled: int  # how many times


def effective_number(weights: Sequence[float]) -> float:
    """(Σ w)² / Σ w²."""
    total = math.fsum(weights)
    return total**2 / math.fsum(weight**2 for weight in weights) if total else math.nan


def systematic_outcomes(weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """All parents that systematic resampling can give, in the order of its one uniform number u.

    The parent of fill k is the inverse of the distribution function at (k + u) / K.
    """
    fills, total = len(weights), math.fsum(weights)
    upto = [math.fsum(weights[: k + 1]) / total * fills for k in range(fills)]
    breaks = sorted({0.0, 1.0, *(place - math.floor(place) for place in upto)})
    return [
        (high - low, [inverse_cdf(weights, (k + (low + high) / 2) / fills) for k in range(fills)])
        for low, high in itertools.pairwise(breaks)
    ]


def fill_estimate(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    holes: Sequence[int],
    position: int,
    end: int,
    fills: int,
    choose: Choose,
    *,
    reference: bool = False,
    resampling: str = "",
    threshold: float = 0.5,
    heads: bool = True,
) -> FillEstimate:
    """K weighted fills from left to right, all at the same position.

    reference   fill 0 is the text itself
    resampling  before a hole, if the effective number of fills is below threshold · K: "systematic", or
                "conditional" (fill 0 stays, each other one gets a parent by weight)
    heads       where no evidence stands to the right, average the next-token heads (Rao-Blackwell)
    """
    tokens = [int(token) for token in x_L]
    texts = [tokens[: holes[0]] for _ in range(fills)]
    weights, evidence, events = [1.0] * fills, 1.0, 0
    last_heads: list[Tensor] = []
    for j in range(holes[0], end):
        few = math.fsum(weights) > 0 and effective_number(weights) < threshold * fills
        if resampling and few and j in holes and j != holes[0]:
            evidence *= math.fsum(weights) / fills
            if resampling == "systematic":
                possible = systematic_outcomes(weights)
                chosen = choose([prob for prob, _ in possible], ("systematic", events))
                parents = possible[chosen][1]
            else:
                assert resampling == "conditional"
                parents = [0, *(choose(weights, ("parent", events, k)) for k in range(1, fills))]
            texts, weights = [list(texts[parent]) for parent in parents], [1.0] * fills
            events += 1
        log_probs = [next_log_probs(text) for text in texts]
        if j == position:
            last_heads = log_probs
            if heads and end == position + 1:
                break
        for k, text in enumerate(texts):
            probs = log_probs[k].exp().tolist()
            if j not in holes:
                weights[k] *= probs[tokens[j]]
                text.append(tokens[j])
            elif reference and k == 0:
                text.append(tokens[j])
            else:
                text.append(choose(probs, ("fill", j, k)))
    evidence *= math.fsum(weights) / fills
    if not math.fsum(weights):
        target_V = left_only(next_log_probs, tokens, position)
    elif heads and end == position + 1:
        target_V = averaged([p_V.exp() for p_V in last_heads], weights)
    else:
        num_words = len(last_heads[0])
        target_V = averaged([one_hot(text[position], num_words) for text in texts], weights)
    return FillEstimate(target_V, effective_number(weights), texts, weights, evidence, events)


def one_hot(token: int, num_words: int) -> Tensor:
    """(V,) float64."""
    result_V = torch.zeros(num_words, dtype=torch.float64)
    result_V[token] = 1
    return result_V


def averaged(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w · value / Σ w."""
    share = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    return sum(s * value.double() for s, value in zip(share, values, strict=True))


def importance_estimate(*arguments, **options) -> FillEstimate:
    """Likelihood weighting: K fresh forced fills. Arguments of all: see `fill_estimate`."""
    return fill_estimate(*arguments, **options)


def smc_estimate(*arguments, **options) -> FillEstimate:
    """Sequential Monte Carlo with systematic resampling below K/2."""
    return fill_estimate(*arguments, resampling="systematic", **options)


def i_sir_estimate(*arguments, **options) -> FillEstimate:
    """Iterated sampling importance resampling: K - 1 fresh fills and the text's own."""
    return fill_estimate(*arguments, reference=True, **options)


def csmc_estimate(*arguments, **options) -> FillEstimate:
    """Conditional SMC: the text's own fill survives every resampling."""
    return fill_estimate(*arguments, reference=True, resampling="conditional", **options)


def mc_literal_estimate(next_log_probs, x_L, holes, position, _end, fills, choose) -> FillEstimate:
    """The mean next-token head over K unweighted fills; nothing to the right of `position` counts."""
    # Visible tokens must not weigh: what is known is given to the teacher as a prefix, no more.
    tokens = [int(token) for token in x_L]
    texts = []
    for k in range(fills):
        text = tokens[: holes[0]]
        for j in range(holes[0], position):
            probs = next_log_probs(text).exp().tolist()
            text.append(choose(probs, ("fill", j, k)) if j in holes else tokens[j])
        texts.append(text)
    weights = [1.0] * fills
    target_V = averaged([next_log_probs(text).exp() for text in texts], weights)
    return FillEstimate(target_V, float(fills), texts, weights, math.nan, 0)


def student_estimate(
    next_log_probs: NextLogProbs,
    x_L: Sequence[int],
    holes: Sequence[int],
    position: int,
    end: int,
    fills: int,
    choose: Choose,
    *,
    proposals: dict[int, Sequence[float]],
    reference: bool = True,
    heads: bool = True,
) -> FillEstimate:
    """Fills from a product of marginals r, one (V,) for each hole: w = p(completed text) / r(fill).

    Where no evidence stands to the right, only what stands to the left of the position weighs.
    """
    tokens = [int(token) for token in x_L]
    stop = position if heads and end == position + 1 else end
    texts, weights, last_heads = [], [], []
    for k in range(fills):
        text, weight = tokens[: holes[0]], 1.0
        for j in range(holes[0], stop):
            token = tokens[j]
            if j in holes and not (reference and k == 0):
                token = choose(proposals[j], ("fill", j, k))
            weight *= float(next_log_probs(text)[token].exp())
            if j in holes:
                weight /= proposals[j][token] / math.fsum(proposals[j])
            text.append(token)
        texts.append(text)
        weights.append(weight)
        last_heads.append(next_log_probs(text[:position]).exp())
    if not math.fsum(weights):
        target_V = left_only(next_log_probs, tokens, position)
    elif stop == position:
        target_V = averaged(last_heads, weights)
    else:
        num_words = len(last_heads[0])
        target_V = averaged([one_hot(text[position], num_words) for text in texts], weights)
    evidence = math.fsum(weights) / fills
    return FillEstimate(target_V, effective_number(weights), texts, weights, evidence, 0)


def mixture(slots: Sequence[tuple[int, float]], allowed: Sequence[int], mix: float) -> dict:
    """{token: probability} of (1 - mix) · r + mix · uniform; r has (token, probability) slots.

    r is cut down to the allowed tokens and renormalised.
    """
    inside = [(token, prob) for token, prob in slots if token in allowed]
    total = math.fsum(prob for _, prob in inside)
    result = {token: mix / len(allowed) for token in allowed}
    for token, prob in inside:
        result[token] += (1 - mix) * prob / total
    return result


def mixture_draw(
    slots: Sequence[tuple[int, float]], allowed: Sequence[int], mix: float, u: float
) -> int:
    """A token of the mixture: [0, mix) of u is the uniform's part, the rest goes to the slots."""
    if u < mix:
        return sorted(allowed)[int(u / mix * len(allowed))]
    probs = [prob if token in allowed else 0.0 for token, prob in slots]
    return slots[inverse_cdf(probs, (u - mix) / (1 - mix))][0]


# --- 9. suffix scoring with a tail, and with pruning -----------------------------------------------


def suffix_candidates(
    next_log_probs: NextLogProbs, x_L: Sequence[int], position: int, count: int
) -> list[int]:
    """The `count` likeliest tokens by the left side; the true one takes the last place if missing."""
    tokens = [int(token) for token in x_L]
    best = next_log_probs(tokens[:position]).argsort(descending=True, stable=True).tolist()[:count]
    return best if tokens[position] in best else [*best[:-1], tokens[position]]


def suffix_scores(next_log_probs, x_L, position, candidates, end) -> list[float]:
    """g(v) = p(v | left) · p(the tokens up to `end` | left, v), a number for each candidate."""
    tokens = [int(token) for token in x_L]
    branches = [[*tokens[:position], v, *tokens[position + 1 : end]] for v in candidates]
    return [math.exp(ar_log_prob(next_log_probs, b, position, end)) for b in branches]


def tail_estimate(
    next_log_probs, x_L, position, candidates, end, draws: int, choose: Choose
) -> tuple[Tensor, float]:
    """(C,) q over the candidates and the mass outside them, by tokens drawn from the others.

    A drawn token stands for P(not a candidate | left) · p(right | left, token) / number of draws.
    """
    tokens = [int(token) for token in x_L]
    prior = next_log_probs(tokens[:position]).exp().tolist()
    others = [0.0 if v in candidates else p for v, p in enumerate(prior)]
    tail = 0.0
    if math.fsum(others) > 0:
        for m in range(draws):
            v = choose(others, ("tail", position, m))
            (score,) = suffix_scores(next_log_probs, tokens, position, [v], end)
            tail += math.fsum(others) * score / prior[v] / draws
    scores = suffix_scores(next_log_probs, tokens, position, candidates, end)
    total = math.fsum(scores) + tail
    return torch.tensor(scores, dtype=torch.float64) / total, tail / total


def pruned(
    next_log_probs, x_L, position, candidates, end, prune: float, first_round: int = 2
) -> tuple[list[int], float]:
    """The candidates that are left at the end, and the posterior mass that the others had when dropped.

    After 0, 2, 4, 8, … tokens of the right side the least likely candidates go, as long as their share
    among those that are left is within the round's budget. Never the true token; never at the end,
    where nothing can be saved any more.
    """
    alive, dropped = list(candidates), 0.0
    length = end - position - 1
    read, rounds = [0], 0
    while read[-1] < length:
        read.append(min(length, first_round * 2**rounds))
        rounds += 1
    for upto in read[:-1]:
        scores = suffix_scores(next_log_probs, x_L, position, alive, position + 1 + upto)
        share = dict(zip(alive, [score / math.fsum(scores) for score in scores], strict=True))
        spent = 0.0
        for v in sorted(set(alive) - {int(x_L[position])}, key=share.__getitem__):
            if spent + share[v] > prune / (rounds + 1):
                break
            spent += share[v]
            alive.remove(v)
        dropped += spent
    return alive, dropped


# --- 10. two tokenizations of one text -------------------------------------------------------------


def aligned(ends_N: Sequence[int], ends_M: Sequence[int]) -> tuple[list[int], list[int]]:
    """The chunk of each token: whoever is behind takes a token, and where both meet a chunk is over.

    Tokens of no bytes go with the chunk that was just closed; before the first byte, with the first.
    """
    sides = (list(ends_N), list(ends_M))
    chunks: tuple[list[int], list[int]] = ([], [])
    at, chunk = [0, 0], 0

    def take(side: int) -> None:
        at[side] = sides[side][len(chunks[side])]
        chunks[side].append(chunk)

    def has_more(side: int) -> bool:
        return len(chunks[side]) < len(sides[side])

    while has_more(0) or has_more(1):
        take(0 if has_more(0) and at[0] <= at[1] else 1)
        if at[0] == at[1] > 0:
            for side in (0, 1):
                while has_more(side) and sides[side][len(chunks[side])] == at[side]:
                    take(side)
            chunk += 1
    return chunks


# --- 11. mixed targets, and chunks as coins ---------------------------------------------------------
#
# A coin is the probability of a chunk as a Decimal, so that 1 - p is exact however close p is to 1. Give
# `decimal` enough digits (a local context) before any arithmetic.


def mixed_logits(student_V: Tensor, teacher_V: Tensor, share: float, temperature: float) -> Tensor:
    """softmax[(1-λ) s/T + λ u/T] of raw logits over the whole vocabulary, as TIDAL is published."""
    s_V, u_V = student_V.double() / temperature, teacher_V.double() / temperature
    return ((1 - share) * s_V + share * u_V).softmax(dim=-1)


def coin(log_likelihood: float, temperature: float) -> Decimal:
    """p = exp(log-likelihood / T)."""
    return (Decimal(log_likelihood) / Decimal(temperature)).exp()


def coin_cross_entropy(p: Decimal, q: Decimal) -> Decimal:
    """-[p log q + (1-p) log(1-q)], 0 < q < 1."""
    return -(p * q.ln() + (1 - p) * (1 - q).ln())


def coin_entropy(p: Decimal) -> Decimal:
    """H(p), 0 < p < 1."""
    return coin_cross_entropy(p, p)


def forward_calm(p_s: Decimal, p_t: Decimal) -> Decimal:
    """-[p_t log p_s + (1-p_t) log(1-p_s)], s student, t teacher."""
    return coin_cross_entropy(p_t, p_s)


def reverse_calm(p_s: Decimal, p_t: Decimal) -> Decimal:
    """-[p_s log p_t + (1-p_s) log(1-p_t)], as published."""
    return coin_cross_entropy(p_s, p_t)


def bernoulli_kl(p_s: Decimal, p_t: Decimal) -> Decimal:
    """KL(p_s || p_t) = Σ over both outcomes of s log(s / t)."""
    return p_s * (p_s / p_t).ln() + (1 - p_s) * ((1 - p_s) / (1 - p_t)).ln()


# --- 12. block diffusion: one block, everything read anew ------------------------------------------


def sees_in_blocks(
    query: int, key: int, start: int, masked: Sequence[bool], block_size: int, attention: str
) -> bool:
    """May position `query` see position `key`? Clean tokens stand before `start`, the block from there.

    Strictly from left to right in a "reordered" block means: observed tokens, then masked ones.
    """
    if key < start and query >= start:
        return True  # the block is the last thing there is: all clean tokens are in earlier blocks
    if key < start:
        return key // block_size <= query // block_size if attention == "block" else key <= query
    if query < start:
        return False
    if attention != "reordered":
        return True
    own = range(start, len(masked))
    order = [i for i in own if not masked[i]] + [i for i in own if masked[i]]
    return order.index(key) <= order.index(query)


def block_logits(
    model,
    *,
    block_size: int,
    attention: str,
    shift: bool,
    mask_id: int,
    given: Iterable[int] = (),
    scale: float = 0.0,
) -> Callable[[list[int]], Tensor]:
    """`tokens -> (L, V)` float64 logits of the block that holds the first mask; zeros elsewhere.

    One forward without a cache over clean tokens and block; what stands after it is cut off. The mask
    is made pair by pair. With `scale` guidance as in `denoiser_log_probs`.
    """

    @torch.no_grad()
    def one(tokens: list[int], start: int) -> Tensor:
        end = min(start + block_size, len(tokens))
        masked = [token == mask_id for token in tokens[:end]]
        mask_LL = torch.zeros(end, end, dtype=model.dtype)
        for query, key in itertools.product(range(end), repeat=2):
            if not sees_in_blocks(query, key, start, masked, block_size, attention):
                mask_LL[query, key] = torch.finfo(model.dtype).min
        x_BL = torch.tensor([tokens[:end]])
        outputs_LV = model(x_BL, use_cache=False, attention_mask=mask_LL[None, None]).logits[0]
        logits_LV = torch.zeros(len(tokens), outputs_LV.shape[1], dtype=torch.float64)
        for i in range(max(start, int(shift)), end):
            logits_LV[i] = outputs_LV[i - int(shift)]
        return logits_LV

    def answer(tokens: list[int]) -> Tensor:
        tokens = [int(token) for token in tokens]
        start = tokens.index(mask_id) // block_size * block_size
        logits_LV = one(tokens, start)
        if scale > 0:
            hidden = set(given)
            without = [mask_id if i in hidden else token for i, token in enumerate(tokens)]
            logits_LV = (1 + scale) * logits_LV - scale * one(without, start)
        return logits_LV

    return answer


# --- 13. block diffusion in training: clean tokens and noisy copies of them in one row --------------


class Place(NamedTuple):
    """A token of a row [x_t ; … ; x_0]; copy 0 are the clean tokens. Padding is document -1."""

    document: int
    position: int
    copy: int
    masked: bool


def sees_in_streams(query: Place, key: Place, block_size: int, attention: str) -> bool:
    """May one token of a row see the other? BD3LM (2503.09573) and its relatives, sentence by sentence."""
    if query.document != key.document:
        return False
    own, other = query.position // block_size, key.position // block_size
    if key.copy == 0 and query.copy == 0:
        return other <= own if attention == "block" else key.position <= query.position
    if key.copy == 0:
        return other < own
    if key.copy != query.copy or other != own:
        return False
    if attention == "reordered":  # as if observed tokens had been moved in front of masks
        return (key.masked, key.position) <= (query.masked, query.position)
    return True


def block_bound_of_table(
    cross_entropy: Callable[[int, frozenset[int]], float], blocks: Sequence[Sequence[int]]
) -> float:
    """Σ over blocks of the bound of the block, where CE(i, masked ones of its block) is a table.

    A block of n tokens: Σ_l E_{|M| = l} (1/l) Σ_M CE, l = 1 … n.
    """
    total = 0.0
    for block in blocks:
        for size in range(1, len(block) + 1):
            sets = list(itertools.combinations(block, size))
            losses = (cross_entropy(i, frozenset(chosen)) for chosen in sets for i in chosen)
            total += math.fsum(losses) / size / len(sets)
    return total


# --- rollouts ---
# A rollout is a list of tokens and the step at which each was decided: `given` = it is the prompt's,
# `never` = it was still a mask when the text had ended.


def row_blocks(length: int, block_size: int) -> list[list[int]]:
    """Positions of each block, counted from position 0; without blocks (0) there is one."""
    size = block_size or max(1, length)
    return [list(range(i, min(i + size, length))) for i in range(0, length, size)]


def block_states(
    steps: Sequence[int], block: Sequence[int], given: int, never: int
) -> list[frozenset[int]]:
    """What was masked in a block before each step that decided something in it, earliest first."""
    when = sorted({steps[i] for i in block} - {given, never})
    return [
        frozenset(i for i in block if steps[i] != given and not steps[i] < step) for step in when
    ]


def masked_share(
    steps: Sequence[int], block_size: int, given: int, never: int
) -> dict[int, Fraction]:
    """Probability of each written position to be masked, if every state of its block is as likely."""
    share = {}
    for block in row_blocks(len(steps), block_size):
        states = block_states(steps, block, given, never)
        for i in block:
            if steps[i] != given and states:
                share[i] = Fraction(sum(i in state for state in states), len(states))
    return share


class RolloutEnd(NamedTuple):
    """What is learnt of a rollout whose end matters: positions, and the text as it should have been."""

    learnt: frozenset[int]
    asked: frozenset[int]
    text: list[int]


def rollout_end(
    tokens: Sequence[int], steps: Sequence[int], eos: int, rule: str, given: int
) -> RolloutEnd:
    """Position by position: the student's own first end token, what is before it and what behind."""
    written = [i for i in range(len(tokens)) if steps[i] != given]
    end = next((i for i in written if tokens[i] == eos), None)
    before = [i for i in written if end is None or i < end]
    at = [] if end is None else [end]
    behind = [i for i in written if end is not None and i > end]
    text = [eos if i in behind else token for i, token in enumerate(tokens)]
    learnt, asked = {
        "padded": (before + at + behind, before + at),
        "learnt": (before + at, before + at),
        "published": (before, before),
    }[rule]
    return RolloutEnd(frozenset(learnt), frozenset(asked), text)


# --- fixed points --------------------------------------------------------------------------------
#
# Training on the student's own text in the limit of everything: the student is a table p_SnV with a free
# distribution for each position of each state, and all rollouts are enumerated. A state is what is seen
# of a block of n tokens, the number V standing for a mask; a text is a state without masks.
# Shape letters here: S = (V + 1)^n states in lexicographic order, Z = V^n texts, n positions.

# With which probability (S,) which of the proposals are decided (S, Z, n). Given: what is open (S, n), the
# probability of each proposal (S, Z, n), that of the likeliest token (S, n). Ties go to the left.
Decided = tuple[Tensor, Tensor]
Rule = Callable[[Tensor, Tensor, Tensor], list[Decided]]


def states_of(vocab_size: int, length: int) -> Tensor:
    """(S, n) all states; the last one is all masks."""
    return enumerate_sequences(vocab_size + 1, length)


def places_of(states: Tensor, vocab_size: int) -> Tensor:
    """(...) the number of each of these states (..., n)."""
    digits_n = (vocab_size + 1) ** torch.arange(states.shape[-1] - 1, -1, -1)
    return (states * digits_n).sum(-1)


def surest_of(open_Sn: Tensor, sure_SZn: Tensor) -> list[Decided]:
    """The open position with the largest number, the first of equal ones."""
    at_SZ1 = sure_SZn.masked_fill(~open_Sn[:, None], NEG_INF).argmax(-1, keepdim=True)
    decided_SZn = torch.zeros_like(sure_SZn, dtype=torch.bool).scatter_(-1, at_SZ1, True)
    return [(torch.ones(len(open_Sn), dtype=torch.float64), decided_SZn & open_Sn[:, None])]


def in_order(open_Sn: Tensor, drawn_SZn: Tensor, *, backwards: bool = False) -> list[Decided]:
    """The first open position, or the last."""
    place_n = torch.arange(open_Sn.shape[-1], dtype=torch.float64)
    return surest_of(open_Sn, (place_n if backwards else -place_n).expand_as(drawn_SZn))


def any_one(open_Sn: Tensor, drawn_SZn: Tensor) -> list[Decided]:
    """Every open position is as likely."""
    chance_Sn = open_Sn / open_Sn.sum(-1, keepdim=True).clamp(min=1).double()
    each_nn = torch.eye(open_Sn.shape[-1], dtype=torch.bool)
    return [
        (chance_Sn[:, i], each_nn[i].expand(*drawn_SZn.shape)) for i in range(open_Sn.shape[-1])
    ]


def all_above(threshold: float, of: str) -> Rule:
    """What is at least this sure by its "drawn" or its "best" token; the surest if nothing is."""

    def rule(open_Sn: Tensor, drawn_SZn: Tensor, best_Sn: Tensor) -> list[Decided]:
        sure_SZn = drawn_SZn if of == "drawn" else best_Sn[:, None].expand_as(drawn_SZn)
        ((chance_S, surest_SZn),) = surest_of(open_Sn, sure_SZn)
        return [(chance_S, surest_SZn | ((sure_SZn >= threshold) & open_Sn[:, None]))]

    return rule


# One token a step. Of the two by confidence the first is a function of the state alone (as margin and
# entropy are), the other looks at the token drawn (LLaDA's low_confidence at a temperature).
DECODING: dict[str, Rule] = {
    "left to right": lambda open_Sn, drawn, _: in_order(open_Sn, drawn),
    "right to left": lambda open_Sn, drawn, _: in_order(open_Sn, drawn, backwards=True),
    "random": lambda open_Sn, drawn, _: any_one(open_Sn, drawn),
    "surest position": lambda open_Sn, drawn, best: surest_of(
        open_Sn, best[:, None].expand_as(drawn)
    ),
    "surest draw": lambda open_Sn, drawn, _: surest_of(open_Sn, drawn),
}


def decoding_step(p_SnV: Tensor, rule: Rule, position: int | None = None) -> Tensor:
    """(S, S) one step: a token is proposed at every open position, some are decided. A text stays put.

    With `position`, the part of it in which that one is decided.
    """
    states, length, vocab_size = p_SnV.shape
    state_Sn, text_Zn = states_of(vocab_size, length), enumerate_sequences(vocab_size, length)
    open_Sn = state_Sn == vocab_size
    seen_SZn = (state_Sn[:, None] == text_Zn[None]).double()
    drawn_SZn = torch.stack([p_SnV[:, i, text_Zn[:, i]] for i in range(length)], dim=-1)
    chance_SZ = torch.where(open_Sn[:, None], drawn_SZn, seen_SZn).prod(-1)
    chance_SZ = chance_SZ * open_Sn.any(-1)[:, None]
    step_SS = torch.zeros(states, states, dtype=torch.float64)
    for weight_S, decided_SZn in rule(open_Sn, drawn_SZn, p_SnV.amax(-1)):
        next_SZn = torch.where(decided_SZn, text_Zn[None], state_Sn[:, None])
        moved_SZ = weight_S[:, None] * chance_SZ
        if position is not None:
            moved_SZ = moved_SZ * decided_SZn[..., position]
        step_SS.scatter_add_(1, places_of(next_SZn, vocab_size), moved_SZ)
    return step_SS


def endings(p_SnV: Tensor, step_SS: Tensor) -> list[Tensor]:
    """m = 0 … n -> (S, Z) probability to have that text exactly m steps after that state."""
    _, length, vocab_size = p_SnV.shape
    text_Zn = enumerate_sequences(vocab_size, length)
    now_SZ = torch.zeros(len(p_SnV), len(text_Zn), dtype=torch.float64)
    now_SZ[places_of(text_Zn, vocab_size), torch.arange(len(text_Zn))] = 1
    found = [now_SZ]
    for _ in range(length):
        found.append(step_SS @ found[-1])
    return found


def sampled_joint(p_SnV: Tensor, rule: Rule) -> Tensor:
    """(Z,) the law of the texts that are written from masks alone."""
    return torch.stack(endings(p_SnV, decoding_step(p_SnV, rule))).sum(0)[-1]


def trained_weights(p_SnV: Tensor, rule: Rule, choice: str) -> Tensor:
    """(n, S, Z) how much a position of a state of a text is learnt from:

    round       one of the states that a rollout passed through, every mask of it
    decided     the same, but only what was decided next
    complement  round, and masks where that has none
    random      any masks on the text of a rollout
    """
    states, length, vocab_size = p_SnV.shape
    state_Sn, text_Zn = states_of(vocab_size, length), enumerate_sequences(vocab_size, length)
    step_SS = decoding_step(p_SnV, rule)
    ends = endings(p_SnV, step_SS)
    if choice == "random":
        fits_SZn = (state_Sn[:, None] == text_Zn[None]) | (state_Sn == vocab_size)[:, None]
        return (fits_SZn.all(-1) * torch.stack(ends).sum(0)[-1]).expand(length, -1, -1)
    parts = [step_SS]  # one for all positions
    if choice == "decided":
        parts = [decoding_step(p_SnV, rule, position) for position in range(length)]
    at_S = torch.zeros(states, dtype=torch.float64)
    at_S[-1] = 1
    weight_nSZ = torch.zeros(len(parts), states, len(text_Zn), dtype=torch.float64)
    for done in range(length):
        # A rollout of r rounds is in each of its states with weight 1 / r.
        later_SZ = sum(ends[left - 1] / (done + left) for left in range(1, length - done + 1))
        for place, part_SS in enumerate(parts):
            weight_nSZ[place] += at_S[:, None] * (part_SS @ later_SZ)
        at_S = at_S @ step_SS
    if choice == "complement":
        other_SZn = torch.where(state_Sn[:, None] == vocab_size, text_Zn[None], vocab_size)
        other_nSZ = places_of(other_SZn, vocab_size).expand_as(weight_nSZ)
        weight_nSZ = weight_nSZ.clone().scatter_add_(1, other_nSZ, weight_nSZ)
    return weight_nSZ.expand(length, -1, -1)


def taught(
    next_log_probs: NextLogProbs,
    vocab_size: int,
    length: int,
    kind: str,
    given: Sequence[int] = (),
) -> Tensor:
    """What the teacher says behind `given`: of each position of a text (Z, n, V), or of a state (S, n, V).

    left    its next-token distribution in the finished text
    suffix  its full conditional: the other masks hold the finished text
    exact   q(v | what is seen), which no rollout can change
    """
    given, start = list(given), len(given)
    end = start + length
    of_kind = {
        "left": lambda x_L, i, _: left_only(next_log_probs, x_L, i),
        "suffix": lambda x_L, i, _: full_conditional(
            next_log_probs, x_L, i, vocab_size, start, end
        ),
        "exact": lambda x_L, i, masked: posterior_marginal(
            next_log_probs, x_L, {*masked, i}, i, vocab_size, start, end
        ),
    }[kind]
    seen = states_of if kind == "exact" else enumerate_sequences
    rows = []
    for state in seen(vocab_size, length).tolist():
        masked = [start + i for i in range(length) if state[i] == vocab_size]
        x_L = given + state
        rows.append(torch.stack([of_kind(x_L, i, masked)[:vocab_size] for i in range(start, end)]))
    return torch.stack(rows)


def learn_once(p_SnV: Tensor, rule: Rule, taught_XnV: Tensor, choice: str = "round") -> Tensor:
    """The best table on the rollouts of this one; as it was where nothing is learnt.

    Forward KL to a target, or cross-entropy, is least at the mean of the targets.
    """
    weight_nSZ = trained_weights(p_SnV, rule, choice)
    total_Sn = weight_nSZ.sum(-1).T
    if len(taught_XnV) == len(p_SnV):  # by state
        return torch.where(total_Sn[..., None] > 0, taught_XnV, p_SnV)
    sums = [weight_nSZ[i] @ taught_XnV[:, i] for i in range(p_SnV.shape[1])]
    mean_SnV = torch.stack(sums, dim=1) / total_Sn[..., None].clamp(min=1e-300)
    return torch.where(total_Sn[..., None] > 1e-290, mean_SnV, p_SnV)


# --- 17. approximate caches ---------------------------------------------------------------------------


def stale_logits(
    model,
    *,
    cache: str,
    refresh: int | None,
    blocks: Sequence[Sequence[int]],
    mask_id: int,
    shift: bool,
) -> Callable[[list[int]], Tensor]:
    """`canvas -> (L, V)` of a model that computes only part of the canvas anew (Fast-dLLM, section 3.2).

    To be asked once a step, in order. Keys and values of every position are kept as a list of tensors; a
    forward gets those of the positions it does not read, whatever age they have. Rows that were not read
    are NaN. "prefix" reads from the current block to the end, "dual" the block; a shifted model one token
    more. Whole canvases are read at the start of each of `blocks` and every `refresh` steps.
    """
    from transformers import DynamicCache

    state = {"block": None, "steps": 0, "kept": None}

    @torch.no_grad()
    def answer(canvas: list[int]) -> Tensor:
        length = len(canvas)
        number = next(
            i for i, block in enumerate(blocks) if any(canvas[p] == mask_id for p in block)
        )
        first, last = blocks[number][0], blocks[number][-1]
        fresh = state["block"] != number or state["steps"] == refresh
        if fresh:
            state.update(block=number, steps=0)
            read = list(range(length))
        else:
            read = list(range(first - int(shift), length if cache == "prefix" else last + 1))
        past = DynamicCache()
        others = [p for p in range(length) if p not in read]
        if others:
            for index, (keys, values) in enumerate(state["kept"]):
                past.update(keys[:, :, others], values[:, :, others], index)
        positions = torch.tensor([read])
        ones = torch.zeros(1, 1, len(read), length, dtype=model.dtype)  # nothing is hidden
        output = model(
            torch.tensor([[canvas[p] for p in read]]),
            position_ids=positions,
            attention_mask=ones,
            past_key_values=past,
            use_cache=True,
        )
        kept = []
        for layer in past.layers:
            parts = []
            for new in (layer.keys, layer.values):
                whole = torch.empty(*new.shape[:2], length, new.shape[3])
                whole[:, :, others] = new[:, :, : len(others)]
                whole[:, :, read] = new[:, :, len(others) :]
                parts.append(whole)
            kept.append(tuple(parts))
        state["kept"] = kept
        state["steps"] += 1
        logits_LV = torch.full((length, output.logits.shape[-1]), torch.nan)
        for place, p in enumerate(read):
            if p + int(shift) < length:
                logits_LV[p + int(shift)] = output.logits[0, place]
        return logits_LV

    return answer
