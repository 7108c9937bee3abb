"""What a user can have got wrong, by who can fix it. Programming errors of ours are asserts instead.

MdmError            anything below; the command line prints it in one line and exits with `exit_code`
├── ConfigError     a setting, a flag or a YAML key           → change the setting
├── DataError       a corpus, a file or a row of it            → change the data
├── VocabError      tokenizer, mask token or token ids         → change the tokenizer or the teacher
├── CheckpointError a model folder: missing, broken, disk full → give another folder, free the disk
├── TrainingError   training cannot go on (a loss is NaN)      → resume with other settings
├── RequestError    one request: too long, empty, a mask in it → change the request
└── SandboxError    programs cannot run safely on this machine → lower the level, other machine
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class MdmError(Exception):
    """Base of all errors a user can mend; the text names the value and the way out."""

    exit_code = 1


class ConfigError(MdmError, ValueError):
    """A setting is unknown, has the wrong type or does not fit the others."""

    exit_code = 2


class DataError(MdmError, ValueError):
    """A corpus is empty, missing, unreadable or has rows of the wrong form."""

    exit_code = 3


class VocabError(MdmError, ValueError):
    """Tokenizers differ, or a mask token clashes with a token in use."""

    exit_code = 4


class CheckpointError(MdmError, OSError):
    """A model folder is missing, incomplete or corrupt, or cannot be written."""

    exit_code = 5


class TrainingError(MdmError, RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""

    exit_code = 6


class RequestError(MdmError, ValueError):
    """One request cannot be served: it is empty, too long, or contains what it must not."""

    exit_code = 8


class SandboxError(MdmError, RuntimeError):
    """The sandbox for generated programs does not start, or is weaker than asked."""

    exit_code = 7


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The text for an unknown name: what it was, the nearest known name, and all known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})"


def check_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise a ConfigError that suggests the nearest name unless `name` is known."""
    if name not in known:
        raise ConfigError(unknown(kind, name, known))
