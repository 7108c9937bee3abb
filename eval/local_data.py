"""Data sets of lm-eval tasks from local files, with the splits the task asks for.

A file is JSONL, JSON (a list, or an object with one list in it), Parquet or CSV; a folder holds one
file a split. lm-eval calls `dataset` through a task's `custom_dataset`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdm.errors import DataError

from .human_eval_data import human_eval_problems
from .json_files import read_lines

Rows = list[dict[str, Any]]
HUMAN_EVAL = "openai/openai_humaneval"
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def dataset(
    *,
    mdm_files: dict[str, str],
    mdm_source: str | None,
    mdm_split: str | None = None,
    **unused: Any,
) -> Any:
    """The data set of one task: `mdm_files` maps splits to files ("*" = the split evaluated on).

    Of splits besides `mdm_split`, the one evaluated on, only those given are there; the others are
    empty, so that no question finds itself among its examples.
    """
    import datasets

    splits: dict[str, Rows] = {}
    for split, file in mdm_files.items():
        if split == "*" and Path(file).is_dir():
            splits |= read_folder(Path(file))
        elif split == "*":
            cut = SPLITTERS.get(mdm_source or "", whole)
            splits = cut(read_rows(Path(file))) | splits
        else:
            splits[split] = read_rows(Path(file))
    if not mdm_files:
        assert mdm_source == HUMAN_EVAL, mdm_source
        splits["test"] = list(human_eval_problems().values())
    if mdm_split is not None and "*" in splits:
        splits.setdefault(mdm_split, splits.pop("*"))
    return _Splits(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}, mdm_split
    )


class _Splits(dict[str, Any]):
    """Splits by name; "*" stands for every name if it is not known which one is evaluated on."""

    def __init__(self, splits: dict[str, Any], evaluated: str | None) -> None:
        super().__init__(splits)
        self.evaluated = evaluated

    def __missing__(self, split: str) -> Any:
        if "*" in self:
            return self["*"]
        if self.evaluated is not None and self.evaluated in self:
            return self[self.evaluated].select([])
        raise DataError(
            f"the local data has no split {split!r} (it has {', '.join(sorted(self))}); give it"
            f" with --data TASK:{split}=FILE"
        )


def whole(rows: Rows) -> dict[str, Rows]:
    """One file for whatever split is evaluated."""
    return {"*": rows}


def mbpp_splits(rows: Rows) -> dict[str, Rows]:
    """MBPP's published splits by task_id; a file that is only a part of it counts as the test split."""
    ranges = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
    splits = {
        name: [row for row in rows if first <= row.get("task_id", 0) <= last]
        for name, (first, last) in ranges.items()
    }
    if all(splits.values()):
        return splits
    return {"test": rows}


SPLITTERS: dict[str, Callable[[Rows], dict[str, Rows]]] = {
    "google-research-datasets/mbpp": mbpp_splits,
}


def read_folder(folder: Path) -> dict[str, Rows]:
    """One split a file: test.jsonl, train.parquet, …"""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if not files:
        raise DataError(f"{folder} has no file of the form SPLIT.jsonl (or {', '.join(SUFFIXES)})")
    return {file.stem: read_rows(file) for file in files}


def read_rows(path: Path) -> Rows:
    """The rows of one file. Raises DataError that names the file, and the line of a broken one."""
    import datasets

    if not path.is_file():
        raise DataError(f"no data file at {str(path)!r}")
    if path.suffix == ".jsonl":
        rows = [row for _, row in read_lines(path)]
    elif path.suffix == ".json":
        rows = _json_list(path)
    elif path.suffix in (".parquet", ".csv"):
        kind = path.suffix[1:]
        try:
            rows = list(datasets.load_dataset(kind, data_files=str(path), split="train"))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"{path} cannot be read as {kind}: {reason}") from error
    else:
        raise DataError(f"{path} has an unknown format; use one of {', '.join(SUFFIXES)}")
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _json_list(path: Path) -> Rows:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):  # {"canary": …, "examples": […]}
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold a list of objects, or an object with one such list")
    return value
