"""From text to text: what is put on the canvas, and what comes back."""

import math
from dataclasses import replace

import oracles
import pytest
import torch
from students import ScriptedStudent, random_student, slow_log_probs, word_vocab
from tiny import CHAT_TEMPLATE, byte_tokenizer
from tiny import START as START_TOKEN

from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError, VocabError
from mdm.generate import Generation, Hole, Request, encode, fill, generate, request_of, visible
from mdm.vocab import read_vocab

START, END, PAD, MASK, V = 12, 13, 14, 15, 16
GREEDY = SamplerSettings()


def check_same(found, expected):
    """Equal, up to rounding of the confidence."""
    for one, other in zip(found, expected, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5, nan_ok=True)
        assert replace(one, confidence=0.0) == replace(other, confidence=0.0)


def scripted(tokens_L):
    """A student that writes this row, left to right."""
    logits_LV = torch.zeros(len(tokens_L), V)
    for i, token in enumerate(tokens_L):
        logits_LV[i, token] = 30.0 - i
    return ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))


# --- the canvas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request("w1 w2", None, 3), Hole((START, 1, 2), 3)),
        (Request("", None, 1), Hole((START,), 1)),
        (Request("w1", "w2 w3", 2), Hole((START, 1), 2, (2, 3))),
        (Request("", "w2", 1, stop=("w4",)), Hole((START,), 1, (2,), ("w4",))),
    ],
)
def test_hole_of_a_request(request_, expected):
    assert encode(word_vocab(), request_) == expected
    assert encode(word_vocab(), request_, key=("a", 1)) == replace(expected, key=("a", 1))
    assert expected.total == len(expected.before) + expected.length + len(expected.after)


def test_what_stands_on_the_canvas():
    seen = []

    def logits_fn(xt_BL):
        seen.append(xt_BL.tolist())
        return torch.zeros(*xt_BL.shape, V)

    fill(ScriptedStudent(logits_fn), [Hole((START, 1), 2, (2, 3))], replace(GREEDY, steps=1))
    assert seen == [[[START, 1, MASK, MASK, 2, 3]]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace(START_TOKEN, "")])
def test_a_chat_has_one_start_token(template):
    # Data rows are made so too: a template may bring a start token of its own.
    vocab = word_vocab()
    vocab.tokenizer.chat_template = template
    hole = encode(vocab, Request("w3", None, 2, chat=True))
    assert hole.before[0] == START
    assert hole.before[1] != START
    assert 3 in hole.before
    assert (hole.length, hole.after) == (2, ())


def test_a_chat_needs_a_template():
    with pytest.raises(VocabError, match="no chat template"):
        encode(word_vocab(), Request("w3", None, 2, chat=True))


def test_a_request_wants_at_least_one_token():
    with pytest.raises(ConfigError, match="tokens to fill must be >= 1; got 0"):
        Request("w1", None, 0)
    with pytest.raises(ConfigError, match="at least 1 open position; got 0"):
        Hole((START,), 0)


def test_a_stop_string_is_not_empty():
    # It would be found at once, and every text would be cut to nothing.
    with pytest.raises(ConfigError, match=r"must not be empty; got \['w1', ''\]"):
        encode(word_vocab(), Request("w1", None, 3, stop=("w1", "")))


# --- what comes back -----------------------------------------------------------------------------


def test_text_ends_before_the_end_token():
    (found,) = generate(scripted([0, 0, 4, 5, END, 6]), [Request("w1", None, 4)], GREEDY)
    assert (found.text, found.num_tokens, found.finish_reason) == ("w4 w5", 2, "stop")
    assert found.token_ids == [4, 5, END, END]
    assert found.nfe == 3


def test_text_without_an_end_has_the_length_asked_for():
    (found,) = generate(scripted([0, 0, 4, 5, 6]), [Request("w1", None, 3)], GREEDY)
    assert (found.text, found.num_tokens, found.finish_reason) == ("w4 w5 w6", 3, "length")
    assert found.nfe == 3


