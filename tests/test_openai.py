"""OpenAI's endpoints, asked through OpenAI's own client.

Bytes are tokens (ids 0 … 255, start 256, end 257, pad 258, mask 259). A random student writes bytes
that are no text; where the text matters, `recite` makes it decide a given one, out of order.
"""

import asyncio
import contextlib
import json
import time

import openai
import pytest
import tiny_serve
import torch
from starlette.requests import ClientDisconnect
from tiny import byte_tokenizer, tiny_model
from tiny_run import ar_folder
from tiny_serve import Gate, byte_student, byte_vocab, eventually, running, tiny_service

from mdm.autoregressive import Autoregressive
from mdm.fim import FAMILIES
from mdm.serve.app import make_app
from mdm.serve.limits import Limits
from mdm.serve.models import hold, open_teacher
from mdm.serve.schemas import DIFFUSION_ONLY
from mdm.serve.service import Service
from mdm.vocab import read_vocab

START, END, MASK, VOCAB = 256, 257, 259, 260
KEY = "a-key-for-tests"
PROMPT = "def add(a, b):\n    return "


def connect(url, key=KEY):
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, http_client=http
    )


def connect_async(url):
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=http
    )


@pytest.fixture(scope="module")
def server():
    service = tiny_service(teacher=True)
    with running(service) as url:
        yield service, url


@pytest.fixture(scope="module")
def client(server):
    with connect(server[1]) as one:
        yield one


