"""The AR model as a baseline: likelihood and text as by full forwards without a cache.

Token ids: words 0 … 11, start 12, end 13, pad 14.
"""

import itertools
import math
from dataclasses import replace

import oracles
import pytest
import torch
from students import random_ar, word_vocab
from tiny import FAMILIES, byte_tokenizer, next_log_probs, tiny_model

from mdm.autoregressive import (
    Autoregressive,
    DecodingSettings,
    by_length,
    log_likelihood,
    write,
    writing,
)
from mdm.convert import make_bidirectional
from mdm.errors import CheckpointError, ConfigError, RequestError
from mdm.generate import Hole
from mdm.likelihood import Likelihood, Pair
from mdm.vocab import read_vocab

START, END, PAD = 12, 13, 14
GREEDY = DecodingSettings()
PAIRS = [
    Pair((START, 3, 1), (5, 2, 7, 7)),
    Pair((START,), (4,)),
    Pair((START, 8, 8, 8, 2, 1), (1, 9, END)),
    Pair((START, 2, PAD), (6, 6, 0, 11, 5, 10, 13)),
]
SPECIAL = ["granite", "gemma2"]


# --- likelihood ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_likelihood_equals_full_forwards(family):
    ar = random_ar(family)
    assert ar.plain_head is (family not in SPECIAL)
    p = next_log_probs(ar.model)
    for batch_tokens in (1, 20, 4096):
        found = log_likelihood(ar, PAIRS, batch_tokens=batch_tokens)
        for pair, likelihood in zip(PAIRS, found, strict=True):
            x, start = [*pair.prompt, *pair.answer], len(pair.prompt)
            expected = oracles.ar_log_prob(p, x, start, len(x))
            assert likelihood.value == pytest.approx(expected, abs=1e-4)
            size = len(pair.answer)
            assert replace(likelihood, value=0.0, greedy=None) == Likelihood(
                0.0, 0.0, 1, "ar", size, is_bound=False
            )


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_likelihood_in_chunks(monkeypatch, family):
    ar = random_ar(family)
    whole = log_likelihood(ar, PAIRS)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * 15 * 2)  # 2 rows of 15 logits
    for one, other in zip(whole, log_likelihood(ar, PAIRS), strict=True):
        assert other == replace(one, value=pytest.approx(one.value, abs=1e-5))


def test_greedy_says_if_every_token_was_the_likeliest():
    ar = random_ar()
    p = next_log_probs(ar.model)
    prompt = (START, 3, 1)
    answer, _ = oracles.greedy_continuation(p, prompt, 5, end_id=-1)
    others = [(*answer[:i], (answer[i] + 1) % 12, *answer[i + 1 :]) for i in range(5)]
    found = log_likelihood(ar, [Pair(prompt, tuple(text)) for text in [answer, *others]])
    assert [one.greedy for one in found] == [True] + [False] * 5


def test_likelihoods_of_all_answers_sum_to_one():
    ar = random_ar(num_words=2)
    pairs = [Pair((2, 1), (a, b)) for a in range(5) for b in range(5)]
    values = [one.value for one in log_likelihood(ar, pairs)]
    assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "expected"),
    [
        ([3, 9, 3, 4], 9, [[0, 2], [3], [1]]),
        ([3, 9, 3, 4], 12, [[0, 2, 3], [1]]),
        ([3, 9, 3, 4], 36, [[0, 2, 3, 1]]),
        ([5, 5], 1, [[0], [1]]),
        ([], 10, []),
    ],
)
def test_batches_of_like_length(lengths, batch_tokens, expected):
    assert by_length(lengths, batch_tokens) == expected


def test_each_likelihood_is_told_as_soon_as_it_is_there():
    told = {}
    found = log_likelihood(random_ar(), PAIRS, batch_tokens=20, done=told.__setitem__)
    assert [told[i] for i in range(len(PAIRS))] == found
    assert log_likelihood(random_ar(), []) == []


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (Pair((START,), ()), "the answer is empty"),
        (Pair((), (1,)), "the prompt has no tokens"),
        (Pair((START, 1, 2), (3,) * 6), "have 9 tokens, but the model was built for at most 8"),
    ],
)
def test_a_pair_that_cannot_be_scored(pair, text):
    ar = random_ar(max_position_embeddings=8)
    assert ar.max_length == 8
    log_likelihood(ar, [Pair((START, 1, 2), (3,) * 5)])
    with pytest.raises(RequestError, match=text):
        log_likelihood(ar, [PAIRS[1], pair])


