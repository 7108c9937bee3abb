"""The kinds of soft target, by name. A new kind is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ..targets import SoftTargets
from .left import left_only
from .suffix import suffix_scored

TARGETS: dict[str, Callable[..., SoftTargets]] = {"left": left_only, "suffix": suffix_scored}
