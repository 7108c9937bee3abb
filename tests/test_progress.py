"""What a run shows and leaves behind."""

import json
import sys

import pytest

from mdm.errors import ConfigError
from mdm.train.progress import Progress, clock, plot_loss, read_metrics

SUMMARY = {"nelbo": 2.5, "nelbo_std_err": 0.1, "rows": 4, "unit": "nats per token"}


def metrics(**values):
    base = {"loss": 3.0, "ce": 3.5, "kd": 2.5, "kd_lambda": 0.5, "gradient_norm": 1.0}
    return base | {"learning_rate": 1e-4, "tokens": 100.0} | values


def progress(folder, *, steps=4, first=0, active=True, board=False):
    return Progress(folder, steps=steps, first=first, active=active, board=board)


def whole_run(folder):
    shown = progress(folder)
    shown.evaluation(0, SUMMARY)
    for step in range(1, 5):
        shown.step(step, metrics(loss=4.0 - step), 1.0)
    shown.evaluation(4, SUMMARY)
    shown.close()
    return folder / "metrics.jsonl"


def test_metrics_and_lines(tmp_path, capsys):
    entries = read_metrics(whole_run(tmp_path))
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4, 4]
    assert [entry["loss"] for entry in entries if "loss" in entry] == [3.0, 2.0, 1.0, 0.0]
    assert entries[0]["held_out"] == entries[-1]["held_out"] == SUMMARY
    assert entries[1]["tokens_per_second"] > 0
    assert entries[1]["memory_bytes"] > 0
    lines = capsys.readouterr().err.splitlines()
    assert "held-out bound after 0 steps: 2.500 ± 0.100 nats per token" in lines[0]
    assert "step 2/4  loss 2.000 (ce 3.500 kd 2.500)  lr 1.0e-04" in lines[2]
    assert len(lines) == 6


def test_a_resumed_run_writes_every_step_once(tmp_path):
    path = whole_run(tmp_path)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    shown = progress(tmp_path, steps=5, first=2)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2]
    shown.step(3, metrics(), 1.0)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2, 3]
    progress(tmp_path, first=0)  # nothing was finished: everything is written again
    assert read_metrics(path) == []


def test_only_the_first_process_writes(tmp_path, capsys):
    shown = progress(tmp_path, active=False, board=True)
    shown.evaluation(0, SUMMARY)
    shown.step(1, metrics(), 1.0)
    shown.say("hello")
    shown.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_live_line_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = progress(tmp_path)
    shown.step(1, metrics(), 1.0)
    shown.step(2, metrics(), 1.0)
    shown.say("done")
    output = capsys.readouterr().err
    assert output.count("\n") == 2  # before and after "done", none between the steps
    assert output.count("\r") == 2


def test_few_lines_without_a_terminal(tmp_path, capsys):
    shown = progress(tmp_path, steps=1000)
    for step in range(1, 1001):
        shown.step(step, metrics(), 1.0)
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = progress(tmp_path, board=True)
    shown.evaluation(0, SUMMARY)
    shown.step(1, metrics(loss=1.0), 1.0)
    shown.step(2, metrics(loss=9.0), 1.0)
    shown.close()
    shown = progress(tmp_path, first=1, board=True)  # step 2 is done again
    shown.step(2, metrics(loss=2.0), 1.0)
    shown.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "ce", "kd", "nelbo", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("nelbo")] == [(0, 2.5)]


def test_tensorboard_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"train\.tensorboard=false"):
        progress(tmp_path, board=True)


def test_loss_curve(tmp_path, monkeypatch):
    path = whole_run(tmp_path)
    image = tmp_path / "loss.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot_loss(path, image)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert plot_loss(path, image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"st')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3599.6, "1:00:00"), (7384, "2:03:04")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
