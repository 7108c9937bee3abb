"""How likely an answer is after a prompt: a value in nats, its standard error and what it cost.

A full-canvas denoiser has no exact likelihood but a lower bound, the mean over all masks (and
orders) of the answer; it is estimated with few masks or summed over all of them (estimators.py).
For block diffusion the bound is a sum over blocks (blocks.py). `order` is the exact likelihood of
the decoder that always decides the surest position next (order.py).
Shapes: B rows of a batch, L length, R masks of one answer, A answer tokens, N masked tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from . import blocks, order
from .config import require
from .denoiser import Denoiser
from .diffusion import generator
from .errors import RequestError, check_known
from .estimators import ESTIMATORS, Masks
from .remasking import REMASKING
from .scoring import Row, token_log_probs
from .vocab import Vocab

AUTO, ORDER = "auto", "order"
KINDS = (AUTO, *ESTIMATORS, ORDER)


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """How an answer is scored.

    estimator    auto: all masks if they are at most mc_samples (exact), otherwise stratified;
                 independent and llada (the published estimator, biased) are for comparison;
                 order: exact likelihood of decoding the surest position first, one token a forward
    mc_samples   masks an answer; block diffusion: masks a block
    cfg_scale    s of guidance, logits = (1+s)·conditional - s·unconditional; 0 = off
    remasking    for `order`: low_confidence, margin or entropy say which position is surest
    block_length for `order`: blocks decoded left to right; null = all at once
    batch_tokens tokens of one forward, padding included
    seed         of the masks; together with the key of a pair it fixes them
    """

    estimator: str = AUTO
    mc_samples: int = 128
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    block_length: int | None = None
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("estimator", self.estimator, KINDS)
        check_known("remasking strategy", self.remasking, REMASKING)
        if self.estimator == ORDER:  # which needs a rule that draws nothing
            check_known("position rule of estimator order", self.remasking, order.RULES)
        for name in ("mc_samples", "batch_tokens"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1; got {getattr(self, name)}")
        require(
            self.block_length is None or self.block_length >= 1,
            f"block_length must be >= 1 (null = all at once); got {self.block_length}",
        )
        require(0 <= self.cfg_scale < math.inf, f"cfg_scale must be >= 0; got {self.cfg_scale}")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An answer and what stands before it, as token ids.

    key  names the random numbers; pairs with one key (the choices of a question) share them, so
         that the difference of their values is known better than the values
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """log p(answer | prompt) in nats, total.

    std_err     of the Monte-Carlo estimate; 0 if nothing was sampled, NaN if it cannot be told
    nfe         denoiser forwards of single rows; guidance counts 2
    estimator   what was used (`auto` resolved)
    num_tokens  answer tokens
    is_bound    the value is (an estimate of) a lower bound, not the likelihood itself
    greedy      would greedy decoding give this answer? None where it was not asked
    """

    value: float
    std_err: float
    nfe: int
    estimator: str
    num_tokens: int
    is_bound: bool
    greedy: bool | None = None


def pair_of_texts(
    vocab: Vocab,
    context: str,
    continuation: str,
    key: str = "",
    *,
    opening: tuple[int, ...] | None = None,
) -> Pair:
    """A pair as evaluations cut it: spaces at the end of the context belong to the continuation.

    Both are tokenised together and split after as many tokens as the context has alone. `opening`
    stands before the context, by default the start token; without any, an empty context gets it.
    """
    opening = (vocab.start_id,) if opening is None or not (opening or context.strip()) else opening
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    before, whole = vocab.encode(context), vocab.encode(context + continuation)
    answer = whole[len(before) :]
    if not answer and continuation:  # the border token swallowed the continuation
        return Pair((*opening, *before), tuple(vocab.encode(continuation)), key)
    return Pair((*opening, *whole[: len(before)]), tuple(answer), key)


def check_pair(pair: Pair, max_length: int, mask_id: int | None) -> None:
    """Raise RequestError for an empty prompt or answer, a mask among the tokens, too many tokens."""
    if not pair.answer:
        raise RequestError("the answer is empty; there is nothing to score")
    if not pair.prompt:
        raise RequestError("the prompt has no tokens; begin it with the start token")
    if mask_id is not None and mask_id in (*pair.prompt, *pair.answer):
        raise RequestError(
            f"prompt or answer contains the mask token (id {mask_id}); encode text with special"
            " tokens disabled (Vocab.encode)"
        )
    length = len(pair.prompt) + len(pair.answer)
    if length > max_length:
        raise RequestError(
            f"prompt ({len(pair.prompt)} tokens) and answer ({len(pair.answer)}) have {length}"
            f" tokens, but the model was built for at most {max_length}; shorten the prompt"
        )


def check_settings(denoiser: Denoiser, settings: LikelihoodSettings) -> None:
    """Raise RequestError for settings that mean nothing to a model with blocks."""
    if denoiser.block_size is None:
        return
    if settings.estimator == ORDER:
        raise RequestError("estimator order needs a full-canvas model; this one has blocks")
    if settings.cfg_scale > 0:
        raise RequestError(
            f"guidance (cfg_scale = {settings.cfg_scale}) has no meaning for the likelihood of a"
            " block diffusion model yet; set cfg_scale to 0"
        )


def log_likelihood(
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    *,
    done: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """Score all pairs; rows of many pairs share a forward. `done(i, result)` as soon as pair i is.

    A result depends on its pair and the settings alone (up to rounding), not on the other pairs.
    Raises RequestError for a pair that cannot be scored, before any forward.
    """
    results: list[Likelihood | None] = [None] * len(pairs)

    def keep(index: int, result: Likelihood) -> None:
        results[index] = result
        if done is not None:
            done(index, result)

    for _ in scoring(denoiser, pairs, settings, keep):
        pass
    return [result for result in results if result is not None]


def scoring(
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    done: Callable[[int, Likelihood], None],
) -> Iterator[int]:
    """`log_likelihood` bit by bit: yields the rows of every forward."""
    check_settings(denoiser, settings)
    for pair in pairs:
        check_pair(pair, denoiser.max_length, denoiser.mask_id)
    if settings.estimator == ORDER:
        return _by_order(denoiser, pairs, settings, done)
    if denoiser.block_size is not None:
        return _by_blocks(denoiser, pairs, settings, done)
    return _by_masks(denoiser, pairs, settings, done)


def _by_masks(
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    done: Callable[[int, Likelihood], None],
) -> Iterator[int]:
    names = [resolve(settings, len(pair.answer)) for pair in pairs]
    for name, pair in zip(names, pairs, strict=True):
        _check_exact(name, len(pair.answer), settings)
    plans: dict[int, Masks] = {}  # of the pairs in work: drawn when their rows are due
    rows = _rows(pairs, names, settings, plans)
    found: list[list[torch.Tensor]] = [[] for _ in pairs]
    for batch in token_log_probs(
        denoiser, rows, cfg_scale=settings.cfg_scale, batch_tokens=settings.batch_tokens
    ):
        for index, log_probs_N in batch:
            found[index].append(log_probs_N)
            masks = plans[index]
            if len(found[index]) < len(masks.weight_R):
                continue
            log_probs_RA = torch.zeros(masks.masked_RL.shape, dtype=torch.float64)
            log_probs_RA[masks.masked_RL] = torch.cat(found[index]).double()
            found[index] = []
            del plans[index]
            result = Likelihood(
                value=masks.value(log_probs_RA),
                std_err=ESTIMATORS[names[index]].std_err(masks, log_probs_RA),
                nfe=len(masks.weight_R) * (2 if settings.cfg_scale > 0 else 1),
                estimator=names[index],
                num_tokens=len(pairs[index].answer),
                is_bound=len(pairs[index].answer) > 1,
            )
            done(index, result)
        yield len(batch)


def resolve(settings: LikelihoodSettings, length: int) -> str:
    """The estimator for `length` tokens that are masked together."""
    if settings.estimator != AUTO:
        return settings.estimator
    return "exact" if length < 60 and 2**length - 1 <= settings.mc_samples else "stratified"


def _check_exact(name: str, length: int, settings: LikelihoodSettings) -> None:
    """Raise RequestError if all masks are asked for and there are too many."""
    if name == "exact" and (length >= 60 or 2**length - 1 > settings.mc_samples):
        raise RequestError(
            f"{length} tokens have 2^{length} - 1 masks, more than mc_samples = {settings.mc_samples};"
            " raise mc_samples, or use estimator auto or stratified"
        )


def _draw(name: str, length: int, settings: LikelihoodSettings, key: str, block: int = 0) -> Masks:
    _check_exact(name, length, settings)
    random = generator("likelihood", settings.seed, key, block)
    return ESTIMATORS[name].draw(length, settings.mc_samples, random)


def _rows(
    pairs: Sequence[Pair],
    names: Sequence[str],
    settings: LikelihoodSettings,
    plans: dict[int, Masks],
) -> Iterator[Row]:
    """Every masked row of every pair, pairs of like length together; `plans` keeps their masks."""
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].answer))
    for index in by_length:
        pair = pairs[index]
        plan = plans[index] = _draw(names[index], len(pair.answer), settings, pair.key)
        x0_L = torch.tensor(pair.prompt + pair.answer)
        start = len(pair.prompt)
        given_L = torch.arange(len(x0_L)) < start
        for masked_A in plan.masked_RL:
            masked_L = torch.zeros(len(x0_L), dtype=torch.bool)
            masked_L[start:] = masked_A
            yield Row(index, x0_L, masked_L, given_L)


def _by_blocks(
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    done: Callable[[int, Likelihood], None],
) -> Iterator[int]:
    grids = [
        blocks.answer_blocks(len(pair.prompt), len(pair.answer), denoiser.block_size)
        for pair in pairs
    ]
    for block in (block for grid in grids for block in grid):
        length = block.stop - block.start
        _check_exact(resolve(settings, length), length, settings)
    for index, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        names = [resolve(settings, block.stop - block.start) for block in grid]
        plans = [
            _draw(name, block.stop - block.start, settings, pair.key, number)
            for number, (name, block) in enumerate(zip(names, grid, strict=True))
        ]
        x0_L = torch.tensor(pair.prompt + pair.answer, device=denoiser.device)
        masks = [plan.masked_RL for plan in plans]
        for rows, log_probs in blocks.block_log_prob_steps(
            denoiser, x0_L, grid, masks, settings.batch_tokens
        ):
            if log_probs is not None:
                done(index, _sum_of_blocks(pair, names, plans, log_probs))
            yield rows


def _sum_of_blocks(
    pair: Pair, names: Sequence[str], plans: Sequence[Masks], log_probs: Sequence[torch.Tensor]
) -> Likelihood:
    """The bound of a pair from the (R, A) log-probabilities of each of its blocks."""
    errors = [
        ESTIMATORS[name].std_err(plan, log_probs_RA)
        for name, plan, log_probs_RA in zip(names, plans, log_probs, strict=True)
    ]
    values = [plan.value(lp_RA) for plan, lp_RA in zip(plans, log_probs, strict=True)]
    return Likelihood(
        value=math.fsum(values),
        std_err=math.sqrt(math.fsum(error**2 for error in errors)),
        nfe=max(len(plan.weight_R) for plan in plans),
        estimator=next((name for name in names if name != "exact"), "exact"),
        num_tokens=len(pair.answer),
        is_bound=any(plan.masked_RL.shape[1] > 1 for plan in plans),
    )


def _by_order(
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodSettings,
    done: Callable[[int, Likelihood], None],
) -> Iterator[int]:
    def keep(index: int, value: float, nfe: int, greedy: bool) -> None:
        length = len(pairs[index].answer)
        done(index, Likelihood(value, 0.0, nfe, ORDER, length, is_bound=False, greedy=greedy))

    return order.decoding_order_steps(
        denoiser,
        [(pair.prompt, pair.answer) for pair in pairs],
        rule=settings.remasking,
        block_length=settings.block_length,
        cfg_scale=settings.cfg_scale,
        batch_tokens=settings.batch_tokens,
        done=keep,
    )


# --- rolling: a whole text -------------------------------------------------------------------------


def rolling_pairs(
    vocab: Vocab, text: str, window: int, *, overlap: int = 0, key: str = ""
) -> list[Pair]:
    """The text cut into windows of at most `window` tokens, every token scored once.

    The first window begins with the start token; later ones have `overlap` earlier tokens before
    them (at least 1). Raises RequestError if the text is empty or the window is too small.
    """
    ids = [vocab.start_id, *vocab.encode(text)]
    if len(ids) == 1:
        raise RequestError("the text is empty; there is nothing to score")
    before = max(1, overlap)
    if window <= before:
        raise RequestError(
            f"a window of {window} tokens leaves none to score after {before} before them"
        )
    pairs: list[Pair] = []
    done = 1
    while done < len(ids):
        context = ids[:1] if done == 1 else ids[done - min(before, done) : done]
        answer = ids[done : done + window - len(context)]
        pairs.append(Pair(tuple(context), tuple(answer), f"{key}/{len(pairs)}"))
        done += len(answer)
    return pairs


def total(parts: Sequence[Likelihood]) -> Likelihood:
    """The likelihood of windows one after the other; their Monte-Carlo errors are independent."""
    assert parts, "no windows"
    return Likelihood(
        value=math.fsum(part.value for part in parts),
        std_err=math.sqrt(math.fsum(part.std_err**2 for part in parts)),
        nfe=sum(part.nfe for part in parts),
        estimator=parts[0].estimator,
        num_tokens=sum(part.num_tokens for part in parts),
        is_bound=any(part.is_bound for part in parts),
    )


def perplexity(whole: Likelihood) -> float:
    """Per token; an upper bound if the likelihood is a lower bound."""
    return math.exp(-whole.value / whole.num_tokens)


def bits_per_byte(whole: Likelihood, text: str) -> float:
    """Comparable between tokenizers; an upper bound if the likelihood is a lower bound."""
    return -whole.value / math.log(2) / len(text.encode())
