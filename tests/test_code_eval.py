"""The metric that stands in for lm-eval's own: its interface, and that the sandbox runs programs."""

import math

import evaluate
import pytest

from mdm.errors import SandboxError
from mdm.eval import code_eval, sandbox
from mdm.eval.code_eval import METRIC, CodeEval, in_place_of_code_eval
from mdm.eval.sandbox import Limits, Verdict

RIGHT, WRONG, BROKEN = "def f(x):\n    return x", "def f(x):\n    return 0", "def f(x:\n"
TESTS = ["assert f(3) == 3", "assert f('a') == 'a'"]


@pytest.fixture
def fake(monkeypatch):
    """Programs named "right" pass; the checks that were really made are kept."""
    made = []

    def run_checks(checks, limits, *, workers, progress):
        made.append(([(check.program, check.tests) for check in checks], limits, workers))
        return [Verdict(c.program.startswith("right"), f"ran {c.program}", 0.1) for c in checks]

    monkeypatch.setattr(code_eval, "run_checks", run_checks)
    return made


def test_programs_really_run_in_the_sandbox():
    values, found = CodeEval().compute(
        references=TESTS, predictions=[[RIGHT, WRONG, BROKEN], [WRONG, WRONG, RIGHT]], k=[1, 2, 3]
    )
    assert values == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3), "pass@3": 1.0}
    assert [[entry["passed"] for _, entry in found[task]] for task in (0, 1)] == [
        [True, False, False],
        [False, False, True],
    ]
    assert found[0][0] == (
        0,
        {"task_id": 0, "completion_id": 0, "passed": True, "result": "passed"},
    )
    assert found[0][1][1]["result"].startswith("AssertionError")
    assert "SyntaxError" in found[0][2][1]["result"]


def test_the_interface_is_that_of_the_original(fake):
    """As lm-eval calls it and reads it; k has the original's defaults."""
    values, found = CodeEval().compute(
        references=["t"], predictions=[["right"] * 3 + ["wrong"] * 9], num_workers=4, timeout=3.0
    )
    assert values.keys() == {"pass@1", "pass@10"}  # of 1, 10, 100 what 12 samples can tell
    assert values["pass@1"] == pytest.approx(3 / 12)
    assert values["pass@10"] == pytest.approx(1 - math.comb(9, 10) / math.comb(12, 10))
    assert list(found) == [0]
    assert [i for i, _ in found[0]] == list(range(12))


def test_k_beyond_the_fewest_samples_is_left_out(fake):
    predictions = [["right a", "wrong"], ["wrong"]]
    values, _ = CodeEval().compute(references=["t", "u"], predictions=predictions, k=[1, 2])
    assert values == {"pass@1": pytest.approx((0.5 + 0.0) / 2)}
    assert CodeEval().compute(references=[], predictions=[], k=[1]) == ({}, {})


def test_collected_programs_run_side_by_side(fake, capsys):
    metric = CodeEval(limits=Limits(seconds=3), workers=2)
    with metric.collecting():
        for program in ("right", "wrong", "right"):
            values, found = metric.compute(references=["t"], predictions=[[program]], k=[1])
            assert (values, found) == ({"pass@1": 0.0}, {})
        assert fake == []
    assert fake == [([("right", "t"), ("wrong", "t")], Limits(seconds=3), 2)]
    values, _ = metric.compute(references=["t"], predictions=[["right"]], k=[1])
    assert values == {"pass@1": 1.0}
    assert len([call for call in fake if call[0]]) == 1


def test_what_was_collected_before_an_error_is_forgotten(fake):
    metric = CodeEval()

    def interrupted():
        with metric.collecting():
            metric.compute(references=["t"], predictions=[["right"]], k=[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert metric.collected is None
    assert fake == []


def test_verdicts_are_kept_by_program_and_tests(fake):
    metric = CodeEval(limits=Limits(seconds=3), workers=2)
    metric.compute(references=["t", "t"], predictions=[["right", "right"], ["wrong"]], k=[1])
    assert fake == [([("right", "t"), ("wrong", "t")], Limits(seconds=3), 2)]
    values, _ = metric.compute(references=["t", "u"], predictions=[["right"], ["right"]], k=[1])
    assert values == {"pass@1": 1.0}
    assert fake[1][0] == [("right", "u")]
    assert metric.verdicts["wrong", "t"].reason == "ran wrong"


def test_every_reference_needs_predictions(fake):
    with pytest.raises(ValueError, match="zip"):
        CodeEval().compute(references=["t", "u"], predictions=[["right"]], k=[1])


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch):
    def fail(*arguments, **options):
        raise SandboxError("it does not start")

    monkeypatch.setattr(code_eval, "run_checks", fail)
    metric = CodeEval()
    with pytest.raises(SandboxError):
        metric.compute(references=["t"], predictions=[["right"]], k=[1])
    assert metric.verdicts == {}


def test_only_this_metric_is_replaced(monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluate, "load", lambda path, *rest, **more: asked.append((path, rest, more))
    )
    before = evaluate.load
    with in_place_of_code_eval() as metric:
        assert evaluate.load("code_eval") is metric is METRIC
        assert evaluate.load("code_eval", keep_in_memory=True) is METRIC
        evaluate.load("exact_match", "x", revision="1")
    assert asked == [("exact_match", ("x",), {"revision": "1"})]
    assert evaluate.load is before
    with pytest.raises(KeyError), in_place_of_code_eval():
        raise KeyError
    assert evaluate.load is before


def test_the_sandbox_of_the_metric_is_the_projects():
    assert code_eval.run_checks is sandbox.run_checks
