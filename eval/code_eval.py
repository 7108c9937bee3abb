"""lm-eval's code metric, run in our sandbox.

Its code tasks load the metric "code_eval" from a model hub, which would run generated code without
isolation. `in_place_of_code_eval` gives them this one instead; prompts and filters stay theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from .metrics import pass_at_k
from .progress import Progress
from .sandbox import Check, Limits, Verdict, run_checks


@dataclasses.dataclass
class CodeEval:
    """The metric's interface: candidates are checked against the test code of their reference.

    Verdicts are kept by program and tests, so that samples can name why they failed.
    """

    limits: Limits = Limits()
    workers: int | None = None
    verdicts: dict[tuple[str, str], Verdict] = dataclasses.field(default_factory=dict)
    collected: list[Check] | None = None

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **unused: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """(pass@k by name, verdicts by task) as the original metric returns them."""
        checks = [
            Check(program, tests)
            for tests, programs in zip(references, predictions, strict=True)
            for program in programs
        ]
        if self.collected is not None:
            self.collected += checks
            return {f"pass@{number}": 0.0 for number in k}, {}
        self.verify(checks)
        found: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        passed, total = [], []
        for task, (tests, programs) in enumerate(zip(references, predictions, strict=True)):
            own = [self.verdicts[program, tests] for program in programs]
            found[task] = [
                (i, {"task_id": task, "completion_id": i, "passed": v.passed, "result": v.reason})
                for i, v in enumerate(own)
            ]
            passed.append(sum(verdict.passed for verdict in own))
            total.append(len(own))
        ks = [number for number in k if min(total, default=0) >= number]
        values = {
            f"pass@{number}": sum(
                pass_at_k(n, c, number) for n, c in zip(total, passed, strict=True)
            )
            / len(total)
            for number in ks
        }
        return values, found

    def verify(self, checks: Sequence[Check], *, progress: Progress | None = None) -> None:
        """Run the checks that have no verdict yet, each once."""
        new = {(check.program, check.tests): check for check in checks}
        new = {key: check for key, check in new.items() if key not in self.verdicts}
        found = run_checks(
            list(new.values()),
            self.limits,
            workers=self.workers,
            progress=None if progress is None else lambda done: progress(),
        )
        self.verdicts |= dict(zip(new, found, strict=True))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """While active, checks are only noted, and scores are 0; at the end all are run at once."""
        self.collected = []
        try:
            yield
            checks, self.collected = self.collected, None
            self.verify(
                checks, progress=Progress("tests", len({(c.program, c.tests) for c in checks}))
            )
        finally:
            self.collected = None


# lm-eval's task modules are imported once a process and keep the object they found, so there is one.
METRIC = CodeEval()


@contextlib.contextmanager
def in_place_of_code_eval() -> Iterator[CodeEval]:
    """While active, `evaluate.load("code_eval")` gives our metric; others load as ever."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return METRIC if path == "code_eval" else original(path, *arguments, **options)

    with mock.patch.object(evaluate, "load", load):
        yield METRIC
