"""Callbacks for options that are lists with commas."""

from __future__ import annotations

import click


def parts(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, ...]:
    """The names in a list; none in an empty one."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """The whole numbers in a list. Raises click.BadParameter."""
    found = parts(context, option, value)
    if not all(part.isdecimal() for part in found):
        raise click.BadParameter(f"must be whole numbers like 0,1,2; got {value!r}")
    return tuple(map(int, found))


def shares(context: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    """The numbers in a list. Raises click.BadParameter."""
    try:
        return tuple(map(float, parts(context, option, value)))
    except ValueError as error:
        raise click.BadParameter(f"must be numbers like 0.8,1; got {value!r}") from error
