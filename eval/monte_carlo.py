"""How much of a score's uncertainty comes from Monte-Carlo likelihoods, apart from the items.

Each likelihood has its own standard error; here they are carried through to the score. The errors
of the choices of a question are taken as independent, though they share random numbers: that makes
the result too large rather than too small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mdm.diffusion import generator
from mdm.likelihood import Likelihood

DRAWS = 400


def mc_std_err(metric: str, rows: Sequence[Mapping[str, Any]], lm: Any) -> float | None:
    """Monte-Carlo standard error of one score from lm-eval's sample rows; None if there is none.

    Known for acc and acc_norm of multiple choice, and for the perplexities and bits per byte.
    """
    from .harness import likelihood_key

    found = [
        [
            lm.likelihoods.get(likelihood_key(row["doc"], arguments))
            for arguments in row["arguments"]
        ]
        for row in rows
    ]
    if not found or any(item is None for items in found for item in items):
        return None
    if all(item.estimator == "ar" for items in found for item in items):
        return None
    if metric in ("acc", "acc_norm") and all(len(items) > 1 for items in found):
        return _of_choices(metric, rows, found)
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        return _of_texts(metric, rows, [items[0] for items in found])
    if metric == "perplexity":
        errors = math.sqrt(math.fsum(items[0].std_err ** 2 for items in found)) / len(found)
        mean = math.fsum(items[0].value for items in found) / len(found)
        return math.exp(-mean) * errors
    return None


def mc_std_err_of_group(members: Sequence[tuple[float, float | None]]) -> float | None:
    """Of a mean of independent tasks, each with its weight and its own error; None if none has one."""
    if all(error is None for _, error in members):
        return None
    whole = math.fsum(weight for weight, _ in members)
    return math.hypot(*(weight * (error or 0.0) for weight, error in members)) / whole


def _of_choices(
    metric: str, rows: Sequence[Mapping[str, Any]], found: Sequence[Sequence[Likelihood]]
) -> float | None:
    """Spread of the accuracy when every likelihood is drawn again around its value."""
    variance = 0.0
    random = generator("monte-carlo", len(rows))
    for row, items in zip(rows, found, strict=True):
        values_C = torch.tensor([item.value for item in items], dtype=torch.float64)
        errors_C = torch.tensor([item.std_err for item in items], dtype=torch.float64)
        if bool(errors_C.isnan().any()):
            return None
        right = gold_choice(row)
        if right is None or not 0 <= right < len(items):
            return None
        noise_DC = torch.randn(DRAWS, len(items), generator=random, dtype=torch.float64)
        drawn_DC = values_C + errors_C * noise_DC
        if metric == "acc_norm":
            lengths = [max(1, len(arguments[1].lstrip())) for arguments in row["arguments"]]
            drawn_DC = drawn_DC / torch.tensor(lengths, dtype=torch.float64)
        hit = float((drawn_DC.argmax(1) == right).double().mean())
        variance += hit * (1 - hit)
    return math.sqrt(variance) / len(rows)


def gold_choice(row: Mapping[str, Any]) -> int | None:
    """Index of the right choice of a multiple-choice item, if its target says so."""
    target = row["target"]
    if isinstance(target, bool) or not isinstance(target, int | str):
        return None
    if isinstance(target, int):
        return target
    choices = [arguments[1].strip() for arguments in row["arguments"]]
    if target.strip() in choices:
        return choices.index(target.strip())
    return int(target) if target.strip().isdigit() else None


def _of_texts(
    metric: str, rows: Sequence[Mapping[str, Any]], found: Sequence[Likelihood]
) -> float | None:
    """By error propagation: all these are functions of total log-likelihood over total length."""
    values = [row[metric] for row in rows]
    if any(not isinstance(value, list | tuple) for value in values):
        return None
    length = math.fsum(float(count) for _, count in values)
    mean = math.fsum(item.value for item in found) / length
    error = math.sqrt(math.fsum(item.std_err**2 for item in found)) / length
    return error / math.log(2) if metric == "bits_per_byte" else math.exp(-mean) * error
