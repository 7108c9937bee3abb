"""The processes of `mdm bench serve`: servers, and those who ask; each is ended by its own handle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from mdm.errors import MdmError
from mdm.serve.access import KEY_VARIABLE

from .serve_load import NO_ANSWER, PATIENCE_S, Client, no_answer
from .serve_requests import MOST_CLIENTS, ServeBench

MAX_ROWS = {"engine": 16, "serial": 1}
START_S = 300.0  # for imports and weights
END_S = 60.0  # from SIGTERM to the end
LAST_WORDS = 1500


class BenchError(MdmError, RuntimeError):
    """A process of the benchmark ended, or did not answer; the text has its last words."""


class Process:
    """A Python process of the benchmark: it logs to a file, and is ended by its own handle."""

    def __init__(
        self, name: str, arguments: Sequence[str], folder: Path, *, talks: bool = False
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if key != KEY_VARIABLE}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                env=environment,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                if pipe is not None:
                    pipe.close()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def failure(self, what: str) -> BenchError:
        """The error that says so, with the last words of the process."""
        code = self.process.poll()
        state = "it still runs" if code is None else f"it ended with status {code}"
        last = self.said().strip()[-LAST_WORDS:] or "nothing"
        return BenchError(f"{self.name}: {what} ({state}); its last words: {last}")


class Server(Process):
    """`mdm serve` on a free port of loopback."""

    def __init__(self, name: str, settings: ServeBench, folder: Path) -> None:
        options = {
            "model": settings.model,
            "host": "127.0.0.1",
            "port": 0,
            "dtype": settings.dtype,
            "threads": settings.threads,
            "max-rows": MAX_ROWS[name],
            "max-queue": MOST_CLIENTS,
            "drain-seconds": 5,
        }
        flags = [f"--{option}={value}" for option, value in options.items()]
        super().__init__(name, ["mdm.cli", "serve", *flags], folder)
        self.url = ""

    def wait(self) -> None:
        """Until it takes requests. Raises BenchError if it does not come to that."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            self.check()
            found = re.search(r"serving .* at (http://\S+:\d+)", self.said())
            if found:
                self.url = found.group(1)
                with contextlib.suppress(*NO_ANSWER):  # it has the port, but does not listen yet
                    if self._get("/ready")[0] == 200:
                        return
            time.sleep(0.1)
        raise self.failure(f"it did not start within {START_S:g} s")

    def check(self) -> None:
        """Raise BenchError if it has ended."""
        if self.process.poll() is not None:
            raise self.failure("the server is gone")

    def _get(self, path: str) -> tuple[int, str]:
        client = Client(self.url)
        try:
            return client.text("GET", path)
        finally:
            client.close()

    def get(self, path: str) -> str:
        """The body of an answer. Raises BenchError if there is none."""
        try:
            status, text = self._get(path)
        except NO_ANSWER as error:
            raise self.failure(f"GET {path}: {no_answer(error)}") from error
        if status != 200:
            raise self.failure(f"GET {path} gave {status}: {text[:300]}")
        return text

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/stats"))
        return found

    def counters(self) -> dict[str, float]:
        """Every metric of /metrics, summed over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums


class Asker(Process):
    """The process that sends requests, or that fills them itself (serve_load.py)."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        super().__init__(name, ["mdm.benchmarks.serve_load", *arguments], folder, talks=True)

    def wait(self) -> None:
        """Until it is ready."""
        self.receive(START_S)

    def ask(self, clients: Sequence[Sequence[Any]], **more: Any) -> dict[str, Any]:
        """Give it the lists of the clients; what came of them."""
        self.send(clients, **more)
        return self.receive(PATIENCE_S * max(len(own) for own in clients))

    def send(self, clients: Sequence[Sequence[Any]], **more: Any) -> None:
        line = json.dumps({"clients": clients, **more}) + "\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self.failure("it takes no work") from error

    def has_answered(self, seconds: float) -> bool:
        """Wait so long for an answer (or its end)."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def receive(self, seconds: float) -> dict[str, Any]:
        if not self.has_answered(seconds):
            raise self.failure(f"no answer within {seconds:g} s")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
            raise self.failure("it ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer
