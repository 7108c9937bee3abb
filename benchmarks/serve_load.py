"""The asking side of `mdm bench serve`, in a process of its own: a line of work in, a line out.

`python -m mdm.benchmarks.serve_load http` sends requests to a server, `… library MODEL DTYPE THREADS`
fills the same requests itself. Lines are JSON; the first one out says that it is ready, and the
process ends with its input. A latency begins before a text is encoded and ends with the whole result.
Knows nothing of statistics, and in `http` nothing of models.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import select
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# More than the server gives a request, so that it is the server that says what was too slow.
PATIENCE_S = 900.0
# So many texts of what was lost are told; all are counted.
TOLD = 5

Body = dict[str, Any]
Work = dict[str, Any]
Result = dict[str, Any]
NO_ANSWER = (OSError, http.client.HTTPException)


# --- requests over HTTP ----------------------------------------------------------------------------


class Client:
    """One client with one connection, which it keeps while the server does."""

    def __init__(self, url: str) -> None:
        place = urllib.parse.urlsplit(url)
        assert place.hostname is not None
        self.connection = http.client.HTTPConnection(place.hostname, place.port, timeout=PATIENCE_S)

    def connect(self) -> None:
        """Open the connection, so that no latency holds that; if it fails, the requests will say so."""
        with contextlib.suppress(OSError):
            self.connection.connect()

    def close(self) -> None:
        """Hang up, whatever is on its way."""
        self.connection.close()

    def send(self, method: str, path: str, body: Body | None = None) -> None:
        """Send a request; its answer is read from `response`."""
        if body is None:
            self.connection.request(method, path)
        else:
            headers = {"content-type": "application/json"}
            self.connection.request(method, path, json.dumps(body).encode(), headers)

    def response(self) -> http.client.HTTPResponse:
        return self.connection.getresponse()

    def text(self, method: str, path: str, body: Body | None = None) -> tuple[int, str]:
        """Status and body of an answer. Raises one of NO_ANSWER."""
        try:
            self.send(method, path, body)
            answer = self.response()
            return answer.status, answer.read().decode()
        except NO_ANSWER:
            self.close()  # what is left of it must not be taken for the next answer
            raise

    def ask(self, body: Body) -> Result:
        """One request to /generate and what came of it; `error` says why there is no text."""
        began = time.perf_counter()
        try:
            status, text = self.text("POST", "/generate", body)
        except NO_ANSWER as error:
            return {"error": no_answer(error)}
        seconds = time.perf_counter() - began
        if status != 200:
            return {"error": f"{status}: {text[:300]}"}
        found = json.loads(text)
        asked = body.get("n", 1)
        if len(found["choices"]) != asked:
            return {"error": f"{asked} texts asked, {len(found['choices'])} in the answer"}
        stats, memory = found["stats"], found["stats"]["memory"]
        return {
            "seconds": seconds,
            "texts": [choice["text"] for choice in found["choices"]],
            "tokens": found["completion_tokens"],
            "prompt_tokens": found["prompt_tokens"],
            "queue_s": stats["queue_s"],
            "forwards": sum(stats["forwards"].values()),
            "token_forwards": stats["token_forwards"],
            "peak_bytes": memory["process_peak_bytes"],
            "device_peak_bytes": memory["device_peak_bytes"],
        }


def no_answer(error: BaseException) -> str:
    return f"no answer: {type(error).__name__}: {error}"


def load(work: Work) -> Result:
    """One line of work for a server: `clients` that each send their list, or a soak for `soak_s`."""
    clients = [Client(work["url"]) for _ in work["clients"]]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(clients)) as pool:
        for client in clients:
            stack.callback(client.close)
            client.connect()
        if "soak_s" in work:
            return soak(pool, clients, work["clients"], work["soak_s"])
        began = time.perf_counter()
        results = list(pool.map(_one_after_the_other, clients, work["clients"]))
        return {"wall_s": time.perf_counter() - began, "results": results}


def _one_after_the_other(client: Client, bodies: list[Body]) -> list[Result]:
    """A closed loop: the next request is sent as soon as the last is answered."""
    return [client.ask(body) for body in bodies]


# --- soak: all that users do, for a while ------------------------------------------------------------


def soak(
    pool: ThreadPoolExecutor, clients: list[Client], lists: list[list[Work]], seconds: float
) -> Result:
    """Every client goes round its list of {"kind", "body", …} until the time is over.

    answered, refused (a wrong request, told so), cancelled (left by us): as meant. lost: all else.
    """
    outcomes: Counter[str] = Counter(dict.fromkeys(("answered", "refused", "cancelled", "lost"), 0))
    kinds: Counter[str] = Counter()
    told: list[str] = []
    latencies: list[float] = []
    lock = threading.Lock()
    began = time.monotonic()

    def go_round(client: Client, items: list[Work]) -> None:
        for item in itertools.cycle(items):
            sent = time.monotonic()
            if sent >= began + seconds:
                return
            try:
                outcome = MANNERS[item["kind"]](client, item)
            except NO_ANSWER as error:
                client.close()
                outcome = no_answer(error)
            latency = time.monotonic() - sent
            as_meant = outcome in outcomes
            with lock:
                kinds[item["kind"]] += 1
                outcomes[outcome if as_meant else "lost"] += 1
                if outcome == "answered":
                    latencies.append(latency)
                elif not as_meant and len(told) < TOLD:
                    told.append(f"{item['kind']}: {outcome}")
            if not as_meant:
                time.sleep(0.1)  # a server that is gone is not asked a million times

    list(pool.map(go_round, clients, lists))
    return {
        **outcomes,
        "sent": sum(kinds.values()),
        "kinds": dict(kinds),
        "wall_s": time.monotonic() - began,
        "latencies": latencies,
        "told": told,
    }


def _whole(client: Client, item: Work) -> str:
    return str(client.ask(item["body"]).get("error", "answered"))


def _stream(client: Client, item: Work) -> str:
    """Read a stream to its end; or, with `leave_after` denoising events, leave it there."""
    seen, last = 0, ""
    client.send("POST", "/generate", {**item["body"], "stream": True, "denoising": True})
    answer = client.response()
    if answer.status != 200:
        return f"{answer.status}: {answer.read().decode()[:300]}"
    for raw in answer:
        line = raw.decode().strip()
        last = line or last
        seen += '"denoising"' in line
        if "leave_after" in item and seen >= item["leave_after"]:
            client.close()
            return "cancelled"
    return "answered" if last.startswith('data: {"done"') else f"a stream that ends with {last!r}"


def _hang_up(client: Client, item: Work) -> str:
    """Send a request and be gone soon after, mostly before its answer."""
    client.send("POST", "/generate", item["body"])
    if not select.select([client.connection.sock], [], [], item["after_s"])[0]:
        client.close()
        return "cancelled"
    answer = client.response()
    text = answer.read().decode()
    return "answered" if answer.status == 200 else f"{answer.status}: {text[:300]}"


def _wrong(client: Client, item: Work) -> str:
    """A request that must be refused with the status given, and with an error for programs."""
    status, text = client.text("POST", "/generate", item["body"])
    if status == item["status"] and text.startswith('{"error":'):
        return "refused"
    return f"{status} instead of {item['status']}: {text[:300]}"


MANNERS: dict[str, Callable[[Client, Work], str]] = {
    "short": _whole,
    "long": _whole,
    "several": _whole,
    "streamed": _stream,
    "left": _stream,
    "hung_up": _hang_up,
    "wrong": _wrong,
}


# --- the same requests without a server --------------------------------------------------------------


class Library:
    """`mdm.generate.fill` on one request at a time, with weights, dtype and threads of the server."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import torch

        from mdm.checkpoint import load_denoiser
        from mdm.commands import to_device

        torch.set_num_threads(threads)
        self.denoiser = load_denoiser(model, dtype=getattr(torch, dtype))
        to_device(self.denoiser, None)  # where the server puts it: the GPU if there is one

    def __call__(self, work: Work) -> Result:
        """One line of work: the requests of all clients, one after the other."""
        began = time.perf_counter()
        results = [[self.fill(body) for body in own] for own in work["clients"]]
        return {"wall_s": time.perf_counter() - began, "results": results}

    def fill(self, body: Body) -> Result:
        """What `ask` tells, as far as there is such a thing here."""
        from mdm.canvas import SamplerSettings
        from mdm.generate import encode, fill, request_of

        began = time.perf_counter()
        request = request_of(
            body.get("prompt"),
            body.get("prefix"),
            body.get("suffix"),
            body.get("span"),
            body.get("gen_length", 1),
        )
        hole = encode(self.denoiser.vocab, request, key=(body["seed"], 0))
        settings = SamplerSettings(steps=body["steps"], temperature=body["temperature"])
        (found,) = fill(self.denoiser, [hole], settings)
        return {
            "seconds": time.perf_counter() - began,
            "texts": [found.text],
            "tokens": found.num_tokens,
            "forwards": found.nfe,
        }


def main(arguments: list[str]) -> None:
    """Answer lines of work until there are no more."""
    work: Callable[[Work], Result]
    if arguments[0] == "library":
        work = Library(arguments[1], arguments[2], int(arguments[3]))
    else:
        work = load
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
