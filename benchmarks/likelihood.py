"""Likelihood estimators on a real checkpoint: error against cost, at equal numbers of forwards.

An estimator is a choice of masks; what the model says under a mask does not depend on who asks. So
for short answers the model is asked once under every mask, and each estimator is drawn many times
from that table: the truth is known exactly and thousands of draws cost nothing. For long answers
there is no table; there the estimators really run, a few times each.
Shapes: A answer tokens, R masks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import load_denoiser, weights_hash
from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.estimators import ESTIMATORS, Masks, every_mask
from mdm.eval.human_eval_data import human_eval_problems
from mdm.likelihood import LikelihoodSettings, Pair, log_likelihood
from mdm.record import append_record, make_record, to_json
from mdm.scoring import Row, token_log_probs

COMPARED = ("llada", "independent", "stratified")
Z95 = 1.96


@dataclasses.dataclass(frozen=True)
class LikelihoodBench:
    """What is measured; see `mdm bench likelihood --help`."""

    model: str
    items: int
    length: int
    long_items: int
    long_length: int
    context: int
    budgets: tuple[int, ...]
    draws: int
    long_draws: int
    seed: int

    def __post_init__(self) -> None:
        require(2 <= self.length <= 14, f"length must be 2…14 (2^length masks); got {self.length}")
        for name in ("items", "context", "long_length"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1; got {getattr(self, name)}")
        require(self.long_items >= 0, f"long_items must be >= 0; got {self.long_items}")
        require(
            min(self.budgets, default=0) < 2**self.length - 1,
            f"with {2**self.length - 1} masks in all, budgets of {self.budgets} forwards leave nothing"
            " to estimate; use a larger length or smaller budgets",
        )
        for name in ("draws", "long_draws"):
            require(getattr(self, name) >= 2, f"{name} must be >= 2; got {getattr(self, name)}")
        require(min(self.budgets, default=0) >= 1, f"budgets must be >= 1; got {self.budgets}")


@dataclasses.dataclass(frozen=True)
class Table:
    """log p of every token under every mask of one answer; row m is the mask with bits of m."""

    pair: Pair
    log_probs_MA: torch.Tensor
    truth: float

    def look_up(self, masks: Masks) -> torch.Tensor:
        """(R, A) log-probabilities under these masks."""
        bits_A = 2 ** torch.arange(masks.masked_RL.shape[1])
        return self.log_probs_MA[(masks.masked_RL.long() * bits_A).sum(1)]


def run(settings: LikelihoodBench, path: Path) -> dict[str, Any]:
    """Measure, append the record to `path`, return it."""
    denoiser = load_denoiser(settings.model)
    short = code_pairs(denoiser, settings.items, settings.length, settings.context)
    tables = [(table_of(denoiser, right), table_of(denoiser, wrong)) for right, wrong in short]
    budgets = [n for n in settings.budgets if n < 2**settings.length - 1]
    results: dict[str, Any] = {
        "short": [
            short_line(name, budget, tables, settings) for budget in budgets for name in COMPARED
        ],
        "exact_forwards": 2**settings.length - 1,
        "long": [],
    }
    if settings.long_items:
        pairs = code_pairs(denoiser, settings.long_items, settings.long_length, settings.context)
        rights = [right for right, _ in pairs]
        results["long"] = [
            long_line(name, budget, denoiser, rights, settings)
            for budget in settings.budgets
            for name in COMPARED
        ]
    record = make_record(
        "bench likelihood",
        results,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        checkpoint=weights_hash(settings.model),
    )
    append_record(path, record)
    return record


def code_pairs(
    denoiser: Denoiser, count: int, length: int, context: int
) -> list[tuple[Pair, Pair]]:
    """Right and wrong answers from HumanEval: the first tokens of a solution, and of another one.

    The prompt is cut on the left to `context` tokens. Problems with shorter solutions are left out.
    """
    vocab = denoiser.vocab
    found = []
    for problem in human_eval_problems().values():
        ids = vocab.encode(problem["canonical_solution"])
        if len(ids) >= length:
            prompt = (vocab.start_id, *vocab.encode(problem["prompt"])[-context:])
            found.append((problem["task_id"], prompt, tuple(ids[:length])))
    require(
        len(found) > count,
        f"HumanEval has {len(found)} solutions of {length} tokens or more, but {count} items need one"
        " more than that; ask for fewer items or a smaller length",
    )
    return [
        (Pair(prompt, answer, key), Pair(prompt, found[i + 1][2], key))
        for i, (key, prompt, answer) in enumerate(found[:count])
    ]


def table_of(denoiser: Denoiser, pair: Pair) -> Table:
    """Ask the model under every mask once."""
    length = len(pair.answer)
    masks = every_mask(length, 0, generator(0))
    x0_L = torch.tensor(pair.prompt + pair.answer)
    hidden_RL = torch.zeros(len(masks.weight_R), len(x0_L), dtype=torch.bool)
    hidden_RL[:, len(pair.prompt) :] = masks.masked_RL
    given_L = torch.arange(len(x0_L)) < len(pair.prompt)
    rows = (Row(0, x0_L, hidden_L, given_L) for hidden_L in hidden_RL)
    scored = itertools.chain.from_iterable(token_log_probs(denoiser, rows))
    flat = torch.cat([log_probs_N for _, log_probs_N in scored])
    found_RA = torch.zeros(masks.masked_RL.shape, dtype=torch.float64)
    found_RA[masks.masked_RL] = flat.double()
    table_MA = torch.zeros(2**length, length, dtype=torch.float64)
    table_MA[(masks.masked_RL.long() * 2 ** torch.arange(length)).sum(1)] = found_RA
    return Table(pair, table_MA, masks.value(found_RA))


def short_line(
    name: str,
    budget: int,
    tables: Sequence[tuple[Table, Table]],
    settings: LikelihoodBench,
) -> dict[str, Any]:
    """One estimator at one budget over all items, against the truth.

    rmse, bias, std_err: root mean squares over items of the error, the mean error and the reported
    error; bias_z: the items' mean errors in their standard errors, root mean square (1 = no bias);
    coverage: how often the truth is within 1.96 reported errors; flips: how often the worse of two
    answers looks better, each with masks of its own, and with the masks of the other.
    """
    estimator = ESTIMATORS[name]
    errors: list[float] = []
    reported: list[float] = []
    biases: list[float] = []
    z: list[float] = []
    own: list[bool] = []  # did the worse answer look better, with masks of its own
    shared: list[bool] = []  # and with the masks of the other
    inside = total = 0
    for item, (right, wrong) in enumerate(tables):
        found = [
            _draw(estimator, right, budget, (name, item, draw), settings)
            for draw in range(settings.draws)
        ]
        other = [
            _draw(estimator, wrong, budget, (name, item, draw), settings)
            for draw in range(settings.draws)
        ]
        miss = [value - right.truth for value, _ in found]
        errors += miss
        known = [error for _, error in found if not math.isnan(error)]
        reported += known
        inside += sum(abs(m) <= Z95 * error for m, (_, error) in zip(miss, found, strict=True))
        total += len(known)
        mean = statistics.fmean(miss)
        spread = statistics.stdev(miss) / math.sqrt(len(miss))
        biases.append(mean)
        z.append(mean / spread if spread else 0.0)
        truth = right.truth - wrong.truth
        for shift, flips in ((0, shared), (1, own)):
            pairs = zip(found, other[shift:] + other[:shift], strict=True)
            flips += [(a - b) * truth < 0 for (a, _), (b, _) in pairs]
    return {
        "estimator": name,
        "forwards": budget,
        "rmse": _rms(errors),
        "bias": statistics.fmean(biases),
        "bias_z": _rms(z),
        "std_err": _rms(reported) if reported else None,
        "coverage": inside / total if total else None,
        "flips_shared_masks": statistics.fmean(shared),
        "flips_own_masks": statistics.fmean(own),
        "items": len(tables),
        "draws": settings.draws,
    }


def long_line(
    name: str,
    budget: int,
    denoiser: Denoiser,
    pairs: Sequence[Pair],
    settings: LikelihoodBench,
) -> dict[str, Any]:
    """One estimator at one budget on long answers: the spread of a few real runs."""
    spreads, reported, means = [], [], []
    for pair in pairs:
        found = [
            log_likelihood(
                denoiser,
                [pair],
                LikelihoodSettings(estimator=name, mc_samples=budget, seed=settings.seed + draw),
            )[0]
            for draw in range(settings.long_draws)
        ]
        values = [result.value for result in found]
        spreads.append(statistics.stdev(values))
        means.append(statistics.fmean(values))
        reported += [result.std_err for result in found if not math.isnan(result.std_err)]
    return {
        "estimator": name,
        "forwards": budget,
        "spread": _rms(spreads),
        "std_err": _rms(reported) if reported else None,
        "means": means,
        "items": len(pairs),
        "draws": settings.long_draws,
    }


def _draw(
    estimator: Any, table: Table, budget: int, key: tuple[int | str, ...], settings: LikelihoodBench
) -> tuple[float, float]:
    """(value, reported standard error) of one draw."""
    random = generator("bench", settings.seed, budget, *key)
    masks = estimator.draw(table.log_probs_MA.shape[1], budget, random)
    log_probs_RA = table.look_up(masks)
    return masks.value(log_probs_RA), estimator.std_err(masks, log_probs_RA)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


def describe(record: dict[str, Any]) -> str:
    """Tables for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"{settings['items']} answers of {settings['length']} tokens, {settings['model']}; errors in"
        f" nats, over {settings['draws']} draws an answer; exact costs {results['exact_forwards']}",
        f"{'forwards':>8}  {'estimator':12}{'rmse':>8}{'/ llada':>9}{'bias':>9}{'bias z':>8}"
        f"{'std err':>9}{'cover':>7}{'flips':>14}",
    ]
    base: dict[int, float] = {}
    for line in results["short"]:
        base.setdefault(line["forwards"], line["rmse"])
        lines.append(
            f"{line['forwards']:>8}  {line['estimator']:12}{line['rmse']:>8.3f}"
            f"{line['rmse'] / base[line['forwards']]:>9.2f}{line['bias']:>9.3f}{line['bias_z']:>8.1f}"
            f"{_cell(line['std_err'], '9.3f')}{_cell(line['coverage'], '7.2f')}"
            f"{line['flips_own_masks']:>7.3f}{line['flips_shared_masks']:>7.3f}"
        )
    if results["long"]:
        lines.append(
            f"{settings['long_items']} answers of {settings['long_length']} tokens,"
            f" {settings['long_draws']} runs each"
        )
        base = {}
        for line in results["long"]:
            base.setdefault(line["forwards"], line["spread"])
            lines.append(
                f"{line['forwards']:>8}  {line['estimator']:12}{line['spread']:>8.3f}"
                f"{line['spread'] / base[line['forwards']]:>9.2f}{'':17}{_cell(line['std_err'], '9.3f')}"
            )
    return "\n".join([*lines, to_json(record)])


def _cell(value: float | None, form: str) -> str:
    return f"{value:>{form}}" if value is not None else " " * int(form.partition(".")[0])


def plot(record: dict[str, Any], path: Path) -> None:
    """Error against forwards, one line an estimator, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in COMPARED:
        own = [line for line in record["results"]["short"] if line["estimator"] == name]
        axes.plot(
            [line["forwards"] for line in own], [line["rmse"] for line in own], "o-", label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("forwards an answer")
    axes.set_ylabel("root mean square error (nats)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
