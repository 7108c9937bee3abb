"""The problems of MBPP (Austin et al., arXiv 2108.07732) from a local file, in either of its forms.

mbpp.jsonl has text, code, test_list, test_setup_code; sanitized-mbpp.json has prompt, code,
test_list, test_imports. A program is the whole file: prompts are prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdm.errors import DataError

from .json_files import read_lines, read_list
from .sandbox import Check

NAME = "MBPP"


def read_mbpp(path: str | Path) -> dict[str, dict[str, Any]]:
    """The problems by "MBPP/<number>", in order.

    Raises DataError, naming file and row, if a field is missing or a number occurs twice.
    """
    problems: dict[str, dict[str, Any]] = {}
    for where, row in (read_list if Path(path).suffix == ".json" else read_lines)(path):
        tests = row.get("test_list")
        if not tests or not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
            raise DataError(f"{where}: test_list must be a list of assertions; got {tests!r}")
        task_id = mbpp_id(row.get("task_id"))
        if task_id is None:
            raise DataError(f"{where}: task_id must be a number; got {row.get('task_id')!r}")
        if task_id in problems:
            raise DataError(f"{where}: {task_id} is there twice")
        problems[task_id] = {**row, "task_id": task_id}
    if not problems:
        raise DataError(f"{path} has no problems")
    return problems


def mbpp_id(value: object) -> str | None:
    """ "MBPP/11" of 11, "11", "MBPP/11" or EvalPlus' "Mbpp/11"; None if it is no such id."""
    text = str(value)
    name, slash, number = text.rpartition("/")
    known = not slash or name.upper() == NAME
    return f"{NAME}/{number}" if known and number.isdecimal() else None


def mbpp_check(problem: Mapping[str, Any], program: str) -> Check:
    """A program and its tests: imports, then the set-up, which may use the program, then asserts."""
    lines = [*problem.get("test_imports", ()), problem.get("test_setup_code", "")]
    return Check(program, "\n".join(filter(None, [*lines, *problem["test_list"]])))