def test_a_hole_has_the_length_asked_for():
    # The likeliest token is the end, everywhere; between a prefix and a suffix it is no choice.
    logits_V = torch.zeros(V)
    logits_V[END], logits_V[7] = 5.0, 4.0
    denoiser = ScriptedStudent(lambda xt_BL: logits_V.expand(*xt_BL.shape, V))
    hole, prompt = generate(denoiser, [Request("w1", "w2", 3), Request("w1", None, 3)], GREEDY)
    assert (hole.token_ids, hole.finish_reason) == ([7, 7, 7], "length")
    assert (prompt.token_ids, prompt.text, prompt.finish_reason) == ([END] * 3, "", "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hole_at_the_end_is_a_continuation(temperature):
    denoiser = random_student(shift=True)
    settings = SamplerSettings(temperature=temperature, suppress_eos=True)
    (hole,) = generate(denoiser, [Request("w1 w2", "", 6)], settings)
    assert [hole] == generate(denoiser, [Request("w1 w2", None, 6)], settings)


def test_requests_of_one_batch_are_those_of_single_calls_at_row_0():
    denoiser = random_student(shift=True)
    settings = SamplerSettings(steps=3, cfg_scale=0.5)
    requests = [Request("w1 w2 w3 w4", None, 6), Request("w5", "w6 w7", 6), Request("", None, 3)]
    alone = [generate(denoiser, [request], settings)[0] for request in requests]
    check_same(generate(denoiser, requests, settings), alone)
    assert generate(denoiser, [], settings) == []


def test_samples_of_one_request_differ_and_reproduce():
    denoiser = random_student()
    settings = SamplerSettings(temperature=2.0)
    requests = [Request("w1", None, 8)] * 3
    results = generate(denoiser, requests, settings, seed=1)
    assert len({result.text for result in results}) == 3
    check_same(generate(denoiser, requests, settings, seed=1), results)
    others = generate(denoiser, requests, settings, seed=2)
    assert [other.text for other in others] != [result.text for result in results]
    # Row 0 of a batch is the single call.
    check_same(generate(denoiser, requests[:1], settings, seed=1), results[:1])


def test_watch_sees_every_step():
    seen = []
    denoiser = random_student()
    generate(
        denoiser,
        [Request("w1", None, 4), Request("w1", None, 2)],
        replace(GREEDY, stop_at_eos=False),
        watch=lambda step, canvases: seen.append(
            (step.step, [int(canvas.open_L.sum()) for canvas in canvases])
        ),
    )
    assert seen == [(0, [3, 1]), (1, [2, 0]), (2, [1, 0]), (3, [0, 0])]


@pytest.mark.parametrize("mask_token", [None, "<|pad|>"])
def test_compat_pads_left_and_padding_is_no_hole(mask_token):
    # A vocabulary may use its pad token as mask.
    denoiser = random_student(shift=True)
    denoiser.vocab = denoiser.vocab.with_mask(mask_token)
    denoiser.mask_id = denoiser.vocab.mask_id
    settings = SamplerSettings(compat="llada", steps=4, block_length=4)
    requests = [Request("w1 w2 w3 w4", None, 4), Request("w5", None, 4)]
    short_and_long = generate(denoiser, requests, settings)
    check_same(generate(denoiser, requests[1:], settings), short_and_long[1:])
    assert [result.nfe for result in short_and_long] == [4, 4]


# --- stop strings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "nfe"),
    [
        (("w6",), "w4 w5 ", 2, 3),
        (("5 w",), "w4 w", 1, 3),  # over the border of two tokens
        (("w8", "w5"), "w4 ", 1, 2),  # the earliest, not the first of the list
        (("w4",), "", 0, 1),
        (("w6 w7", "w5 w6 w7"), "w4 ", 1, 4),
        (("w9",), "w4 w5 w6 w7 w8", 5, 5),
        ((), "w4 w5 w6 w7 w8", 5, 5),
    ],
)
def test_a_stop_string_ends_a_row_early(stop, text, tokens, nfe):
    student = scripted([0, 0, 4, 5, 6, 7, 8])
    found, other = generate(
        student, [Request("w1", None, 5, stop=stop), Request("w1", None, 5)], GREEDY
    )
    assert (found.text, found.num_tokens, found.nfe) == (text, tokens, nfe)
    assert not any(string in found.text for string in stop)
    assert found.finish_reason == ("stop" if text != "w4 w5 w6 w7 w8" else "length")
    # What was not decided is filled with end tokens.
    assert found.token_ids == [[4, 5, 6, 7, 8][i] if i < nfe else END for i in range(5)]
    assert (other.text, other.nfe) == ("w4 w5 w6 w7 w8", 5)
    assert student.forwards == 5


