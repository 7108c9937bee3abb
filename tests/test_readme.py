"""The README's commands run: with a tiny model and corpus in place of the reader's, and small budgets."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tiny import byte_tokenizer, tiny_model
from tiny_serve import Process

from mdm.checkpoint import save_denoiser
from mdm.cli import COMMANDS, mdm
from mdm.convert import StudentSettings, convert

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = [
    "train.steps=2",
    "train.eval_rows=2",
    "train.batch_rows=2",
    "train.micro_rows=2",
    "data.length=96",
    "data.min_tokens=4",
    "train.precision=fp32",
    "teacher.dtype=fp32",
    "data.held_out_fraction=0.3",
]
TINY = ["student.init=path/to/model", "teacher.model=path/to/model", "data.sources=[path/to/code]"]


def commands() -> list[list[str]]:
    """Every `mdm …` and `torchrun …` command in the README's bash blocks."""
    found, pending = [], ""
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines(keepends=True):
            pending += line
            try:
                found.append(shlex.split(pending, comments=True))
                pending = ""
            except ValueError:  # an open quotation goes on in the next line
                continue
    return [command for command in found if command and command[0] in ("mdm", "torchrun")]


def curls() -> list[tuple[str, str]]:
    """(path, JSON) of every curl command to the server."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for one in re.findall(r"^curl .*?(?=^curl |\Z)", block, flags=re.DOTALL | re.MULTILINE):
            words = shlex.split(one.replace("\\\n", " "))
            (url,) = [word for word in words if word.startswith("localhost:8000/")]
            assert words[words.index("-H") + 1] == "content-type: application/json"
            found.append((url.removeprefix("localhost:8000"), words[words.index("-d") + 1]))
    return found


def test_every_command_is_found():
    names = [command[1] for command in commands() if command[0] == "mdm"]
    assert names.count("generate") == 2
    assert names.count("train") == 11
    assert names.count("eval") == 3
    assert set(names) | {"demo"} == set(COMMANDS)
    prompts = [command[2] for command in commands() if command[1] == "generate"]
    assert prompts == ["--prefix", "import os\n"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the README's reader has: a model, code, and a finished run."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", 259, layers=2).save_pretrained("path/to/model")
    byte_tokenizer().save_pretrained("path/to/model")
    student = convert(StudentSettings(init="path/to/model", layers=1))
    save_denoiser(student, "runs/demo/final")
    Path("path/to/code").mkdir()
    for i in range(6):
        body = "".join(f"    x += {i} * {j}\n" for j in range(4))
        text = f'def f{i}(x):\n    """Add to x."""\n{body}    return x\n'
        Path(f"path/to/code/f{i}.py").write_text(text)
    Path("README.md").write_text(README[:600], encoding="utf-8")
    return tmp_path


def shrink(command: list[str]) -> list[str]:
    """The same command, small enough for a test."""
    name, arguments = command[1], command[2:]
    if name == "convert" and "--layers" in arguments:
        arguments[arguments.index("--layers") + 1] = "1"
    if arguments[:1] == ["train-step"]:
        arguments += ["--model", "path/to/model", "--rows", "1", "--length", "32", "--repeats", "1"]
    if arguments[:1] == ["likelihood"]:
        arguments += [
            "--items",
            "1",
            "--length",
            "3",
            "--long-items",
            "1",
            "--long-length",
            "4",
            "--draws",
            "2",
        ]
        arguments += ["--long-draws", "2", "--budgets", "2,4"]
    if name == "eval" and "--tasks" in arguments:
        arguments += ["--limit", "1", "--gen-length", "4"]
        if "embedded" in arguments:
            arguments[arguments.index("embedded")] = "path/to/model"
    if "cache-targets" in arguments:  # the embedded teacher is for `make demo`
        arguments += [word for s in (*SMALL, *TINY) for word in ("--set", s)]
    if name == "train" and "student.init=students/half" in arguments:
        arguments += [word for setting in SMALL for word in ("--set", setting)]
    elif name == "train" and not {"--list", "--settings", "--resume", "--dry-run"} & {*arguments}:
        arguments += ["--dry-run"]  # the embedded teacher is for `make demo`
    return [name, *arguments]


ELSEWHERE = ("serve", "targets", "suffix", "study", "cache", "tokenizers", "tide", "on-policy",
             "latency", "drift", "cpu", "all")  # fmt: skip


def test_the_commands_run(place, capsys):
    half_done = False
    for command in commands():
        if command[0] == "torchrun":
            command = command[command.index("mdm.cli") :]
        arguments = shrink(command)
        if (
            "--resume" in arguments
            or arguments[0] == "serve"
            or (arguments[0] == "bench" and arguments[1] in ELSEWHERE)
        ):
            continue  # run by test_trainer.py, below, and by test_bench_….py
        mdm.main(arguments, standalone_mode=False)
        half_done |= "half" in arguments
    assert half_done
    assert (place / "runs/half/final/model.safetensors").is_file()
    assert (place / "runs/left-targets/cache.json").is_file()
    assert '"token_ids"' in (place / "samples.jsonl").read_text(encoding="utf-8")
    assert (place / "tokenizer/tokenizer.json").is_file()
    output = capsys.readouterr().out
    assert "def add(a, b):\n    total = " in output
    assert '"finish_reason"' in output
    assert "mdm / twin: memory" in output
    assert "nats (lower bound, stratified" in output
    assert "| infill_single_line | pass@1 |" in output
    assert (place / "runs/eval/student/results.json").is_file()
    assert "stratified" in (place / "benchmarks/results/likelihood.jsonl").read_text()


def test_the_server_answers_what_the_readme_asks(place):
    (serve,) = [command[1:] for command in commands() if command[:2] == ["mdm", "serve"]]
    assert serve[:3] == ["serve", "--model", "runs/demo/final"]
    (script,) = re.findall(r"```python\n(from openai.*?)```", README, flags=re.DOTALL)
    with Process(place, *serve[1:3]) as server:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            answers = [
                http.post(path, content=body, headers={"content-type": "application/json"})
                for path, body in curls()
            ]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert set(answers[0].json()["stats"]) >= {"queue_s", "forwards", "memory"}
        assert answers[1].text.count('"denoising"') == 16
        assert answers[2].json()["log_likelihood"] < 0
        script = script.replace("http://localhost:8000", server.url)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert server.end() == 0
