"""The engine: results that do not depend on neighbours, and places that are given and freed by forwards.

Bytes are token ids; start 256, end 257, pad 258, mask 259.
"""

import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_serve import Gate, before_forwards, byte_student, eventually, tiny_service

from mdm import autoregressive, likelihood
from mdm.autoregressive import DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.generate import Hole, fill
from mdm.likelihood import LikelihoodSettings, Pair
from mdm.serve import intake
from mdm.serve.engine import ILL_AFTER, ILL_FOR_S
from mdm.serve.errors import ServeError
from mdm.serve.jobs import Committed, Failed, Job, JobDone, RowDone, Scored
from mdm.serve.units import score_unit

START, END, MASK = 256, 257, 259


class Client:
    """Submits a job and keeps what it hears."""

    def __init__(self, service, units, *, model="tiny", kind="generate", timeout_s=60.0):
        self.events = []
        self.ended = threading.Event()
        self.job = Job.of(kind, model, units, self.listen, timeout_s)
        self.engine = service.engine
        self.engine.submit(self.job)

    def listen(self, event):
        self.events.append(event)
        if isinstance(event, (JobDone, Failed)):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60), "the job did not end"
        return self.events[-1]

    def texts(self):
        assert isinstance(self.wait(), JobDone), self.events[-1]
        rows = [event for event in self.events if isinstance(event, RowDone)]
        return [one.generation for one in sorted(rows, key=lambda one: one.row)]

    def error(self):
        last = self.wait()
        assert isinstance(last, Failed), last
        return last.error

    @property
    def forwards(self):
        return sum(isinstance(event, Committed) for event in self.events)


def plan(service, hole, settings=None, *, n=1, seed=0, served=None):
    return intake.plan(
        served or service.student,
        [hole],
        settings or SamplerSettings(),
        service.limits,
        service.workspace,
        n=n,
        seed=seed,
        telemetry=service.telemetry,
    )


def ask(service, hole, settings=None, *, timeout_s=60.0, **more):
    planned = plan(service, hole, settings, **more)
    return Client(service, planned.units, model=planned.served.name, timeout_s=timeout_s)


def hole(before, length, after=(), **more):
    return Hole((START, *before), length, tuple(after), **more)


@pytest.fixture
def service():
    made = tiny_service()
    made.engine.start()
    yield made
    made.engine.stop()


@pytest.fixture
def small():
    """One place, and one more request may wait."""
    made = tiny_service(max_rows=1, max_queue=1)
    made.engine.start()
    yield made
    made.engine.stop()


GREEDY = SamplerSettings(stop_at_eos=False)
MIXED = [
    GREEDY,
    replace(GREEDY, steps=4),
    replace(GREEDY, temperature=1.0),
    replace(GREEDY, temperature=0.7, top_p=0.8, steps=8),
    replace(GREEDY, cfg_scale=1.5),
    replace(GREEDY, cfg_scale=0.5, temperature=1.0, block_length=4),
    replace(GREEDY, remasking="random", temperature=1.0),
    replace(GREEDY, remasking="entropy", block_length=4, steps=4),
    replace(GREEDY, threshold=0.2),
    replace(GREEDY, threshold=0.1, remasking="margin", temperature=1.3),
    SamplerSettings(temperature=2.0),
    SamplerSettings(eos_last=True, temperature=1.5),
]


def mixed_requests(count):
    """(hole, settings, n, seed) of unlike lengths and settings."""
    found = []
    for i in range(count):
        settings = MIXED[i % len(MIXED)]
        before = [(7 * i + j) % 251 for j in range(1 + 5 * (i % 9))]
        after = [65, 66, 67][: i % 4]
        length = 8 if settings.steps or settings.block_length else 3 + i % 11
        found.append((hole(before, length, after), settings, 1 + i % 3, 100 + i))
    return found


def alone(denoiser, one, settings, n, seed):
    holes = [replace(one, key=(seed, row)) for row in range(n)]
    return [fill(denoiser, [single], settings)[0] for single in holes]


