"""mdm's own endpoints over HTTP: results, streams, bad input, and everything that ends early."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_serve import Gate, byte_student, client, eventually, running, tiny_service

from mdm import generate as library
from mdm import likelihood
from mdm.canvas import SamplerSettings
from mdm.generate import Request
from mdm.likelihood import LikelihoodSettings
from mdm.serve.openai_schemas import ChatRequest, CompletionRequest
from mdm.serve.schemas import CompareRequest, GenerateRequest

HOLE = {"prefix": "def f(x):\n    y = ", "suffix": "\n    return y", "span": 6}
PROMPT = {"prompt": "import ", "gen_length": 8}


@pytest.fixture(scope="module")
def server():
    service = tiny_service(teacher=True)
    with running(service) as url, client(url) as http:
        http.service = service
        yield http


@pytest.fixture
def gated():
    """A server of one place and one in the queue whose forwards wait to be let through."""
    service = tiny_service(max_rows=1, max_queue=1)
    gate = Gate(service)
    with running(service) as url, client(url) as http:
        http.gate, http.service = gate, service
        yield http
        gate.open()


@pytest.fixture
def gated_with_teacher():
    service = tiny_service(teacher=True)
    gate = Gate(service)
    with running(service) as url, client(url) as http:
        yield http, gate, service
        gate.open()


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def error(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def events(response):
    """The JSON of every `data:` line."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def stream(http, body):
    with http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


# --- results -------------------------------------------------------------------------------------

CASES = [
    (HOLE, {}),
    (HOLE, {"temperature": 1.0, "n": 3, "steps": 3}),
    (PROMPT, {"block_length": 4, "steps": 4, "temperature": 0.5, "top_p": 0.9}),
    (PROMPT, {"remasking": "random", "cfg_scale": 1.0, "temperature": 1.0}),
    (PROMPT, {"threshold": 0.1, "suppress_eos": True}),
    (PROMPT, {"factor": 20.0, "suppress_eos": True, "temperature": 0.5}),
    (PROMPT, {"entropy_bound": 9, "remasking": "entropy", "block_length": 4}),
    (PROMPT, {"entropy_bound": 0, "remasking": "entropy"}),
    (PROMPT, {"threshold": 0.01, "remasking": "margin"}),
    (PROMPT, {"temperature": 3.0, "eos_last": True, "stop_at_eos": False, "n": 2}),
    (PROMPT, {"stop": ["e", "\n"], "temperature": 2.0, "n": 4}),
    ({"prompt": "", "gen_length": 5}, {}),
    ({"prompt": "hi", "gen_length": 5, "chat": True}, {"temperature": 1.0}),
    ({"prefix": "", "suffix": "x", "span": 3}, {}),
    ({"prompt": "<|mask|><|end|>", "gen_length": 4}, {}),
]


@pytest.mark.parametrize(("what", "how"), CASES, ids=str)
def test_generate_is_the_library_over_http(server, what, how):
    body = {**what, **how, "seed": 7}
    found = ok(server.post("/generate", json=body))
    how = dict(how)
    n, stop = how.pop("n", 1), tuple(how.pop("stop", ()))
    if "span" in what:
        request = Request(what["prefix"], what["suffix"], what["span"], stop=stop)
    else:
        request = Request(what["prompt"], None, what["gen_length"], what.get("chat", False), stop)
    denoiser = byte_student()
    expected = library.generate(denoiser, [request] * n, SamplerSettings(**how), seed=7)
    for choice, wanted in zip(found["choices"], expected, strict=True):
        assert choice["text"] == wanted.text
        assert choice["finish_reason"] == wanted.finish_reason
        assert choice["completion_tokens"] == wanted.num_tokens
        assert choice["forwards"] == wanted.nfe
    tokens, forwards = sum(w.num_tokens for w in expected), sum(w.nfe for w in expected)
    assert found["completion_tokens"] == tokens
    hole = library.encode(denoiser.vocab, request)
    assert found["prompt_tokens"] == len(hole.before) + len(hole.after)
    stats = found["stats"]
    assert stats["forwards"] == {"denoise": forwards}
    assert stats["tokens_per_forward"] == pytest.approx(tokens / forwards, abs=1e-3)
    assert 0 <= stats["queue_s"] <= stats["total_s"]
    assert stats["tokens_per_second"] > 0 or not tokens
    memory = stats["memory"]
    assert memory["process_peak_bytes"] >= memory["process_resident_bytes"] > 2**20
    assert memory["predicted_bytes"] > 0
    assert (found["seed"], found["model"], found["left_only"]) == (7, "tiny", False)


