"""A server of a model with blocks: the same answers as the library, and nothing kept too long.

Bytes are token ids; start 256, end 257, pad 258, mask 259. The student's blocks have 4 tokens.
"""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from test_engine import GREEDY, Client, alone, ask, check_same, hole, plan
from test_memory import peak_allocation
from tiny import tiny_model
from tiny_run import ar_folder, tiny_denoiser
from tiny_serve import (
    Gate,
    before_forwards,
    byte_student,
    eventually,
    running,
    tiny_service,
)
from tiny_serve import client as http_client

from mdm import generate as library
from mdm import likelihood
from mdm.attention import BLOCK_ATTENTIONS
from mdm.canvas import NOTHING_READ, SamplerSettings
from mdm.checkpoint import save_denoiser
from mdm.convert import make_bidirectional
from mdm.denoiser import CHUNK_BYTES, Denoiser
from mdm.generate import Hole, Request, open_filling
from mdm.likelihood import LikelihoodSettings, Pair
from mdm.sampler import take_step
from mdm.serve.errors import ServeError
from mdm.serve.jobs import Committed, JobDone, Scored
from mdm.serve.limits import Limits
from mdm.serve.memory import MIB, footprint
from mdm.serve.models import hold
from mdm.serve.run import open_service
from mdm.serve.telemetry import Telemetry
from mdm.serve.units import fill_unit, score_unit

START, END, MASK = 256, 257, 259
BLOCK = 4
MIXED = [
    GREEDY,
    replace(GREEDY, steps=5),
    replace(GREEDY, temperature=1.0),
    replace(GREEDY, block_length=2, temperature=0.7, top_p=0.8),
    replace(GREEDY, cfg_scale=1.5),
    replace(GREEDY, cfg_scale=0.5, temperature=1.0, steps=7),
    replace(GREEDY, remasking="entropy", steps=6),
    replace(GREEDY, threshold=0.2),
    SamplerSettings(temperature=2.0),
]


def block_student(**more):
    return byte_student(block_size=BLOCK, **more)


@pytest.fixture
def service():
    made = tiny_service(student=block_student())
    made.engine.start()
    yield made
    made.engine.stop()


def shapes_of(service):
    """(rows, tokens read) of every forward from now on."""
    seen = []
    before_forwards(service, lambda x_BQ: seen.append(tuple(x_BQ.shape)))
    return seen


# --- the engine ----------------------------------------------------------------------------------


def tokens_read(one, committed):
    """Positions of the forwards of a row, from what they decided: [kept, end of the block)."""
    total, kept = 0, 0
    for event in committed:
        block = (len(one.before) + event.positions[0]) // BLOCK
        total += min(one.total, (block + 1) * BLOCK) - kept
        kept = block * BLOCK
    return total


def test_mixed_requests_at_different_blocks_are_what_they_are_alone(service):
    requests = [
        (hole([(7 * i + j) % 251 for j in range(i % 11)], 5 + i % 9, [65, 66, 67][: i % 4]),
         MIXED[i % len(MIXED)], 1 + i % 2, i)
        for i in range(36)
    ]  # fmt: skip
    clients = [ask(service, one, how, n=n, seed=seed) for one, how, n, seed in requests]
    texts = [client.texts() for client in clients]
    for request, client, found in zip(requests, clients, texts, strict=True):
        one, how, n, _ = request
        check_same(found, alone(block_student(), *request))
        usage = client.events[-1].usage
        assert sum(usage.forwards.values()) == sum(text.nfe for text in found)
        assert usage.forwards["prefill"] == n * (2 if how.cfg_scale else 1)
        events = [event for event in client.events if isinstance(event, Committed)]
        read = sum(tokens_read(one, [e for e in events if e.row == row]) for row in range(n))
        assert usage.token_forwards == read * (2 if how.cfg_scale else 1)
        assert usage.token_forwards < one.total * sum(text.nfe for text in found)
    assert len({tuple(text.token_ids) for found in texts for text in found}) > 30  # none mixed up
    assert max(client.job.usage.batch_rows / client.job.usage.passes for client in clients) > 4


