"""`mdm bench serve`: nothing is lost, its sums are those of the server, its processes end.

One small run with real processes is shared by the tests of the record; what happens when a process
fails is tried with processes of its own. Nothing here measures time.
"""

import dataclasses
import json
import math
import re
import socket
import statistics

import numpy
import psutil
import pytest
from click.testing import CliRunner
from tiny_serve import Gate, byte_student, client, eventually, running, tiny_service

from mdm.benchmarks import serve as bench
from mdm.benchmarks import serve_load
from mdm.benchmarks import serve_processes as processes
from mdm.benchmarks import serve_report as report
from mdm.benchmarks import serve_requests as asked
from mdm.benchmarks.command import bench as command
from mdm.checkpoint import load_denoiser, load_vocab, save_denoiser, weights_hash
from mdm.errors import ConfigError, DataError
from mdm.record import to_json

SETTINGS = asked.ServeBench(
    model="student",
    workload="short",
    concurrency=(1, 3),
    requests=2,
    repeats=2,
    dtype="float32",
    threads=1,
    soak=1.0,
    seed=0,
)
BODY = {"prompt": "def f(x):", "gen_length": 8, "steps": 4, "temperature": 0.7, "seed": 5}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "student"
    save_denoiser(byte_student(), folder)
    return folder


@pytest.fixture(scope="module")
def settings(student):
    return dataclasses.replace(SETTINGS, model=str(student))


@pytest.fixture(scope="module")
def ran(settings, tmp_path_factory):
    """(record, file, what was told, processes that were there when it measured)."""
    path = tmp_path_factory.mktemp("records") / "serve.jsonl"
    told, there = [], []

    def note(text):
        told.append(text)
        if not there and "repeat" in text:
            there.extend(psutil.Process().children(recursive=True))

    return bench.run(settings, path, note), path, told, there


@pytest.fixture(scope="module")
def requests(student):
    return asked.Requests(load_vocab(str(student)), asked.WORKLOADS["short"], 0)


# --- a run with real processes -----------------------------------------------------------------------


@pytest.mark.slow
def test_every_request_is_answered_and_counted_once(ran):
    record = ran[0]
    levels = record["results"]["levels"]
    assert [(line["concurrency"], line["side"]) for line in levels] == [
        (1, "engine"),
        (1, "serial"),
        (3, "engine"),
        (3, "serial"),
    ]
    for line in levels:
        assert line["requests"] == line["concurrency"] * 2 * 2  # clients, requests, repeats
        assert line["errors"] == 0
        assert line["first_error"] is None
        assert line["tokens"] == line["tokens_by_server"] == sum(line["tokens_all"])
        assert 0 < line["tokens"] <= 16 * line["requests"]  # an end token may come before the end
        assert line["token_forwards"] == 33 * line["forwards"]  # start, 16 around it, 16 new
        assert line["prompt_tokens"] == 17 * line["requests"]
        assert line["wall_s"] == pytest.approx(sum(line["wall_s_all"]))
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["wall_s"])
        assert line["requests_per_s"] == pytest.approx(line["requests"] / line["wall_s"])
        assert line["tokens_per_forward"] == pytest.approx(line["tokens"] / line["forwards"])
        rows = round(line["rows_per_pass"] * line["passes"])
        assert rows == line["forwards"]  # nobody else asks, and there is no guidance
        assert 0 < line["latency_p50_s"] <= line["latency_p95_s"]
        assert 0 <= line["queue_p50_s"] <= line["queue_p95_s"]
        assert line["peak_bytes"] > 2**20
    for line in levels:
        if line["side"] == "serial":
            assert line["rows_per_pass"] == 1


