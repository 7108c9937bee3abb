"""The store of answers: what was written is read again, and nothing damaged is passed over."""

import pytest

from mdm.errors import DataError
from mdm.eval.responses import Responses, key_of


def test_a_key_depends_on_values_not_on_their_order():
    assert key_of({"a": 1, "b": (2, 3)}, "x") == key_of({"b": [2, 3], "a": 1}, "x")
    assert len({key_of(1), key_of(2), key_of("1"), key_of(1, 2), key_of([1, 2]), key_of(1.5)}) == 6
    assert len(key_of("\udc80")) == len(key_of("ü"))  # a surrogate is no error


def test_without_a_file_answers_are_kept_in_memory():
    responses = Responses(None)
    assert "k" not in responses
    responses.add("k", {"text": "x"})
    assert "k" in responses
    assert responses["k"] == {"text": "x"}


def test_a_second_store_knows_what_the_first_wrote(tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    first = Responses(path)
    first.add("k", {"text": "ü\nx", "value": float("nan")})
    first.add("l", {"text": ""})
    second = Responses(path)
    assert second["k"] == {"text": "ü\nx", "value": None}  # JSON has no NaN
    assert second["l"] == {"text": ""}
    second.add("m", {})
    assert set(Responses(path).known) == {"k", "l", "m"}


def torn(path):
    """A file whose writer was killed in the middle of the second line."""
    responses = Responses(path)
    responses.add("k", {"text": "x"})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    return path


def test_a_torn_last_line_is_lost_and_the_rest_kept(tmp_path):
    path = torn(tmp_path / "responses.jsonl")
    responses = Responses(path)
    assert set(responses.known) == {"k"}
    responses.add("l", {"text": "y"})
    assert responses["l"] == {"text": "y"}


def test_after_a_torn_line_it_goes_on_more_than_once(tmp_path):
    path = torn(tmp_path / "responses.jsonl")
    Responses(path).add("l", {"text": "y"})
    assert set(Responses(path).known) == {"k", "l"}


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "responses.jsonl"
    Responses(path).add("k", {"text": "x"})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    responses = Responses(path)
    assert "k" in responses
    responses.add("l", {})
    assert set(Responses(path).known) == {"k", "l"}


@pytest.mark.parametrize("damage", [b'{"key": "k", "resp', b'{"key": "k"}', b"[]", b"\xff", b"1"])
def test_a_damaged_line_in_the_middle_is_refused(tmp_path, damage):
    path = tmp_path / "responses.jsonl"
    responses = Responses(path)
    for key in "abc":
        responses.add(key, {})
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"responses\.jsonl, line 2 is damaged.*remove the line"):
        Responses(path)
