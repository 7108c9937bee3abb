"""lm-eval's own command line, with our model and our sandbox in it."""

import sys

import evaluate
import pytest
from lm_eval.api.registry import get_model

from mdm.errors import SandboxError
from mdm.eval import native, sandbox
from mdm.eval.code_eval import METRIC
from mdm.eval.harness import MdmLM


@pytest.fixture
def seen(monkeypatch):
    """What lm-eval's command line finds when it is called."""
    found = []

    def cli_evaluate():
        found.append((list(sys.argv), evaluate.load("code_eval"), get_model("mdm")))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    return found


def test_arguments_model_and_metric(seen):
    before, argv = evaluate.load, list(sys.argv)
    native.run_native(["run", "--model", "mdm", "--tasks", "a,b", "--help"])
    assert seen == [
        (["lm-eval", "run", "--model", "mdm", "--tasks", "a,b", "--help"], METRIC, MdmLM)
    ]
    assert (evaluate.load, sys.argv) == (before, argv)


@pytest.mark.parametrize("level", [None, "process", "full"])
def test_code_tasks_need_the_sandbox(seen, monkeypatch, level):
    asked = []
    monkeypatch.setattr(sandbox, "require_level", asked.append)
    if level is None:
        monkeypatch.delenv("MDM_SANDBOX_LEVEL", raising=False)
    else:
        monkeypatch.setenv("MDM_SANDBOX_LEVEL", level)
    native.run_native(["run", "--tasks", "humaneval"])
    assert asked == []
    native.run_native(["run", "--tasks", "humaneval", "--confirm_run_unsafe_code"])
    assert asked == [level or sandbox.DEFAULT_LEVEL]
    assert len(seen) == 2


def test_nothing_runs_without_it(seen, monkeypatch):
    monkeypatch.setattr(sandbox, "reached_level", lambda: "process")
    monkeypatch.setenv("MDM_SANDBOX_LEVEL", "landlock")
    with pytest.raises(SandboxError, match="reaches the sandbox level 'process', 'landlock' is"):
        native.run_native(["run", "--confirm_run_unsafe_code"])
    assert seen == []