def test_a_late_request_shares_forwards_with_one_at_a_later_block(service):
    gate = Gate(service)
    shapes = shapes_of(service)
    first = ask(service, hole([1, 2], 13), GREEDY)
    gate.wait()
    gate.let(5)  # its first, short block and the beginning of the next
    for _ in range(5):
        gate.wait()
    late = ask(service, hole([9] * 6, 8), GREEDY)
    gate.open()
    check_same(first.texts(), alone(block_student(), hole([1, 2], 13), GREEDY, 1, 0))
    check_same(late.texts(), alone(block_student(), hole([9] * 6, 8), GREEDY, 1, 0))
    assert gate.seen == [1] * 6 + [2] * 7 + [1]
    assert shapes[:3] == [(1, 4), (1, 8), (1, 4)]  # the second stores the first block
    assert shapes[6] == (2, 8)  # the prompt and the hole's first block; a block in its middle


def test_the_prompt_of_a_long_one_is_not_padding_for_others():
    service = tiny_service(student=block_student())
    shapes = shapes_of(service)
    short = [ask(service, hole([i], 7), GREEDY) for i in range(3)]
    long = ask(service, hole([1] * 300, 7), GREEDY)
    service.engine.start()
    for one in (*short, long):
        one.texts()
    assert shapes[:2] == [(1, 304), (3, 4)]
    assert all(rows == 4 for rows, _ in shapes[2:7])
    service.engine.stop()


def test_rows_are_put_together_by_what_they_read_now():
    """One far on, one at its prompt, one at its start: the first and the last go together."""
    service = tiny_service(student=block_student())
    engine = service.engine
    for before in (300, 100, 2):
        ask(service, hole([1] * before, 40), GREEDY)
    engine._admit()
    rows = [(job, unit) for job in engine._jobs for unit in job.running]
    far, prompt, start = (unit for _, unit in rows)
    take_step(service.student.model, {0: far.filling.canvas})
    found = [[unit for _, unit in group] for group in engine._groups(rows)]
    assert found == [[prompt], [far, start]]
    assert [(unit.kept, unit.read) for unit in found[1]] == [(300, 4), (0, 4)]
    assert engine._step_bytes(found[1]) == engine.footprint.step_bytes(
        2, 4, 8, GREEDY, kept=300, last=max(far.last, start.last)
    )
    service.engine.start()
    service.engine.stop()


def test_no_forward_reads_more_tokens_than_allowed():
    service = tiny_service(student=block_student(), batch_tokens=16)
    shapes = shapes_of(service)
    clients = [ask(service, hole([i] * 2, 9), GREEDY) for i in range(6)]
    service.engine.start()
    for one in clients:
        one.texts()
    assert max(rows * read for rows, read in shapes) == 16
    assert (4, 4) in shapes
    assert (2, 8) in shapes
    service.engine.stop()


# --- what is kept --------------------------------------------------------------------------------


def kept_tensors(unit):
    """Weak references to the keys that a row keeps."""
    return [weakref.ref(keys) for prefix in unit.filling.canvas.prefixes
            for layer in prefix.layers for keys in layer]  # fmt: skip


def begun(service, how=GREEDY):
    """A request in work, its unit and what that keeps; its next forward waits."""
    gate = Gate(service)
    planned = plan(service, hole([1] * 9, 40), how)
    client = Client(service, planned.units)
    gate.let(6)
    for _ in range(7):
        gate.wait()
    (unit,) = planned.units
    kept = kept_tensors(unit)
    assert unit.kept == 12
    assert len(kept) == (8 if how.cfg_scale else 4)
    return client, unit, kept, gate


def check_freed(unit, kept):
    gc.collect()
    assert unit.filling.canvas.prefixes is NOTHING_READ
    assert [one() for one in kept if one() is not None] == []