def test_a_seed_that_is_not_given_is_told_and_reproduces(server):
    body = {**PROMPT, "temperature": 1.5}
    first, second = ok(server.post("/generate", json=body)), ok(server.post("/generate", json=body))
    assert first["seed"] != second["seed"]
    again = ok(server.post("/generate", json={**body, "seed": first["seed"]}))
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert first["choices"][0]["text"] != second["choices"][0]["text"]


def test_the_teacher_can_be_asked(server):
    found = ok(server.post("/generate", json={**PROMPT, "model": "ar", "seed": 1, "stop": "q"}))
    assert found["model"] == "ar"
    forwards = found["stats"]["forwards"]
    assert forwards["prefill"] == 1
    assert forwards["decode"] == found["choices"][0]["forwards"] - 1
    assert found["prompt_tokens"] == len("import ")  # this tokenizer adds nothing by itself


@pytest.mark.parametrize(("what", "how"), CASES, ids=str)
def test_a_stream_adds_up_to_the_answer(server, what, how):
    body = {**what, **how, "seed": 7}
    whole = ok(server.post("/generate", json=body))
    for denoising in (False, True):
        first, *middle, last = stream(server, {**body, "denoising": denoising})
        assert first["seed"] == 7
        assert first["id"] == last["done"]["id"]
        for choice in whole["choices"]:
            own = [event for event in middle if event["index"] == choice["index"]]
            assert "".join(event["text"] for event in own) == choice["text"]
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            steps = [event["denoising"] for event in own if "denoising" in event]
            assert bool(steps) == denoising
            for number, step in enumerate(steps):
                assert step["step"] == number
                assert len(step["positions"]) == len(step["tokens"]) == len(step["confidence"]) > 0
        assert [choice["text"] for choice in last["done"]["choices"]] == [
            choice["text"] for choice in whole["choices"]
        ]


def test_a_finished_request_can_be_replayed(server):
    body = {**HOLE, "temperature": 1.0, "n": 2, "seed": 3}
    for answer in (ok(server.post("/generate", json=body)), stream(server, body)[-1]["done"]):
        found = ok(server.get(f"/generate/{answer['id']}/trajectory"))
        assert found["seed"] == 3
        for row, choice in zip(found["rows"], answer["choices"], strict=True):
            assert (row["before"], row["after"]) == (HOLE["prefix"], HOLE["suffix"])
            assert row["length"] == HOLE["span"]
            placed = [place for step in row["steps"] for place in step["positions"]]
            assert sorted(placed) == list(range(HOLE["span"]))
            tokens = {
                place: token
                for step in row["steps"]
                for place, token in zip(step["positions"], step["token_ids"], strict=True)
            }
            ids = [tokens[place] for place in range(HOLE["span"])]
            assert byte_student().vocab.decode(ids) == row["text"] == choice["text"]
    assert error(server.get("/generate/nothing/trajectory"), 404)["code"] == "trajectory_not_found"


def test_an_end_token_that_was_put_off_has_no_confidence():
    """Its confidence is -inf, which is no JSON; a student that says nothing else."""
    service = tiny_service()
    denoiser = service.student.model
    real, end = denoiser.raw_head, denoiser.vocab.eos_id

    def only_the_end(rows_ND):
        logits_NV = real(rows_ND)
        logits_NV[:, end] += 1000
        return logits_NV

    denoiser.raw_head = only_the_end
    with running(service) as url, client(url) as http:
        body = {"prompt": "a", "gen_length": 3, "eos_last": True, "denoising": True}
        steps = [e["denoising"] for e in stream(http, body) if "denoising" in e]
        assert [step["confidence"] for step in steps] == [[None]] * len(steps) != []
        done = ok(http.post("/generate", json={"prompt": "a", "gen_length": 3, "eos_last": True}))
        assert done["choices"][0]["text"] == ""
        assert ok(http.get(f"/generate/{done['id']}/trajectory"))["rows"][0]["steps"]


