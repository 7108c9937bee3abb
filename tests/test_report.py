"""Results as a table."""

import math

import pytest

from mdm.eval.report import markdown, table


def score(value, n=10, std_err=None, mc_std_err=None, interval=None):
    return {
        **{"value": value, "n": n, "std_err": std_err},
        **{"mc_std_err": mc_std_err, "interval": interval},
    }


def test_a_line_for_every_score():
    record = {
        "model": {"kind": "student", "source": "runs/demo/final"},
        "checkpoint": "abc",
        "results": {
            "humaneval": {"pass@1": score(0.25, 164, 0.0338, None, (0.19, 0.3214))},
            "hellaswag": {"acc": score(1 / 3, 3, math.nan, 0.0166), "acc_norm": score(0.0)},
        },
    }
    assert markdown(record).splitlines() == [
        "student runs/demo/final (weights abc)",
        "",
        "| task | metric | value | ± items | ± Monte Carlo | 95 % | n |",
        "|---|---|--:|--:|--:|---|--:|",
        "| humaneval | pass@1 | 0.250 | 0.034 |  | 0.190 – 0.321 | 164 |",
        "| hellaswag | acc | 0.333 |  | 0.017 |  | 3 |",
        "| hellaswag | acc_norm | 0 |  |  |  | 10 |",
    ]
    assert markdown(record).endswith(table(record["results"]))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (99.99949, "99.999"), (123.456, "123.5"), (-2.5, "-2.500")],
)
def test_numbers(value, text):
    assert f"| {text} |  |  |  | 10 |" in table({"t": {"m": score(value)}})
