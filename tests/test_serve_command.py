"""`mdm serve` as a process: it says where it is, serves, and ends well; bad settings in one line."""

from __future__ import annotations

import signal
import socket
import sys

import httpx
import pytest
from click.testing import CliRunner
from tiny import tiny_model
from tiny_serve import Process, byte_student, byte_vocab

from mdm.checkpoint import save_denoiser
from mdm.errors import CheckpointError, ConfigError
from mdm.serve.access import KEY_VARIABLE
from mdm.serve.command import serve
from mdm.serve.models import name_of
from mdm.serve.run import listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's finished student, and a teacher beside it."""
    place = tmp_path_factory.mktemp("serve")
    save_denoiser(byte_student(), place / "runs" / "small" / "final")
    vocab = byte_vocab()
    tiny_model("llama", len(vocab), layers=1).save_pretrained(place / "teacher")
    vocab.tokenizer.save_pretrained(place / "teacher")
    return place


def test_serves_the_last_run_until_a_signal_and_finishes_what_is_in_work(folder):
    with Process(folder, "--teacher", "teacher", "--max-rows", 1) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert "runs/small/final (the last finished run)" in "".join(server.log)
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            models = http.get("/stats").json()["models"]
            assert {name: model["kind"] for name, model in models.items()} == {
                "small": "student",
                "teacher": "teacher",
            }
            body = {"prompt": "a", "gen_length": 300, "seed": 1, "stream": True}
            with http.stream("POST", "/generate", json=body) as response:
                lines = response.iter_lines()
                assert "id" in next(lines)
                server.process.send_signal(signal.SIGTERM)  # in the middle of the request
                last = [line for line in lines if line][-1]
            assert '"done"' in last
        assert server.end() == 0
    assert "300 forwards" in "".join(server.log)


def test_a_second_of_patience_and_then_the_end(folder):
    with Process(folder, "--drain-seconds", 1) as server, httpx.Client(trust_env=False) as http:
        body = {"prompt": "a", "gen_length": 1000, "n": 16, "stream": True}
        with http.stream("POST", f"{server.url}/generate", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert "id" in next(lines)
            server.process.send_signal(signal.SIGINT)
            assert '"shutting_down"' in [line for line in lines if line][-1]  # it is told
        assert server.end() == 0


def test_a_key_from_the_environment(folder):
    with Process(folder, **{KEY_VARIABLE: "secret-key-1"}) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            assert http.get("/stats").status_code == 401
            headers = {"authorization": "Bearer secret-key-1"}
            assert http.get("/stats", headers=headers).status_code == 200
        assert server.end() == 0
    assert "secret" not in "".join(server.log)
    assert "key needed" in "".join(server.log)


def run(*arguments, **environment):
    result = CliRunner().invoke(serve, [str(one) for one in arguments], env=environment)
    assert result.exception is not None
    return result.exception


def test_bad_settings(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert "can be reached from other machines" in str(run("--host", "0.0.0.0"))
    assert "max_rows must be at least 1; got 0" in str(run("--max-rows", 0))
    assert "timeout_s must be > 0" in str(run("--timeout", 0))
    assert "0 … 65535" in str(run("--port", 10**5))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = run("--port", taken.getsockname()[1])
        assert isinstance(error, ConfigError)
        assert "choose another --port" in str(error)
    assert "did you mean 'float32'" in str(run("--port", 0, "--dtype", "float23"))
    assert "did you mean 'int8_dynamic'" in str(run("--port", 0, "--quantization", "int8"))
    assert isinstance(run("--port", 0, "--model", tmp_path), CheckpointError)
    assert "is a student" in str(run("--port", 0, "--teacher", "runs/small/final"))
    assert "cannot use --device 'gpu'" in str(run("--port", 0, "--device", "gpu"))
    error = run("--port", 0, "--teacher", "teacher", "--name", "teacher")
    assert "both called 'teacher'" in str(error)


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "mdm.serve.run", None)  # as if an import in it failed
    error = run("--port", 0)
    assert isinstance(error, ConfigError)
    assert "'mdm-code[serve]'" in str(error)


def test_names():
    assert name_of("runs/demo/final") == "demo"
    assert name_of("students/half") == "half"
    assert name_of("embedded") == "embedded"
    assert name_of("models/x.gguf") == "x"
    assert name_of("final") == "final"


def test_listening_on_a_free_port():
    listener = listen("127.0.0.1", 0)
    assert listener.getsockname()[1] > 0
    listener.close()
    with pytest.raises(ConfigError, match="cannot listen on no-such-host"):
        listen("no-such-host.invalid", 0)