@pytest.mark.slow
def test_both_sides_write_the_same(ran):
    """float32, the same seeds: neighbours, HTTP and the engine change no text."""
    results = ran[0]["results"]
    engine, serial = results["levels"][2:]
    assert engine["tokens"] == serial["tokens"]
    assert engine["forwards"] == serial["forwards"]
    for line in results["ratios"]:
        assert (line["texts_compared"], line["texts_different"]) == (4 * line["concurrency"], 0)
    over = results["overhead"]
    assert (over["requests"], over["errors"]) == (2 * asked.KINDS * 2, 0)
    assert (over["texts_compared"], over["texts_different"]) == (16, 0)


@pytest.mark.slow
def test_ratios_are_those_of_the_sums(ran):
    results = ran[0]["results"]
    for line in results["ratios"]:
        engine, serial = (
            [
                tokens / wall
                for tokens, wall in zip(own["tokens_all"], own["wall_s_all"], strict=True)
            ]
            for own in results["levels"]
            if own["concurrency"] == line["concurrency"]
        )
        expected = [fast / slow for fast, slow in zip(engine, serial, strict=True)]
        assert line["values"] == pytest.approx(expected)
        assert line["ratio"] == pytest.approx(sum(expected) / 2)
        assert line["std_err"] == pytest.approx(abs(expected[0] - expected[1]) / 2)
        assert line["n"] == 2
    over = results["overhead"]
    each = zip(over["server_median_s"], over["library_median_s"], strict=True)
    assert over["values"] == pytest.approx([mine / base - 1 for mine, base in each])
    assert over["overhead"] == pytest.approx(statistics.fmean(over["values"]))


@pytest.mark.slow
def test_a_soak_loses_nothing_and_leaves_nothing(ran):
    found = ran[0]["results"]["soak"]
    assert found["lost"] == found["rows_left"] == 0
    assert found["told"] == []
    assert found["sent"] == found["answered"] + found["refused"] + found["cancelled"]
    assert found["sent"] == sum(found["kinds"].values()) > 0
    assert set(found["kinds"]) <= set(serve_load.MANNERS)
    resident = [rss for _, rss in found["samples"]]
    assert len(resident) > 2
    assert (found["resident_first_bytes"], found["resident_last_bytes"]) == (
        resident[0],
        resident[-1],
    )
    assert found["resident_peak_bytes"] == max(resident)


@pytest.mark.slow
def test_the_record_says_how_it_was_made(ran, settings, student):
    record, path, told, _ = ran
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == json.loads(to_json(record))
    assert record["kind"] == "bench serve"
    assert record["settings"] == dataclasses.asdict(settings)
    assert record["checkpoint"] == weights_hash(student)
    results = record["results"]
    assert results["workload"] == {"prompt": 16, "new": 16, "steps": 16}
    assert results["limits"]["engine"]["max_rows"] == 16
    assert results["limits"]["serial"]["max_rows"] == 1
    assert {"metrics", "boundary", "warm_up_requests", "device"} <= set(results)
    assert {"versions", "commit", "device", "seed"} <= set(record)
    assert len(told) == 1 + 2 * 2 * 2 + 2 + 1  # start, rounds, overhead, soak


@pytest.mark.slow
def test_sides_take_turns_in_who_is_first(ran):
    rounds = [text.partition(": ")[2] for text in ran[2] if "concurrency" in text]
    assert rounds == [
        "concurrency 1, engine",
        "concurrency 1, serial",
        "concurrency 3, serial",
        "concurrency 3, engine",
        "concurrency 1, serial",
        "concurrency 1, engine",
        "concurrency 3, engine",
        "concurrency 3, serial",
    ]


@pytest.mark.slow
def test_its_processes_are_gone(ran):
    assert len(ran[3]) >= 4  # two servers, the client, the library
    assert [process for process in ran[3] if process.is_running()] == []


