"""Who may call the server: addresses, API keys, host names. Knows no web framework."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Collection
from pathlib import Path

from mdm.errors import ConfigError

KEY_VARIABLE = "MDM_API_KEY"
KEY_FORM = re.compile(r"[\x21-\x7e]{8,512}")


def is_loopback(host: str) -> bool:
    """Does this address name this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None) -> list[str]:
    """API keys: one a line of the file, or that of the environment. Raises ConfigError.

    Never an argument of the command line: everybody on a machine can read those.
    """
    if file is not None:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in keys if key]
        if not keys:
            raise ConfigError(f"{file} holds no API key; write one a line")
    else:
        keys = [key for key in [os.environ.get(KEY_VARIABLE, "").strip()] if key]
    for key in keys:
        if not KEY_FORM.fullmatch(key):
            raise ConfigError(
                f"an API key has {len(key)} characters or some that are not plain; it takes 8 to 512"
                " printable ASCII characters without spaces"
            )
    return keys


def check_access(host: str, keys: Collection[str], *, open_to_all: bool) -> None:
    """Raise ConfigError if strangers could use the server and nobody said they may."""
    if is_loopback(host) or keys or open_to_all:
        return
    raise ConfigError(
        f"--host {host} can be reached from other machines; set an API key ({KEY_VARIABLE} or"
        " --api-key-file), or say --open-to-all if that is meant"
    )


def allowed_hosts(host: str, more: Collection[str]) -> list[str] | None:
    """Names that requests may call the server by; None = any.

    On loopback only its own: a page of a stranger that has its name point to 127.0.0.1 (DNS
    rebinding) is turned away. A public server is called by names we cannot know, and has a key.
    """
    if not is_loopback(host):
        return list(more) or None
    literal = f"[{host}]" if ":" in host else host
    return ["localhost", "127.0.0.1", "[::1]", literal, *more]