def check_same(found, expected):
    """The same in all that is decided; the mean confidence is rounded."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, confidence=0.0) == replace(other, confidence=0.0)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4, nan_ok=True)


def test_64_mixed_requests_are_what_they_are_alone(service):
    requests = mixed_requests(64)
    clients = [ask(service, one, how, n=n, seed=seed) for one, how, n, seed in requests]
    found = [client.texts() for client in clients]
    for request, texts in zip(requests, found, strict=True):
        check_same(texts, alone(byte_student(), *request))
    assert len({tuple(text.token_ids) for texts in found for text in texts}) > 100  # none mixed up
    for (one, how, n, _), client, texts in zip(requests, clients, found, strict=True):
        usage = client.events[-1].usage
        assert usage.forwards == {"denoise": sum(text.nfe for text in texts)}
        assert usage.token_forwards == one.total * sum(text.nfe for text in texts)
        passes = 2 if how.cfg_scale else 1
        assert client.forwards * passes == sum(text.nfe for text in texts)
        for row in range(n):
            told = [event for event in client.events if getattr(event, "row", None) == row]
            committed = [event for event in told if isinstance(event, Committed)]
            assert [event.forward for event in committed] == list(range(len(committed)))
            known = {
                place: token
                for event in committed
                for place, token in zip(event.positions, event.tokens, strict=True)
            }
            text = texts[row]
            assert all(text.token_ids[place] == token for place, token in known.items())
            if how.stop_at_eos is False:
                assert known.keys() == set(range(one.length))
            assert all(
                0 <= c <= 1 or how.remasking == "entropy" for e in committed for c in e.confidence
            )


def test_scores_are_those_of_the_library_among_others(service):
    pairs = [Pair((START, 65, 66), (67, 68, 69, 70), "a"), Pair((START, 1), (5, 9) * 6, "b")]
    settings = [
        LikelihoodSettings(),
        LikelihoodSettings(estimator="stratified", mc_samples=32, cfg_scale=0.5),
        LikelihoodSettings(estimator="order"),
        LikelihoodSettings(estimator="llada", mc_samples=16, seed=4),
    ]
    busy = [ask(service, hole([3], 20), seed=seed) for seed in range(3)]
    clients = [
        Client(
            service,
            [score_unit(service.student, pairs, one, service.workspace, service.telemetry)],
            kind="score",
        )
        for one in settings
    ]
    for one, client in zip(settings, clients, strict=True):
        assert isinstance(client.wait(), JobDone), client.events
        found = {e.index: e.likelihood for e in client.events if isinstance(e, Scored)}
        expected = likelihood.log_likelihood(byte_student(), pairs, one)
        for index, wanted in enumerate(expected):
            assert found[index].value == pytest.approx(wanted.value, abs=1e-4)
            assert found[index].std_err == pytest.approx(wanted.std_err, abs=1e-4)
            assert found[index].nfe == wanted.nfe
        assert client.events[-1].usage.forwards == {"score": sum(one.nfe for one in expected)}
    assert len({client.texts()[0].text for client in busy}) == 1  # greedy, so the seed is no matter


def test_a_teacher_writes_what_the_library_writes():
    service = tiny_service(teacher=True)
    service.engine.start()
    teacher = service.teacher.model
    requests = [(hole([10 + i] * (1 + i), 6 + i), temperature, 1 + i % 3, i)
                for i, temperature in enumerate([0.0, 1.0, 0.7])]  # fmt: skip
    clients = [
        ask(service, one, SamplerSettings(temperature=t), n=n, seed=seed, served=service.teacher)
        for one, t, n, seed in requests
    ]
    ask(service, hole([1], 9)).texts()
    for (one, temperature, n, seed), client in zip(requests, clients, strict=True):
        holes = [replace(one, key=(seed, row)) for row in range(n)]
        expected = autoregressive.write(teacher, holes, DecodingSettings(temperature))
        assert [text.token_ids for text in client.texts()] == [text.token_ids for text in expected]
        usage = client.events[-1].usage
        assert usage.forwards["prefill"] == n
        assert usage.forwards["decode"] == sum(text.nfe - 1 for text in expected)
        assert usage.token_forwards == n * len(one.before) + usage.forwards["decode"]
    service.engine.stop()


# --- places --------------------------------------------------------------------------------------


def test_a_late_request_joins_at_the_next_forward_and_leaves_with_its_last(service):
    gate = Gate(service)
    long = ask(service, hole([1, 2, 3], 12), GREEDY)
    gate.wait()  # its first forward has begun
    late = ask(service, hole([4, 5, 6], 12), replace(GREEDY, steps=2))
    for _ in range(3):
        gate.let()
        gate.wait()
    assert isinstance(late.wait(), JobDone)  # while the other one has most of its steps to go
    assert not long.ended.is_set()
    gate.open()
    assert long.forwards <= 12
    long.wait()
    assert gate.seen == [1, 2, 2, *[1] * 9]
    assert (long.forwards, late.forwards) == (12, 2)


def test_a_cancelled_request_frees_its_place_within_one_forward(small):
    gate = Gate(small)
    first = ask(small, hole([1], 50), GREEDY)
    gate.wait()
    second = ask(small, hole([2], 2), GREEDY)
    first.job.cancel()
    gate.let()
    gate.wait()  # the next forward is that of the second
    assert first.error().code == "cancelled"
    assert first.forwards <= 1
    gate.open()
    assert len(second.texts()) == 1
    assert len(gate.seen) == 3


def test_a_waiting_request_can_be_cancelled(small):
    gate = Gate(small)
    first = ask(small, hole([1], 2), GREEDY)
    gate.wait()
    second = ask(small, hole([2], 2), GREEDY)
    second.job.cancel()
    gate.open()
    assert second.error().code == "cancelled"
    assert second.forwards == 0
    first.texts()
    assert len(gate.seen) == 2


def test_one_request_of_many_texts_does_not_keep_others_out():
    service = tiny_service(max_rows=4)
    gate = Gate(service)
    many = ask(service, hole([1], 6), replace(GREEDY, steps=1, temperature=1.0), n=12)
    one = ask(service, hole([2], 6), GREEDY)
    service.engine.start()
    gate.open()
    many.texts(), one.texts()
    # Its first row goes in with three of the many, not after all twelve.
    assert gate.seen[0] == 4
    assert one.job.usage.passes == 6
    assert one.job.usage.batch_rows > 6  # it shared its forwards from the first
    service.engine.stop()


def test_requests_start_in_order_of_arrival(small):
    gate = Gate(small)
    order = []
    clients = []
    for number in range(2):
        clients.append(ask(small, hole([number], 1), GREEDY))
        listen = clients[-1].job.listener
        clients[-1].job.listener = lambda e, n=number, to=listen: (order.append(n), to(e))
        eventually(lambda: small.engine.rows_in_work == 1, "one in work")
    gate.open()
    for client in clients:
        client.wait()
    assert order == sorted(order)


def test_a_full_queue_says_when_to_come_back(small):
    gate = Gate(small)
    first = ask(small, hole([1], 3), GREEDY)
    gate.wait()
    second = ask(small, hole([2], 3), GREEDY)
    assert small.engine.waiting == 1
    with pytest.raises(ServeError, match="1 requests are waiting and the queue holds 1") as caught:
        ask(small, hole([3], 3))
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert 1 <= caught.value.retry_after <= 60
    gate.open()
    first.texts(), second.texts()
    ask(small, hole([3], 3)).texts()  # there is room again


def test_without_a_queue_a_free_place_is_still_taken():
    service = tiny_service(max_rows=2, max_queue=0)
    gate = Gate(service)
    two = [ask(service, hole([i], 3)) for i in range(2)]
    with pytest.raises(ServeError, match="0"):
        ask(service, hole([3], 3))
    service.engine.start()
    gate.open()
    assert [len(client.texts()) for client in two] == [1, 1]
    service.engine.stop()


@pytest.mark.parametrize("waiting", [False, True])
def test_a_deadline_ends_a_request_wherever_it_is(small, waiting):
    gate = Gate(small)
    busy = ask(small, hole([1], 4), GREEDY) if waiting else None
    if waiting:
        gate.wait()
    late = ask(small, hole([2], 50), GREEDY, timeout_s=0.01)
    if not waiting:
        gate.wait()
    time.sleep(0.02)
    gate.let()
    error = late.error()
    assert (error.status, error.code) == (504, "deadline_exceeded")
    assert ("waiting" if waiting else "in work") in str(error)
    assert late.forwards == (0 if waiting else 1)
    gate.open()
    if busy is not None:
        busy.texts()
    ask(small, hole([3], 2)).texts()


# --- what goes wrong -----------------------------------------------------------------------------


def failing(service, when, error):
    """The student's forward raises `error` if `when(xt_BL)`."""
    real = service.student.model.rows

    def forward(xt_BL, *arguments, **options):
        if when(xt_BL):
            raise error
        return real(xt_BL, *arguments, **options)

    service.student.model.rows = forward


