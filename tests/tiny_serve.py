"""A server with tiny models for tests: in a thread, on a free port of loopback, with a real uvicorn.

`Gate` holds the student's forwards until a test lets them through, so that what happens between two
forwards can be tested without any timing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_model

from mdm.autoregressive import Autoregressive
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.serve.app import make_app
from mdm.serve.limits import Limits
from mdm.serve.models import hold
from mdm.serve.service import Service
from mdm.vocab import read_vocab

ROOT = Path(__file__).parent.parent
WORKSPACE_MIB = 512


def byte_vocab():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return read_vocab(tokenizer)


def byte_student(
    seed: int = 0, *, block_size: int | None = None, attention: str | None = None
) -> Denoiser:
    """A random student over bytes (ids 0 … 255, start 256, end 257, pad 258, mask 259)."""
    vocab = byte_vocab().with_mask(None)
    model = tiny_model("llama", len(vocab), layers=2, seed=seed)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=True, block_size=block_size, attention=attention).eval()


def byte_teacher(seed: int = 1) -> Autoregressive:
    vocab = byte_vocab()
    return Autoregressive(tiny_model("llama", len(vocab), layers=2, seed=seed), vocab)


def tiny_service(*, teacher: bool = False, student: Denoiser | None = None, **limits) -> Service:
    """A service with a tiny student called "tiny" (and a teacher called "ar")."""
    held = hold(student or byte_student(), name="tiny", source="runs/tiny/final")
    beside = hold(byte_teacher(), name="ar", source="path/to/ar") if teacher else None
    return Service(held, beside, Limits(**{"workspace_mib": WORKSPACE_MIB, **limits}))


def before_forwards(service: Service, call) -> None:
    """`call(x_BQ)` with the tokens of every forward of the student; if it raises, the forward fails.

    Of a student with blocks these are those that are read, and forwards of likelihoods are among them.
    """
    denoiser = service.student.model
    if denoiser.block_size is not None:
        denoiser.model.base_model.register_forward_pre_hook(lambda _, given: call(given[0]))
        return
    real = denoiser.rows

    def rows(xt_BL, *arguments, **options):
        call(xt_BL)
        return real(xt_BL, *arguments, **options)

    denoiser.rows = rows


class Gate:
    """Every forward of the student waits for `let`; afterwards `open` lets all through.

    seen  the number of rows of each forward, in order
    """

    def __init__(self, service: Service) -> None:
        self.permits = threading.Semaphore(0)
        self.seen: list[int] = []
        self._open = False
        self._arrived = threading.Semaphore(0)

        def hold(xt_BL):
            self._arrived.release()
            if not self._open:
                assert self.permits.acquire(timeout=30), "nobody let this forward through"
            self.seen.append(len(xt_BL))

        before_forwards(service, hold)

    def wait(self) -> None:
        """Until a forward has begun (and now waits to be let through)."""
        assert self._arrived.acquire(timeout=30), "no forward has begun"

    def let(self, forwards: int = 1) -> None:
        for _ in range(forwards):
            self.permits.release()

    def open(self) -> None:
        self._open = True
        self.permits.release()


@contextlib.contextmanager
def running(service: Service, *, drain_s: float = 10.0, **options) -> Iterator[str]:
    """Serve in a thread; yields the base URL. Options are those of `make_app`."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = make_app(service, **options)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=round(drain_s) + 5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server did not start in time"
            time.sleep(0.01)
        yield url
    finally:
        service.engine.drain(drain_s)
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def client(url: str, **options) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False, **options)


def eventually(condition, what: str, seconds: float = 30.0) -> None:
    """Wait until it holds; a test of behaviour, not of time, so the limit is generous."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.01)


class Process:
    """`mdm serve …` in a folder; its log is read as it comes."""

    def __init__(self, folder, *arguments, **environment):
        command = [sys.executable, "-m", "mdm.cli", "serve", "--port", "0", *map(str, arguments)]
        own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command, cwd=folder, env=own, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"at (http://\S+)", line):
                self.url = found[1]
            if "startup complete" in line:
                break
        assert self.url, "".join(self.log)
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end(signal.SIGKILL)

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self.reader.join()
        self.process.stderr.close()
        return code