def test_a_wrong_request_is_described_as_400(server):
    description = ok(server.get("/openapi.json"))
    answers = [
        operation["responses"]
        for methods in description["paths"].values()
        for operation in methods.values()
    ]
    assert not any("422" in one for one in answers)
    assert "HTTPValidationError" not in description["components"]["schemas"]
    fields = list(description["components"]["schemas"]["GenerateRequest"]["properties"])
    assert fields[:4] == ["prompt", "prefix", "suffix", "span"]


def test_old_trajectories_are_forgotten():
    for kept, expected in ((2, [404, 200, 200]), (0, [404] * 3)):
        with running(tiny_service(trajectories=kept)) as url, client(url) as http:
            ids = [ok(http.post("/generate", json=PROMPT))["id"] for _ in range(3)]
            codes = [http.get(f"/generate/{one}/trajectory").status_code for one in ids]
            assert codes == expected


SCORES = [
    {},
    {"estimator": "stratified", "mc_samples": 16, "seed": 5},
    {"estimator": "order", "remasking": "margin", "block_length": 2},
    {"cfg_scale": 0.5},
]


@pytest.mark.parametrize("how", SCORES, ids=str)
def test_score_is_the_library_over_http(server, how):
    denoiser = byte_student()
    found = ok(server.post("/score", json={"context": "ab", "continuation": "cdé", **how}))
    pair = likelihood.pair_of_texts(denoiser.vocab, "ab", "cdé")
    (expected,) = likelihood.log_likelihood(denoiser, [pair], LikelihoodSettings(**how))
    assert found["log_likelihood"] == pytest.approx(expected.value, abs=1e-4)
    assert found["std_err"] == pytest.approx(expected.std_err, abs=1e-4)
    assert found["estimator"] == expected.estimator
    assert found["is_bound"] is expected.is_bound
    assert found["greedy"] is expected.greedy
    assert found["num_tokens"] == 4
    assert found["stats"]["forwards"] == {"score": expected.nfe}
    assert found["bits_per_byte"] == pytest.approx(-expected.value / 0.6931472 / 4, abs=1e-4)


def test_score_of_a_text_in_windows_and_by_the_teacher(server):
    denoiser = byte_student()
    body = {"text": "some longer text", "window": 6, "mc_samples": 8}
    found = ok(server.post("/score", json=body))
    pairs = likelihood.rolling_pairs(denoiser.vocab, body["text"], 6)
    parts = likelihood.log_likelihood(denoiser, pairs, LikelihoodSettings(mc_samples=8))
    assert found["log_likelihood"] == pytest.approx(likelihood.total(parts).value, abs=1e-3)
    assert found["num_tokens"] == len(body["text"])
    exact = ok(server.post("/score", json={"model": "ar", "context": "a", "continuation": "bc"}))
    assert (exact["estimator"], exact["std_err"], exact["is_bound"]) == ("ar", 0, False)
    assert exact["stats"]["forwards"] == {"score": 1}


def test_bits_are_those_of_the_bytes_that_are_scored(server):
    """Spaces at the end of the context are scored with the continuation."""
    denoiser = byte_student()
    found = ok(server.post("/score", json={"context": "a   ", "continuation": "b"}))
    pair = likelihood.pair_of_texts(denoiser.vocab, "a   ", "b")
    (whole,) = likelihood.log_likelihood(denoiser, [pair], LikelihoodSettings())
    assert found["num_tokens"] == 4
    assert found["bits_per_byte"] == pytest.approx(-whole.value / 0.6931472 / 4, abs=1e-3)
    assert found["nats_per_token"] == pytest.approx(-whole.value / 4, abs=1e-3)


def test_compare_runs_both(server):
    body = {**PROMPT, "seed": 2, "temperature": 0.8, "steps": 4}
    found = ok(server.post("/compare", json=body))
    alone = ok(server.post("/generate", json=body))
    assert found["student"]["choices"][0]["text"] == alone["choices"][0]["text"]
    beside = {"model": "ar", "seed": 2, "temperature": 0.8}
    alone = ok(server.post("/generate", json={**PROMPT, **beside}))
    assert found["teacher"]["choices"][0]["text"] == alone["choices"][0]["text"]
    assert found["ratio"]["tokens_per_forward"] == 2.0
    assert not found["teacher"]["left_only"]
    hole = ok(server.post("/compare", json={**HOLE, "seed": 2}))
    assert hole["teacher"]["left_only"]
    assert not hole["student"]["left_only"]


