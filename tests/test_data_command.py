"""The commands `mdm data functions` and `mdm data inspect`."""

import json

import pytest
from click.testing import CliRunner
from tiny import byte_tokenizer

from mdm.errors import CheckpointError, ConfigError, DataError
from mdm.train.data_command import data

CODE = 'def f{0}(x):\n    """Add {0}."""\n    return x + {0}\n\n\n'


def run(*arguments):
    result = CliRunner().invoke(data, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def code(tmp_path):
    (tmp_path / "code").mkdir()
    for i in range(5):
        (tmp_path / "code" / f"{i}.py").write_text(CODE.format(i) + CODE.format(i + 10))
    return tmp_path / "code"


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_functions_become_rows_that_can_be_trained_on(tmp_path, code, tokenizer):
    output = tmp_path / "rows.jsonl"
    assert "10 functions" in run("functions", code, "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "response", "origin", "name", "line"}
    assert "3 functions" in run("functions", code, "--output", output, "--limit", 3)
    assert len(output.read_text().splitlines()) == 3
    text = run("inspect", output, "--tokenizer", tokenizer, "--set", "data.length=100")
    # Both functions of a file are on the same side.
    assert "train     1 documents, 1 rows of 100" in text
    assert "held_out  2 documents, 2 rows of 100" in text
    assert "learnt: 32 tokens\n    return x + " in text


def test_a_failure_keeps_the_old_rows(tmp_path, code):
    output = tmp_path / "rows.jsonl"
    output.write_text("old")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="no function"):
        run("functions", tmp_path / "empty.py", "--output", output)
    assert output.read_text() == "old"
    with pytest.raises(DataError, match="cannot write"):
        run("functions", code, "--output", tmp_path / "no" / "rows.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code", "empty.py", "rows.jsonl"]


def test_inspect_counts_what_is_left_out(tmp_path, code, tokenizer):
    (code / "copy.py").write_text((code / "0.py").read_text())
    (code / "bad.py").write_bytes(b"# \xe9")
    text = run("inspect", code, "--tokenizer", tokenizer)
    assert "left out  1 duplicates" in text
    assert "1 not UTF-8, e.g. " in text
    assert "--- document 0, read: 1 tokens" in text


def test_inspect_shows_the_share_of_each_class(tmp_path, tokenizer):
    (tmp_path / "code").mkdir()
    for i in range(2):
        (tmp_path / "code" / f"{i}.py").write_text(f"f{i}n=+{i}7#cd\n")
    # 10 characters, a line end and an eos.
    expected = {"identifier 25.0%", "comment 25.0%", "other 16.7%", "literal 16.7%"}
    expected |= {"operator 16.7%", "keyword 0.0%"}
    text = run("inspect", tmp_path / "code", "--tokenizer", tokenizer)
    for line in text.splitlines()[1:4:2]:
        assert set(line.strip().split(", ")) == expected
    text = run(
        "inspect", tmp_path / "code", "--tokenizer", tokenizer, "--set", "data.language=none"
    )
    assert text.count("other 100.0%") == 2


def test_wrong_settings_and_tokenizers_are_named(tmp_path, code, tokenizer):
    with pytest.raises(ConfigError, match=r"'data.lenght'; did you mean 'data.length'"):
        run("inspect", code, "--tokenizer", tokenizer, "--set", "data.lenght=3")
    with pytest.raises(ConfigError, match="unknown section 'length'"):
        run("inspect", code, "--tokenizer", tokenizer, "--set", "length=3")
    with pytest.raises(CheckpointError, match="no model folder"):
        run("inspect", code, "--tokenizer", tmp_path / "none")