def test_a_stop_string_counts_once_there_is_no_gap_before_it():
    # Decided from right to left: nothing is known until the last position.
    logits_LV = torch.zeros(6, V)
    for i, token in enumerate([4, 5, 6, 7], start=2):
        logits_LV[i, token] = 4.0 + i
    student = ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))
    (found,) = generate(student, [Request("w1", None, 4, stop=("w5",))], GREEDY)
    assert (found.text, found.nfe, found.finish_reason) == ("w4 ", 4, "stop")
    assert found.token_ids == [4, 5, 6, 7]


def test_a_stop_string_after_an_end_token_does_not_count():
    student = scripted([0, 0, 4, END, 6, 7])
    settings = replace(GREEDY, stop_at_eos=False)
    (found,) = generate(student, [Request("w1", None, 4, stop=("w6",))], settings)
    assert (found.text, found.num_tokens, found.finish_reason) == ("w4", 1, "stop")


def test_a_stop_string_in_what_was_given_does_not_count():
    student = scripted([0, 0, 4, 5, 0])
    (found,) = generate(student, [Request("w1", "w9", 2, stop=("w1", "w9"))], GREEDY)
    assert (found.text, found.finish_reason) == ("w4 w5", "length")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4, "block_length": 2},
        {"steps": 8, "compat": "llada"},
        {"temperature": 1.5},
        {"cfg_scale": 1.0},
    ],
)
def test_no_text_contains_its_stop_string(changes):
    settings = SamplerSettings(**changes)
    denoiser = random_student(shift=True)
    texts = [one.text for one in generate(denoiser, [Request("w1 w2", None, 8)] * 6, settings)]
    for stop in ("w1", "w10", " w", "3 w1"):
        found = generate(denoiser, [Request("w1 w2", None, 8, stop=(stop,))] * 6, settings)
        for one, text in zip(found, texts, strict=True):
            assert stop not in one.text
            if settings.compat == "default":  # there, rows share their noise
                assert one.text == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        ([4, 5], (), ("w4 w5", 2, "length")),
        ([4, END, 5], (), ("w4", 1, "stop")),
        ([END, 4], (), ("", 0, "stop")),
        ([4, END, 5], ("w5",), ("w4", 1, "stop")),
        ([4, 5, 6], ("w6", " w5"), ("w4", 1, "stop")),
        ([4, 5, 6], ("4",), ("w", 0, "stop")),
        ([4, 5, END], ("w5",), ("w4 ", 1, "stop")),
        ([], ("w5",), ("", 0, "length")),
    ],
)
def test_visible(ids, stop, expected):
    text, tokens, count, reason = visible(word_vocab(), ids, stop)
    assert (text, count, reason) == expected
    assert tokens == ids


def test_visible_counts_whole_tokens_of_bytes():
    vocab = read_vocab(byte_tokenizer())
    ids = list("aé€b".encode())
    assert visible(vocab, ids, ("€",))[:3] == ("aé", ids, 3)
    assert visible(vocab, ids, ("b",))[:3] == ("aé€", ids, 6)
    assert visible(vocab, ids, ("\N{EURO SIGN}b", "é"))[:3] == ("a", ids, 1)


# --- batches ---------------------------------------------------------------------------------------

HOLES = [
    Hole((START, 1), 5, key=("k", 0)),
    Hole((START, 2, 2, 2), 2, (5,), key=("k", 1)),
    Hole((START,), 9, key=("k", 2)),
    Hole((START, 7), 1, key=("k", 3)),
    Hole((START, 1, 3), 4, stop=("w3", "w1"), key=("k", 4)),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [False, True])