def test_a_row_that_fails_fails_alone(service, caplog):
    bad = 222
    failing(service, lambda xt_BL: bool((xt_BL == bad).any()), ValueError("secret text"))
    hows = [replace(GREEDY, temperature=1.0), GREEDY, replace(GREEDY, temperature=0.5)]
    good = [ask(service, hole([i], 9), how, seed=i) for i, how in enumerate(hows)]
    ill = ask(service, hole([bad], 9), GREEDY)
    error = ill.error()
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in str(error)
    for i, (how, client) in enumerate(zip(hows, good, strict=True)):
        check_same(client.texts(), alone(byte_student(), hole([i], 9), how, 1, i))
    assert service.engine.illness is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "secret text" in caplog.text  # the operator is told, and where it was
    assert "in forward" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_together_is_tried_again_alone(service, error):
    seen = []

    def too_many(xt_BL):
        seen.append(len(xt_BL))
        return len(xt_BL) > 1

    failing(service, too_many, error)
    how = replace(GREEDY, temperature=1.0)
    clients = [ask(service, hole([i], 6), how, seed=i) for i in range(4)]
    for i, client in enumerate(clients):
        check_same(client.texts(), alone(byte_student(), hole([i], 6), how, 1, i))
    assert max(seen) > 1


def test_after_running_out_of_memory_forwards_are_planned_smaller(service):
    tried = []

    def too_many(xt_BL):
        tried.append(len(xt_BL))
        return len(xt_BL) > 2

    gate = Gate(service)
    failing(service, too_many, MemoryError("can't allocate memory"))
    clients = [ask(service, hole([i], 16), GREEDY) for i in range(8)]
    gate.open()
    for client in clients:
        client.texts()
    failed = sum(rows > 2 for rows in tried)
    assert 0 < failed <= 16  # not one failing forward after the other for each of 16 steps
    assert tried.count(2) > tried.count(1)