@pytest.fixture(scope="module")
def native(server):
    """`POST /generate` of the same server."""
    with tiny_serve.client(server[1]) as http:

        def generate(**fields):
            answer = http.post("/generate", json=fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield generate


@contextlib.contextmanager
def serving(service, **options):
    """A server of its own, and a client of it."""
    with running(service, **options) as url, connect(url) as one:
        yield one


def ask(client, endpoint, **fields):
    """One request; a chat has the prompt as the user's message."""
    fields = {"model": "tiny", "max_tokens": 12, **fields}
    own = {*DIFFUSION_ONLY, "denoising", "timeout_s"}
    extra = {name: fields.pop(name) for name in own if name in fields}
    if endpoint == "chat":
        messages = [{"role": "user", "content": fields.pop("prompt")}]
        return client.chat.completions.create(messages=messages, extra_body=extra, **fields)
    return client.completions.create(extra_body=extra, **fields)


def said(choice):
    """The text of a choice, whole or in a chunk."""
    if hasattr(choice, "message"):
        return choice.message.content
    if hasattr(choice, "delta"):
        return choice.delta.content or ""
    return choice.text


def texts(answer):
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [said(choice) for choice in answer.choices]


def put_together(chunks):
    """What a client has that appends texts: (text, finish reason) of every choice."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text, reason = found.get(choice.index, ("", None))
            assert reason is None, "a choice went on after its end"
            found[choice.index] = text + said(choice), choice.finish_reason
    return [found[index] for index in sorted(found)]


def recite(service, script):
    """The student decides these tokens after an empty prompt, in an order of its own."""

    def rows(xt_BL, wanted_BL, **_):
        logits_NV = torch.zeros(int(wanted_BL.sum()), VOCAB)
        for logits_V, (_, position) in zip(logits_NV, wanted_BL.nonzero().tolist(), strict=True):
            logits_V[script[position - 1]] = 6 + 7 * position % 11
        return logits_NV

    service.student.model.rows = rows
    service.student.model.head = lambda logits_NV: logits_NV


# --- models ----------------------------------------------------------------------------------------


def test_models(server, client):
    service, _ = server
    assert [one.id for one in client.models.list()] == ["tiny", "ar"]
    one = client.models.retrieve("ar")
    assert (one.id, one.object, one.created) == ("ar", "model", service.teacher.created)
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("arr")
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    assert "did you mean 'ar'" in found.value.message


def test_name_with_a_slash():
    held = hold(byte_student(), name="my/run", source="x", weights="c0ffee")
    with serving(Service(held, None, Limits(workspace_mib=64))) as client:
        assert client.models.retrieve("my/run").id == "my/run"
        answer = client.completions.create(model="my/run", prompt="a", max_tokens=1)
        assert (answer.model, answer.system_fingerprint) == ("my/run", "c0ffee")


# --- one text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "ar"])
@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_is_what_generate_gives(client, native, endpoint, model):
    fields = {"prompt": PROMPT, "temperature": 1.0, "top_p": 0.9, "seed": 5, "n": 2, "model": model}
    answer = ask(client, endpoint, **fields)
    expected = native(**fields, chat=endpoint == "chat", gen_length=12)
    assert texts(answer) == [choice["text"] for choice in expected["choices"]]
    assert len(set(texts(answer))) == 2
    usage = answer.usage
    assert usage.prompt_tokens == expected["prompt_tokens"]
    assert usage.completion_tokens == expected["completion_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.object == {"text": "text_completion", "chat": "chat.completion"}[endpoint]
    assert (answer.model, answer.seed, answer.system_fingerprint) == (model, 5, None)
    assert answer.stats["forwards"] == expected["stats"]["forwards"]
    assert answer.stats.keys() == expected["stats"].keys()


def test_settings_of_the_sampler(client, native):
    own = {"steps": 6, "block_length": 4, "cfg_scale": 0.5, "remasking": "entropy"}
    answer = ask(client, "text", prompt=PROMPT, temperature=0.7, seed=1, **own)
    expected = native(prompt=PROMPT, gen_length=12, temperature=0.7, seed=1, **own)
    assert texts(answer) == [expected["choices"][0]["text"]]
    assert answer.stats["forwards"] == {"denoise": 12}  # guidance counts 2


@pytest.mark.parametrize(
    "rule", [{"factor": 20.0}, {"entropy_bound": 9.0, "remasking": "entropy"}], ids=str
)
@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_rules_of_decoding(client, native, endpoint, rule):
    answer = ask(client, endpoint, prompt=PROMPT, temperature=0.7, seed=1, **rule)
    chat = {"chat": True} if endpoint == "chat" else {}
    expected = native(prompt=PROMPT, gen_length=12, temperature=0.7, seed=1, **chat, **rule)
    assert texts(answer) == [expected["choices"][0]["text"]]
    assert answer.stats["forwards"] == expected["stats"]["forwards"]
    assert answer.stats["forwards"]["denoise"] < 12


def test_defaults(client, native):
    text = client.completions.create(model="tiny", prompt=PROMPT)
    again = client.completions.create(model="tiny", prompt=PROMPT)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}]
    )
    assert text.seed != again.seed  # drawn anew, but greedy
    expected = native(prompt=PROMPT, gen_length=16)["choices"][0]["text"]
    assert texts(text) == texts(again) == [expected]
    assert texts(chat) == [native(prompt=PROMPT, chat=True, gen_length=64)["choices"][0]["text"]]


def test_seed_and_temperature(client):
    def sampled(**fields):
        return ask(client, "text", prompt=PROMPT, temperature=1.0, **fields)

    first = sampled()
    assert texts(sampled(seed=first.seed)) == texts(first)
    assert texts(sampled(seed=first.seed + 1)) != texts(first)
    assert texts(ask(client, "text", prompt=PROMPT, seed=first.seed)) != texts(first)


def test_null_is_left_out(client):
    names = ("stop", "seed", "temperature", "top_p", "n", "stream", "stream_options", "logit_bias")
    nothing = dict.fromkeys([*names, "presence_penalty", "frequency_penalty", "user"])
    plain = ask(client, "text", prompt=PROMPT)
    fields = {**nothing, **dict.fromkeys(["suffix", "echo", "best_of", "logprobs"])}
    assert texts(ask(client, "text", prompt=PROMPT, **fields)) == texts(plain)
    more = ("tools", "functions", "response_format", "modalities", "audio", "logprobs")
    fields = {**nothing, **dict.fromkeys([*more, "max_completion_tokens"])}
    assert texts(ask(client, "chat", prompt=PROMPT, **fields)) == texts(
        ask(client, "chat", prompt=PROMPT)
    )


def test_fields_that_ask_for_nothing(client):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
    assert ask(client, "text", prompt="a", best_of=2, n=2, **neutral).usage.prompt_tokens == 2
    chat = {
        "logprobs": False,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "function_call": "auto",
    }
    assert len(texts(ask(client, "chat", prompt="a", **chat, **neutral))) == 1


# --- several texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "ar"])
def test_several_prompts(client, model):
    prompts = ["def f(x):", "class A", ""]
    alone = [ask(client, "text", model=model, prompt=one) for one in prompts]
    answer = ask(client, "text", model=model, prompt=prompts, n=2)
    expected = [text for one in alone for text in texts(one) * 2]
    assert len(set(expected)) == 3
    assert texts(answer) == expected
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert answer.usage.completion_tokens == sum(2 * one.usage.completion_tokens for one in alone)


def test_equal_prompts_are_drawn_apart(client):
    fields = {"temperature": 1.0, "seed": 3}
    answer = ask(client, "text", prompt=[PROMPT] * 4, **fields)
    assert len(set(texts(answer))) == 4
    assert texts(answer) == texts(ask(client, "text", prompt=PROMPT, n=4, **fields))


@pytest.mark.parametrize("model", ["tiny", "ar"])
def test_token_ids(client, model):
    ids = [list(text.encode()) for text in ("def f(x):", "é = ", "")]
    expected = ask(client, "text", model=model, prompt=["def f(x):", "é = ", ""], echo=True)
    assert texts(expected)[1].startswith("é = ")
    assert texts(ask(client, "text", model=model, prompt=ids, echo=True)) == texts(expected)
    one = ask(client, "text", model=model, prompt=ids[1], echo=True)
    assert texts(one) == texts(expected)[1:2]


def test_start_token_stands_once(client):
    ids = list(PROMPT.encode())
    plain, with_start = (ask(client, "text", prompt=prompt) for prompt in (ids, [START, *ids]))
    assert plain.usage.prompt_tokens == with_start.usage.prompt_tokens == len(ids) + 1
    assert texts(plain) == texts(with_start)


def test_echo(client):
    prompts = ["a = 'ä'", "b"]
    plain = ask(client, "text", prompt=prompts, n=2)
    echoed = ask(client, "text", prompt=prompts, n=2, echo=True)
    leads = [prompt for prompt in prompts for _ in range(2)]
    assert texts(echoed) == [a + b for a, b in zip(leads, texts(plain), strict=True)]
    assert echoed.usage == plain.usage


# --- holes -----------------------------------------------------------------------------------------


def test_suffix(client, native):
    suffix, settings = "\n    return total", {"temperature": 0.8, "seed": 11}
    expected = native(prefix=PROMPT, suffix=suffix, span=6, **settings)
    for prompt in (PROMPT, list(PROMPT.encode())):
        answer = ask(client, "text", prompt=prompt, suffix=suffix, max_tokens=6, **settings)
        assert texts(answer) == [expected["choices"][0]["text"]]
        assert answer.usage.prompt_tokens == 1 + len(PROMPT) + len(suffix)
    plain = ask(client, "text", prompt=PROMPT, max_tokens=6, **settings)
    assert texts(plain) != texts(answer)
    assert texts(ask(client, "text", prompt=PROMPT, suffix="", max_tokens=6, **settings)) == texts(
        plain
    )


def test_suffix_for_a_teacher_with_marks():
    marks = FAMILIES["starcoder"].marks
    vocab = read_vocab(byte_tokenizer(marks))
    ar = Autoregressive(tiny_model("llama", len(vocab), layers=2, seed=1), vocab)
    service = Service(
        hold(byte_student(), name="tiny", source="x"),
        hold(ar, name="ar", source="y"),
        Limits(workspace_mib=64),
    )
    with running(service) as url, connect(url) as client, tiny_serve.client(url) as http:
        fields = {"model": "ar", "suffix": "\n    return"}
        expected = http.post("/generate", json={**fields, "prefix": PROMPT, "span": 5}).json()
        answer = ask(client, "text", prompt=PROMPT, max_tokens=5, **fields)
        assert texts(answer) == [expected["choices"][0]["text"]]
        assert answer.usage.prompt_tokens == len(PROMPT) + len("\n    return") + len(marks)
        with pytest.raises(openai.BadRequestError, match="as text, not as token ids"):
            ask(client, "text", prompt=[1, 2], **fields)


def test_a_served_teacher_ends_where_its_family_closes_the_middle(tmp_path):
    source = ar_folder(tmp_path, extra_special=(*FAMILIES["starcoder"].marks, "<|endoftext|>"))
    served = open_teacher(source, name=None, dtype="float32", device="cpu")
    assert served.fills_holes
    assert served.decoder.tokenizer.convert_tokens_to_ids("<|endoftext|>") in served.end_ids


# --- chat ------------------------------------------------------------------------------------------


def chat(client, *messages, **fields):
    listed = [{"role": role, "content": content} for role, content in messages]
    fields = {"model": "tiny", "max_tokens": 12, **fields}
    return client.chat.completions.create(messages=listed, **fields)


def test_conversation(client):
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "one"), ("user", "2?")]
    answer = chat(client, *turns)
    ids = byte_vocab().encode_chat([{"role": role, "content": text} for role, text in turns])
    assert answer.usage.prompt_tokens == len(ids)
    assert texts(answer) == texts(ask(client, "text", prompt=ids))
    assert texts(answer) != texts(chat(client, turns[-1]))
    developer = chat(client, ("developer", "Be brief."), *turns[1:])
    assert texts(developer) == texts(answer)
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    assert texts(chat(client, ("system", parts), *turns[1:])) == texts(answer)


def test_answer_becomes_a_message(client):
    first = chat(client, ("user", "1?"))
    said_so_far = [{"role": "user", "content": "1?"}, first.choices[0].message]
    second = client.chat.completions.create(model="tiny", messages=said_so_far, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_number_of_tokens_of_a_chat(client):
    old, new = (chat(client, ("user", "1?"), **{name: 5, "max_tokens": 5}) for name in NAMES)
    assert old.usage.completion_tokens == new.usage.completion_tokens == 5
    assert texts(old) == texts(new)
    only_new = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "1?"}], max_completion_tokens=5
    )
    assert texts(only_new) == texts(old)


NAMES = ("max_tokens", "max_completion_tokens")


def test_no_chat_template():
    vocab = read_vocab(byte_tokenizer()).with_mask(None)
    student = byte_student()
    student.vocab = vocab
    with (
        serving(tiny_service(student=student)) as client,
        pytest.raises(openai.BadRequestError, match="'tiny' has no chat template") as found,
    ):
        chat(client, ("user", "a"))
    assert found.value.param == "messages"


@pytest.mark.parametrize("model", ["tiny", "ar"])
def test_special_tokens_in_a_text_are_text(client, model):
    spelled = "<|mask|><|end|>"
    answer = ask(client, "text", model=model, prompt=spelled, echo=True)
    expected = ask(client, "text", model=model, prompt=list(spelled.encode()), echo=True)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert texts(answer)[0].startswith(spelled)
    assert texts(answer) == texts(expected)
    talked = chat(client, ("user", spelled), model=model)
    neutral = chat(client, ("user", "x" * len(spelled)), model=model)
    assert talked.usage.prompt_tokens == neutral.usage.prompt_tokens
    assert texts(talked) != texts(neutral)


# --- streams ---------------------------------------------------------------------------------------

STREAMS = {
    "one": {"prompt": PROMPT},
    "many": {"prompt": [PROMPT, "class A", "é"], "n": 2, "temperature": 1.0, "seed": 7},
    "ids": {"prompt": [[1, 2], [3]], "temperature": 1.0, "seed": 7},
    "echo": {"prompt": [PROMPT, ""], "n": 2, "echo": True},
    "hole": {"prompt": PROMPT, "suffix": "\n", "temperature": 1.0, "seed": 7},
    "blocks": {"prompt": PROMPT, "block_length": 4, "threshold": 0.4, "temperature": 0.5, "n": 3},
    "guided": {"prompt": PROMPT, "cfg_scale": 0.5, "steps": 4},
    "teacher": {"model": "ar", "prompt": [PROMPT, "b"], "n": 2, "temperature": 1.0, "seed": 7},
}
CHATS = {
    "chat": {"prompt": PROMPT},
    "chats": {"prompt": PROMPT, "n": 3, "temperature": 1.0, "seed": 7},
    "chat with the teacher": {"model": "ar", "prompt": PROMPT, "n": 2},
}


@pytest.mark.parametrize("denoising", [False, True])
@pytest.mark.parametrize("case", [*STREAMS, *CHATS])
def test_stream_is_the_text(client, case, denoising):
    endpoint = "chat" if case in CHATS else "text"
    fields = {"seed": 0, **(STREAMS | CHATS)[case]}
    whole = ask(client, endpoint, **fields)
    chunks = list(ask(client, endpoint, **fields, denoising=denoising, stream=True))
    assert put_together(chunks) == [(said(one), one.finish_reason) for one in whole.choices]
    assert {chunk.object for chunk in chunks} == {
        {"text": "text_completion", "chat": "chat.completion.chunk"}[endpoint]
    }
    assert len({chunk.id for chunk in chunks}) == 1
    assert {(chunk.model, chunk.seed) for chunk in chunks} == {(whole.model, whole.seed)}
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert [hasattr(chunk, "stats") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].stats["forwards"] == whole.stats["forwards"]
    roles = [getattr(getattr(c.choices[0], "delta", None), "role", None) for c in chunks]
    leads = len(whole.choices) if endpoint == "chat" else 0
    assert roles == ["assistant"] * leads + [None] * (len(chunks) - leads)
    for chunk in chunks[leads:]:
        choice = chunk.choices[0]
        assert said(choice) or choice.finish_reason or hasattr(chunk, "denoising"), "says nothing"
    told = [chunk.denoising for chunk in chunks if hasattr(chunk, "denoising")]
    assert bool(told) == denoising
    for index in range(len(whole.choices)) if denoising else ():
        own = [one for one in told if one["index"] == index]
        assert [one["step"] for one in own] == list(range(len(own)))
        positions = [position for one in own for position in one["positions"]]
        # A text that ends leaves the rest of its hole.
        assert sorted(positions) == list(range(12)) or whole.choices[index].finish_reason == "stop"
        assert own[0].keys() == {
            *("index", "step", "seconds", "positions", "token_ids", "tokens", "confidence")
        }


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_usage_of_a_stream(client, endpoint):
    fields = {"prompt": PROMPT, "n": 2, "seed": 0, "temperature": 1.0}
    options = {"include_usage": True}
    whole = ask(client, endpoint, **fields)
    chunks = list(ask(client, endpoint, **fields, stream=True, stream_options=options))
    *others, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.stats["forwards"] == whole.stats["forwards"]
    assert all(chunk.choices and chunk.usage is None for chunk in others)
    assert not any(hasattr(chunk, "stats") for chunk in others)
    assert put_together(chunks) == [(said(one), one.finish_reason) for one in whole.choices]


def test_events_of_a_stream(server):
    body = {"model": "tiny", "prompt": "é", "stream": True, "denoising": True, "max_tokens": 4}
    with tiny_serve.client(server[1]) as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.content.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    assert all(json.loads(event[6:])["object"] == "text_completion" for event in events)


def test_replay(server, client):
    answer = ask(client, "text", prompt=PROMPT)
    with tiny_serve.client(server[1]) as http:
        found = http.get(f"/generate/{answer.id}/trajectory").json()
    assert [row["text"] for row in found["rows"]] == texts(answer)


# --- texts that are known --------------------------------------------------------------------------

SCRIPT = "größer → ∞ 🙂 STOP and more"
KNOWN = {
    # (tokens, stop, text, finish reason)
    "whole": (SCRIPT.encode(), [], SCRIPT, "length"),
    "stop": (SCRIPT.encode(), ["STOP"], "größer → ∞ 🙂 ", "stop"),
    "stop at a character": (SCRIPT.encode(), "∞", "größer → ", "stop"),
    "first of two": (SCRIPT.encode(), ["more", " 🙂"], "größer → ∞", "stop"),
    "nearly": (SCRIPT.encode(), ["STOPPED", "mores", "🙃"], SCRIPT, "length"),
    "end token": ([*"für ".encode(), END, *b"never shown, whatever is said"], [], "für ", "stop"),
    "nothing": ([END] * 34, [], "", "stop"),
}


@pytest.fixture(scope="module")
def actor():
    service = tiny_service()
    with serving(service) as client:
        yield service, client


@pytest.mark.parametrize("block_length", [1, 5, 8, None])
@pytest.mark.parametrize("case", KNOWN)
def test_known_text(actor, case, block_length):
    service, client = actor
    script, stop, text, reason = KNOWN[case]
    recite(service, script)
    fields = {"prompt": "", "max_tokens": len(script), "stop": stop}
    if block_length is not None:
        fields["block_length"] = block_length
    whole = ask(client, "text", **fields)
    assert [(said(one), one.finish_reason) for one in whole.choices] == [(text, reason)]
    assert whole.usage.completion_tokens == len(text.encode())  # a byte is a token
    options = {"include_usage": True}
    chunks = list(ask(client, "text", **fields, stream=True, stream_options=options))
    assert put_together(chunks) == [(text, reason)]
    assert chunks[-1].usage == whole.usage
    pieces = [said(choice) for chunk in chunks for choice in chunk.choices]
    assert not any("\ufffd" in piece for piece in pieces)
    if text and block_length == 1:
        assert len([piece for piece in pieces if piece]) > 3


# --- what is refused -------------------------------------------------------------------------------

BAD = {
    "model is missing": ("text", {"model": openai.omit, "prompt": "a"}, "model"),
    "prompt is missing": ("text", {"prompt": None}, "prompt"),
    "prompt is a number": ("text", {"prompt": 3}, "prompt"),
    "no prompt": ("text", {"prompt": []}, "prompt"),
    "mixed prompts": ("text", {"prompt": ["a", 3]}, "prompt"),
    "negative token": ("text", {"prompt": [-1]}, "prompt"),
    "no such token": ("text", {"prompt": [[1], [VOCAB]]}, "prompt"),
    "mask token": ("text", {"prompt": [1, MASK]}, "prompt"),
    "no tokens": ("text", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "number as text": ("text", {"prompt": "a", "n": "2"}, "n"),
    "negative temperature": ("text", {"prompt": "a", "temperature": -1}, "temperature"),
    "empty stop": ("text", {"prompt": "a", "stop": [""]}, "stop.0"),
    "too many stops": ("text", {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    "best of more": ("text", {"prompt": "a", "best_of": 2}, "best_of"),
    "best of fewer": ("text", {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    "logprobs": ("text", {"prompt": "a", "logprobs": 0}, "logprobs"),
    "presence": ("text", {"prompt": "a", "presence_penalty": 0.1}, "presence_penalty"),
    "frequency": ("chat", {"prompt": "a", "frequency_penalty": -1}, "frequency_penalty"),
    "bias": ("text", {"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    "suffix for a teacher": ("text", {"prompt": "a", "suffix": "b", "model": "ar"}, "suffix"),
    "steps for a teacher": ("text", {"prompt": "a", "steps": 4, "model": "ar"}, "steps"),
    "factor for a teacher": ("text", {"prompt": "a", "factor": 1, "model": "ar"}, "factor"),
    "cache for a chat": ("chat", {"prompt": "a", "cache": "dual", "model": "ar"}, "cache"),
    "no factor": ("text", {"prompt": "a", "factor": 0}, "factor"),
    "negative entropy": ("chat", {"prompt": "a", "entropy_bound": -1}, "entropy_bound"),
    "two rules": ("text", {"prompt": "a", "factor": 1, "threshold": 0.5}, None),
    "refresh of nothing": ("chat", {"prompt": "a", "refresh": 2}, None),
    "steps for a chat": ("chat", {"prompt": "a", "steps": 4, "model": "ar"}, "steps"),
    "options": ("text", {"prompt": "a", "stream_options": {}}, "stream_options"),
    "denoising": ("chat", {"prompt": "a", "denoising": True}, "denoising"),
    "two numbers": ("chat", {"prompt": "a", "max_completion_tokens": 3}, "max_tokens"),
    "chat logprobs": ("chat", {"prompt": "a", "logprobs": True}, "logprobs"),
    "no number of them": ("chat", {"prompt": "a", "logprobs": 0}, "logprobs"),
    "no penalty at all": ("text", {"prompt": "a", "presence_penalty": False}, "presence_penalty"),
    "top logprobs": ("chat", {"prompt": "a", "top_logprobs": 1}, "top_logprobs"),
    "json": (
        "chat",
        {"prompt": "a", "response_format": {"type": "json_object"}},
        "response_format",
    ),
    "tools": ("chat", {"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
    "a tool": ("chat", {"prompt": "a", "tool_choice": "required"}, "tool_choice"),
    "functions": ("chat", {"prompt": "a", "functions": [{"name": "f"}]}, "functions"),
    "a function": ("chat", {"prompt": "a", "function_call": {"name": "f"}}, "function_call"),
    "sound": ("chat", {"prompt": "a", "modalities": ["text", "audio"]}, "modalities"),
    "voice": ("chat", {"prompt": "a", "audio": {"voice": "x", "format": "wav"}}, "audio"),
    "no text": ("chat", {"prompt": 3}, "messages.0.content"),
    "half a part": ("chat", {"prompt": [{"type": "text"}]}, "messages.0.content"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(client, case):
    endpoint, fields, param = BAD[case]
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, endpoint, **fields)
    assert (found.value.type, found.value.param) == ("invalid_request_error", param)
    assert found.value.code == "invalid_value"


def test_refused_by_name(client):
    with pytest.raises(
        openai.BadRequestError, match=r"'best_off'.*did you mean 'best_of'"
    ) as found:
        client.completions.create(model="tiny", prompt="a", extra_body={"best_off": None})
    assert (found.value.code, found.value.param) == ("unknown_field", "best_off")
    with pytest.raises(openai.BadRequestError, match="type 'image_url' cannot be read"):
        chat(client, ("user", [{"type": "image_url", "image_url": {"url": "x"}}]))
    with pytest.raises(openai.BadRequestError, match="'developer', 'user'") as found:
        chat(client, ("user", "a"), ("tool", "b"))
    assert found.value.param == "messages.1.role"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="tiny", messages=[])
    assert found.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="steps is 5, but there are 2 blocks"):
        ask(client, "text", prompt="a", steps=5, block_length=6)


def test_too_large(client):
    with pytest.raises(openai.APIStatusError, match=r"17 .*at most 16") as found:
        ask(client, "text", prompt=["a"] * 17)
    assert (found.value.status_code, found.value.param) == (413, "prompt")
    with pytest.raises(openai.APIStatusError, match="18 texts") as found:
        ask(client, "text", prompt=["a"] * 9, n=2)
    assert (found.value.status_code, found.value.param) == (413, "n")
    with pytest.raises(openai.APIStatusError) as found:
        ask(client, "chat", prompt="a", n=17)
    assert (found.value.status_code, found.value.param) == (413, "n")
    for prompt in (["a", "a" * 1020], [[1], [1] * 1020]):
        with pytest.raises(openai.BadRequestError, match=r"1021 tokens\) and 12 new") as found:
            ask(client, "text", prompt=prompt)
        assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="65537 characters") as found:
        ask(client, "chat", prompt="a" * 65537)
    assert (found.value.code, found.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.APIStatusError, match="65537 characters") as found:
        ask(client, "text", prompt="a" * 65537, suffix="b")
    assert (found.value.code, found.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_no_such_model(client, stream):
    for endpoint in ("text", "chat"):
        with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'") as found:
            ask(client, endpoint, model="tinny", prompt="a", stream=stream)
        assert (found.value.code, found.value.param) == ("model_not_found", "model")


def test_half_a_character_in_json(server):
    """A lone surrogate can be written in JSON, but is no text."""
    with tiny_serve.client(server[1]) as http:
        for path, body, param in (
            ("completions", '{"model": "tiny", "prompt": ["a", "\\ud800"]}', "prompt"),
            (
                "chat/completions",
                '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
                "messages",
            ),
        ):
            answer = http.post(
                f"/v1/{path}", content=body, headers={"content-type": "application/json"}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            assert "not valid Unicode" in error["message"]


def test_key():
    with running(tiny_service(), keys=[KEY]) as url:
        with connect(url) as client:
            assert [one.id for one in client.models.list()] == ["tiny"]
        with connect(url, "another-key") as stranger:
            for call in (stranger.models.list, lambda: ask(stranger, "text", prompt="a")):
                with pytest.raises(openai.AuthenticationError) as found:
                    call()
                assert found.value.code == "invalid_api_key"


# --- what fails on the way -------------------------------------------------------------------------


def break_forwards(service, *, after, needle=None):
    """Forwards fail after so many, or only those with this token in a row."""
    denoiser = service.student.model
    real, seen = denoiser.rows, []

    def forward(xt_BL, *arguments, **options):
        seen.append(len(xt_BL))
        if len(seen) > after and (needle is None or bool((xt_BL == needle).any())):
            raise RuntimeError("broken on purpose")
        return real(xt_BL, *arguments, **options)

    denoiser.rows = forward


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_failure(endpoint):
    service = tiny_service()
    with serving(service) as client:
        break_forwards(service, after=4)
        chunks = []
        stream = ask(client, endpoint, prompt="a", stream=True, denoising=True)
        with pytest.raises(openai.APIError, match="failed on this request") as found:
            chunks.extend(stream)
        assert found.value.code == "internal_error"
        assert not isinstance(found.value, openai.APIStatusError)  # the answer had begun
        assert [chunk.denoising["step"] for chunk in chunks if hasattr(chunk, "denoising")] == [
            *range(4)
        ]
        with pytest.raises(openai.InternalServerError) as found:
            ask(client, endpoint, prompt="a")
        assert (found.value.status_code, found.value.code) == (500, "internal_error")


def test_one_prompt_fails_all():
    service = tiny_service()
    with serving(service) as client:
        break_forwards(service, after=2, needle=ord("!"))
        with pytest.raises(openai.InternalServerError):
            ask(client, "text", prompt=["a", "!", "b"], stop=["never"])
        eventually(lambda: service.engine.rows_in_work == 0, "the other prompts are given up")
        assert service.telemetry.summary()["requests"]["/v1/completions"] == {"internal_error": 1}
        assert len(texts(ask(client, "text", prompt=["a", "b"]))) == 2


def test_deadline():
    service = tiny_service()
    real = service.student.model.rows

    def slow(*arguments, **options):
        time.sleep(0.05)
        return real(*arguments, **options)

    service.student.model.rows = slow
    with serving(service) as client:
        with pytest.raises(openai.InternalServerError) as found:
            ask(client, "text", prompt="a", timeout_s=0.01)
        assert (found.value.status_code, found.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError) as found:
            list(ask(client, "text", prompt="a", timeout_s=0.01, stream=True))
        assert found.value.code == "deadline_exceeded"
        with pytest.raises(openai.APIStatusError) as found:
            ask(client, "text", prompt="a", timeout_s=601)
        assert found.value.param == "timeout_s"


def test_queue_is_full():
    service = tiny_service(max_rows=1, max_queue=0)
    gate = Gate(service)
    with serving(service) as client:
        stream = ask(client, "chat", prompt="a", stream=True)
        gate.wait()
        for endpoint in ("text", "chat"):
            with pytest.raises(openai.RateLimitError) as found:
                ask(client, endpoint, prompt="a")
            assert found.value.code == "queue_full"
            assert int(found.value.response.headers["retry-after"]) >= 1
        gate.open()
        assert put_together(stream)[0][1] == "length"


# --- clients that go -------------------------------------------------------------------------------


def given_up(service, gate):
    """The job is marked while its forward is still held; that one is its last."""
    eventually(lambda: all(job.cancelled for job in service.engine._jobs), "the server notices")
    before = len(gate.seen)
    gate.let()
    eventually(lambda: service.engine.rows_in_work == 0, "the rows are free")
    assert len(gate.seen) == before + 1
    eventually(
        lambda: list(service.telemetry.summary()["requests"].values()) == [{"cancelled": 1}],
        "it is counted once",
    )


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_client_leaves_a_stream(endpoint):
    service = tiny_service()
    gate = Gate(service)
    with serving(service) as client:
        with ask(client, endpoint, prompt="a", stream=True, denoising=True, n=2) as stream:
            gate.wait()
            gate.let()
            assert any(hasattr(chunk, "denoising") for chunk in stream)
            gate.wait()
            assert service.engine.rows_in_work == 2
        given_up(service, gate)
        gate.open()


@pytest.mark.parametrize("endpoint", ["text", "chat"])
def test_client_does_not_wait(endpoint):
    service = tiny_service()
    gate = Gate(service)

    async def leave(url):
        async with connect_async(url) as client:
            task = asyncio.ensure_future(ask(client, endpoint, prompt="a", n=3))
            await asyncio.to_thread(gate.wait)
            assert service.engine.rows_in_work == 3
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.to_thread(given_up, service, gate)

    with running(service) as url:
        asyncio.run(leave(url))
        gate.open()


def test_client_is_gone_before_the_first_chunk():
    service = tiny_service()
    gate = Gate(service)
    app = make_app(service)
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": true}'
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(_):
        gate.wait()  # the job is in work
        raise OSError("nobody is there")

    service.engine.start()
    try:
        with pytest.raises(ClientDisconnect):
            asyncio.run(app(scope, receive, send))
        assert [job.cancelled for job in service.engine._jobs] == [True]
    finally:
        gate.open()
        service.engine.stop()


# --- many at once ----------------------------------------------------------------------------------


def test_async_client(server, client):
    cases = [
        ("text", {"prompt": [PROMPT, "a"], "temperature": 1.0, "seed": 1}),
        ("text", {"prompt": PROMPT, "suffix": "\n", "temperature": 0.5, "seed": 2, "n": 2}),
        ("chat", {"prompt": PROMPT, "temperature": 1.0, "seed": 3, "cfg_scale": 0.5}),
        ("text", {"prompt": PROMPT, "model": "ar", "temperature": 1.0, "seed": 4}),
    ]
    alone = [texts(ask(client, endpoint, **fields)) for endpoint, fields in cases]

    async def streamed(one, endpoint, fields):
        stream = await ask(one, endpoint, **fields, stream=True)
        return [text for text, _ in put_together([chunk async for chunk in stream])]

    async def together():
        async with connect_async(server[1]) as one:
            whole = [ask(one, endpoint, **fields) for endpoint, fields in cases]
            parts = [streamed(one, endpoint, fields) for endpoint, fields in cases]
            found = await asyncio.gather(*whole, *parts)
            models = [model.id async for model in one.models.list()]
            return found[: len(cases)], found[len(cases) :], models

    whole, parts, models = asyncio.run(together())
    assert [texts(answer) for answer in whole] == alone == list(parts)
    assert models == ["tiny", "ar"]


# --- documentation ---------------------------------------------------------------------------------


def test_examples_work(server):
    with tiny_serve.client(server[1]) as http:
        described = http.get("/openapi.json").json()
        models = described["components"]["schemas"]
        for path, name in (
            ("/v1/completions", "CompletionRequest"),
            ("/v1/chat/completions", "ChatRequest"),
        ):
            operation = described["paths"][path]["post"]
            assert operation["tags"] == ["openai"]
            content = operation["requestBody"]["content"]["application/json"]
            assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
            assert set(operation["responses"]["200"]["content"]) == {
                "application/json",
                "text/event-stream",
            }
            assert models[name]["examples"]
            for example in models[name]["examples"]:
                answer = http.post(path, json={**example, "model": "tiny"})
                assert answer.status_code == 200, answer.text
            assert all(
                "description" in field for key, field in models[name]["properties"].items()
            ), "a field that is not explained"