def test_without_a_teacher_there_is_nothing_to_compare(gated):
    assert error(gated.post("/compare", json=PROMPT), 400)["code"] == "no_teacher"


# --- 64 at a time --------------------------------------------------------------------------------


def counters(http):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


def test_64_mixed_requests_at_once_and_metrics_that_add_up():
    service = tiny_service(teacher=True, max_queue=64)
    bodies = []
    for i in range(64):
        what, how = CASES[i % len(CASES)]
        body = {**what, **how, "seed": i, "stream": i % 3 == 0}
        if i % 7 == 3:
            body = {**PROMPT, "model": "ar", "seed": i, "temperature": 0.5}
        bodies.append(body)
    with running(service) as url, client(url) as http:

        def ask(body):
            with client(url) as own:
                if body.get("stream"):
                    return stream(own, body)[-1]["done"]
                return ok(own.post("/generate", json=body))

        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(ask, bodies))
        found = counters(http)
        one_by_one = [ok(http.post("/generate", json={**body, "stream": False})) for body in bodies]
        stats = ok(http.get("/stats"))
    for body, one, other in zip(bodies, together, one_by_one, strict=True):
        texts = [choice["text"] for choice in one["choices"]]
        assert texts == [choice["text"] for choice in other["choices"]], body
    assert len({one["id"] for one in together + one_by_one}) == 128
    for model in ("tiny", "ar"):
        own = [one for one in together if one["model"] == model]
        tokens = sum(one["completion_tokens"] for one in own)
        assert found["mdm_tokens_total", model] == tokens
        assert found["mdm_prompt_tokens_total", model] == sum(one["prompt_tokens"] for one in own)
        forwards = 0
        for kind in ("denoise", "prefill", "decode"):
            counted = sum(one["stats"]["forwards"].get(kind, 0) for one in own)
            assert found.get(("mdm_forwards_total", *sorted((model, kind))), 0) == counted
            forwards += counted
        assert found["mdm_token_forwards_total", model] == sum(
            one["stats"]["token_forwards"] for one in own
        )
        assert found["mdm_tokens_per_forward", model] == pytest.approx(tokens / forwards)
        assert stats["counters"]["models"][model]["tokens"] == 2 * tokens
    assert found["mdm_requests_total", "/generate", "ok"] == 64
    assert found["mdm_request_seconds_count", "/generate"] == 64
    assert found["mdm_queue_seconds_count",] == 64
    assert found["mdm_queue_requests",] == found["mdm_rows_in_work",] == 0
    rows = sum(v for k, v in found.items() if k[0] == "mdm_batch_rows_sum" and "denoise" in k)
    passes = sum(v for k, v in found.items() if k[0] == "mdm_batch_rows_count" and "denoise" in k)
    assert rows / passes > 2  # they did share forwards
    assert stats["counters"]["requests"]["/generate"] == {"ok": 128}


# --- what ends early -----------------------------------------------------------------------------