def test_a_denoiser_is_no_autoregressive_model():
    model = tiny_model("llama", 16)
    make_bidirectional(model)
    with pytest.raises(CheckpointError, match="should be causal but is bidirectional"):
        Autoregressive(model, word_vocab())


# --- greedy text -----------------------------------------------------------------------------------

HOLES = [
    Hole((START, 3, 1), 6, key=(0, 0)),
    Hole((START,), 9, key=(0, 1)),
    Hole((START, 8, 8, 8, 2, 1, 5), 1, key=(0, 2)),
    Hole((START, 2), 12, key=(0, 3)),
    Hole((START, 7, 7, 7), 3, key=(0, 4)),
]


def check_greedy(ar, hole, found):
    p = next_log_probs(ar.model)
    tokens, mean = oracles.greedy_continuation(p, hole.before, hole.length, END)
    assert found.token_ids == tokens
    assert found.confidence == pytest.approx(mean, abs=1e-4)
    assert found.nfe == len(tokens)
    shown = tokens[: tokens.index(END)] if END in tokens else tokens
    assert found.num_tokens == len(shown)
    assert found.text == ar.vocab.decode(shown)
    assert found.finish_reason == ("stop" if END in tokens else "length")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_greedy_text_equals_writing_without_a_cache(family, batch_size):
    ar = random_ar(family)
    for hole, found in zip(HOLES, write(ar, HOLES, GREEDY, batch_size=batch_size), strict=True):
        check_greedy(ar, hole, found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_rows_that_end_leave_the_others_alone(family):
    # The end token is made likely and lengths differ, so that rows end at different times.
    ar = random_ar(family, seed=1)
    ar.model.get_output_embeddings().weight.data[END] *= 3
    holes = [Hole((START, a, b), 2 + (5 * a + b) % 11) for a in range(4) for b in range(6)]
    found = write(ar, holes, GREEDY, batch_size=24)
    for hole, one in zip(holes, found, strict=True):
        check_greedy(ar, hole, one)
    assert len({one.nfe for one in found}) > 3
    assert {one.finish_reason for one in found} == {"stop", "length"}


def test_a_window_of_attention_slides_while_writing():
    ar = random_ar("gemma3", layers=2, sliding_window=4)
    holes = [Hole((START, 3, 1), 9), Hole((START, 5, 6, 7, 8, 9), 7), Hole((START,), 2)]
    for hole, found in zip(holes, write(ar, holes, GREEDY), strict=True):
        check_greedy(ar, hole, found)


def test_done_is_told_as_rows_finish():
    ar = random_ar()
    done = []
    found = write(ar, HOLES, GREEDY, batch_size=8, done=lambda i, one: done.append((i, one)))
    assert sorted(i for i, _ in done) == [0, 1, 2, 3, 4]
    assert all(found[i] == one for i, one in done)
    forwards = [one.nfe for _, one in done]
    assert forwards == sorted(forwards)
    assert write(ar, [], GREEDY) == []


@pytest.mark.parametrize("settings", [GREEDY, DecodingSettings(0.7, 0.9)])
def test_each_token_comes_with_its_log_probability(settings):
    ar = random_ar()
    p = next_log_probs(ar.model)
    ids = [list(hole.before) for hole in HOLES]
    log_probs = [[] for _ in HOLES]
    for written in writing(ar, HOLES, settings):
        for one in written:
            assert one.log_prob == pytest.approx(float(p(ids[one.row])[one.token]), abs=1e-4)
            assert one.confidence == math.exp(one.log_prob)
            ids[one.row].append(one.token)
            log_probs[one.row].append(one.log_prob)
            if one.result is not None:
                assert one.result.token_ids == ids[one.row][len(HOLES[one.row].before) :]
                mean = sum(log_probs[one.row]) / len(log_probs[one.row])
                assert one.result.confidence == pytest.approx(mean, abs=1e-6)


# --- stop strings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stop_strings_end_a_row_at_the_first(batch_size):
    ar = random_ar()
    p = next_log_probs(ar.model)
    tokens, _ = oracles.greedy_continuation(p, HOLES[3].before, 12, END)
    text = ar.vocab.decode(tokens)
    assert len(tokens) == 12
    words = text.split()
    # A word; over the border of two tokens; several; one that never comes.
    for stop in ((words[4],), (f"{words[2]} {words[3][:1]}",), (words[6], words[3]), ("w99",)):
        holes = [replace(HOLES[3], stop=stop), *HOLES[:3]]
        found, *others = write(ar, holes, GREEDY, batch_size=batch_size)
        for hole, other in zip(HOLES[:3], others, strict=True):
            check_greedy(ar, hole, other)
        places = [text.find(string) for string in stop if string in text]
        if not places:
            assert (found.text, found.finish_reason, found.nfe) == (text, "length", 12)
            continue
        assert found.text == text[: min(places)]
        assert found.finish_reason == "stop"
        # The row was ended with the token that completed the string.
        written = [ar.vocab.decode(tokens[:n]) for n in range(13)]
        first = next(n for n in range(13) if any(string in written[n] for string in stop))
        assert (found.nfe, found.token_ids) == (first, tokens[:first])
        assert found.num_tokens == max(n for n in range(13) if len(written[n]) <= len(found.text))


def test_a_stop_string_inside_a_character():
    # One byte a token: a character is text only when its last byte is there.
    vocab = read_vocab(byte_tokenizer())
    ar = Autoregressive(tiny_model("llama", 259, layers=1, hidden=16), vocab)
    word = "aé€b".encode()
    steps = itertools.cycle(range(7))

    def scripted(rows_ND):
        logits_NV = torch.zeros(1, 259)
        logits_NV[:, word[next(steps)]] = 50.0
        return logits_NV

    ar.head = scripted
    (found,) = write(ar, [Hole((256, 97), 7, stop=("€",))], GREEDY)
    assert (found.text, found.finish_reason, found.nfe, found.num_tokens) == ("aé", "stop", 6, 3)
    steps = itertools.cycle(range(7))
    (found,) = write(ar, [Hole((256, 97), 7)], GREEDY)
    assert (found.text, found.num_tokens) == ("aé€b", 7)


# --- sampled text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)])
def test_first_tokens_follow_the_tempered_nucleus(temperature, top_p):
    ar = random_ar(num_words=6)
    log_p_V = next_log_probs(ar.model)([6, 1])
    probs_V = (log_p_V / temperature).softmax(-1)
    kept, mass = [], 0.0
    for token in probs_V.argsort(descending=True).tolist():
        if mass < top_p:
            kept.append(token)
            mass += float(probs_V[token])
    settings = DecodingSettings(temperature=temperature, top_p=top_p)
    n = 1500
    found = write(ar, [Hole((6, 1), 1, key=("s", i)) for i in range(n)], settings, batch_size=500)
    counts_V = torch.bincount(torch.tensor([one.token_ids[0] for one in found]), minlength=9)
    assert set(counts_V.nonzero().flatten().tolist()) <= set(kept)
    expected_k = n * probs_V[kept] / mass
    chi_square = float(((counts_V[kept] - expected_k) ** 2 / expected_k.clamp(min=1)).sum())
    assert chi_square < 30  # at most 8 degrees of freedom
    # What a text is rated by is the model's own probability, whatever it was drawn from.
    for one in found[:20]:
        assert one.confidence == pytest.approx(float(log_p_V[one.token_ids[0]]), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_key_fixes_a_text_in_any_company(family):
    ar = random_ar(family)
    settings = DecodingSettings(temperature=1.2, top_p=0.95)
    alone = [write(ar, [hole], settings)[0] for hole in HOLES]
    for order in ([4, 1, 3, 0, 2], [2, 2, 3]):
        for batch_size in (1, 2, 8):
            torch.manual_seed(batch_size)
            found = write(ar, [HOLES[i] for i in order], settings, batch_size=batch_size)
            assert [one.token_ids for one in found] == [alone[i].token_ids for i in order]
    keys = [(0, 3), (1, 3), (0, 4), ("a", 0)]
    texts = [write(ar, [replace(HOLES[3], key=key)], settings)[0].text for key in keys]
    assert len(set(texts)) == 4


# --- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hole", "text"),
    [
        (Hole((START,), 2, after=(1, 2)), "cannot see the 2 tokens after the hole"),
        (Hole((START, 1, 2), 6), "prompt and new tokens are 9, but .* at most 8; shorten"),
        (Hole((), 3), "nothing stands before the hole; begin with the start token"),
    ],
)
def test_a_hole_that_cannot_be_written(hole, text):
    ar = random_ar(max_position_embeddings=8)
    (found,) = write(ar, [Hole((START, 1, 2), 5)], GREEDY)
    assert len(found.token_ids) == 5
    with pytest.raises(RequestError, match=text):
        write(ar, [Hole((START,), 1), hole], GREEDY)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": -1.0}, r"temperature must be >= 0 \(0 = greedy\); got -1.0"),
        ({"temperature": math.inf}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] \(1 = all tokens\); got 0.0"),
        ({"top_p": 1.5}, "top_p must be in .* got 1.5"),
    ],
)
def test_wrong_settings(changes, text):
    with pytest.raises(ConfigError, match=text):
        DecodingSettings(**changes)