def test_a_failed_forward_leaves_nothing_behind_while_it_is_tried_again(service):
    class Large:
        pass

    alive, kept = [], []
    real = service.student.model.rows

    def forward(xt_BL, *arguments, **options):
        alive.append(sum(one() is not None for one in kept))
        large = Large()
        kept.append(weakref.ref(large))
        if len(xt_BL) > 1:
            raise MemoryError("can't allocate memory")
        del large
        return real(xt_BL, *arguments, **options)

    service.student.model.rows = forward
    gate = Gate(service)
    clients = [ask(service, hole([i], 3), GREEDY) for i in range(2)]
    gate.open()
    for client in clients:
        client.texts()
    assert len(alive) > 6
    assert set(alive) == {0}


def test_an_error_after_a_forward_fails_its_request_only(service, monkeypatch):
    from mdm.generate import Filling

    real = Filling.follow

    def follow(self, vocab, commit):
        if self.hole.before[-1] == 222:
            raise KeyError("a mistake")
        return real(self, vocab, commit)

    monkeypatch.setattr(Filling, "follow", follow)
    gate = Gate(service)
    ill, well = ask(service, hole([222], 5)), ask(service, hole([1], 5))
    gate.open()
    assert ill.error().code == "internal_error"
    well.texts()


def test_running_out_of_memory_is_no_illness(service):
    real = service.student.model.rows
    failing(service, lambda _: True, MemoryError("can't allocate memory"))
    for i in range(ILL_AFTER + 1):
        assert ask(service, hole([i], 2)).error().code == "out_of_memory"
    assert service.engine.illness is None
    service.student.model.rows = real


def test_illness_passes_so_that_it_can_be_tried_again(service):
    failing(service, lambda _: True, ValueError("broken"))
    for i in range(ILL_AFTER):
        ask(service, hole([i], 2)).error()
    assert service.engine.illness is not None
    service.engine.failed_at -= ILL_FOR_S
    assert service.engine.illness is None


