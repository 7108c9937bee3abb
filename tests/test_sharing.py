"""Requests shared among processes: in threads that talk as processes do, and in real ones."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_eval
import tiny_run

from mdm.errors import RequestError
from mdm.eval import sharing
from mdm.eval.sharing import _bytes, _value


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        {"text": "é 漢字 \ud800 \u0000"},
        [1, 0.1, -1e-300, math.inf],
        [[{"a": [None]}]],
    ],
)
def test_messages_come_back_as_they_were(message):
    assert _value(_bytes(message)) == message


def test_an_unknown_error_stays_unknown():
    found = _value(_bytes({"std_err": math.nan}))
    assert math.isnan(found["std_err"])


# --- one process ---------------------------------------------------------------------------------


def test_alone_nothing_is_handed_round(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with sharing.processes():
        assert (sharing.rank(), sharing.world_size()) == (0, 1)
        assert sharing.own_device() is None
        assert sharing.lead("double", [{"n": 1}], lambda items: [*items, {"n": 2}]) == [
            {"n": 1},
            {"n": 2},
        ]
        sharing.dismiss()


# --- many, as threads ----------------------------------------------------------------------------


class Cluster:
    """Runs a function of the rank in as many threads; broadcast and gather pass real messages."""

    def __init__(self, monkeypatch, size):
        self.size, self.own = size, threading.local()
        self.barrier = threading.Barrier(size, timeout=20)
        self.board = [None] * size
        monkeypatch.setattr(sharing, "rank", lambda: self.own.rank)
        monkeypatch.setattr(sharing, "world_size", lambda: size)
        monkeypatch.setattr(sharing, "_broadcast", lambda message: self.talk(message)[0])
        monkeypatch.setattr(sharing, "_gather", self.talk)

    def talk(self, message):
        self.board[self.own.rank] = _bytes(message)
        self.barrier.wait()
        found = [_value(data) for data in self.board]
        self.barrier.wait()
        return found

    def run(self, leader, computes):
        shares = [[] for _ in range(self.size)]

        def work(number):
            self.own.rank = number
            own = {name: note(shares[number], compute) for name, compute in computes.items()}
            if number:
                sharing.follow(own)
                return
            results.append(leader(own))
            sharing.dismiss()

        def note(share, compute):
            return lambda items: share.append(len(items)) or compute(items)

        results = []
        threads = [threading.Thread(target=work, args=(i,)) for i in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return results[0], shares


def doubled(items):
    return [{"n": 2 * item["n"]} for item in items]


def squared(items):
    return [{"n": item["n"] ** 2} for item in items]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_answers_are_in_order_whoever_gave_them(monkeypatch, size, count):
    items = [{"n": n} for n in range(count)]

    def leader(computes):
        return [sharing.lead(name, items, computes[name]) for name in ("double", "square")]

    cluster = Cluster(monkeypatch, size)
    found, shares = cluster.run(leader, {"double": doubled, "square": squared})
    assert found == [doubled(items), squared(items)]
    sizes = [len(items[i::size]) for i in range(size)]
    assert shares == [[n, n] for n in sizes]


def test_a_leader_that_fails_leaves_nobody_waiting(monkeypatch):
    def fail(items):
        raise RequestError("too long")

    def leader(computes):
        with pytest.raises(RequestError, match="too long"):
            sharing.lead("double", [{"n": 1}, {"n": 2}], fail)
        return sharing.lead("double", [{"n": 1}, {"n": 2}], computes["double"])

    found, _ = Cluster(monkeypatch, 2).run(leader, {"double": doubled})
    assert found == [{"n": 2}, {"n": 4}]


def test_what_goes_wrong_elsewhere_is_said_once_by_the_leader(monkeypatch):
    calls = []

    def fails_elsewhere(items):
        calls.append(items)
        if {"n": 1} in items:  # the leader's share
            return doubled(items)
        raise RequestError("too long")

    def leader(computes):
        with pytest.raises(RequestError, match="too long"):
            sharing.lead("fails", [{"n": 1}, {"n": 2}], computes["fails"])
        return sharing.lead("double", [{"n": 1}, {"n": 2}], computes["double"])

    found, _ = Cluster(monkeypatch, 2).run(leader, {"double": doubled, "fails": fails_elsewhere})
    assert found == [{"n": 2}, {"n": 4}]
    assert len(calls) == 2


# --- many, as processes --------------------------------------------------------------------------

SCRIPT = """
import json, sys, tiny_eval
from mdm.errors import RequestError
from mdm.eval import sharing
from mdm.eval.answers import SCORE, Answers
from mdm.eval.responses import Responses

def fail(items):
    raise RequestError("the leader fails")

with sharing.processes():
    folder = sys.argv[1]
    model = tiny_eval.evaluated(batch_size=1)
    calls = []
    complete = model.complete

    def counted(holes, **more):
        calls.append(len(holes))
        return complete(holes, **more)

    object.__setattr__(model, "complete", counted)
    answers = Answers(model, Responses(None))
    if sharing.rank():
        answers.follow()
    else:
        texts, scores = tiny_eval.some_answers(answers)
        try:
            sharing.lead(SCORE, [], fail)
        except RequestError as error:
            failed = str(error)
        sharing.dismiss()
        found = {"texts": texts, "scores": scores, "known": len(answers.responses.known), "failed": failed}
        open(folder + "/found.json", "w").write(json.dumps(found))
    open(f"{folder}/calls{sharing.rank()}.json", "w").write(json.dumps(calls))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Both start in seconds, but on a busy machine that is many."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = tiny_run.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    alone = tiny_eval.answers(batch_size=1)
    texts, scores = tiny_eval.some_answers(alone)
    assert found["texts"] == texts
    assert len(set(texts)) == 11
    assert found["scores"] == pytest.approx(scores, rel=1e-5)
    assert found["known"] == len(alone.responses.known) == 16
    assert found["failed"] == "the leader fails"  # and the other one did not wait for ever
    calls = [json.loads((tmp_path / f"calls{i}.json").read_text()) for i in range(2)]
    assert [sum(own) for own in calls] == [6, 5]  # a round of 8, then one of 3