@pytest.mark.parametrize(("given", "more"), [(None, set()), (3, {3}), ([3, 4], {3, 4})])
def test_all_end_tokens_of_a_model_end_its_texts(given, more):
    ar = random_ar()
    ar.model.generation_config.eos_token_id = given
    assert ar.end_ids == {ar.vocab.eos_id} | more
    hole = Hole((START, 1), 12, key=("k",))
    (found,) = write(ar, [hole], DecodingSettings(temperature=5.0))
    ends = [i for i, token in enumerate(found.token_ids) if token in ar.end_ids]
    assert ends in ([], [len(found.token_ids) - 1])
    assert found.num_tokens == len(found.token_ids) - len(ends)


def test_a_teacher_stops_where_its_family_closes_the_middle():
    hole = Hole((START, 3), 6)
    plain = random_ar()
    (whole,) = write(plain, [hole], GREEDY)
    end = whole.token_ids[2]
    stops = Autoregressive(plain.model, plain.vocab, more_ends=(end,))
    assert stops.end_ids == plain.end_ids | {end}
    (found,) = write(stops, [hole], GREEDY)
    size = whole.token_ids.index(end)
    assert found.token_ids == whole.token_ids[: size + 1]
    assert (found.finish_reason, found.num_tokens) == ("stop", size)