def test_a_comparison_that_was_begun_is_finished(gated_with_teacher):
    http, gate, service = gated_with_teacher
    with ThreadPoolExecutor() as pool:
        future = pool.submit(http.post, "/compare", json={**PROMPT, "seed": 1})
        gate.wait()  # the student's half is in work
        service.engine.drain(60)
        gate.open()
        found = ok(future.result())
    assert found["teacher"]["choices"]
    counted = counters(http)
    assert counted["mdm_requests_total", "/compare", "ok"] == 1
    halves = found["student"]["stats"]["total_s"] + found["teacher"]["stats"]["total_s"]
    assert counted["mdm_request_seconds_sum", "/compare"] == pytest.approx(halves, abs=1e-3)
    assert counted["mdm_tokens_total", "tiny"] == found["student"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/generate", "/score", "/compare", "/v1/completions"])
def test_a_client_that_goes_while_its_text_is_encoded(gated_with_teacher, path, monkeypatch):
    """The tokenizer is one thread's at a time, and nothing is submitted for who is gone."""
    http, gate, service = gated_with_teacher
    gate.open()
    encoder = type(service.student.encoder)
    inside, most, begun, go_on = [], [], threading.Event(), threading.Event()
    real = encoder.encode

    def slow(self, text):
        if self is service.student.encoder:
            inside.append(text)
            most.append(len(inside))
            begun.set()
            assert go_on.wait(30)
            inside.pop()
        return real(self, text)

    monkeypatch.setattr(encoder, "encode", slow)
    body = {"/score": {"continuation": "a"}, "/v1/completions": {"model": "tiny", "prompt": "a"}}

    async def ask_and_go():
        async with httpx.AsyncClient(base_url=http.base_url, trust_env=False) as own:
            task = asyncio.create_task(own.post(path, json=body.get(path, PROMPT)))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(ask_and_go())
    with ThreadPoolExecutor() as pool:
        second = pool.submit(http.post, "/generate", json=PROMPT)
        third = pool.submit(http.post, "/generate", json={**PROMPT, "timeout_s": 0.05})
        time.sleep(0.3)
        go_on.set()
        ok(second.result())
        late = error(third.result(), 504)  # its time ran while it waited for the tokenizer
        assert late["code"] == "deadline_exceeded"
    assert max(most) == 1
    eventually(
        lambda: counters(http).get(("mdm_requests_total", path, "cancelled")) == 1, "counted"
    )
    assert counters(http)["mdm_queue_seconds_count",] == 1  # the second alone was worked on


def test_health_is_answered_while_a_forward_runs(gated):
    with ThreadPoolExecutor() as pool:
        future = pool.submit(gated.post, "/generate", json=PROMPT)
        gated.gate.wait()  # the model is in a forward, and stays there
        assert ok(gated.get("/health")) == {"status": "ok"}
        assert ok(gated.get("/ready")) == {"status": "ready"}
        assert ok(gated.get("/stats"))["counters"]["rows_in_work"] == 1
        gated.gate.open()
        ok(future.result())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_goes_frees_its_place(gated, streaming, waiting):
    engine, url = gated.service.engine, str(gated.base_url)
    body = {"prompt": "x", "gen_length": 200, "stream": streaming}

    async def ask_and_go():
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            task = asyncio.create_task(http.post("/generate", json=body))
            while not (engine.waiting if waiting else engine.rows_in_work):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with ThreadPoolExecutor() as pool:
        busy = (
            pool.submit(gated.post, "/generate", json={**PROMPT, "gen_length": 4})
            if waiting
            else None
        )
        if waiting:
            gated.gate.wait()
        asyncio.run(ask_and_go())
        job = engine._jobs[-1]
        eventually(lambda: job.cancelled, "the job is cancelled")
        if not waiting:
            gated.gate.wait()
            gated.gate.let()  # the forward it was in; there is no other
            eventually(lambda: not engine._jobs, "its place is free")
            assert gated.gate.seen == [1]
        gated.gate.open()
        if busy is not None:
            ok(busy.result())
            assert len(gated.gate.seen) == 4  # not one for the one that went
    eventually(
        lambda: counters(gated).get(("mdm_requests_total", "/generate", "cancelled")) == 1,
        "counted as cancelled",
    )
    ok(gated.post("/generate", json=PROMPT))


def test_a_stream_that_is_left_frees_its_place(gated):
    engine = gated.service.engine
    body = {"prompt": "x", "gen_length": 200, "stream": True, "denoising": True}
    with gated.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        assert "id" in next(lines)
        gated.gate.wait()
        gated.gate.let()
        assert "denoising" in next(line for line in lines if line.startswith("data: "))
        job = engine._jobs[0]  # once the stream is left it may be gone at once
    eventually(lambda: job.cancelled, "the job is cancelled")
    gated.gate.open()
    eventually(lambda: not engine._jobs, "its place is free")
    assert len(gated.gate.seen) <= 2


def test_a_full_queue_is_429_with_retry_after(gated):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(gated.post, "/generate", json=PROMPT)
        gated.gate.wait()
        second = pool.submit(gated.post, "/generate", json=PROMPT)
        eventually(lambda: gated.service.engine.waiting == 1, "one waits")
        for path, body in (("/generate", PROMPT), ("/score", {"continuation": "a"})):
            third = gated.post(path, json=body)
            assert error(third, 429)["code"] == "queue_full"
            assert 1 <= int(third.headers["retry-after"]) <= 60
        assert error(gated.post("/generate", json={**PROMPT, "stream": True}), 429)
        gated.gate.open()
        ok(first.result()), ok(second.result())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_deadline_is_504_or_the_last_event(gated, streaming):
    body = {"prompt": "x", "gen_length": 100, "timeout_s": 0.2, "stream": streaming}
    with ThreadPoolExecutor() as pool:
        future = pool.submit(gated.post, "/generate", json=body)
        gated.gate.wait()
        job = gated.service.engine._jobs[0]
        eventually(lambda: job.age > 0.25, "its time is over")
        gated.gate.open()
        response = future.result()
    if streaming:
        assert response.status_code == 200
        last = json.loads(response.text.strip().splitlines()[-1][6:])
        assert last["error"]["code"] == "deadline_exceeded"
    else:
        assert error(response, 504)["code"] == "deadline_exceeded"
    assert counters(gated)["mdm_requests_total", "/generate", "deadline_exceeded"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_that_fails_is_500_and_the_server_lives(streaming, caplog):
    service = tiny_service()
    real = service.student.model.rows

    def forward(*_, **__):
        raise ValueError("the prompt was import")

    with running(service) as url, client(url) as http:
        service.student.model.rows = forward
        response = http.post("/generate", json={**PROMPT, "stream": streaming})
        body = response.json() if not streaming else json.loads(response.text.split("data: ")[-1])
        assert body["error"]["code"] == "internal_error"
        assert "import" not in body["error"]["message"]
        service.student.model.rows = real
        ok(http.post("/generate", json=PROMPT))


def test_an_ill_engine_says_so():
    service = tiny_service()
    with running(service) as url, client(url) as http:
        service.engine.failures, service.engine.failed_at = 10**3, time.monotonic()
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
        ok(http.post("/generate", json=PROMPT))  # it works again
        assert ok(http.get("/health")) == {"status": "ok"}


def test_a_shutdown_finishes_what_is_in_work():
    service = tiny_service()
    gate = Gate(service)
    with ThreadPoolExecutor() as pool:
        with running(service) as url:
            with client(url) as http:
                future = pool.submit(
                    httpx.post, f"{url}/generate", json=PROMPT, trust_env=False, timeout=60
                )
                gate.wait()
                service.engine.drain(60)
                assert error(http.post("/generate", json=PROMPT), 503)["code"] == "shutting_down"
                assert http.get("/ready").status_code == 503
                assert http.get("/health").status_code == 200
            gate.open()
        assert ok(future.result())["completion_tokens"] > 0


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    ("/generate", {}, 400, "prompt", "give a prompt"),
    ("/generate", {"prompt": 5}, 400, "prompt", "valid string"),
    ("/generate", {**PROMPT, "span": 3}, 400, "span", "either prompt or"),
    ("/generate", {"prefix": "a"}, 400, "span", "span is missing"),
    ("/generate", {**HOLE, "gen_length": 4}, 400, "gen_length", "the length of a hole is span"),
    ("/generate", {**HOLE, "chat": True}, 400, "chat", "chat needs a prompt"),
    ("/generate", {**PROMPT, "gen_lenght": 4}, 400, "gen_lenght", "did you mean 'gen_length'"),
    ("/generate", {**PROMPT, "gen_length": 0}, 400, "gen_length", "greater than or equal to 1"),
    ("/generate", {**PROMPT, "gen_length": "8"}, 400, "gen_length", "valid integer"),
    ("/generate", {**PROMPT, "temperature": -1}, 400, "temperature", "greater than or equal"),
    ("/generate", {**PROMPT, "temperature": True}, 400, "temperature", "valid number"),
    ("/generate", {**PROMPT, "steps": 3, "block_length": 4}, 400, None, "a multiple of 2"),
    ("/generate", {**PROMPT, "steps": 4, "threshold": 0.5}, 400, None, "leave steps out"),
    ("/generate", {**PROMPT, "factor": 1, "threshold": 0.5}, 400, None, "threshold and factor are"),
    ("/generate", {**PROMPT, "factor": 1, "steps": 4}, 400, None, "factor decides how many"),
    ("/generate", {**PROMPT, "factor": 0}, 400, "factor", "greater than 0"),
    ("/generate", {**PROMPT, "entropy_bound": 1}, 400, None, "remasking entropy; got"),
    ("/generate", {**PROMPT, "entropy_bound": -0.1}, 400, "entropy_bound", "greater than or equal"),
    ("/generate", {**PROMPT, "cache": "prefx"}, 400, None, "did you mean 'prefix'"),
    ("/generate", {**PROMPT, "cache": None}, 400, "cache", "valid string"),
    ("/generate", {**PROMPT, "refresh": 2}, 400, None, "choose cache=prefix or cache=dual"),
    ("/generate", {**PROMPT, "cache": "dual", "refresh": 0}, 400, "refresh", "equal to 1"),
    ("/compare", {**PROMPT, "entropy_bound": 1}, 400, None, "remasking entropy; got"),
    ("/generate", {**PROMPT, "model": "ar", "factor": 1}, 400, "factor", "a setting of diffusion"),
    ("/generate", {**PROMPT, "model": "ar", "cache": "dual"}, 400, "cache", "of diffusion"),
    ("/generate", {**PROMPT, "remasking": "low_conf"}, 400, None, "did you mean 'low_confidence'"),
    ("/generate", {**PROMPT, "stop": ""}, 400, "stop.0", "at least 1 character"),
    ("/generate", {**PROMPT, "stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ("/generate", {**PROMPT, "n": 17}, 413, "n", "at most 16 texts"),
    ("/generate", {**PROMPT, "model": "tini"}, 404, "model", "did you mean 'tiny'"),
    ("/generate", {**PROMPT, "model": "ar", "steps": 4}, 400, "steps", "a setting of diffusion"),
    ("/generate", {**HOLE, "model": "ar"}, 400, "suffix", "sees the left side only"),
    ("/generate", {**PROMPT, "denoising": True}, 400, "denoising", "goes with stream"),
    ("/generate", {**PROMPT, "timeout_s": 10**5}, 413, "timeout_s", "at most 600 s"),
    ("/generate", {**PROMPT, "seed": -1}, 400, "seed", "greater than or equal to 0"),
    ("/generate", {"prompt": "x", "gen_length": 1023}, 400, None, "built for at most 1024"),
    ("/generate", {"prompt": "x" * 1100}, 400, None, "prompt (1101 tokens) and 64 new tokens"),
    ("/generate", {"prompt": "x" * 10**5}, 400, "prompt", "has 100000 characters"),
    ("/generate", {"prompt": "\ud800"}, 400, "prompt", "not valid Unicode"),
    ("/score", {}, 400, "continuation", "give a continuation"),
    ("/score", {"continuation": ""}, 400, None, "the answer is empty"),
    ("/score", {"text": "a", "context": "b"}, 400, "text", "give either text"),
    ("/score", {"text": ""}, 400, None, "the text is empty"),
    ("/score", {"text": "abc", "window": 2000}, 400, "window", "built for 1024"),
    ("/score", {"text": "a" * 200, "window": 4}, 413, "text", "takes 8576 forwards (67 windows)"),
    ("/score", {"text": "a" * 5000, "estimator": "order"}, 413, "text", "takes 5000 forwards"),
    ("/score", {"continuation": "a", "window": 20}, 400, "window", "window goes with text"),
    ("/score", {"continuation": "a", "estimator": "exakt"}, 400, None, "did you mean 'exact'"),
    (
        "/score",
        {"continuation": "abcdefgh" * 2, "estimator": "exact"},
        400,
        None,
        "raise mc_samples",
    ),
    ("/score", {"continuation": "a", "mc_samples": 10**5}, 413, "mc_samples", "at most 4096"),
    ("/score", {"continuation": "a", "model": "ar", "seed": 1}, 400, "seed", "is exact"),
    ("/compare", {**PROMPT, "n": 2}, 400, "n", "unknown field 'n'"),
    ("/compare", {}, 400, "prompt", "give a prompt"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "text"), BAD)
def test_bad_input_is_told_by_name(server, path, body, status, param, text):
    response = server.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    found = error(response, status)
    assert text in found["message"]
    assert found["param"] == param


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'"text"', "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
        (b"\xff\xfe", "application/json"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json"),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json"),
        (b'{"prompt": "a", "factor": 1e999}', "application/json"),
        (b'{"prompt": "a", "remasking": "entropy", "entropy_bound": 1e999}', "application/json"),
        (b'{"prompt": "a", "gen_length": 1' + b"0" * 5000 + b"}", "application/json"),
        (b"[" * 10**5 + b"]" * 10**5, "application/json"),
    ],
    ids=range(13),
)
def test_a_body_that_is_not_what_it_should_be(server, content, kind):
    response = server.post("/generate", content=content, headers={"content-type": kind})
    assert error(response, 400)["type"] == "invalid_request_error"


def test_the_memory_a_request_would_take_is_told():
    with running(tiny_service(workspace_mib=1)) as url, client(url) as http:
        response = http.post("/generate", json={"prompt": "x", "gen_length": 900})
        message = error(response, 413)["message"]
        assert "needs about" in message
        assert "may take 1 MiB" in message
        ok(http.post("/generate", json={"prompt": "x", "gen_length": 8}))
        text = {"text": "x" * 900}
        assert error(http.post("/score", json=text), 413)["code"] == "memory_limit"


def test_probes_may_ask_for_the_head(server):
    for path in ("/", "/health", "/ready"):
        response = server.head(path)
        assert (response.status_code, response.content) == (200, b"")


def test_unknown_paths_and_methods(server):
    assert error(server.get("/generat"), 404)["code"] == "not_found"
    response = server.get("/generate")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_sum_of_settings_reaches_the_sampler(server):
    """Every field of the sampler is one of the request's, by the same name, with the same default."""
    schema = ok(server.get("/openapi.json"))["components"]["schemas"]["GenerateRequest"][
        "properties"
    ]
    for name, default in vars(SamplerSettings()).items():
        if name != "compat":
            assert schema[name].get("default") == default, name


def test_bounds_are_those_of_the_sampler(server):
    schemas = ok(server.get("/openapi.json"))["components"]["schemas"]
    bounds = {
        "threshold": {"exclusiveMinimum": 0, "maximum": 1},
        "factor": {"exclusiveMinimum": 0},
        "entropy_bound": {"minimum": 0},
        "refresh": {"minimum": 1, "maximum": 2**20},
    }
    for request in ("GenerateRequest", "CompareRequest", "CompletionRequest", "ChatRequest"):
        for name, expected in bounds.items():
            number, null = schemas[request]["properties"][name]["anyOf"]
            assert null == {"type": "null"}
            assert {key: value for key, value in number.items() if key != "type"} == expected


@pytest.mark.parametrize(
    "how", [{"cache": "prefix"}, {"cache": "dual", "refresh": 3}, {"factor": 0.5}], ids=str
)
def test_a_request_gives_the_settings_of_the_library(how):
    for request in (
        GenerateRequest(**PROMPT, **how),
        CompareRequest(**PROMPT, **how),
        CompletionRequest(model="tiny", prompt="a", **how),
        ChatRequest(model="tiny", messages=[{"role": "user", "content": "a"}], **how),
    ):
        assert request.sampler() == SamplerSettings(**how)


def test_the_examples_of_the_description_work(server):
    description = ok(server.get("/openapi.json"))
    tried = 0
    for path, methods in description["paths"].items():
        if "post" not in methods:
            continue
        reference = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = description["components"]["schemas"][reference.rsplit("/", 1)[1]]
        assert schema["examples"], path
        for example in schema["examples"]:
            if "model" in example:
                example = {**example, "model": "tiny"}
            response = server.post(path, json=example)
            assert response.status_code == 200, (path, response.text)
            tried += 1
    assert tried >= 4


def test_nothing_of_a_request_is_logged_unless_asked(caplog):
    caplog.set_level("INFO")
    for asked in (False, True):
        caplog.clear()
        service = tiny_service()
        service.log_requests = asked
        with running(service) as url, client(url) as http:
            text = ok(http.post("/generate", json={"prompt": "hidden words", "gen_length": 4}))
            http.post("/generate", json={"prompt": "hidden words", "gen_length": 10**4})
            http.post("/generate", json={"prompt": 5, "hidden words": 4})
        assert ("hidden words" in caplog.text) is asked
        assert text["id"] in caplog.text
        assert "4 forwards" in caplog.text