@pytest.mark.parametrize("how", [GREEDY, replace(GREEDY, cfg_scale=1.0)], ids=["", "guided"])
@pytest.mark.parametrize("end", ["cancel", "finish", "deadline", "failure", "stop"])
def test_what_a_row_keeps_is_freed_when_it_ends(service, end, how):
    client, unit, kept, gate = begun(service, how)
    if end == "cancel":
        client.job.cancel()
    if end == "deadline":
        client.job.timeout_s = 0.0
    if end == "stop":
        service.engine.drain(0)
    if end == "failure":

        def fail(_):
            raise ValueError("broken")

        before_forwards(service, fail)
    gate.open()
    assert isinstance(client.wait(), JobDone) == (end == "finish")
    ask(service, hole([2], 1)) if end in ("cancel", "deadline") else None
    eventually(lambda: not service.engine.rows_in_work, "nothing is in work")
    check_freed(unit, kept)


def test_a_stop_string_frees_it_too(service):
    (text,) = alone(block_student(), hole([1], 12), GREEDY, 1, 0)
    assert len(text.text) > 3
    one = hole([1], 12, stop=(text.text[:2],))
    planned = plan(service, one)
    client = Client(service, planned.units)
    assert client.texts()[0].finish_reason == "stop"
    assert client.forwards < 12
    assert planned.units[0].filling.canvas.prefixes is NOTHING_READ


def test_rows_that_wait_for_memory_start_when_others_end():
    service = tiny_service(student=block_student())
    one = hole([1] * 20, 30)
    unit = plan(service, one, GREEDY).units[0]
    assert unit.held_bytes > 0
    service.engine.workspace = service.workspace = 2 * unit.held_bytes + unit.step_bytes
    most = []
    before_forwards(service, lambda _: most.append(service.engine.rows_in_work))
    clients = [ask(service, hole([i] * 20, 30), GREEDY) for i in range(5)]
    service.engine.start()
    for client in clients:
        client.texts()
    assert max(most) == 2
    service.engine.stop()


def test_what_cannot_fit_is_refused_with_the_cache_counted(service):
    unit = plan(service, hole([1] * 20, 30), GREEDY).units[0]
    service.workspace = unit.held_bytes + unit.step_bytes
    assert plan(service, hole([1] * 20, 30), GREEDY).predicted == service.workspace
    service.workspace -= 1
    with pytest.raises(ServeError, match="51 tokens with 30 new ones"):
        plan(service, hole([1] * 20, 30), GREEDY)


# --- memory runs out -----------------------------------------------------------------------------


def too_many_rows(limit, tried):
    def call(x_BQ):
        tried.append(len(x_BQ))
        if len(x_BQ) > limit:
            raise MemoryError("can't allocate memory")

    return call


def test_out_of_memory_together_is_tried_again_alone(service):
    tried = []
    before_forwards(service, too_many_rows(1, tried))
    how = replace(GREEDY, temperature=1.0)
    clients = [ask(service, hole([i] * (i + 1), 11), how, seed=i) for i in range(4)]
    for i, client in enumerate(clients):
        check_same(client.texts(), alone(block_student(), hole([i] * (i + 1), 11), how, 1, i))
    assert max(tried) > 1
    assert service.engine.illness is None


def test_in_the_middle_of_a_forward_too(service):
    """After the first layer has been put into the cache."""
    layer = service.student.model.model.base_model.layers[1]
    failed = []

    def fail(_, given):
        if len(given[0]) > 1:
            failed.append(len(given[0]))
            raise torch.OutOfMemoryError("out of memory")

    layer.register_forward_pre_hook(fail)
    gate = Gate(service)
    clients = [ask(service, hole([i] * 5, 9), GREEDY, seed=i) for i in range(3)]
    gate.open()
    for i, client in enumerate(clients):
        check_same(client.texts(), alone(block_student(), hole([i] * 5, 9), GREEDY, 1, i))
    assert failed


