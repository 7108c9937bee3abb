"""`mdm score`: the numbers of the library, in words and as JSON, for students and AR models."""

import json
import math

import pytest
from tiny import byte_tokenizer, tiny_model

from mdm import autoregressive, likelihood
from mdm.checkpoint import load_ar, load_denoiser, save_denoiser
from mdm.cli import mdm
from mdm.convert import StudentSettings, convert
from mdm.errors import ConfigError, DataError, RequestError
from mdm.likelihood import LikelihoodSettings, Pair
from mdm.vocab import read_vocab


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", 259, layers=1, max_position_embeddings=64).save_pretrained("ar")
    byte_tokenizer().save_pretrained("ar")
    save_denoiser(convert(StudentSettings(init="ar")), "runs/x/final")
    return tmp_path


def score(capsys, *arguments: str) -> str:
    mdm.main(["score", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_student_is_scored_as_the_library_does(place, capsys):
    out = json.loads(score(capsys, "ab", "cdefghij", "--mc-samples", "16", "--json"))
    student = load_denoiser("runs/x/final")
    pair = Pair((student.vocab.start_id, *b"ab"), tuple(b"cdefghij"))
    found = likelihood.log_likelihood(student, [pair], LikelihoodSettings(mc_samples=16))[0]
    assert out["value"] == pytest.approx(found.value, rel=1e-5)
    assert out["std_err"] == pytest.approx(found.std_err, rel=1e-3)
    assert (out["estimator"], out["num_tokens"], out["is_bound"]) == ("stratified", 8, True)
    assert out["perplexity"] == pytest.approx(math.exp(-out["value"] / 8))
    assert out["bits_per_byte"] == pytest.approx(-out["value"] / 8 / math.log(2))
    assert out["settings"]["mc_samples"] == 16
    assert out["model"] == "runs/x/final"


def test_an_ar_model_is_scored_exactly(place, capsys):
    out = json.loads(score(capsys, "ab", "cd", "--model", "ar", "--json"))
    network, tokenizer = load_ar("ar")
    ar = autoregressive.Autoregressive(network, read_vocab(tokenizer))
    found = autoregressive.log_likelihood(ar, [Pair((*ar.opening, *b"ab"), tuple(b"cd"))])[0]
    assert out["value"] == pytest.approx(found.value, rel=1e-5)
    assert (out["std_err"], out["estimator"], out["is_bound"]) == (0, "ar", False)


def test_in_words(place, capsys):
    assert "lower bound, exact, 15 forwards), 4 tokens" in score(capsys, "ab", "cdef")
    assert "(exact, order, 4 forwards)" in score(capsys, "ab", "cdef", "--estimator", "order")
    assert "(exact, ar, 1 forwards)" in score(capsys, "ab", "cdef", "--model", "ar")


@pytest.mark.parametrize("model", [(), ("--model", "ar")])
def test_a_file_is_scored_in_windows(place, capsys, model):
    text = "x = 1\n" * 20
    (place / "code.py").write_text(text)
    arguments = ["--file", "code.py", "--window", "32", "--mc-samples", "4", *model]
    out = json.loads(score(capsys, *arguments, "--json"))
    assert out["num_tokens"] == len(text)
    windows = math.ceil(len(text) / 31)
    assert out["nfe"] == windows * (4 if not model else 1)
    longer = json.loads(score(capsys, *arguments, "--overlap", "8", "--json"))
    assert longer["num_tokens"] == len(text)
    assert longer["nfe"] > out["nfe"]


def test_the_seed_counts_and_nothing_else(place, capsys):
    arguments = ["ab", "cdefghijklmnop", "--mc-samples", "8", "--json"]
    first, again = (json.loads(score(capsys, *arguments))["value"] for _ in range(2))
    other = json.loads(score(capsys, *arguments, "--seed", "1"))["value"]
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (["ab"], ConfigError, "CONTEXT and CONTINUATION"),
        ([], ConfigError, "--file"),
        (["ab", "cd", "--file", "x"], ConfigError, "either"),
        (["ab", ""], RequestError, "empty"),
        (["ab", "c" * 70], RequestError, "64"),
        (["ab", "cd", "--estimator", "stratifed"], ConfigError, "did you mean 'stratified'"),
        (["ab", "cd", "--mc-samples", "0"], ConfigError, "mc_samples"),
        (["--file", "binary"], DataError, "UTF-8"),
        (["--file", "nothing"], FileNotFoundError, "nothing"),
    ],
)
def test_bad_input_is_named(place, arguments, error, named):
    (place / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(error, match=named):
        mdm.main(["score", *arguments], standalone_mode=False)


def test_the_spelling_of_the_mask_is_text(place, capsys):
    out = json.loads(score(capsys, "<|mask|>", "<|mask|>", "--mc-samples", "8", "--json"))
    assert out["num_tokens"] == 8  # bytes, not one mask


def test_bytes_are_those_of_what_is_scored(place, capsys):
    """Spaces at the end of the context belong to the continuation."""
    out = json.loads(score(capsys, "ab  ", "cd", "--json"))
    assert out["num_tokens"] == 4
    assert out["bits_per_byte"] == pytest.approx(-out["value"] / 4 / math.log(2))
    with pytest.raises(RequestError, match="CONTINUATION is empty"):
        mdm.main(["score", "ab ", ""], standalone_mode=False)


def test_the_window_that_was_used_is_told(place, capsys):
    (place / "code.py").write_text("x = 1\n" * 20)
    out = json.loads(score(capsys, "--file", "code.py", "--mc-samples", "2", "--json"))
    assert (out["window"], out["overlap"]) == (64, 0)  # 512 was asked; the model has 64
    assert json.loads(score(capsys, "a", "b", "--json"))["window"] is None
