"""Who may call the server."""

import pytest

from mdm.errors import ConfigError
from mdm.serve.access import KEY_VARIABLE, allowed_hosts, check_access, is_loopback, read_keys

KEY = "k" * 12


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_public_address_needs_a_key_or_a_word():
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0 can be reached.*--open-to-all"):
        check_access("0.0.0.0", [], open_to_all=False)
    check_access("0.0.0.0", [KEY], open_to_all=False)
    check_access("0.0.0.0", [], open_to_all=True)
    check_access("127.0.0.1", [], open_to_all=False)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_keys(None) == []
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    assert read_keys(None) == [KEY]
    file = tmp_path / "keys"
    file.write_text(f"{KEY}1\n\n{KEY}2\n")
    assert read_keys(file) == [f"{KEY}1", f"{KEY}2"]


@pytest.mark.parametrize("bad", ["short", "with spaces in it", "ü" * 12, "x" * 513])
def test_a_key_that_is_none(tmp_path, bad):
    file = tmp_path / "keys"
    file.write_text(bad)
    with pytest.raises(ConfigError, match=f"{len(bad)} characters") as caught:
        read_keys(file)
    assert bad not in str(caught.value)


def test_a_file_without_keys(tmp_path):
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(tmp_path / "keys")


def test_host_names():
    own = allowed_hosts("127.0.0.1", ["box"])
    assert {"localhost", "127.0.0.1", "[::1]", "box"} == set(own)
    assert "[::2]" not in own
    assert allowed_hosts("0.0.0.0", []) is None
    assert allowed_hosts("0.0.0.0", ["api.example.org"]) == ["api.example.org"]
    assert "127.0.0.2" in allowed_hosts("127.0.0.2", [])