def test_forwards_are_planned_half_as_large_for_a_while():
    """What rows keep is there all the time, and not counted against a smaller forward."""
    service = tiny_service(student=block_student())
    engine = service.engine
    for i in range(8):
        ask(service, hole([i] * 60, 200), GREEDY)
    engine._admit()
    rows = [(job, unit) for job in engine._jobs for unit in job.running]
    (group,) = engine._groups(rows)
    assert len(group) == 8
    engine._recover(MemoryError("can't allocate memory"), group)
    assert [len(group) for group in engine._groups(rows)] == [4, 4]
    service.engine.start()
    service.engine.stop()


# --- predictions ---------------------------------------------------------------------------------


def big_student(
    family="llama", dtype=torch.float32, attention="block", block_size=8, layers=3, vocab=2000
):
    """Large enough that tensors outweigh the allocator's noise."""
    model = tiny_model(family, vocab, layers=layers, hidden=64)
    make_bidirectional(model)
    return Denoiser(
        model.to(dtype),
        byte_student().vocab,
        shift=True,
        block_size=block_size,
        attention=attention,
    ).eval()


def check_steps(student, prompts, settings, steps):
    """Every forward takes what was predicted, whatever it reads and keeps."""
    held = hold(student, name="big", source="-")
    units = [
        fill_unit(held, student, i, Hole((START, *[65] * n), 40, key=(0, i)), settings)
        for i, n in enumerate(prompts)
    ]
    canvases = {i: unit.filling.canvas for i, unit in enumerate(units)}
    sizes = held.footprint
    reads, peaks, most = [], [], []
    for _ in range(steps):
        reads.append([(unit.kept, unit.read) for unit in units])
        outputs = [int(canvas.open_L[canvas.blocks[0]].sum()) for canvas in canvases.values()]
        assert all(n <= unit.outputs for n, unit in zip(outputs, units, strict=True))
        predicted = sizes.step_bytes(
            sum(unit.rows for unit in units),
            max(unit.read for unit in units),
            sum(outputs),
            settings,
            kept=max(unit.kept for unit in units),
            last=max(unit.last for unit in units),
        )
        peak = peak_allocation(lambda: take_step(student, canvases))
        assert peak <= predicted, (reads[-1], peak / MIB, predicted / MIB)
        peaks.append(peak)
        most.append(predicted)
    # A new buffer is counted in every step, but made in few.
    assert max(most) <= 2.5 * max(peaks), (max(peaks) / MIB, max(most) / MIB)
    return reads


@pytest.mark.parametrize("prompts", [[300], [300, 290, 277, 10], [13, 12, 5]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0}, {"cfg_scale": 1.0}, {"remasking": "entropy"}],
    ids=str,
)
def test_a_forward_takes_what_was_predicted(prompts, settings):
    how = SamplerSettings(stop_at_eos=False, steps=12, **settings)
    reads = check_steps(big_student(), prompts, how, 5)
    prompt = prompts[0]
    first = (prompt + 1) // 8 * 8 + 8
    assert reads[0][0] == (0, first)
    assert {read for step in reads[1:] for _, read in step} == {8, 16}


@pytest.mark.parametrize("prompts", [[300], [300, 298]], ids=str)
def test_what_many_layers_keep_is_most_of_it(prompts):
    """A buffer for them is made by the first step."""
    how = SamplerSettings(stop_at_eos=False, steps=12)
    check_steps(big_student(layers=10, vocab=260), prompts, how, 5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_of_any_family_too(family, dtype, attention):
    student = big_student(family, dtype, attention, block_size=16)
    how = SamplerSettings(stop_at_eos=False, steps=8)
    check_steps(student, [200, 190, 181], how, 5)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.0}], ids=str)
