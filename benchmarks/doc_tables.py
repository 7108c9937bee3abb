"""Tables in the docs that come from records: `mdm bench tables` writes them, and tells if one is stale.

A page marks the place, and what stands between is replaced by the newest record of that benchmark:

    <!-- bench:serve -->
    …
    <!-- /bench -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mdm.errors import ConfigError, check_known

from .catalogue import CATALOGUE

_MARKED = re.compile(
    r"^<!-- bench:(?P<name>[a-z-]+) -->\n(?P<table>.*?)^<!-- /bench -->$", re.MULTILINE | re.DOTALL
)
_MARK = re.compile(r"^<!-- /?bench.*$", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    """The pages of a checkout that may have tables: README.md and docs/*.md."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [path for path in found if path.is_file()]


def names(text: str) -> list[str]:
    """The benchmarks whose tables a page has. Raises ConfigError if a mark is unknown or unpaired."""
    found = [match["name"] for match in _MARKED.finditer(text)]
    for name in found:
        check_known("benchmark", name, CATALOGUE)
    marks = _MARK.findall(text)
    if len(marks) != 2 * len(found):
        raise ConfigError(
            f"marks of tables must be pairs of <!-- bench:NAME --> and <!-- /bench --> lines; got {marks}"
        )
    return found


def table(name: str, results: Path) -> str:
    """The newest record of a benchmark as Markdown. Raises ConfigError if there is none that has it all."""
    benchmark = CATALOGUE[name]
    records = benchmark.records(results)
    if not records:
        raise ConfigError(f"no record of {name} in {results / benchmark.file}")
    newest = max(records, key=lambda record: str(record["time"]))
    try:
        return benchmark.markdown(newest)
    except (KeyError, TypeError) as error:  # no such field, or null where a number is shown
        raise ConfigError(
            f"the newest record of {name} ({newest['time']}) lacks what its table needs"
            f" ({type(error).__name__}: {error}), as an older version made it or too little was measured;"
            f" again: `mdm bench all --only {name}`"
        ) from error


def filled(text: str, results: Path) -> tuple[str, list[str]]:
    """A page with its tables made anew, and why some were left as they are.

    Raises ConfigError if a mark is unknown or unpaired.
    """
    notes = []
    names(text)

    def renewed(match: re.Match[str]) -> str:
        try:
            made = table(match["name"], results)
        except ConfigError as error:
            notes.append(f"{error}; its table is left as it is")
            return match[0]
        return f"<!-- bench:{match['name']} -->\n\n{made}\n\n<!-- /bench -->"

    return _MARKED.sub(renewed, text), notes


def renew(paths: Iterable[Path], results: Path, *, write: bool) -> tuple[list[Path], list[str]]:
    """The pages whose tables differ from the records, and notes; with `write` they are put right.

    Raises ConfigError that names the page if a mark in it is unknown or unpaired.
    """
    stale, notes = [], []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        try:
            new, told = filled(text, results)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        notes += [f"{path}: {note}" for note in told]
        if new != text:
            stale.append(path)
            if write:
                path.write_text(new, encoding="utf-8")
    return stale, notes