def test_out_of_memory_alone_is_told(service):
    failing(service, lambda xt_BL: xt_BL.shape[1] > 30, MemoryError("can't allocate memory"))
    large, other = ask(service, hole([1], 40)), ask(service, hole([1], 4))
    error = large.error()
    assert (error.status, error.code) == (503, "out_of_memory")
    other.texts()


def test_forwards_that_all_fail_make_it_ill_until_one_does_not(service):
    real = service.student.model.rows
    failing(service, lambda _: True, ValueError("broken"))
    for i in range(ILL_AFTER):
        assert service.engine.illness is None
        ask(service, hole([i], 2)).error()
    assert "forwards failed" in service.engine.illness
    service.student.model.rows = real
    ask(service, hole([1], 2)).texts()
    assert service.engine.illness is None


def test_a_listener_that_is_gone_stops_its_request_only(small):
    gate = Gate(small)
    first = ask(small, hole([1], 50))

    def gone(event):
        raise RuntimeError("Event loop is closed")

    first.job.listener = gone
    gate.wait()  # then it does not wait in the queue, which has one place
    other = ask(small, hole([2], 2))
    gate.open()
    other.texts()
    assert len(gate.seen) < 6


def test_the_engine_survives_an_error_of_its_own(service, monkeypatch, caplog):
    def broken():
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(service.engine, "_admit", broken)
    assert ask(service, hole([1], 2)).error().code == "internal_error"
    monkeypatch.undo()
    ask(service, hole([1], 2)).texts()
    assert "a round of the engine failed" in caplog.text


# --- the end -------------------------------------------------------------------------------------


def test_draining_finishes_what_is_there_and_takes_nothing_new(service):
    gate = Gate(service)
    there = ask(service, hole([1], 5))
    gate.wait()
    service.engine.drain(60)
    with pytest.raises(ServeError, match="shutting down") as caught:
        ask(service, hole([2], 5))
    assert caught.value.status == 503
    gate.open()
    assert len(there.texts()) == 1
    service.engine.stop()
    assert service.engine.illness == "the engine's thread has ended"


def test_when_the_time_to_drain_is_over_those_in_work_are_told(service):
    gate = Gate(service)
    there = ask(service, hole([1], 50))
    gate.wait()
    service.engine.drain(0.01)
    time.sleep(0.02)
    gate.open()
    assert there.error().code == "shutting_down"


def test_the_second_half_of_a_request_is_taken_on_while_draining(service):
    service.engine.drain(60)
    planned = plan(service, hole([1], 2))
    with pytest.raises(ServeError, match="shutting down"):
        Client(service, planned.units)
    client = Client.__new__(Client)
    client.events, client.ended = [], threading.Event()
    client.job = Job.of("generate", "tiny", planned.units, client.listen, 60.0)
    service.engine.submit(client.job, follows=True)
    assert len(client.texts()) == 1


def test_stopping_without_grace_tells_those_in_work(service):
    gate = Gate(service)
    there = ask(service, hole([1], 50))
    waits = [ask(service, hole([1], 50), n=16) for _ in range(2)]
    gate.wait()
    gate.open()
    service.engine.stop()
    for client in (there, *waits):
        assert client.error().code == "shutting_down"


# --- a teacher's rows, and likelihoods -----------------------------------------------------------


def test_a_teachers_texts_have_places_and_leave_with_their_last_token():
    service = tiny_service(teacher=True, max_rows=3)
    seen, real = [], service.teacher.model.model.base_model.forward

    def forward(x_BL, *arguments, **options):
        seen.append((len(x_BL), service.engine.rows_in_work))
        return real(x_BL, *arguments, **options)

    service.teacher.model.model.base_model.forward = forward
    client = ask(
        service, hole([1], 4), SamplerSettings(temperature=1.0), n=7, served=service.teacher
    )
    service.engine.start()
    assert len(client.texts()) == 7
    assert max(rows for rows, _ in seen) == 3
    assert max(places for _, places in seen) <= 3
    usage = client.events[-1].usage
    assert usage.passes == len(seen)
    assert usage.batch_rows == sum(rows for rows, _ in seen)
    service.engine.stop()