@pytest.mark.parametrize(("prompt", "length"), [(300, 100), (3, 400), (300, 2)])
def test_a_request_alone_never_takes_more_than_predicted(prompt, length, settings):
    """Its largest forward and what it keeps, over its whole life."""
    student = big_student()
    served = hold(student, name="big", source="-")
    one = Hole((START, *[65] * prompt), length, (66,) * 20)
    how = SamplerSettings(stop_at_eos=False, threshold=1e-9, **settings)
    unit = fill_unit(served, student, 0, one, how)
    canvas, most = unit.filling.canvas, 0

    def life():
        nonlocal most
        while not canvas.finished:
            take_step(student, {0: canvas})
            most = max(most, held_bytes(canvas))

    peak = peak_allocation(life)
    assert peak <= unit.step_bytes + unit.held_bytes <= 2.5 * peak
    if length > 2:
        assert most <= unit.held_bytes <= 1.2 * most
    assert len(canvas.ids_L) - 20 <= prompt + 1 + length  # the text after the hole is not read


def held_bytes(canvas):
    return sum(
        part.numel() * part.element_size()
        for prefix in canvas.prefixes
        for layer in prefix.layers
        for part in layer
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "settings"),
    [
        (300, 3, {}),
        (303, 7, {}),
        (20, 200, {}),
        (300, 30, {"estimator": "stratified", "mc_samples": 64}),
        (3, 5, {"batch_tokens": 64}),
    ],
)
def test_a_likelihood_takes_what_was_predicted(prompt, answer, settings):
    student = big_student(vocab=260)  # logits are a chunk of its own, and small here
    pairs = [Pair((START, *[65] * prompt), tuple(range(answer)), "a"), Pair((START,), (65,), "b")]
    held = hold(student, name="big", source="-")
    how = LikelihoodSettings(**{"batch_tokens": 1024, **settings})
    unit = score_unit(held, pairs, how, 4096 * MIB, Telemetry(student.device))
    peak = peak_allocation(lambda: likelihood.log_likelihood(student, pairs, how))
    predicted = unit.step_bytes - 4 * CHUNK_BYTES + unit.held_bytes
    assert peak <= predicted <= 2.5 * peak, (peak / MIB, predicted / MIB)


def test_a_likelihood_takes_fewer_rows_where_memory_is_small():
    """127 masks of a short answer after a long prompt would hold the prompt's keys 127 times."""
    service = tiny_service(student=big_student(block_size=8, layers=6), max_rows=2)
    pair = Pair((START, *[65] * 503), tuple(range(7)), "a")
    how = LikelihoodSettings(batch_tokens=2**17)
    shapes = shapes_of(service)
    found = []
    for workspace in (4096 * MIB, 300 * MIB):
        unit = score_unit(service.student, [pair], how, workspace, service.telemetry)
        assert unit.step_bytes + unit.held_bytes <= workspace
        client = Client(service, [unit], kind="score")
        if not service.engine._thread.is_alive():
            service.engine.start()
        client.wait()
        found += [event.likelihood for event in client.events if isinstance(event, Scored)]
        shapes.append("")
    cut = shapes.index("")
    assert shapes[:cut] == [(1, 511), (127, 7)]
    assert shapes[cut + 1] == (1, 511)
    assert max(rows for rows, _ in shapes[cut + 2 : -1]) < 64
    assert found[0].value == pytest.approx(found[1].value, abs=1e-4)
    with pytest.raises(ServeError, match="scoring 511 tokens"):
        score_unit(service.student, [pair], how, 257 * MIB, service.telemetry)
    service.engine.stop()


# --- likelihoods ---------------------------------------------------------------------------------


def test_scores_are_those_of_the_library_among_others(service):
    pairs = [Pair((START, 65, 66), (67, 68, 69, 70), "a"), Pair((START, 1), (5, 9) * 6, "b")]
    settings = [
        LikelihoodSettings(),
        LikelihoodSettings(estimator="stratified", mc_samples=9, batch_tokens=16),
    ]
    busy = [ask(service, hole([3], 20), seed=seed) for seed in range(3)]
    for how in settings:
        unit = score_unit(service.student, pairs, how, service.workspace, service.telemetry)
        client = Client(service, [unit], kind="score")
        assert isinstance(client.wait(), JobDone), client.events
        found = {e.index: e.likelihood for e in client.events if isinstance(e, Scored)}
        expected = likelihood.log_likelihood(block_student(), pairs, how)
        for index, wanted in enumerate(expected):
            assert found[index].value == pytest.approx(wanted.value, abs=1e-4)
            assert found[index].nfe == wanted.nfe
        usage = client.events[-1].usage
        assert usage.forwards == {"score": sum(one.nfe for one in expected)}
        # The clean tokens once, and from the block where the answer begins for every mask.
        assert usage.token_forwards == (7 + 7 * expected[0].nfe) + (14 + 14 * expected[1].nfe)
    for client in busy:
        client.texts()


