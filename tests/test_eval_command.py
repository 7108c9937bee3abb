"""`mdm eval` on a tiny student: what is printed, where the results are, how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_eval
import yaml
from tiny_eval import write_rows
from tiny_run import ar_folder, environment, tiny_denoiser

import mdm.cli
from mdm.canvas import SamplerSettings
from mdm.checkpoint import save_denoiser
from mdm.eval import answers, command, models, native, sandbox, sharing
from mdm.eval import run as run_module
from mdm.eval.command import default_output
from mdm.eval.human_eval_data import human_eval_problems
from mdm.eval.models import model_settings

OWN = {
    "task": "own_task",
    "dataset_path": "nobody/own",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    tiny_eval.no_network(monkeypatch)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "student"
    save_denoiser(tiny_denoiser(ar_folder(tmp_path_factory.mktemp("ar"))), folder)
    return folder


@pytest.fixture
def mdm_eval(monkeypatch, capsys, tmp_path):
    """Run `mdm eval` with these arguments in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mdm", "eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            mdm.cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def called(monkeypatch):
    """What an evaluation is called with, instead of one."""
    found = {}

    def open_evaluated(source, settings, device):
        found.update(source=source, model=settings, device=device)
        return tiny_eval.evaluated(settings=settings)

    def evaluate(answers, settings, data, output, **more):
        found.update(answers=answers, settings=settings, data=data, output=output, **more)
        Path(output).mkdir(parents=True)
        (Path(output) / "results.md").write_text("the table\n")
        return {"seconds": 3.2, "lm_eval": {}}

    monkeypatch.setattr(models, "open_evaluated", open_evaluated)
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    return found


# --- help and usage ------------------------------------------------------------------------------

HELP = """
import sys
from mdm.eval.command import evaluate
try:
    evaluate(["--help"])
except SystemExit as stop:
    assert not stop.code
print("LOADED", *sys.modules)
"""


def test_help_needs_no_heavy_library():
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, check=True, env=environment()
    )
    text, _, loaded = done.stdout.partition("LOADED")
    assert not {"torch", "transformers", "lm_eval", "datasets"} & set(loaded.split())
    for word in ("--tasks", "--data", "compare", "lm-eval", "samples"):
        assert word in text


def test_no_tasks(mdm_eval):
    for arguments in ((), ("--model", "x"), ("--tasks", " , ")):
        code, out, err = mdm_eval(*arguments)
        assert (code, out) == (2, "")
        assert "name tasks with --tasks, or a subcommand" in err


def test_an_unknown_subcommand_is_suggested(mdm_eval):
    code, _, err = mdm_eval("compre", "a", "b")
    assert code == 2
    assert "unknown subcommand 'compre'; did you mean 'compare'?" in err


@pytest.mark.parametrize(
    ("model", "tasks", "expected"),
    [
        ("runs/demo/final", ("humaneval",), "runs/eval/demo-final/humaneval"),
        ("/a/b/half", ("mbpp", "gsm8k"), "runs/eval/half/mbpp-gsm8k"),
        ("org/name", ("a",), "runs/eval/name/a"),
        ("x.gguf", ("a" * 100,), f"runs/eval/x.gguf/{'a' * 80}"),
    ],
)
def test_where_results_go(model, tasks, expected):
    assert str(default_output(model, tasks)) == expected


# --- options -------------------------------------------------------------------------------------