@pytest.mark.slow
def test_tables_and_picture(ran, tmp_path):
    record = ran[0]
    *text, last = report.describe(record).splitlines()
    assert json.loads(last)["results"]["ratios"] == record["results"]["ratios"]
    shown = "\n".join(text)
    line = record["results"]["levels"][2]
    assert re.search(rf"^ +3  engine .*{line['tokens_per_s']:.1f}.* 12 +0 ", shown, re.MULTILINE)
    assert "engine / serial at concurrency 1: " in shown
    assert "engine / serial at concurrency 3: " in shown  # 16 was not measured
    assert "0 of 16 texts differ" in shown
    assert "0 lost; 0 rows left" in shown
    report.plot(record, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_headline_is_at_16_if_that_was_measured():
    lines = [{"concurrency": level} for level in (32, 16, 2)]
    assert [line["concurrency"] for line in report.headlines(lines)] == [2, 16]
    assert list(report.headlines(lines[2:])) == lines[2:]


# --- processes that fail -----------------------------------------------------------------------------


def test_a_server_that_does_not_start_says_why(settings, tmp_path):
    wrong = dataclasses.replace(settings, model=str(tmp_path / "nowhere"))
    reason = r"engine: .*status 5.*no model folder"
    with (
        processes.Server("engine", wrong, tmp_path) as server,
        pytest.raises(processes.BenchError, match=reason),
    ):
        server.wait()
    assert server.process.poll() is not None


def test_a_server_and_a_client_that_die_are_told(settings, tmp_path):
    with (
        processes.Server("engine", settings, tmp_path) as server,
        processes.Asker("client", ["http"], tmp_path) as asker,
    ):
        server.wait()
        asker.wait()
        assert bench.one_round(server, asker, [[BODY]]).total("tokens") > 0
        server.process.kill()
        server.process.wait()
        found = asker.ask([[BODY], [BODY]], url=server.url)
        assert ["no answer" in result["error"] for (result,) in found["results"]] == [True, True]
        with pytest.raises(
            processes.BenchError, match=r"engine: the server is gone .*serving student"
        ):
            server.check()
        with pytest.raises(processes.BenchError, match="GET /metrics: no answer"):
            bench.one_round(server, asker, [[BODY]])
        with pytest.raises(processes.BenchError, match="engine: the server is gone"):
            bench.resident_bytes(server)
        asker.send([])  # no clients: nothing it could know what to do with
        with pytest.raises(processes.BenchError, match="client: it ended without an answer"):
            asker.receive(60)


def test_a_process_that_ignores_its_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "END_S", 0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deaf.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with processes.Process("deaf", ["deaf"], tmp_path) as process:
        eventually(lambda: "ready" in process.said(), "it is ready")
    assert process.process.poll() == -9


def test_no_key_of_the_environment_locks_the_benchmark_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_API_KEY", "a-secret-key")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "show.py").write_text("import os\nprint('MDM_API_KEY' in os.environ)\n")
    with processes.Process("show", ["show"], tmp_path) as process:
        process.process.wait(60)
    assert process.said() == "False\n"


# --- the load ----------------------------------------------------------------------------------------


def test_a_closed_loop_asks_one_thing_at_a_time():
    """Three clients of two requests each: never more than three at once, and in order."""
    service = tiny_service()
    gate = Gate(service)
    gate.open()
    lists = [[{**BODY, "seed": 10 * client + i} for i in range(2)] for client in range(3)]
    with running(service) as url:
        found = serve_load.load({"url": url, "clients": lists})
        again = serve_load.load({"url": url, "clients": [[body for own in lists for body in own]]})
    assert max(gate.seen) <= 3
    assert [len(own) for own in found["results"]] == [2, 2, 2]
    one_by_one = [result["texts"] for result in again["results"][0]]
    assert [result["texts"] for own in found["results"] for result in own] == one_by_one
    assert len({tuple(texts) for texts in one_by_one}) > 1  # seeds are told to the server
    for result in again["results"][0]:
        assert result["token_forwards"] == result["forwards"] * (1 + 9 + 8)
        assert result["prompt_tokens"] == 10
        assert 0 < result["tokens"] <= 8
        assert result["seconds"] > 0


def test_what_is_not_answered_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # a port at which nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = serve_load.load({"url": url, "clients": [[BODY, BODY]]})
    assert [result["error"].startswith("no answer: ") for result in found["results"][0]] == [
        True,
        True,
    ]
    with running(tiny_service()) as url:
        bodies = [{**BODY, "steps": 0}, BODY, {**BODY, "n": 2}]
        wrong, right, two = serve_load.load({"url": url, "clients": [bodies]})["results"][0]
    assert wrong["error"].startswith("400: ")
    assert "steps" in wrong["error"]
    assert "error" not in right  # the connection goes on
    assert len(two["texts"]) == 2


def test_after_no_answer_a_client_begins_anew():
    """It could take what comes too late for the answer to its next request."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the kernel takes connections; nobody reads them
        one = serve_load.Client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        one.connection.timeout = 0.1
        errors = [one.ask(BODY)["error"] for _ in range(2)]
        one.close()
    assert ["TimeoutError" in error for error in errors] == [True, True]


def test_the_library_fills_the_same(student, requests):
    library = serve_load.Library(str(student), "float32", 1)
    bodies = [requests[number] for number in range(asked.KINDS)]
    with running(tiny_service(student=load_denoiser(student))) as url:
        by_server = serve_load.load({"url": url, "clients": [bodies]})["results"][0]
    by_library = library({"clients": [bodies]})["results"][0]
    for name in ("texts", "tokens", "forwards"):
        assert [one[name] for one in by_library] == [one[name] for one in by_server]


def test_every_kind_of_soak_ends_as_meant(requests, student):
    long = asked.Requests(requests.vocab, asked.WORKLOADS["long"], 0)
    items = asked.soak_items({"own": requests, "long": long}, 0)
    assert {item["kind"] for item in items} == set(serve_load.MANNERS)
    expected = {
        "left": "cancelled",
        "wrong": "refused",
    }
    service = tiny_service(student=load_denoiser(student))
    with running(service) as url:
        one = serve_load.Client(url)  # which goes on after a stream that it left
        for item in items:
            outcome = serve_load.MANNERS[item["kind"]](one, item)
            if item["kind"] != "hung_up":  # which may come too late
                assert outcome == expected.get(item["kind"], "answered"), item
        one.close()
        eventually(lambda: not service.engine.rows_in_work, "what was left is given up")


def test_hanging_up_gives_the_place_back():
    service = tiny_service()
    gate = Gate(service)
    with running(service) as url, client(url) as web:
        one = serve_load.Client(url)
        assert serve_load.MANNERS["hung_up"](one, {"body": BODY, "after_s": 0.0}) == "cancelled"
        gate.open()
        eventually(lambda: 'outcome="cancelled"} 1.0' in web.get("/metrics").text, "cancelled")
        # and the next request of the same client is another one
        assert serve_load.MANNERS["hung_up"](one, {"body": BODY, "after_s": 60}) == "answered"
        one.close()


def test_a_soak_tells_what_was_lost():
    """Requests that a server refuses, though it should not, are lost; and so are all of a dead one."""
    unexpected = {"kind": "short", "body": {**BODY, "steps": 0}}
    not_refused = {"kind": "wrong", "body": BODY, "status": 400}
    bad_stream = {"kind": "streamed", "body": {**BODY, "steps": 0}}
    other_error = {"kind": "wrong", "body": {**BODY, "steps": 0}, "status": 413}
    lists = [[unexpected], [not_refused], [bad_stream], [other_error]]
    with running(tiny_service()) as url:
        found = serve_load.load({"url": url, "clients": lists, "soak_s": 0.3})
    assert found["answered"] == found["cancelled"] == found["refused"] == 0
    assert found["lost"] == found["sent"] >= 4
    told = sorted(found["told"])
    assert len(told) <= serve_load.TOLD
    assert any(text.startswith("short: 400") for text in told)
    assert any(text.startswith("wrong: 200 instead of 400") for text in told)
    assert any(text.startswith("streamed: 400") for text in told)
    assert any(text.startswith("wrong: 400 instead of 413") for text in told)
    gone = serve_load.load({"url": url, "clients": [[unexpected]], "soak_s": 0.1})
    assert gone["lost"] == gone["sent"] >= 1
    assert "no answer" in gone["told"][0]


def test_rows_that_nobody_waits_for_are_seen(monkeypatch):
    class Held:
        def __init__(self, *rows):
            self.rows = list(rows)

        def stats(self):
            held = self.rows.pop(0) if len(self.rows) > 1 else self.rows[0]
            return {"counters": {"rows_in_work": held, "queue_requests": 0}}

    assert bench.rows_left(Held(2, 1, 0)) == 0
    monkeypatch.setattr(processes, "END_S", 0.3)
    assert bench.rows_left(Held(2)) == 2


# --- requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(asked.WORKLOADS))
def test_requests_are_cut_from_code_by_tokens(student, name):
    workload = asked.WORKLOADS[name]
    vocab = load_vocab(str(student))
    requests = asked.Requests(vocab, workload, 0)
    programs = [vocab.decode(ids) for ids in requests.programs]
    bodies = [requests[number] for number in range(8)]
    for body in bodies:
        assert body["steps"] == workload.steps
        assert 0 <= body["seed"] < 2**31
        if "prompt" in body:
            given, new = [body["prompt"]], body["gen_length"]
        else:
            given, new = [body["prefix"], body["suffix"]], body["span"]
        assert new == workload.new
        assert sum(len(vocab.encode(text)) for text in given) == workload.prompt
        gap = f".{{{new}}}"  # a token is a byte, and these bytes are ASCII
        pattern = re.compile(gap.join(map(re.escape, given)), re.DOTALL)
        assert any(pattern.search(program) for program in programs)
    assert [("prefix" in body, body["temperature"]) for body in bodies[:4]] == [
        (True, 0.0),
        (False, 0.0),
        (True, 0.7),
        (False, 0.7),
    ]
    assert len({body["seed"] for body in bodies}) == 8
    assert [asked.Requests(vocab, workload, 0)[number] for number in range(8)] == bodies
    assert asked.Requests(vocab, workload, 1)[0] != bodies[0]


def test_a_workload_longer_than_every_program_is_refused(student):
    with pytest.raises(DataError, match="100000 tokens"):
        asked.Requests(load_vocab(str(student)), asked.Workload(99_999, 1, 1), 0)


# --- statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_percentiles_are_numpys(count):
    values = [math.sin(7 * i) for i in range(count)]
    for percent in (0, 5, 50, 95, 99.5, 100):
        assert report.percentile(values, percent) == pytest.approx(
            numpy.percentile(values, percent)
        )
    assert math.isnan(report.percentile([], 50))


def test_mean_and_its_error():
    values = [1.0, 2.0, 4.0, 7.0]
    mean = sum(values) / 4
    variance = sum((value - mean) ** 2 for value in values) / 3
    assert report.mean_and_error(values) == pytest.approx((mean, math.sqrt(variance / 4)))
    mean, error = report.mean_and_error([3.0])
    assert mean == 3.0
    assert math.isnan(error)


def test_slope_is_that_of_least_squares():
    points = [(0.0, 1.0), (1.0, 4.0), (3.0, 5.0), (4.0, 11.0)]
    at, values = (sum(column) / 4 for column in zip(*points, strict=True))
    slow = sum((x - at) * (y - values) for x, y in points) / sum((x - at) ** 2 for x, _ in points)
    assert report.slope(points) == pytest.approx(slow)
    assert report.slope([(2 * x, 7.0) for x in range(5)]) == 0
    assert math.isnan(report.slope([]))
    assert math.isnan(report.slope([(1.0, 1.0), (1.0, 2.0)]))


def result(seconds, tokens, forwards, **more):
    sizes = {"prompt_tokens": 3, "queue_s": 0.0, "token_forwards": 9, "peak_bytes": tokens}
    own = {"seconds": seconds, "texts": ["x"], "tokens": tokens, "forwards": forwards}
    return {**sizes, "device_peak_bytes": None, **own, **more}


def test_lines_are_quotients_of_sums_and_tell_errors():
    rounds = [
        bench.Round(2.0, [result(1.0, 10, 5), {"error": "500: no"}], 5, 5, 10),
        bench.Round(6.0, [result(2.0, 4, 8), result(4.0, 2, 1)], 3, 9, 6),
    ]
    line = bench.level_line("engine", 2, rounds)
    assert (line["requests"], line["errors"], line["first_error"]) == (4, 1, "500: no")
    assert line["tokens_per_s"] == 16 / 8
    assert line["requests_per_s"] == 3 / 8
    assert line["tokens_per_forward"] == pytest.approx(16 / 14)
    assert line["rows_per_pass"] == 14 / 8
    assert line["latency_p50_s"] == 2.0
    assert line["peak_bytes"] == 10
    other = bench.Round(4.0, [result(1.0, 8, 1, texts=["y"]), result(1.0, 8, 1)], 1, 1, 16)
    ratio = bench.ratio_line(2, rounds, [other, other])
    assert ratio["values"] == [(10 / 2) / 4, (6 / 6) / 4]
    # the one that failed is not compared
    assert (ratio["texts_compared"], ratio["texts_different"]) == (3, 2)


def test_a_level_without_any_answer_is_still_a_line():
    failed = bench.Round(1.0, [{"error": "503: no"}], 0, 0, 0)
    line = bench.level_line("serial", 1, [failed])
    assert (line["requests"], line["errors"], line["tokens_per_s"]) == (1, 1, 0)
    assert line["peak_bytes"] is None
    assert math.isnan(line["latency_p95_s"])
    assert math.isnan(bench.ratio_line(1, [failed], [failed])["ratio"])


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"workload": "shrt"}, "did you mean 'short'"),
        ({"dtype": "float17"}, "float17"),
        ({"concurrency": ()}, "concurrency"),
        ({"concurrency": (1, 0)}, "concurrency"),
        ({"concurrency": (1, 257)}, "257"),
        ({"concurrency": (2, 4, 2)}, "twice"),
        ({"requests": 0}, "requests"),
        ({"repeats": 0}, "repeats"),
        ({"threads": 0}, "threads"),
        ({"soak": -1.0}, "soak"),
        ({"soak": math.inf}, "soak"),
        ({"soak": math.nan}, "soak"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SETTINGS, **change)


def test_the_command_hands_its_options_on(tmp_path, monkeypatch):
    seen = []

    def run(settings, path, note):
        note("at work")
        seen.append((settings, path))
        return {"a": "record"}

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(report, "plot", lambda record, path: seen.append((record, path)))
    monkeypatch.setattr(report, "describe", lambda record: json.dumps(record))
    arguments = [
        "serve",
        "--model",
        "m",
        "--concurrency",
        "1, 4",
        "--soak",
        "2.5",
        "--threads",
        "3",
    ]
    more = ["--record", str(tmp_path / "r"), "--plot", str(tmp_path / "p"), "--dtype", "bfloat16"]
    answer = CliRunner().invoke(command, [*arguments, *more], catch_exceptions=False)
    settings, path = seen[0]
    assert settings == asked.ServeBench("m", "short", (1, 4), 4, 3, "bfloat16", 3, 2.5, 0)
    assert path == tmp_path / "r"
    assert seen[1] == ({"a": "record"}, tmp_path / "p")
    assert answer.stdout.splitlines()[-1] == '{"a": "record"}'
    assert "at work" in answer.stderr
    assert "at work" not in answer.stdout
    wrong = CliRunner().invoke(command, ["serve", "--model", "m", "--concurrency", "1,x"])
    assert isinstance(wrong.exception, ConfigError)
    assert "1,x" in str(wrong.exception)
