"""The server under load, against the same weights without it.

Three questions, one run, one machine, the same requests on both sides: how much more does the engine
do than a server that takes one request at a time (`--max-rows 1`, every other one waits)? How much
does HTTP add to a call of the library? Is anything lost, and does memory stay, under a soak?
Both servers are up all the time and idle while the other is asked; sides take turns, level by level
(the library: request by request), so that what else the machine does hits both.

Tokens are visible ones: after the prompt, up to the end token. Latency is the client's, from before
the text is encoded to the whole answer. Rates are sums over sums, never means of rates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from mdm.checkpoint import load_vocab
from mdm.config import require
from mdm.record import append_record, make_record

from .serve_load import PATIENCE_S, Body
from .serve_processes import END_S, Asker, Process, Server
from .serve_report import MIB, mean_and_error, percentile, slope
from .serve_requests import KINDS, SIDES, WORKLOADS, Requests, ServeBench, soak_items

METRICS = 1  # version of what the numbers mean
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Round:
    """One level of one side, once.

    passes, batch_rows, counted   forwards of the model, rows in them, visible tokens: by the server
    """

    wall_s: float
    results: list[dict[str, Any]]
    passes: int
    batch_rows: int
    counted: int

    @property
    def answered(self) -> list[dict[str, Any]]:
        return [result for result in self.results if "error" not in result]

    def total(self, name: str) -> int:
        return sum(result[name] for result in self.answered)

    @property
    def tokens_per_s(self) -> float:
        return self.total("tokens") / self.wall_s


def run(settings: ServeBench, path: Path, note: Note = lambda _: None) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `note` is told what is being done."""
    vocab = load_vocab(settings.model)
    workload = WORKLOADS[settings.workload]
    requests = Requests(vocab, workload, settings.seed)
    library = ["library", settings.model, settings.dtype, str(settings.threads)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        note("starting two servers, a client and the library")
        servers = {side: stack.enter_context(Server(side, settings, folder)) for side in SIDES}
        client = stack.enter_context(Asker("client", ["http"], folder))
        alone = stack.enter_context(Asker("library", library, folder))
        processes: list[Server | Asker] = [*servers.values(), client, alone]
        stack.callback(_tell_to_end, processes)  # all at once, then each is waited for
        for process in processes:
            process.wait()
        (model,) = servers["engine"].stats()["models"].values()
        longest = max(workload.total, WORKLOADS["long"].total if settings.soak else 0)
        require(
            longest <= model["max_length"],
            f"a canvas has up to {longest} tokens, but {settings.model} was built for"
            f" {model['max_length']}; take a smaller workload (and no soak)",
        )
        warm_up(servers, client, alone, requests)
        results: dict[str, Any] = {
            "workload": dataclasses.asdict(workload),
            "metrics": METRICS,
            "warm_up_requests": KINDS,
            "boundary": "client: request sent to whole answer read, encoding of texts included",
            "device": model["device"],
            "limits": {side: server.stats()["limits"] for side, server in servers.items()},
            **throughput(settings, servers, client, requests, note),
            "overhead": overhead(settings, servers["engine"], client, alone, requests, note),
            "soak": None,
        }
        if settings.soak:
            note(f"soak: {settings.soak:g} s")
            long = Requests(vocab, WORKLOADS["long"], settings.seed)
            results["soak"] = soak(settings, servers["engine"], client, requests, long)
    record = make_record(
        "bench serve",
        results,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        checkpoint=model["weights"],
    )
    append_record(path, record)
    return record


def _tell_to_end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.process.terminate()


def warm_up(servers: dict[str, Server], client: Asker, alone: Asker, requests: Requests) -> None:
    """One request of each kind on every side, uncounted. Raises BenchError if one is not answered."""
    bodies = [requests[number] for number in range(KINDS)]
    for server in servers.values():
        found = client.ask([[body] for body in bodies], url=server.url)
        for (result,) in found["results"]:
            if "error" in result:
                raise server.failure(f"it does not answer a first request: {result['error']}")
    alone.ask([bodies])


def throughput(
    settings: ServeBench,
    servers: dict[str, Server],
    client: Asker,
    requests: Requests,
    note: Note,
) -> dict[str, Any]:
    """Both sides at every level: `levels`, a line a side and level, and `ratios` engine / serial."""
    rounds: dict[tuple[str, int], list[Round]] = {}
    number = KINDS  # those before have warmed up
    for repeat in range(settings.repeats):
        for place, level in enumerate(settings.concurrency):
            each = settings.requests
            bodies = [requests[number + i] for i in range(level * each)]
            number += level * each
            clients = [bodies[i::level] for i in range(level)]
            for side in SIDES if (repeat + place) % 2 == 0 else SIDES[::-1]:
                note(f"repeat {repeat + 1} of {settings.repeats}: concurrency {level}, {side}")
                one = one_round(servers[side], client, clients)
                rounds.setdefault((side, level), []).append(one)
    return {
        "levels": [
            level_line(side, level, rounds[side, level])
            for level in settings.concurrency
            for side in SIDES
        ],
        "ratios": [
            ratio_line(level, *(rounds[side, level] for side in SIDES))
            for level in settings.concurrency
        ],
    }


def one_round(server: Server, client: Asker, clients: Sequence[Sequence[Body]]) -> Round:
    """Every client sends its list, one request after the other."""
    before = server.counters()
    found = client.ask(clients, url=server.url)
    server.check()
    after = server.counters()

    def grown(name: str) -> int:
        return round(after.get(name, 0.0) - before.get(name, 0.0))

    return Round(
        wall_s=found["wall_s"],
        results=[result for own in found["results"] for result in own],
        passes=grown("mdm_batch_rows_count"),
        batch_rows=grown("mdm_batch_rows_sum"),
        counted=grown("mdm_tokens_total"),
    )


def level_line(side: str, level: int, rounds: Sequence[Round]) -> dict[str, Any]:
    """One side at one level, over all repeats: sums, and quotients of sums."""
    answered = [result for one in rounds for result in one.answered]
    failed = [result["error"] for one in rounds for result in one.results if "error" in result]
    wall_s = sum(one.wall_s for one in rounds)
    passes, rows = sum(one.passes for one in rounds), sum(one.batch_rows for one in rounds)
    totals = {
        name: sum(one.total(name) for one in rounds)
        for name in ("tokens", "prompt_tokens", "forwards", "token_forwards")
    }
    seconds = [result["seconds"] for result in answered]
    queued = [result["queue_s"] for result in answered]
    on_device = [result["device_peak_bytes"] for result in answered]
    return {
        "side": side,
        "concurrency": level,
        "requests": len(answered) + len(failed),
        "errors": len(failed),
        "first_error": failed[0] if failed else None,
        "wall_s": wall_s,
        "wall_s_all": [one.wall_s for one in rounds],
        **totals,
        "tokens_all": [one.total("tokens") for one in rounds],
        "tokens_by_server": sum(one.counted for one in rounds),
        "passes": passes,
        "requests_per_s": len(answered) / wall_s,
        "tokens_per_s": totals["tokens"] / wall_s,
        "latency_p50_s": percentile(seconds, 50),
        "latency_p95_s": percentile(seconds, 95),
        "queue_p50_s": percentile(queued, 50),
        "queue_p95_s": percentile(queued, 95),
        "rows_per_pass": rows / passes if passes else math.nan,
        "tokens_per_forward": totals["tokens"] / totals["forwards"] if answered else math.nan,
        "peak_bytes": max((result["peak_bytes"] for result in answered), default=None),
        "device_peak_bytes": max((b for b in on_device if b is not None), default=None),
    }


def ratio_line(level: int, engine: Sequence[Round], serial: Sequence[Round]) -> dict[str, Any]:
    """Visible tokens a second, engine over serial: mean and standard error over repeats.

    texts_different: requests whose texts are not the same on both sides.
    """
    both = list(zip(engine, serial, strict=True))
    values = [
        fast.tokens_per_s / slow.tokens_per_s if slow.tokens_per_s else math.nan
        for fast, slow in both
    ]
    mean, std_err = mean_and_error(values)
    return {
        "concurrency": level,
        "ratio": mean,
        "std_err": std_err,
        "n": len(values),
        "values": values,
        **compare_texts([pair for a, b in both for pair in zip(a.results, b.results, strict=True)]),
    }


def overhead(
    settings: ServeBench,
    server: Server,
    client: Asker,
    alone: Asker,
    requests: Requests,
    note: Note,
) -> dict[str, Any]:
    """What the server adds to the library for one client: ratio of median latencies, less 1.

    The two take turns request by request, and in who comes first (ABBA, so that no kind of request
    always meets the same order).
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    medians: dict[str, list[float]] = {"server": [], "library": []}
    each = settings.requests * KINDS
    for repeat in range(settings.repeats):
        note(f"repeat {repeat + 1} of {settings.repeats}: server and library")
        seconds: dict[str, list[float]] = {"server": [], "library": []}
        for i in range(each):
            body = requests[-1 - repeat * each - i]  # of its own, whatever the levels are
            found: dict[str, dict[str, Any]] = {}
            for side in ("server", "library") if i % 4 in (0, 3) else ("library", "server"):
                if side == "server":
                    answer = client.ask([[body]], url=server.url)
                else:
                    answer = alone.ask([[body]])
                found[side] = answer["results"][0][0]
            server.check()
            pairs.append((found["server"], found["library"]))
            for side, result in found.items():
                if "error" not in found["server"]:
                    seconds[side].append(result["seconds"])
        for side in medians:
            medians[side].append(percentile(seconds[side], 50))
    values = [
        mine / base - 1 for mine, base in zip(medians["server"], medians["library"], strict=True)
    ]
    mean, std_err = mean_and_error(values)
    return {
        "overhead": mean,
        "std_err": std_err,
        "n": len(values),
        "values": values,
        "server_median_s": medians["server"],
        "library_median_s": medians["library"],
        "requests": len(pairs),
        "errors": sum("error" in mine for mine, _ in pairs),
        **compare_texts(pairs),
    }


def compare_texts(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, int]:
    """Of requests answered on both sides: how many, and how many with another text."""
    whole = [(a, b) for a, b in pairs if "error" not in a and "error" not in b]
    different = sum(a["texts"] != b["texts"] for a, b in whole)
    return {"texts_compared": len(whole), "texts_different": different}


def soak(
    settings: ServeBench, server: Server, client: Asker, own: Requests, long: Requests
) -> dict[str, Any]:
    """Constant load of all that users do; resident memory over time; what was lost."""
    count = max(settings.concurrency)
    clients = [soak_items({"own": own, "long": long}, number) for number in range(count)]
    every = min(2.0, settings.soak / 20)
    samples = [(0.0, resident_bytes(server))]
    began = time.monotonic()
    client.send(clients, url=server.url, soak_s=settings.soak)
    while not client.has_answered(every):
        at = time.monotonic() - began
        samples.append((at, resident_bytes(server)))
        if at > settings.soak + PATIENCE_S:
            raise client.failure(f"the soak has not ended after {at:.0f} s")
    found = client.receive(every)
    left = rows_left(server)
    samples.append((time.monotonic() - began, resident_bytes(server)))
    latencies = found.pop("latencies")
    resident = [rss for _, rss in samples]
    later = [(at / 60, rss / MIB) for at, rss in samples if at >= settings.soak / 2]
    return {
        **found,
        "clients": count,
        "latency_p50_s": percentile(latencies, 50),
        "latency_p95_s": percentile(latencies, 95),
        "resident_first_bytes": resident[0],
        "resident_last_bytes": resident[-1],
        "resident_peak_bytes": max(resident),
        "slope_mib_per_minute": slope(later),
        "samples": [[round(at, 2), rss] for at, rss in samples],
        "rows_left": left,
    }


def resident_bytes(server: Server) -> int:
    """Resident memory of a server now. Raises BenchError if it is gone."""
    server.check()
    try:
        return int(psutil.Process(server.process.pid).memory_info().rss)
    except psutil.Error as error:  # it ended between the two
        raise server.failure("its memory cannot be read") from error


def rows_left(server: Server) -> int:
    """Rows and requests that the engine still holds when nobody waits for them any more: 0."""
    until = time.monotonic() + END_S
    while True:
        counted = server.stats()["counters"]
        held = int(counted["rows_in_work"]) + int(counted["queue_requests"])
        if not held or time.monotonic() >= until:
            return held
        time.sleep(0.1)
