"""The benchmark of approximate caches: what is compared with what, and its numbers by hand."""

import json
import math

import pytest
import torch
from students import random_student

from mdm.benchmarks.drift import DriftBench, beside_exact, compared, markdown, measure, run
from mdm.checkpoint import save_denoiser
from mdm.errors import ConfigError
from mdm.record import to_json

MASK = 15
SMALL = {"texts": 2, "prompt_length": 6, "gen_length": 9, "block_length": 3}


def bench(**changes):
    return DriftBench(model="none", **(SMALL | changes))


def test_two_distributions_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.9, 0.1, 0.0]]).log()
    largest, same, kl = compared(p, q)
    assert largest == pytest.approx(math.log(2), abs=1e-6)
    assert same == 0.5 or same == 1.0  # a tie may go either way; the second row is equal
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl == pytest.approx(expected / 2, abs=1e-6)


def test_a_cache_that_is_always_anew_is_not_off_at_all():
    denoiser = random_student(shift=True, layers=2)
    found = beside_exact(denoiser, [12, 3, 1], bench(caches=("dual:1", "prefix:1", "dual")))
    for name in ("dual:1", "prefix:1"):
        assert found[name]["max_logit_difference"] < 1e-4
        assert found[name]["same_argmax"] == 1
        assert found[name]["kl"] < 1e-6
    assert found["dual"]["max_logit_difference"] > 1e-2
    assert found["dual"]["kl"] > 1e-6


def words(monkeypatch):
    problems = {str(i): {"prompt": f"w{i} w3 w1 w2 w5 w6 w7"} for i in range(3)}
    monkeypatch.setattr("mdm.benchmarks.drift.human_eval_problems", lambda: problems)


def test_counts_of_a_run(monkeypatch):
    words(monkeypatch)
    denoiser = random_student(shift=True, layers=2)
    results = measure(denoiser, bench(caches=("prefix", "dual", "dual:2")), lambda text: None)
    assert results["texts"] == 2
    assert results["exact"]["tokens_read_per_forward"] == 15
    lines = results["caches"]
    assert {name: line["forwards"] for name, line in lines.items()} == dict.fromkeys(lines, 18)
    # In each of three blocks one whole canvas, then twice the block and the token before it …
    assert lines["dual"]["tokens_read_per_forward"] == pytest.approx((15 + 2 * 4) / 3)
    # … with a refresh after two steps, or all from there on.
    assert lines["dual:2"]["tokens_read_per_forward"] == pytest.approx((15 + 4 + 15) / 3)
    assert lines["prefix"]["tokens_read_per_forward"] == pytest.approx(
        (3 * 15 + 2 * (10 + 7 + 4)) / 9
    )
    for line in lines.values():
        assert 0 <= line["same_tokens"] <= 1
        assert line["seconds_per_forward"] > 0


def test_a_record_and_its_table(monkeypatch, tmp_path):
    words(monkeypatch)
    save_denoiser(random_student(shift=True), tmp_path / "student")
    settings = DriftBench(model=str(tmp_path / "student"), caches=("dual",), **SMALL)
    record = run(settings, tmp_path / "drift.jsonl")
    assert json.loads((tmp_path / "drift.jsonl").read_text()) == json.loads(to_json(record))
    page = markdown(record)
    assert "| dual, approximate | 8 |" in page
    assert "| none (exact) | 15 | 1 | 0 | 100 % | 0 | 100 % |" in page
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"caches": ("dul",)}, "unknown cache 'dul'; did you mean 'dual'"),
        ({"caches": ("dual:x",)}, "steps between refreshes must be a number: dual:8; got 'dual:x'"),
        ({"caches": ()}, "names no cache"),
        ({"texts": 0}, "--texts must be at least 1; got 0"),
        ({"prompt_length": 1}, "--prompt-length must be >= 2; got 1"),
    ],
)
def test_wrong_settings(changes, text):
    with pytest.raises(ConfigError, match=text):
        bench(**changes)


def test_a_model_with_blocks_needs_no_approximation(tmp_path):
    save_denoiser(random_student(block_size=3), tmp_path / "blocks")
    with pytest.raises(ConfigError, match="denoises in blocks of 3 and has an exact cache"):
        run(DriftBench(model=str(tmp_path / "blocks")), tmp_path / "r.jsonl")
