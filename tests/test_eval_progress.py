"""How far an evaluation is, on stderr."""

import pytest

from mdm.eval.progress import EVERY_SECONDS, Progress, _span


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_now_and_then_and_at_the_end(capsys):
    clock = Clock()
    progress = Progress("complete", 4, clock=clock)
    assert lines(capsys) == []
    clock.now += EVERY_SECONDS - 1
    progress()
    assert lines(capsys) == []
    clock.now += 1
    progress()
    assert lines(capsys) == ["complete: 2/4, 0:10, 0:10 left"]
    clock.now += 2
    progress()
    assert lines(capsys) == []
    clock.now += 2
    progress()
    assert lines(capsys) == ["complete: 4/4, 0:14, 0:00 left"]


def test_the_rest_is_estimated_from_what_is_finished(capsys):
    clock = Clock()
    progress = Progress("score", 400, clock=clock)
    clock.now += 90
    progress(10)
    assert lines(capsys) == ["score: 10/400, 1:30, 58:30 left"]


def test_known_answers_are_told_once(capsys):
    Progress("score", 3, known=2)
    assert lines(capsys) == ["score: 2 of 5 known from an earlier run"]
    Progress("score", 0, known=5)  # nothing to do
    Progress("score", 5)
    assert lines(capsys) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.7, "1:00"), (65, "1:05"), (3599, "59:59"), (3600, "1 h 00 min"),
     (7500, "2 h 05 min")],
)  # fmt: skip
def test_spans_of_time(seconds, text):
    assert _span(seconds) == text