def test_options_reach_their_settings(mdm_eval, called, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": 1}])
    code, out, err = mdm_eval(
        *["--tasks", "a, b,", "--model", "some/model", "--output", "out", "--data", f"a={path}"],
        *["--data", f"b:train={path}", "--limit", 3, "--num-fewshot", 0, "--chat"],
        *["--system", "Be brief.", "--samples", 4, "--temperature", 0.7, "--top-p", 0.9],
        *["--gen-length", 32, "--steps", 16, "--block-length", 8, "--remasking", "entropy"],
        *["--cfg-scale", 0.5, "--suppress-eos", "--eos-last", "--estimator", "stratified"],
        *["--mc-samples", 9, "--window", 64, "--infill-length", "search"],
        *["--infill-teacher", "fim", "--spans", 2, "--batch-size", 5, "--batch-tokens", 99],
        *["--dtype", "bfloat16", "--device", "cpu", "--seed", 7, "--sandbox-level", "process"],
        *["--sandbox-seconds", 2.5, "--workers", 3, "--include-path", tmp_path],
    )
    assert (code, out, err) == (0, "the table\n", "3 s; out/results.json\n")
    assert (called["source"], called["device"]) == ("some/model", "cpu")
    assert called["model"] == model_settings(
        **{"gen_length": 32, "steps": 16, "block_length": 8, "remasking": "entropy"},
        **{"cfg_scale": 0.5, "suppress_eos": True, "eos_last": True, "estimator": "stratified"},
        **{"mc_samples": 9, "window": 64, "batch_size": 5, "batch_tokens": 99},
        **{"dtype": "bfloat16", "seed": 7},
    )
    settings = called["settings"]
    assert settings.tasks == ("a", "b")
    assert (settings.limit, settings.num_fewshot, settings.chat) == (3, 0, True)
    assert (settings.system, settings.samples) == ("Be brief.", 4)
    assert (settings.temperature, settings.top_p) == (0.7, 0.9)
    assert (settings.sandbox_level, settings.sandbox_seconds) == ("process", 2.5)
    assert settings.workers == 3
    infill = settings.infill
    assert (infill.length, infill.teacher, infill.spans_per_problem) == ("search", "fim", 2)
    assert infill.seed == 7
    assert [(file.task, file.split) for file in called["data"]] == [("a", "*"), ("b", "train")]
    assert called["output"] == Path("out")
    assert called["include_path"] == str(tmp_path)
    assert called["answers"].responses.path == Path("out/responses.jsonl")


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (("--threshold", 0.9), {"threshold": 0.9}),
        (("--factor", 1), {"factor": 1.0}),
        (
            ("--entropy-bound", 0.1, "--remasking", "entropy"),
            {"entropy_bound": 0.1, "remasking": "entropy"},
        ),
        (("--cache", "prefix"), {"cache": "prefix"}),
        (("--cache", "dual", "--refresh", 4), {"cache": "dual", "refresh": 4}),
    ],
)
def test_rules_and_caches_reach_the_sampler(mdm_eval, called, arguments, values):
    code, _, err = mdm_eval("--tasks", "a", "--model", "m", *arguments)
    assert code == 0, err
    assert called["model"] == model_settings(**values)
    assert called["model"].sampler == SamplerSettings(**values)


def test_layers_in_8_bits_are_a_setting_of_the_model(mdm_eval, called):
    code, _, err = mdm_eval("--tasks", "a", "--model", "m", "--quantization", "int8_dynamic")
    assert code == 0, err
    assert called["model"] == model_settings(quantization="int8_dynamic")


def test_defaults_are_those_of_the_settings(mdm_eval, called):
    code, _, err = mdm_eval("--tasks", "a", "--model", "runs/demo/final")
    assert code == 0
    assert called["model"] == model_settings()
    assert called["settings"] == run_module.EvalSettings(tasks=("a",))
    assert called["settings"].sandbox_level == sandbox.DEFAULT_LEVEL
    assert (called["device"], called["data"]) == (None, [])
    assert "runs/eval/demo-final/a/results.json" in err


def test_without_a_model_the_last_finished_run(mdm_eval, called, tmp_path, student_folder):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "final").symlink_to(student_folder)
    code, _, err = mdm_eval("--tasks", "a")
    assert (code, called["source"]) == (0, "runs/demo/final")
    assert err.startswith("model: runs/demo/final (the last finished run)\n")