def test_suppressed_ends_are_all_of_them():
    ar = random_ar()
    ar.more_ends = (3, 5)
    assert {3, 5} < ar.end_ids
    for settings in (GREEDY, DecodingSettings(temperature=1.5)):
        holes = [Hole((START, n), 12, key=("ends", n)) for n in range(6)]
        found = write(ar, holes, replace(settings, suppress_eos=True))
        assert all(len(one.token_ids) == 12 for one in found)
        assert not any(ar.end_ids & set(one.token_ids) for one in found)
        ended = write(ar, holes, settings)
        assert any(len(one.token_ids) < 12 for one in ended)


def test_layers_of_other_kinds_are_refused():
    from types import SimpleNamespace

    from mdm.causal import windows_of
    from mdm.errors import CheckpointError

    kinds = ["full_attention", "linear_attention", "chunked_attention"]
    config = SimpleNamespace(model_type="mixed", layer_types=kinds, sliding_window=4)
    config.get_text_config = lambda: config
    with pytest.raises(CheckpointError, match=r"another kind \(chunked_attention, linear_att"):
        windows_of(config)
    config.layer_types = ["full_attention", "sliding_attention"]
    assert windows_of(config) == {"full_attention": None, "sliding_attention": 4}
    config.layer_types = ["full_attention"]
    assert windows_of(config) == {"": None}
