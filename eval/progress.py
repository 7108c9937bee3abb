"""How far a long evaluation is and when it will end, one line now and then on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY_SECONDS = 10.0


class Progress:
    """Counts finished requests of one kind."""

    def __init__(
        self, what: str, total: int, *, known: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total, self.known, self.clock = what, total, known, clock
        self.finished = 0
        self.began = self.shown = clock()
        if total and known:
            self._print(f"{known} of {known + total} known from an earlier run")

    def __call__(self, count: int = 1) -> None:
        """`count` more are finished."""
        self.finished += count
        now = self.clock()
        if now - self.shown < EVERY_SECONDS and self.finished < self.total:
            return
        self.shown = now
        seconds = now - self.began
        left = seconds / self.finished * (self.total - self.finished)
        self._print(f"{self.finished}/{self.total}, {_span(seconds)}, {_span(left)} left")

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"
