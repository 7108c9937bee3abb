"""Where finished models are: the default of every `--model`."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import SETTINGS_FILE
from .errors import CheckpointError


def last_finished(runs: str | Path = "runs") -> Path:
    """`final/` of the run that finished last. Raises CheckpointError if there is none."""
    finished = [path.parent for path in Path(runs).glob(f"*/final/{SETTINGS_FILE}")]
    if not finished:
        raise CheckpointError(
            f"no finished run in {str(runs)!r}; train one with `mdm train`, or name a model with --model"
        )
    return max(finished, key=lambda path: (path / SETTINGS_FILE).stat().st_mtime)
