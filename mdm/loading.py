"""What every loader of model folders shares: names, silence, one kind of error, and no missing weight."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, MdmError, check_known

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(name: str) -> torch.dtype:
    """The number type that a model computes in. Raises ConfigError for a name not in DTYPES."""
    import torch

    check_known("dtype", name, DTYPES)
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def may_be_hub_name(source: str) -> bool:
    """Can this be `owner/name` of a hub? Below a folder that is here it is a path, mistyped or not."""
    path = Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.exists():
        return False
    return not path.parent.is_dir()


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn whatever the loading libraries raise into one clear CheckpointError."""
    try:
        yield
    except MdmError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot load a model from {source!r} ({type(error).__name__}: {reason});"
            " give a model folder, a .gguf file, a hub name, or `embedded`"
        ) from error


def require_complete(source: str, loading: dict[str, Any], *, known_only: bool = False) -> None:
    """Raise CheckpointError if weights were missing or of another shape.

    `loading` is what `from_pretrained` tells of it. With `known_only` weights that the model has no
    place for are an error, too: then names were misread.
    """
    found: dict[str, Collection[Any]] = {
        "missing": loading["missing_keys"],
        "of another shape": loading["mismatched_keys"],
    }
    if known_only:
        found["without a place"] = loading["unexpected_keys"]
    if any(found.values()):
        told = (
            f"{len(keys)} {what} ({', '.join(sorted(map(str, keys))[:3])})"
            for what, keys in found.items()
        )
        raise CheckpointError(
            f"the weights of {source!r} do not fit its config.json: {', '.join(told)}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notices of `transformers` while it loads or saves.

    What matters among them (missing weights, say) is checked by us and raised.
    """
    from transformers.utils import logging as notices

    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one progress bar cannot be switched off
            yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()