def test_a_likelihood_takes_its_turns_by_forwards(service):
    """One pair of very many masks: others go on between its forwards."""
    pairs = [Pair((START,), tuple(range(64)), "a")]
    how = LikelihoodSettings(estimator="independent", mc_samples=2000, batch_tokens=64)
    unit = score_unit(service.student, pairs, how, service.workspace, service.telemetry)
    score = Client(service, [unit], kind="score")
    eventually(lambda: score.job.usage.passes > 1, "it is in work")
    ask(service, hole([1], 2)).texts()
    assert not score.ended.is_set()
    score.job.cancel()
    assert score.error().code == "cancelled"
    assert unit.iterator is None


def test_the_rows_of_every_forward_are_told():
    how = LikelihoodSettings(mc_samples=31, batch_tokens=40)
    pair = Pair((START, 65, 66), (67, 68, 69, 70), "a")  # 1 + 3 tokens: 2³ - 1 masks of 7
    done = []
    rows = list(
        likelihood.scoring(block_student(), [pair, pair], how, lambda *found: done.append(found))
    )
    assert rows == [1, 2, 2, 2, 1] * 2  # 7 clean and 7 noisy tokens a row
    assert [index for index, _ in done] == [0, 1]


# --- over HTTP -----------------------------------------------------------------------------------

HOLE = {"prefix": "def f(x):\n    y = ", "suffix": "\n    return y", "span": 6}
PROMPT = {"prompt": "import ", "gen_length": 9}


@pytest.fixture(scope="module")
def server():
    made = tiny_service(teacher=True, student=block_student())
    with running(made) as url, http_client(url) as http:
        http.service = made
        yield http


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def expected(request, settings, seed=0):
    asked = Request(
        request.get("prompt", request.get("prefix")),
        request.get("suffix"),
        request.get("gen_length", request.get("span")),
    )
    return library.generate(block_student(), [asked], SamplerSettings(**settings), seed=seed)[0]


@pytest.mark.parametrize("request_", [PROMPT, HOLE], ids=["continue", "infill"])
@pytest.mark.parametrize("settings", [{}, {"steps": 4, "temperature": 1.0}, {"block_length": 2}])
def test_a_text_is_that_of_the_library_streamed_or_not(server, request_, settings):
    body = {**request_, **settings, "seed": 3}
    wanted = expected(request_, settings, 3)
    found = ok(server.post("/generate", json=body))
    assert found["choices"][0]["text"] == wanted.text
    assert sum(found["stats"]["forwards"].values()) == wanted.nfe
    assert found["stats"]["memory"]["predicted_bytes"] > 0
    text, decided, done = "", {}, None
    with server.stream("POST", "/generate", json={**body, "stream": True, "denoising": True}) as r:
        for line in r.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            text += event.get("text", "")
            step = event.get("denoising", {})
            decided |= dict(zip(step.get("positions", ()), step.get("token_ids", ()), strict=True))
            done = event.get("done", done)
    assert text == done["choices"][0]["text"] == wanted.text
    assert [decided[place] for place in sorted(decided)] == wanted.token_ids[: len(decided)]
    replay = ok(server.get(f"/generate/{done['id']}/trajectory"))
    assert sum(len(step["positions"]) for step in replay["rows"][0]["steps"]) == len(decided)