def test_a_job_that_ends_lets_go_of_its_caches(service):
    beside = tiny_service(teacher=True)
    beside.engine.start()
    units = plan(beside, hole([1], 400), served=beside.teacher).units
    client = Client(beside, units, model="ar")
    eventually(lambda: client.forwards > 3, "it writes")
    client.job.cancel()
    assert client.error().code == "cancelled"
    assert units[0].iterator is None
    beside.engine.stop()


def test_a_long_likelihood_does_not_keep_others_waiting(service):
    pairs = likelihood.rolling_pairs(service.student.encoder, "a" * 400, 4)
    settings = LikelihoodSettings(estimator="independent", mc_samples=2000, batch_tokens=64)
    drawn = []
    real = likelihood.ESTIMATORS["independent"].draw
    unit = score_unit(service.student, pairs, settings, service.workspace, service.telemetry)

    def draw(*arguments):
        drawn.append(arguments)
        return real(*arguments)

    estimator = replace(likelihood.ESTIMATORS["independent"], draw=draw)
    likelihood.ESTIMATORS["independent"] = estimator
    try:
        score = Client(service, [unit], kind="score")
        eventually(lambda: score.job.usage.passes > 1, "it is in work")
        ask(service, hole([1], 2)).texts()  # while most of its masks have not been drawn
        assert len(drawn) < len(pairs) / 2
        score.job.cancel()
        assert score.error().code == "cancelled"
    finally:
        likelihood.ESTIMATORS["independent"] = replace(estimator, draw=real)


# --- how forwards are put together ---------------------------------------------------------------


def shapes_of(service):
    seen = []
    before_forwards(service, lambda xt_BL: seen.append(tuple(xt_BL.shape)))
    return seen


def test_rows_of_unlike_length_do_not_pad_one_another():
    service = tiny_service()
    seen = shapes_of(service)
    one_step = replace(GREEDY, steps=1)
    lengths = [10, 11, 12, 100, 105, 300]
    clients = [ask(service, hole([1] * (n - 3), 2), one_step) for n in lengths]
    service.engine.start()
    for client in clients:
        client.texts()
    assert sorted(seen) == [(1, 300), (2, 105), (3, 12)]
    service.engine.stop()


def test_no_forward_has_more_tokens_than_allowed():
    service = tiny_service(batch_tokens=64)
    seen = shapes_of(service)
    clients = [
        ask(service, hole([1] * (n - 3), 2), replace(GREEDY, steps=1, cfg_scale=scale))
        for n, scale in [(20, 0.0)] * 5 + [(30, 1.0)] + [(100, 0.0)]
    ]
    service.engine.start()
    for client in clients:
        client.texts()
    assert (1, 100) in seen  # a longer row is a forward by itself
    assert (2, 30) in seen  # guidance counts twice
    assert all(rows * length <= 64 for rows, length in seen if length < 100)
    assert sum(rows for rows, _ in seen) == 8
    service.engine.stop()


def test_no_forward_is_planned_beyond_the_workspace():
    service = tiny_service()
    unit = plan(service, hole([1] * 20, 30), GREEDY).units[0]
    service.engine.workspace = service.workspace = int(2.5 * unit.step_bytes)
    seen = shapes_of(service)
    clients = [ask(service, hole([1] * 20, 30), replace(GREEDY, steps=1)) for _ in range(6)]
    service.engine.start()
    for client in clients:
        client.texts()
    assert max(rows for rows, _ in seen) == 2
    service.engine.stop()


def test_what_holds_memory_waits_for_its_turn():
    service = tiny_service(teacher=True)
    unit = plan(service, hole([1] * 20, 30), served=service.teacher).units[0]
    assert unit.held_bytes > 0
    service.engine.workspace = unit.held_bytes + unit.step_bytes + 1
    most = 0
    real = service.teacher.model.model.base_model.forward

    def forward(*arguments, **options):
        nonlocal most
        most = max(most, service.engine.rows_in_work)
        return real(*arguments, **options)

    service.teacher.model.model.base_model.forward = forward
    clients = [ask(service, hole([i] * 20, 30), served=service.teacher) for i in range(3)]
    service.engine.start()
    for client in clients:
        client.texts()
    assert most == 1
    service.engine.stop()
