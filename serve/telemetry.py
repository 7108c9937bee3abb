"""What the server counts, for Prometheus and for people.

Tokens are visible ones: after the prompt, up to the first end token or stop string; prompt, padding
and cancelled requests never count as generated. Forwards are rows: guidance counts 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .errors import ServeError
from .memory import Reading, highest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Telemetry:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = time.time()
        self.highest = Reading(0, 0)
        self.process = psutil.Process()
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "mdm_requests", "Requests answered", ["endpoint", "outcome"], registry=own
        )
        self.queue = Gauge("mdm_queue_requests", "Requests waiting for a place", registry=own)
        self.rows = Gauge("mdm_rows_in_work", "Texts and likelihoods in work", registry=own)
        self.batch = Histogram(
            "mdm_batch_rows", "Rows in a forward", ["kind"], buckets=ROWS, registry=own
        )
        self.forward_seconds = Histogram(
            "mdm_forward_seconds", "Time of a forward", ["kind"], buckets=SECONDS, registry=own
        )
        self.prompt_tokens = Counter(
            "mdm_prompt_tokens", "Tokens of prompts", ["model"], registry=own
        )
        self.tokens = Counter(
            "mdm_tokens", "Visible tokens of finished requests", ["model"], registry=own
        )
        self.forwards = Counter(
            "mdm_forwards", "Forwards, a row each", ["model", "kind"], registry=own
        )
        self.token_forwards = Counter(
            "mdm_token_forwards", "Positions computed", ["model"], registry=own
        )
        self.per_forward = Gauge(
            "mdm_tokens_per_forward",
            "Visible tokens over forwards, of finished requests to generate",
            ["model"],
            registry=own,
        )
        self.seconds = Histogram(
            "mdm_request_seconds", "Arrival to result", ["endpoint"], buckets=SECONDS, registry=own
        )
        self.queue_seconds = Histogram(
            "mdm_queue_seconds", "Arrival to first forward", buckets=SECONDS, registry=own
        )
        memory = {
            "mdm_process_resident_bytes": ("Resident memory", self._resident_bytes),
            "mdm_process_resident_peak_bytes": (
                "Highest resident memory in a forward",
                lambda: self.highest.rss_peak,
            ),
        }
        if device.type == "cuda":
            memory |= {
                "mdm_device_allocated_bytes": ("Allocated on the GPU", self._device_bytes),
                "mdm_device_peak_bytes": (
                    "Highest allocated on the GPU in a forward",
                    lambda: self.highest.device_peak or 0,
                ),
            }
        for name, (text, function) in memory.items():
            Gauge(name, text, registry=own).set_function(function)
        self._tokens: dict[str, int] = {}
        self._generating: dict[str, int] = {}
        self._finished, self._finished_s = 0, 0.0
        self._waiting: Callable[[], int] = lambda: 0
        self._rows_in_work: Callable[[], int] = lambda: 0

    def _resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def _device_bytes(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    # --- from the engine ---------------------------------------------------------------------------

    def watch(self, waiting: Callable[[], int], rows_in_work: Callable[[], int]) -> None:
        """Where to ask how many requests wait and how many rows are in work."""
        self._waiting, self._rows_in_work = waiting, rows_in_work
        self.queue.set_function(waiting)
        self.rows.set_function(rows_in_work)

    def forward(self, kind: str, rows: int, seconds: float, reading: Reading) -> None:
        """One forward of a model."""
        self.batch.labels(kind).observe(rows)
        self.forward_seconds.labels(kind).observe(seconds)
        self.highest = highest(self.highest, reading)

    def count_forwards(self, model: str, kind: str, forwards: int, tokens: int) -> None:
        """Forwards of one row, and the positions they computed."""
        self.forwards.labels(model, kind).inc(forwards)
        self.token_forwards.labels(model).inc(tokens)

    # --- from the endpoints ------------------------------------------------------------------------

    def finished(
        self,
        endpoint: str | None,
        model: str,
        *,
        prompt: int,
        tokens: int,
        forwards: int,
        seconds: float,
        queue_s: float,
    ) -> None:
        """One request was answered by a model; `endpoint` None: that was only a part of it."""
        if endpoint is not None:
            self.requests.labels(endpoint, "ok").inc()
            self.seconds.labels(endpoint).observe(seconds)
        self.prompt_tokens.labels(model).inc(prompt)
        self.tokens.labels(model).inc(tokens)
        self._tokens[model] = self._tokens.get(model, 0) + tokens
        self._generating[model] = self._generating.get(model, 0) + forwards
        if self._generating[model]:
            self.per_forward.labels(model).set(self._tokens[model] / self._generating[model])
        self.queue_seconds.observe(queue_s)
        self._finished += 1
        self._finished_s += seconds - queue_s

    def not_finished(self, endpoint: str, error: ServeError) -> None:
        """One request ended without a result. An error that is told twice counts once."""
        if not error.counted:
            error.counted = True
            self.requests.labels(endpoint, error.code).inc()

    def mean_seconds(self) -> float | None:
        """Mean seconds of a request from its first forward to its result."""
        return self._finished_s / self._finished if self._finished else None

    # --- for readers -------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        """The text Prometheus reads."""
        return generate_latest(self.registry)

    def summary(self) -> dict[str, Any]:
        """The same numbers for people."""
        requests: dict[str, dict[str, int]] = {}
        for sample in self._samples("mdm_requests_total"):
            by_outcome = requests.setdefault(sample.labels["endpoint"], {})
            by_outcome[sample.labels["outcome"]] = int(sample.value)
        models: dict[str, dict[str, Any]] = {}
        for name, key in (
            ("mdm_prompt_tokens_total", "prompt_tokens"),
            ("mdm_tokens_total", "tokens"),
            ("mdm_token_forwards_total", "token_forwards"),
        ):
            for sample in self._samples(name):
                models.setdefault(sample.labels["model"], {})[key] = int(sample.value)
        for sample in self._samples("mdm_forwards_total"):
            own = models.setdefault(sample.labels["model"], {}).setdefault("forwards", {})
            own[sample.labels["kind"]] = int(sample.value)
        for sample in self._samples("mdm_tokens_per_forward"):
            models[sample.labels["model"]]["tokens_per_forward"] = round(sample.value, 3)
        memory = {
            "resident_bytes": self._resident_bytes(),
            "resident_peak_bytes": self.highest.rss_peak,
        }
        if self.device.type == "cuda":
            memory["device_allocated_bytes"] = self._device_bytes()
            memory["device_peak_bytes"] = self.highest.device_peak or 0
        return {
            "uptime_s": round(time.time() - self.began, 1),
            "requests": requests,
            "models": models,
            "queue_requests": self._waiting(),
            "rows_in_work": self._rows_in_work(),
            "mean_request_s": self.mean_seconds(),
            "memory": memory,
        }

    def _samples(self, name: str) -> list[Any]:
        return [
            sample
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        ]