@pytest.mark.parametrize(
    ("arguments", "expected_code", "text"),
    [
        ((), 5, "mdm: no finished run in 'runs'"),
        (("--model", "./none"), 5, "mdm: no model folder at './none'"),
        (("--model", "m", "--samples", 3), 2, "mdm: 3 samples of one prompt need --temperature"),
        (("--model", "m", "--data", "x"), 2, "mdm: cannot read --data 'x'"),
        (("--model", "m", "--data", "a=none.jsonl"), 3, "there is no file or folder"),
        (("--model", "m", "--dtype", "int8"), 2, "mdm: unknown dtype 'int8'"),
        (("--model", "m", "--infill-length", "tru"), 2, "did you mean 'true'?"),
        (("--model", "m", "--limit", 0), 2, "mdm: limit must be >= 1; got 0"),
        (("--model", "m", "--threshold", 0.9, "--factor", 1), 2, "exclude each other; give one"),
        (("--model", "m", "--factor", 1, "--steps", 4), 2, "mdm: factor decides how many steps"),
        (("--model", "m", "--entropy-bound", 1), 2, "entropy_bound needs another confidence"),
        (("--model", "m", "--refresh", 3), 2, "refresh=3 is for an approximate cache"),
        (("--model", "m", "--cache", "dul"), 2, "did you mean 'dual'?"),
        (("--model", "m", "--quantization", "int8"), 2, "did you mean 'int8_dynamic'?"),
    ],
)
def test_what_is_refused(mdm_eval, arguments, expected_code, text):
    code, out, err = mdm_eval("--tasks", "humaneval", *arguments)
    assert (code, out) == (expected_code, "")
    assert text in err
    assert "Traceback" not in err


def test_notes_on_the_prompts(mdm_eval, called, monkeypatch):
    details = {
        "truncated_prompts": {"a": 2},
        "prompts_cut_inside_a_token": {"b": 3},
        "num_fewshot_ignored": ["c"],
    }
    evaluate = run_module.evaluate
    monkeypatch.setattr(
        run_module, "evaluate", lambda *all, **more: {**evaluate(*all, **more), "lm_eval": details}
    )
    code, out, err = mdm_eval("--tasks", "a", "--model", "m", "--strip")
    assert (code, out) == (0, "the table\n")
    assert called["model"] == model_settings(strip=True)
    first, third, second, _ = err.splitlines()
    assert third == "note: c: lm-eval ignores --num-fewshot here, the task itself says 0"
    assert first.startswith("note: b: 3 prompts end with white space that this tokenizer joins")
    assert second == "note: a: 2 prompts were too long and lost their beginning"


# --- processes -----------------------------------------------------------------------------------


def test_processes_that_do_not_lead_follow(mdm_eval, called, monkeypatch):
    monkeypatch.setattr(sharing, "rank", lambda: 1)
    followed = []
    monkeypatch.setattr(answers.Answers, "follow", lambda self: followed.append(self))
    code, out, _ = mdm_eval("--tasks", "a", "--model", "m")
    assert (code, out) == (0, "")
    assert followed[0].responses.path is None  # one process writes
    assert "settings" not in called


def test_others_are_dismissed_whatever_happens(mdm_eval, called, monkeypatch):
    dismissed = []
    monkeypatch.setattr(sharing, "dismiss", lambda: dismissed.append(1))
    assert mdm_eval("--tasks", "a", "--model", "m")[0] == 0
    assert dismissed == [1]

    def fail(*arguments, **options):
        raise sandbox.SandboxError("no sandbox")

    monkeypatch.setattr(run_module, "evaluate", fail)
    assert mdm_eval("--tasks", "a", "--model", "m")[0] == 7
    assert dismissed == [1, 1]


# --- a real one ----------------------------------------------------------------------------------