def test_a_key_fixes_a_text_in_any_company(temperature, shift):
    denoiser = random_student(shift=shift)
    settings = SamplerSettings(
        temperature=temperature, top_p=0.9, remasking="random", cfg_scale=0.3
    )
    alone = [fill(denoiser, [hole], settings)[0] for hole in HOLES]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [2, 2, 0]):
        for batch_size in (None, 1, 2, 3, 99):
            found = fill(denoiser, [HOLES[i] for i in order], settings, batch_size=batch_size)
            check_same(found, [alone[i] for i in order])
    other = fill(denoiser, [replace(hole, key=("other", 0)) for hole in HOLES], settings)
    assert [one.token_ids for one in other] != [one.token_ids for one in alone]


def test_as_soon_as_a_row_is_done_the_next_joins():
    logits_V = torch.zeros(V)
    logits_V[7] = 5.0
    student = ScriptedStudent(lambda xt_BL: logits_V.expand(*xt_BL.shape, V))
    together, done = [], []
    found = fill(
        student,
        [replace(hole, stop=()) for hole in HOLES],
        GREEDY,
        batch_size=2,
        watch=lambda step, canvases: together.append([commit.row for commit in step.commits]),
        done=lambda i, one: done.append((i, one)),
    )
    assert together == [[0, 1]] * 2 + [[0, 2]] * 3 + [[2, 3]] + [[2, 4]] * 4 + [[2]]
    assert done == [(i, found[i]) for i in (1, 0, 3, 4, 2)]
    assert [one.nfe for one in found] == [5, 2, 9, 1, 4]
    assert student.forwards == 11


def test_the_published_sampler_refills_too():
    denoiser = random_student(shift=True)
    settings = SamplerSettings(compat="llada", steps=4)
    holes = [Hole((START, *range(n)), 4) for n in (1, 3, 2)]
    check_same(fill(denoiser, holes, settings, batch_size=2), fill(denoiser, holes, settings))


@pytest.mark.parametrize("attention", ["block", "context_causal", "reordered"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_key_fixes_a_text_of_a_model_with_blocks(temperature, attention):
    denoiser = random_student(shift=True, block_size=4, layers=2)
    denoiser.attention = attention
    settings = SamplerSettings(temperature=temperature, cfg_scale=0.3)
    alone = [fill(denoiser, [hole], settings)[0] for hole in HOLES]
    assert [len(one.token_ids) for one in alone] == [hole.length for hole in HOLES]
    for order, batch_size in (([0, 1, 2, 3, 4], None), ([4, 2, 0, 3, 1], 2), ([2, 2, 0], 1)):
        found = fill(denoiser, [HOLES[i] for i in order], settings, batch_size=batch_size)
        check_same(found, [alone[i] for i in order])


def test_a_stop_string_ends_a_row_of_blocks():
    denoiser = random_student(shift=True, block_size=2)
    request = Request("w1 w2", None, 8)
    (whole,) = generate(denoiser, [request], SamplerSettings(stop_at_eos=False, suppress_eos=True))
    stop = whole.text.split()[3]
    (found,) = generate(
        denoiser,
        [replace(request, stop=(stop,))],
        SamplerSettings(stop_at_eos=False, suppress_eos=True),
    )
    assert found.text == whole.text.partition(stop)[0]
    assert (found.finish_reason, found.nfe < whole.nfe) == ("stop", True)


def test_the_published_sampler_knows_no_blocks():
    denoiser = random_student(block_size=4)
    with pytest.raises(ConfigError, match="compat=llada is a sampler for models without blocks"):
        generate(denoiser, [Request("w1", None, 4)] * 2, SamplerSettings(compat="llada"))


# --- confidence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_confidence_is_the_mean_log_probability_of_what_was_decided(block_length, scale):
    denoiser = random_student(shift=True)
    hole = Hole((START, 1, 3), 6)
    settings = SamplerSettings(stop_at_eos=False, block_length=block_length, cfg_scale=scale)
    (found,) = fill(denoiser, [hole], settings)
    total, _, greedy = oracles.order_log_prob(
        slow_log_probs(denoiser, range(3), scale),
        [*hole.before, *found.token_ids],
        3,
        MASK,
        block_length=block_length,
    )
    assert greedy
    assert found.confidence == pytest.approx(total / 6, abs=1e-5)


def test_confidence_counts_decided_tokens_alone():
    # Two of four are decided, the rest is filled at the end token.
    (found,) = generate(scripted([0, 0, 4, END, 6, 7]), [Request("w1", None, 4)], GREEDY)
    certain = [30.0 - i - math.log(14 + math.exp(30.0 - i)) for i in (2, 3)]  # 15 tokens, no mask
    assert found.token_ids == [4, END, END, END]
    assert found.confidence == pytest.approx(sum(certain) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"temperature": 1.0}, True),
        ({"remasking": "random"}, False),
        ({"remasking": "margin"}, False),
        ({"remasking": "entropy"}, False),
        ({"eos_last": True}, False),  # the end token's confidence is no probability then
    ],
)
def test_confidence_is_unknown_where_it_is_no_probability(changes, known):
    settings = SamplerSettings(stop_at_eos=False, **changes)
    (found,) = fill(random_student(), [Hole((START, 1), 6)], settings)
    assert math.isnan(found.confidence) is not known
    assert not known or -20 < found.confidence < 0