def test_a_score_is_that_of_the_library(server):
    found = ok(server.post("/score", json={"context": "def f", "continuation": "(x): pass"}))
    pair = likelihood.pair_of_texts(block_student().vocab, "def f", "(x): pass")
    (wanted,) = likelihood.log_likelihood(block_student(), [pair], LikelihoodSettings())
    assert found["log_likelihood"] == pytest.approx(wanted.value, rel=1e-5)
    assert (found["estimator"], found["std_err"], found["is_bound"]) == ("exact", 0.0, True)
    assert found["stats"]["memory"]["predicted_bytes"] > 4 * CHUNK_BYTES
    whole = ok(server.post("/score", json={"text": "import os\n" * 3, "window": 16}))
    assert whole["num_tokens"] == 30


def test_compare_and_openai(server):
    both = ok(server.post("/compare", json={**HOLE, "seed": 1}))
    assert both["student"]["choices"][0]["text"] == expected(HOLE, {}, 1).text
    assert both["teacher"]["left_only"]
    body = {"model": "tiny", "prompt": "import ", "max_tokens": 9, "seed": 0}
    answer = ok(server.post("/v1/completions", json=body))
    assert answer["choices"][0]["text"] == expected(PROMPT, {}).text
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
    answer = ok(server.post("/v1/chat/completions", json=body))
    assert answer["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {**PROMPT, "block_length": 3}, "divisor of 4"),
        ("/generate", {**PROMPT, "steps": 1}, "blocks to denoise"),
        ("/score", {"continuation": "a", "estimator": "order"}, "full-canvas model"),
        ("/score", {"continuation": "a", "cfg_scale": 1.0}, "guidance"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused_at_once(server, path, body, message):
    before = server.service.student.model.model.base_model
    called = []
    handle = before.register_forward_pre_hook(lambda *_: called.append(1))
    response = server.post(path, json=body)
    handle.remove()
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert not called


@pytest.mark.parametrize("values", [{"estimator": "order"}, {"cfg_scale": 1.0}], ids=str)
def test_a_likelihood_that_means_nothing_does_not_wait_in_the_queue(service, values):
    how = LikelihoodSettings(**values)
    pair = Pair((START,), (65,), "a")
    with pytest.raises(ServeError) as caught:
        score_unit(service.student, [pair], how, service.workspace, service.telemetry)
    assert caught.value.status == 400


@pytest.mark.parametrize(("span", "unseen"), [(2, False), (3, True), (4, False), (7, True)])
def test_a_suffix_behind_the_last_block_is_said_to_be_unseen(server, span, unseen):
    """Start and 4 bytes: a hole of 3 ends with the second block."""
    found = ok(server.post("/generate", json={"prefix": "abcd", "suffix": ")", "span": span}))
    assert found["left_only"] is unseen
    alone = ok(server.post("/generate", json={"prefix": "abcd", "suffix": "", "span": span}))
    assert not alone["left_only"]


def test_stats_tell_the_size_of_blocks(server):
    models = ok(server.get("/stats"))["models"]
    assert (models["tiny"]["block_size"], models["ar"]["block_size"]) == (BLOCK, None)


def test_a_folder_with_a_block_model_can_be_served(tmp_path):
    student = tiny_denoiser(ar_folder(tmp_path / "ar"))
    student.block_size, student.attention = 4, "context_causal"
    save_denoiser(student, tmp_path / "blocks")
    found = open_service(str(tmp_path / "blocks"), None, Limits(workspace_mib=64)).student
    assert (found.block_size, found.model.attention) == (4, "context_causal")


def test_a_full_canvas_model_keeps_nothing():
    student = byte_student()
    unit = fill_unit(hold(student, name="a", source="-"), student, 0, hole([1], 5), GREEDY)
    assert (unit.kept, unit.read, unit.held_bytes) == (0, 7, 0)
    sizes = footprint(student.model)
    assert unit.step_bytes == sizes.step_bytes(1, 7, 5, GREEDY)
    assert open_filling(student, hole([1], 5), GREEDY).canvas.prefixes is NOTHING_READ