def test_an_evaluation_and_its_comparison(mdm_eval, student_folder, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": f"{i} is", "a": str(i)} for i in range(3)])
    arguments = ["--tasks", "own_task", "--data", f"own_task={rows}", "--include-path", own]
    arguments += ["--model", student_folder, "--gen-length", 3]
    code, out, err = mdm_eval(*arguments)
    assert code == 0, err
    assert "| own_task | exact_match | 0 | 0 |  | 0.000 – 0.561 | 3 |" in out
    assert "complete: 3/3" in err
    assert "lm_eval" not in err
    folder = Path("runs/eval/student/own_task")
    assert json.loads((folder / "results.json").read_text())["seed"] == 0
    code, again, err = mdm_eval(*arguments)
    assert (code, again) == (0, out)
    assert "complete" not in err  # all was known
    code, _, _ = mdm_eval(*arguments, "--seed", 1, "--temperature", 1, "--output", "other")
    assert code == 0
    code, out, _ = mdm_eval("compare", folder, "other")
    assert code == 0
    assert "| own_task | exact_match | 3 |" in out
    code, out, _ = mdm_eval("compare", folder, "other", "--json")
    (difference,) = json.loads(out)["differences"]
    assert (difference["metric"], difference["n"]) == ("exact_match", 3)
    code, _, err = mdm_eval("compare", folder, "nowhere")
    assert code == 3
    assert "nowhere has no results.json" in err


def test_another_rule_asks_again_and_is_recorded(mdm_eval, student_folder, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": f"{i} is", "a": str(i)} for i in range(3)])
    arguments = ["--tasks", "own_task", "--data", f"own_task={rows}", "--include-path", own]
    arguments += ["--model", student_folder, "--gen-length", 3, "--output", "out"]
    ways = [
        {},
        {"threshold": 0.5},
        {"factor": 0.5},
        {"factor": 5.0},
        {"entropy_bound": 1.0, "remasking": "entropy"},
    ]
    for number, way in enumerate(ways, 1):
        options = [
            word for name, value in way.items() for word in (f"--{name.replace('_', '-')}", value)
        ]
        code, _, err = mdm_eval(*arguments, *options)
        assert (code, "complete: 3/3" in err) == (0, True), err
        assert len(Path("out/responses.jsonl").read_text().splitlines()) == 3 * number
        sampler = json.loads(Path("out/results.json").read_text())["settings"]["model"]["sampler"]
        expected = {"threshold": None, "factor": None, "entropy_bound": None, **way}
        assert sampler.items() >= {"cache": "none", "refresh": None, **expected}.items()
        assert "complete" not in mdm_eval(*arguments, *options)[2]  # and is known from then on
    assert "complete: 3/3" in mdm_eval(*arguments, "--quantization", "int8_dynamic")[2]


# --- lm-eval and samples -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "tasks"),
        ("--help",),
        ("run", "-h"),
        ("run", "--model", "mdm", "--model_args", "model=a,steps=4", "--tasks", "b"),
        (),
    ],
)
def test_lm_eval_gets_its_arguments_untouched(mdm_eval, monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(native, "run_native", seen.append)
    code, out, _ = mdm_eval("lm-eval", *arguments)
    assert (code, out, seen) == (0, "", [arguments])


def test_lm_evals_own_command_line(mdm_eval):
    code, out, _ = mdm_eval("lm-eval", "run", "--help")
    assert code == 0
    assert out.startswith("usage: lm-eval run")
    assert "--model_args" in out


def test_samples_of_another_program(mdm_eval, tmp_path):
    problem = human_eval_problems()["HumanEval/0"]
    rows = [
        {"task_id": "HumanEval/0", "completion": problem["canonical_solution"]},
        {"task_id": "HumanEval/0", "completion": "    return None\n"},
    ]
    path = write_rows(tmp_path / "samples.jsonl", rows)
    code, out, err = mdm_eval("samples", path, "--allow-partial", "-k", "1,2")
    assert code == 0, err
    assert "| humaneval | pass@1 | 0.500 |" in out
    assert "| humaneval | pass@2 | 1.000 |" in out
    assert f"verdicts: {path}_results.jsonl" in err
    code, out, _ = mdm_eval("samples", path, "--allow-partial", "--json")
    assert json.loads(out)["results"]["humaneval"]["pass@1"]["value"] == 0.5
    code, _, err = mdm_eval("samples", path, "-k", "one")
    assert code == 2
    assert "-k must be whole numbers like 1,10; got 'one'" in err
    assert command.samples.help.startswith("Score FILE")
