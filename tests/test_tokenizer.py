"""Learning a tokenizer: lossless, of the size asked for, nothing reaches over a line into code."""

import json
import random

import pytest
from click.testing import CliRunner
from tiny_run import corpus_folder

from mdm.checkpoint import load_vocab
from mdm.errors import ConfigError, DataError
from mdm.token_bytes import token_bytes
from mdm.train.data_command import data
from mdm.train.tokenizer import train_tokenizer

CODE = "def area(width, height):\n    # naïve\n    return width * height + 12345\n\n\n" * 20


def test_lossless_and_of_the_size(tmp_path):
    size = train_tokenizer([CODE, CODE.upper()], 300, tmp_path / "t")
    vocab = load_vocab(str(tmp_path / "t"))
    assert size == len(vocab) == 300
    rng = random.Random(0)
    noise = "".join(chr(rng.randrange(0xD800)) for _ in range(500))
    for text in (CODE, "日本語 \t\r\n\0 ▁ <|endoftext|> e\u0301", noise):
        ids = vocab.encode(text)
        table = token_bytes(vocab)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert vocab.start_id not in ids
    assert len(vocab.encode(CODE)) < 0.6 * len(CODE)
    assert vocab.start_id == vocab.eos_id == 0


def test_tokens_keep_to_words_and_lines(tmp_path):
    train_tokenizer([CODE] * 3, 2**9, tmp_path / "t")
    for value in token_bytes(load_vocab(str(tmp_path / "t"))):
        text = (value or b"").decode("utf-8", "ignore")
        assert not (text.strip() and "\n" in text.rstrip("\n")), text
        assert sum(c.isdigit() for c in text) <= 3


def test_the_command(tmp_path):
    corpus = corpus_folder(tmp_path / "corpus")
    arguments = ["train-tokenizer", corpus, "--size", "280", "--output", str(tmp_path / "t")]
    result = CliRunner().invoke(data, arguments, catch_exceptions=False)
    assert result.output.startswith(f"280 tokens → {tmp_path / 't'}")
    again = CliRunner().invoke(data, [*arguments, "--limit", "3"], catch_exceptions=False)
    assert again.exit_code == 0  # a tokenizer may be replaced
    assert json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--size must be above 256.* got 256"):
        train_tokenizer([CODE], 256, tmp_path / "t")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    train_tokenizer([CODE], 300, tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"other things than a tokenizer \(model.safetensors\)"):
        train_tokenizer([CODE], 300, tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"
