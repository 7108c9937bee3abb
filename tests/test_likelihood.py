"""Likelihood of answers: against enumeration, the same in any company, refused with a reason.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import math
from dataclasses import replace

import oracles
import pytest
import torch
from students import random_ar, random_student, slow_log_probs
from tiny import FAMILIES, byte_tokenizer, next_log_probs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mdm.likelihood
from mdm.autoregressive import log_likelihood as ar_log_likelihood
from mdm.diffusion import generator
from mdm.errors import ConfigError, RequestError
from mdm.estimators import published
from mdm.likelihood import (
    KINDS,
    Likelihood,
    LikelihoodSettings,
    Pair,
    bits_per_byte,
    check_pair,
    log_likelihood,
    pair_of_texts,
    perplexity,
    resolve,
    rolling_pairs,
    total,
)
from mdm.vocab import read_vocab

START, END, MASK = 12, 13, 15
PAIRS = [
    Pair((START, 3, 1), (5, 2, 7, 7), "a"),
    Pair((START,), (4,), "b"),
    Pair((START, 8, 8, 8, 2, 1), (1, 9, 3), "c"),
    Pair((START, 2), (6, 6, 0, 11, 5, END), "d"),
]
LONG = Pair((START, 2, 4), (6, 6, 0, 11, 5, 10, 1), "long")


def exact_value(denoiser, pair, scale=0.0):
    given = range(len(pair.prompt))
    x = [*pair.prompt, *pair.answer]
    maskable = range(len(pair.prompt), len(x))
    return oracles.exact_bound(slow_log_probs(denoiser, given, scale), x, maskable, MASK)


# --- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "granite"])
def test_exact_equals_enumeration(family, shift):
    denoiser = random_student(family, shift=shift)
    found = log_likelihood(denoiser, PAIRS, LikelihoodSettings())
    for pair, likelihood in zip(PAIRS, found, strict=True):
        expected = exact_value(denoiser, pair)
        assert likelihood.value == pytest.approx(expected, abs=1e-4)
        size = len(pair.answer)
        assert likelihood == Likelihood(
            likelihood.value, 0.0, 2**size - 1, "exact", size, is_bound=size > 1, greedy=None
        )


@pytest.mark.parametrize("scale", [0.4, 2.0])
def test_guided_exact_equals_enumeration_of_guided_forwards(scale):
    denoiser = random_student(shift=True)
    settings = LikelihoodSettings(estimator="exact", cfg_scale=scale)
    for pair, likelihood in zip(PAIRS, log_likelihood(denoiser, PAIRS, settings), strict=True):
        assert likelihood.value == pytest.approx(exact_value(denoiser, pair, scale), abs=2e-4)
        assert likelihood.nfe == 2 * (2 ** len(pair.answer) - 1)


@pytest.mark.parametrize("estimator", KINDS)
def test_one_token_is_the_log_softmax(estimator):
    denoiser = random_student(shift=True)
    prompt, token = [START, 3, 1], 7
    expected = float(slow_log_probs(denoiser)([*prompt, MASK])[3, token])
    settings = LikelihoodSettings(estimator=estimator, mc_samples=16)
    (found,) = log_likelihood(denoiser, [Pair(tuple(prompt), (token,))], settings)
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert found.std_err == pytest.approx(0, abs=1e-5)
    assert not found.is_bound
    assert found.nfe == (16 if estimator in ("independent", "llada") else 1)


def test_the_bound_is_below_the_likelihood_of_a_distribution():
    # Over all answers of a length the exponentiated bounds sum to at most 1.
    denoiser = random_student(num_words=2, dtype=torch.float64)
    start = denoiser.vocab.start_id
    pairs = [Pair((start, 1), (a, b)) for a in range(5) for b in range(5)]
    found = log_likelihood(denoiser, pairs, LikelihoodSettings())
    assert 0.3 < math.fsum(math.exp(one.value) for one in found) < 1


# --- sampled ---------------------------------------------------------------------------------------


def over_seeds(denoiser, pair, settings, seeds=80):
    found = [
        log_likelihood(denoiser, [pair], replace(settings, seed=seed))[0] for seed in range(seeds)
    ]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    return values, float(values.std()) / seeds**0.5, found


@pytest.mark.parametrize(
    ("estimator", "samples"), [("stratified", 3), ("stratified", 24), ("independent", 6)]
)
@pytest.mark.parametrize(("family", "scale"), [("llama", 0.0), ("gpt2", 0.7)])
def test_sampled_values_have_the_bound_as_their_mean(estimator, samples, family, scale):
    denoiser = random_student(family, shift=True)
    settings = LikelihoodSettings(estimator=estimator, mc_samples=samples, cfg_scale=scale)
    values, std_err, found = over_seeds(denoiser, LONG, settings)
    assert abs(float(values.mean()) - exact_value(denoiser, LONG, scale)) < 4 * std_err
    assert std_err > 0
    assert {one.nfe for one in found} == {samples * (2 if scale else 1)}
    assert {(one.estimator, one.is_bound, one.num_tokens) for one in found} == {
        (estimator, True, 7)
    }


def test_the_published_estimator_is_off_by_its_bias():
    # L = 4 and rounds of 8: even l count 3 times as much as odd l.
    denoiser = random_student(shift=True, seed=3)
    pair = PAIRS[0]
    x, maskable = [*pair.prompt, *pair.answer], range(3, 7)
    predicted = oracles.llada_expected_bound(slow_log_probs(denoiser), x, maskable, MASK)
    exact = exact_value(denoiser, pair)
    settings = LikelihoodSettings(estimator="llada", mc_samples=32)
    values, std_err, _ = over_seeds(denoiser, pair, settings, 150)
    assert abs(float(values.mean()) - predicted) < 4 * std_err
    assert abs(predicted - exact) > 4 * std_err
    (right,) = log_likelihood(denoiser, [pair], LikelihoodSettings(mc_samples=32))
    assert right.value == pytest.approx(exact, abs=1e-4)


def test_the_published_estimator_equals_the_oracle_on_the_same_masks():
    denoiser = random_student(shift=True)
    settings = LikelihoodSettings(estimator="llada", mc_samples=20, seed=4)
    (found,) = log_likelihood(denoiser, [LONG], settings)
    masks = published(7, 20, generator("likelihood", 4, "long", 0))
    rows = masks.masked_RL.tolist()
    expected = oracles.llada_estimate(
        slow_log_probs(denoiser), [*LONG.prompt, *LONG.answer], 3, [rows[:8], rows[8:]], MASK
    )
    assert found.value == pytest.approx(expected, abs=1e-4)
    assert found.nfe == 16


def test_stratified_becomes_exact():
    denoiser = random_student()
    settings = LikelihoodSettings(estimator="stratified", mc_samples=127)
    (found,) = log_likelihood(denoiser, [LONG], settings)
    assert found.value == pytest.approx(exact_value(denoiser, LONG), abs=1e-4)
    assert (found.std_err, found.nfe) == (0, 127)


def test_standard_error_of_a_model():
    denoiser = random_student(shift=True)
    pair = Pair((START, 2), (6, 6, 0, 11, 5, 10, 1, 3, 3, 8, 2, 4))
    settings = LikelihoodSettings(estimator="stratified", mc_samples=48)
    values, _, found = over_seeds(denoiser, pair, settings, 60)
    errors = torch.tensor([one.std_err for one in found])
    assert 0.5 < float(errors.mean() / values.std()) < 2
    others, _, _ = over_seeds(denoiser, pair, replace(settings, estimator="llada"), 60)
    assert values.std() < others.std()


# --- the same in any company -------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auto", "stratified", "independent", "llada", "order"])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_pairs_do_not_depend_on_one_another(estimator, scale):
    denoiser = random_student("llama", shift=True, dtype=torch.float64)
    settings = LikelihoodSettings(estimator=estimator, mc_samples=16, cfg_scale=scale, seed=2)
    pairs = [*PAIRS, LONG]
    alone = [log_likelihood(denoiser, [pair], settings)[0] for pair in pairs]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 1]):
        for batch_tokens in (1, 37, 10**5):
            found = log_likelihood(
                denoiser, [pairs[i] for i in order], replace(settings, batch_tokens=batch_tokens)
            )
            for i, one in zip(order, found, strict=True):
                assert one.value == pytest.approx(alone[i].value, abs=1e-5)
                assert one.std_err == pytest.approx(alone[i].std_err, abs=1e-5, nan_ok=True)
                same = replace(one, value=0.0, std_err=0.0)
                assert same == replace(alone[i], value=0.0, std_err=0.0)
    assert log_likelihood(denoiser, [], settings) == []


def test_seed_and_key_fix_the_masks():
    denoiser = random_student()
    settings = LikelihoodSettings(mc_samples=10)

    def value(key, seed):
        (found,) = log_likelihood(denoiser, [replace(LONG, key=key)], replace(settings, seed=seed))
        return found.value

    assert value("a", 0) == value("a", 0)
    assert len({value("a", 0), value("a", 1), value("b", 0), value("b", 1)}) == 4


def masks_of(monkeypatch, denoiser, pairs, settings):
    """The masks that each pair was scored with."""
    seen = [[] for _ in pairs]
    score = mdm.likelihood.token_log_probs

    def spy(denoiser, rows, **options):
        rows = list(rows)
        for row in rows:
            seen[row.index].append(row.masked_L[row.given_L.logical_not()].tolist())
        return score(denoiser, rows, **options)

    monkeypatch.setattr(mdm.likelihood, "token_log_probs", spy)
    log_likelihood(denoiser, pairs, settings)
    return seen


@pytest.mark.parametrize("estimator", ["stratified", "independent", "llada"])
def test_pairs_of_one_key_share_their_masks(monkeypatch, estimator):
    pairs = [
        Pair((START, 1), (1, 2, 3, 4, 5, 6), "question 1"),
        Pair((START, 1, 9), (9, 9, 9, 4, 5, 6), "question 1"),
        Pair((START, 1), (1, 2, 3, 4, 5, 6), "question 2"),
        Pair((START, 1), (1, 2, 3), "question 1"),
    ]
    settings = LikelihoodSettings(estimator=estimator, mc_samples=16)
    first, second, other, shorter = masks_of(monkeypatch, random_student(), pairs, settings)
    assert first == second != other
    assert len(first) == len(shorter) + (9 if estimator == "stratified" else 0) == 16


@pytest.mark.parametrize("block_size", [None, 2])
def test_each_result_is_told_as_soon_as_it_is_there(block_size):
    for estimator in ("auto", "order") if block_size is None else ("auto",):
        told = {}
        settings = LikelihoodSettings(estimator=estimator)
        student = random_student(block_size=block_size)
        found = log_likelihood(student, PAIRS, settings, done=told.__setitem__)
        assert [told[i] for i in range(len(PAIRS))] == found


# --- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["low_confidence", "margin", "entropy"])
def test_order_settings_reach_the_walk(rule):
    denoiser = random_student(shift=True)
    settings = LikelihoodSettings(
        estimator="order", remasking=rule, block_length=3, cfg_scale=0.5, batch_tokens=20
    )
    for pair, found in zip(PAIRS, log_likelihood(denoiser, PAIRS, settings), strict=True):
        value, order, greedy = oracles.order_log_prob(
            slow_log_probs(denoiser, range(len(pair.prompt)), 0.5),
            [*pair.prompt, *pair.answer],
            len(pair.prompt),
            MASK,
            rule,
            3,
        )
        assert found.value == pytest.approx(value, abs=1e-4)
        assert found == Likelihood(
            found.value, 0.0, 2 * len(order), "order", len(order), is_bound=False, greedy=greedy
        )


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "length", "expected"),
    [
        (1, 1, "exact"),
        (127, 7, "exact"),
        (126, 7, "stratified"),
        (128, 8, "stratified"),
        (2**60, 59, "exact"),
        (2**62, 60, "stratified"),
    ],
)
def test_auto_takes_all_masks_if_they_are_few(samples, length, expected):
    assert resolve(LikelihoodSettings(mc_samples=samples), length) == expected
    assert resolve(LikelihoodSettings(estimator="llada"), length) == "llada"


def test_exact_over_the_budget_says_the_way_out():
    settings = LikelihoodSettings(estimator="exact", mc_samples=126)
    text = (
        r"7 tokens have 2\^7 - 1 masks, more than mc_samples = 126; raise mc_samples, or use"
        " estimator auto or stratified"
    )
    with pytest.raises(RequestError, match=text):
        log_likelihood(random_student(), [LONG], settings)
    log_likelihood(random_student(), [LONG], replace(settings, mc_samples=127))
    with pytest.raises(RequestError, match=r"90 tokens have 2\^90 - 1 masks"):
        log_likelihood(random_student(), [Pair((START,), (1,) * 90)], settings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"estimator": "stratifed"}, "unknown estimator 'stratifed'; did you mean 'stratified'?"),
        ({"remasking": "low_conf"}, "unknown remasking strategy 'low_conf'; did you mean 'low_c"),
        ({"remasking": "random", "estimator": "order"}, "unknown position rule .* 'random'"),
        ({"mc_samples": 0}, "mc_samples must be >= 1; got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1; got 0"),
        ({"cfg_scale": -0.5}, "cfg_scale must be >= 0; got -0.5"),
        ({"cfg_scale": math.inf}, "cfg_scale must be >= 0; got inf"),
        ({"cfg_scale": math.nan}, "cfg_scale must be >= 0; got nan"),
        ({"block_length": 0}, "block_length must be >= 1 .* got 0"),
    ],
)
def test_wrong_settings(changes, text):
    with pytest.raises(ConfigError, match=text):
        LikelihoodSettings(**changes)


# --- what can be scored ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (Pair((START,), ()), "the answer is empty"),
        (Pair((), (1,)), "the prompt has no tokens; begin it with the start token"),
        (Pair((START, MASK), (1,)), r"contains the mask token \(id 15\); encode text with special"),
        (Pair((START,), (1, MASK)), r"contains the mask token \(id 15\)"),
        (
            Pair((START, 1, 2), (3,) * 6),
            r"prompt \(3 tokens\) and answer \(6\) have 9 tokens, but the model was built for at"
            " most 8",
        ),
    ],
)
def test_a_pair_that_cannot_be_scored(monkeypatch, pair, text):
    with pytest.raises(RequestError, match=text):
        check_pair(pair, 8, MASK)
    denoiser = random_student(max_position_embeddings=8)
    monkeypatch.setattr(denoiser, "rows", None)  # no forward before the refusal
    for estimator in ("auto", "order"):
        with pytest.raises(RequestError, match=text):
            log_likelihood(denoiser, [PAIRS[1], pair], LikelihoodSettings(estimator=estimator))


def test_pairs_that_just_fit():
    check_pair(Pair((START, 1, 2), (3,) * 5), 8, MASK)
    check_pair(Pair((START, MASK), (1,)), 8, None)  # an autoregressive model has no mask


# --- texts -----------------------------------------------------------------------------------------


def byte_vocab():
    return read_vocab(byte_tokenizer()).with_mask(None)


def merging_vocab():
    """Characters a, b, c and the space; "ab" and " c" are one token."""
    words = {"a": 0, "b": 1, "c": 2, " ": 3, "ab": 4, " c": 5, "<|end|>": 6}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("a", "b"), (" ", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    return read_vocab(fast)


@pytest.mark.parametrize(
    ("context", "continuation", "before", "answer"),
    [
        ("ab", "cd", "ab", "cd"),
        ("ab ", "cd", "ab", " cd"),
        ("ab \n ", "cd", "ab", " \n cd"),
        ("ab ", " cd", "ab", "  cd"),
        ("  ab", "cd ", "  ab", "cd "),
        ("", "cd", "", "cd"),
        ("  ", "cd", "", "  cd"),
        ("ab ", "", "ab", " "),
        ("ab", "", "ab", ""),
        ("é", "é", "é", "é"),
    ],
)
def test_spaces_at_the_border_belong_to_the_continuation(context, continuation, before, answer):
    pair = pair_of_texts(byte_vocab(), context, continuation, "k")
    assert pair == Pair((256, *before.encode()), tuple(answer.encode()), "k")


@pytest.mark.parametrize(
    ("context", "continuation", "prompt", "answer"),
    [
        ("c", "ab", (6, 2), (4,)),
        ("c ", "c", (6, 2), (5,)),  # the space goes over, and is one token with what follows
        ("ca", "bc", (6, 2, 4), (2,)),  # two tokens alone, and so they are kept together
        ("a", "b", (6, 0), (1,)),  # "ab" is one token: nothing would be left to score
        ("a", "", (6, 0), ()),
    ],
)
def test_a_token_over_the_border(context, continuation, prompt, answer):
    pair = pair_of_texts(merging_vocab(), context, continuation)
    assert (pair.prompt, pair.answer) == (prompt, answer)


def test_a_mask_spelt_out_is_text():
    vocab = byte_vocab()
    text = vocab.token(vocab.mask_id)
    pair = pair_of_texts(vocab, f"a {text}", f" {text}<|end|>")
    assert vocab.mask_id not in pair.prompt + pair.answer
    assert vocab.eos_id not in pair.answer
    assert vocab.decode(pair.answer) == f" {text}<|end|>"
    check_pair(pair, 1000, vocab.mask_id)


# --- a whole text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
@pytest.mark.parametrize("window", [2, 7, 8, 100])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 23])
def test_rolling_scores_every_token_once(length, window, overlap):
    vocab, text = byte_vocab(), "".join(chr(97 + i) for i in range(length))
    if window <= max(1, overlap):
        with pytest.raises(RequestError, match=f"a window of {window} tokens leaves none to score"):
            rolling_pairs(vocab, text, window, overlap=overlap)
        return
    pairs = rolling_pairs(vocab, text, window, overlap=overlap, key="doc")
    ids = [256, *text.encode()]
    assert [i for pair in pairs for i in pair.answer] == ids[1:]
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert all(pair.key.startswith("doc") for pair in pairs)
    assert pairs[0].prompt == (256,)
    done = 1
    for number, pair in enumerate(pairs):
        size = len(pair.prompt) + len(pair.answer)
        assert size == window or (number == len(pairs) - 1 and size < window)
        assert list(pair.prompt) == ids[done - len(pair.prompt) : done]
        if number:
            assert len(pair.prompt) == min(max(1, overlap), done)
        done += len(pair.answer)


def test_an_empty_text():
    with pytest.raises(RequestError, match="the text is empty; there is nothing to score"):
        rolling_pairs(byte_vocab(), "", 8)


def test_total_of_windows():
    parts = [
        Likelihood(-3.0, 0.3, 5, "stratified", 4, is_bound=True),
        Likelihood(-1.5, 0.4, 2, "exact", 1, is_bound=False),
    ]
    whole = total(parts)
    assert whole == Likelihood(-4.5, pytest.approx(0.5), 7, "stratified", 5, is_bound=True)
    assert not total(parts[1:]).is_bound
    assert perplexity(whole) == pytest.approx(math.exp(0.9))
    assert bits_per_byte(whole, "aé") == pytest.approx(4.5 / math.log(2) / 3)
    with pytest.raises(AssertionError, match="no windows"):
        total([])


def test_rolling_equals_the_autoregressive_sum():
    ar = random_ar()
    text = "w1 w5 w5 w3 w0 w7 w7 w2 w11"
    ids = [START, 1, 5, 5, 3, 0, 7, 7, 2, 11]
    p = next_log_probs(ar.model)
    whole = total(ar_log_likelihood(ar, rolling_pairs(ar.vocab, text, 100)))
    expected = oracles.ar_log_prob(p, ids, 1, 10)
    assert whole.value == pytest.approx(expected, abs=1e-4)
    assert perplexity(whole) == pytest.approx(math.exp(-expected / 9), rel=1e-4)
    assert bits_per_byte(whole, text) == pytest.approx(
        -expected / math.log(2) / len(text), rel=1e-4
    )
    # In windows of 4 with 2 tokens before them: each token from what its window shows.
    windows = total(ar_log_likelihood(ar, rolling_pairs(ar.vocab, text, 4, overlap=2)))
    expected = oracles.ar_log_prob(p, ids[:4], 1, 4) + sum(
        oracles.ar_log_prob(p, ids[i : i + 4], 2, 4) for i in (2, 4, 6)
    )
    assert windows.value == pytest.approx(expected, abs=1e-4)


def test_rolling_of_a_denoiser():
    denoiser = random_student()
    pairs = rolling_pairs(denoiser.vocab, "w1 w5 w5 w3 w0", 4)
    whole = total(log_likelihood(denoiser, pairs, LikelihoodSettings()))
    expected = sum(exact_value(denoiser, pair) for pair in pairs)
    assert whole.value == pytest.approx(expected, abs=1e-4)
    assert (whole.num_tokens, whole.is_bound, whole.nfe) == (5, True, 7 + 3)