def test_the_published_sampler_may_decide_on_masks_alone():
    class Masked(ScriptedStudent):
        """Its raw head prefers the mask, which the published sampler does not forbid."""

        def rows(self, xt_BL, wanted_BL, *, document_ids_BL):
            return torch.zeros(int(wanted_BL.sum()), V)

        def raw_head(self, rows_ND):
            logits_NV = rows_ND.clone()
            logits_NV[:, MASK] = 9.0
            return logits_NV

    settings = SamplerSettings(compat="llada", steps=2)
    (found,) = fill(Masked(None), [Hole((START, 1), 2)], settings)
    assert found.token_ids == [MASK, MASK]
    assert math.isnan(found.confidence)


def test_a_generation_without_a_rating_has_none():
    assert math.isnan(Generation("", [], 0, "length", 0).confidence)


# --- the command line's request ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("p", None, None, None, 9), Request("p", None, 9)),
        ((None, "a", "b", 3, 9), Request("a", "b", 3)),
        ((None, "a", None, 3, 9), Request("a", "", 3)),
        ((None, None, "b", 3, 9), Request("", "b", 3)),
        ((None, None, None, 3, 9), Request("", "", 3)),
    ],
)
def test_request_of(arguments, expected):
    assert request_of(*arguments) == expected


def test_request_of_stop_strings():
    assert request_of("p", None, None, None, 9, stop=["a"]) == Request("p", None, 9, stop=("a",))
    assert request_of(None, "a", "b", 3, 9, stop=("c", "d")) == Request(
        "a", "b", 3, stop=("c", "d")
    )


def test_request_of_a_chat():
    assert request_of("p", None, None, None, 9, chat=True) == Request("p", None, 9, chat=True)


@pytest.mark.parametrize(
    ("arguments", "chat", "text"),
    [
        ((None, None, None, None, 9), False, "give a PROMPT to continue, or --prefix"),
        (("p", "a", None, None, 9), False, "give either a PROMPT or --prefix/--suffix, not both"),
        (("p", None, None, 4, 9), False, "give either a PROMPT or --prefix/--suffix, not both"),
        ((None, "a", "b", None, 9), False, "need --span N"),
        ((None, "a", "b", 4, 9), True, "--chat needs a PROMPT"),
        ((None, "a", "b", 0, 9), False, "must be >= 1; got 0"),
        (("p", None, None, None, 0), False, "must be >= 1; got 0"),
    ],
)
def test_what_is_no_request(arguments, chat, text):
    with pytest.raises(ConfigError, match=text):
        request_of(*arguments, chat=chat)


def test_any_of_several_end_tokens_ends_a_text():
    vocab = word_vocab()
    assert visible(vocab, [1, 5, 2], ())[2:] == (3, "length")
    assert visible(vocab, [1, 5, 2], (), {5, vocab.eos_id})[2:] == (1, "stop")
    assert visible(vocab, [1, vocab.eos_id, 2], (), {5})[2:] == (3, "length")
