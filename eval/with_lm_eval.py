"""Tasks of lm-eval, run by lm-eval, and what came out of them in our form."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mdm.errors import DataError, MdmError

from .answers import Answers
from .code_eval import METRIC
from .metrics import mean_and_std_err, pass_at_k, ratio_std_err, wilson_interval
from .monte_carlo import mc_std_err, mc_std_err_of_group
from .outcome import Outcome, Score

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from .run import EvalSettings

# Filters that make the only number of their task; others are named beside the metric.
ONLY_FILTER = ("none", "create_test", "extract_code")
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
BOOTSTRAP = 1000  # of metrics without a closed form; lm-eval's 100k takes minutes


def with_lm_eval(
    answers: Answers,
    settings: EvalSettings,
    manager: TaskManager,
    loaded: dict[str, Any],
    native: Mapping[str, Any],
) -> tuple[list[Outcome], dict[str, Any]]:
    """Evaluate loaded tasks; the second result is lm-eval's own, without the samples."""
    from lm_eval import simple_evaluate

    from .harness import MdmLM

    lm = MdmLM(answers=answers)
    for name, task in loaded["tasks"].items():
        require_examples(name, task, settings.num_fewshot)
        if settings.samples > 1:
            task.set_config("repeats", settings.samples)
    sampling: dict[str, Any] = {}
    if settings.temperature is not None:
        sampling |= {"do_sample": settings.temperature > 0, "temperature": settings.temperature}
    if settings.top_p is not None:
        sampling["top_p"] = settings.top_p
    manager.load = lambda names: loaded
    arguments: dict[str, Any] = {
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "apply_chat_template": settings.chat,
        "system_instruction": settings.system,
        "gen_kwargs": sampling or None,
        "bootstrap_iters": BOOTSTRAP,
        **native,
    }

    def run() -> Any:
        with _quiet():
            return simple_evaluate(
                model=lm,
                tasks=list(loaded["tasks"]) + list(loaded["groups"]),
                task_manager=manager,
                confirm_run_unsafe_code=True,  # the sandbox's level was checked before
                log_samples=True,
                **arguments,
            )

    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        # lm-eval checks one program after the other. A first pass only collects them, so that they
        # run side by side; in the second the verdicts and the model's answers are known.
        with METRIC.collecting():
            run()
        lm = MdmLM(answers=answers)
    results = run()
    outcomes = [
        outcome_of(name, results, lm, unsafe=bool(getattr(task, "UNSAFE_CODE", False)))
        for name, task in loaded["tasks"].items()
    ]
    members = {outcome.task: outcome for outcome in outcomes}
    outcomes += [
        group_of(name, results, loaded["groups"].get(name), members)
        for name in results.get("groups", {})
    ]
    details = _plain({key: value for key, value in results.items() if key != "samples"})
    details["truncated_prompts"] = dict(lm.truncated)
    details["prompts_cut_inside_a_token"] = dict(lm.joined)
    details["num_fewshot_ignored"] = [
        name
        for name, task in loaded["tasks"].items()
        if settings.num_fewshot and task.get_config("num_fewshot") == 0  # as lm-eval has it
    ]
    for config in details["configs"].values():  # where our data comes from: code, and paths of here
        config.pop("custom_dataset", None)
        config.pop("dataset_kwargs", None)
    return outcomes, details


def require_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Raise DataError if there are fewer examples than go into each prompt."""
    own = task.get_config("num_fewshot")
    shots = own if num_fewshot is None or own == 0 else num_fewshot  # as lm-eval has it
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None or len(sampler.df) >= shots:
        return
    split = task.config.fewshot_split or task.config.training_split or "train"
    raise DataError(
        f"task {name} puts {shots} examples into each prompt, but there are {len(sampler.df)} of them;"
        f" give them as a file: --data {name}:{split}=FILE.jsonl, or use --num-fewshot {len(sampler.df)}"
    )


def _plain(value: Any) -> Any:
    """JSON's types; functions in a configuration become their names."""
    return json.loads(
        json.dumps(value, default=lambda other: getattr(other, "__qualname__", str(other)))
    )


def outcome_of(name: str, results: Mapping[str, Any], lm: Any, *, unsafe: bool) -> Outcome:
    """One task's numbers and items."""
    rows = results["samples"][name]
    samples = _samples(name, rows, unsafe)
    count = len(samples)
    scores: dict[str, Score] = {}
    if unsafe:
        scores |= _pass_rates(samples)
    for label, (metric, kept, value) in _numbers(results["results"][name]).items():
        if unsafe and metric.startswith("pass"):
            continue  # ours count every sample, lm-eval's MBPP only the first
        own = [row for row in rows if row["filter"] == kept]
        if metric == "acc" and not _greedy_is_known(own, lm):
            for sample in samples:  # False stands for "not asked" in lm-eval's interface
                sample["metrics"].pop(label, None)
            continue
        error = results["results"][name].get(f"{metric}_stderr,{kept}")
        if metric in PERPLEXITIES:
            error = _perplexity_std_err(metric, value, [row[metric] for row in own])
        binary = all(sample["metrics"].get(label) in (0, 1) for sample in samples)
        scores[label] = Score(
            value=value,
            n=count,
            std_err=error if isinstance(error, float) else None,
            mc_std_err=mc_std_err(metric, own, lm),
            interval=wilson_interval(round(value * count), count) if binary else None,
        )
    config = results["configs"].get(name, {})
    return Outcome(
        name,
        scores,
        samples,
        {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "items": results["n-samples"].get(name),
            "generation_kwargs": config.get("generation_kwargs"),
            "repeats": config.get("repeats"),
        },
    )


def _greedy_is_known(rows: list[dict[str, Any]], lm: Any) -> bool:
    """Is this accuracy, if it is that of greedy decoding, known? A bound does not tell it."""
    from .harness import likelihood_key

    if any(len(row["arguments"]) != 1 or len(row["arguments"][0]) != 2 for row in rows):
        return True  # choices, or generated text
    found = [lm.likelihoods.get(likelihood_key(row["doc"], row["arguments"][0])) for row in rows]
    return all(item is None or item.greedy is not None for item in found)


def _perplexity_std_err(metric: str, value: float, pairs: list[tuple[float, float]]) -> float:
    """From the spread over texts (log-likelihood, length); lm-eval's own is a bootstrap or missing."""
    totals, sizes = zip(*pairs, strict=True)
    error = ratio_std_err(totals, sizes)
    return error / math.log(2) if metric == "bits_per_byte" else value * error


def group_of(
    name: str,
    results: Mapping[str, Any],
    group: Any = None,
    members: Mapping[str, Outcome] | None = None,
) -> Outcome:
    """The mean of a group as lm-eval weighs it; its items are with its tasks.

    `group` (lm-eval's) and `members` (outcomes of tasks) tell how Monte-Carlo errors add up.
    """
    values = results["groups"][name]
    scores = {}
    for label, (metric, kept, value) in _numbers(values).items():
        error = values.get(f"{metric}_stderr,{kept}")
        count = int(
            values.get("sample_len", values.get("sample_count", {}).get(f"{metric},{kept}", 0))
        )
        found = {} if group is None else _weights(group, metric, kept, results["results"])
        errors = [
            (weight, own.mc_std_err if (own := members[task].scores.get(label)) else None)
            for task, weight in found.items()
            if members
        ]
        scores[label] = Score(
            value,
            count,
            error if isinstance(error, float) else None,
            mc_std_err_of_group(errors),
        )
    return Outcome(name, scores, [], {"group": True})


def _weights(group: Any, metric: str, kept: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Task → weight in a group's mean, as Group.aggregate of lm-eval has it: over all its leaves."""
    by_size = [
        config.weight_by_size
        for config in group.aggregate_metric_list
        if config.metric == metric and (config.filter_list is None or kept in config.filter_list)
    ][-1]
    weights: dict[str, float] = {}
    for task in group.get_all_tasks():  # twice what is in two of its groups
        values = results.get(task.task_name, {})
        if f"{metric},{kept}" in values:
            size = values.get("sample_len", 0) if by_size else 1
            weights[task.task_name] = weights.get(task.task_name, 0) + size
    return weights


def _numbers(values: Mapping[str, Any]) -> dict[str, tuple[str, str, float]]:
    """Our label → (metric, filter, value) of lm-eval's "metric,filter" keys."""
    found = {}
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        found[_label(metric, kept)] = (metric, kept, float(value))
    return found


def _label(metric: str, kept: str) -> str:
    return metric if kept in ONLY_FILTER else f"{metric} ({kept})"


def _samples(name: str, rows: list[dict[str, Any]], unsafe: bool) -> list[dict[str, Any]]:
    """One entry an item; lm-eval has one for each of its filters."""
    samples: dict[int, dict[str, Any]] = {}
    ids = _ids(rows)
    for row in rows:
        entry = samples.setdefault(
            row["doc_id"],
            {
                "task": name,
                "id": ids[row["doc_id"]],
                "doc_hash": row["doc_hash"],
                "metrics": {},
                "outputs": row["resps"][0] if len(row["resps"]) == 1 else row["resps"],
                "arguments": _plain(row["arguments"]),
                "target": _plain(row["target"]),
                "filtered": {},
            },
        )
        entry["filtered"][row["filter"]] = _plain(row["filtered_resps"])
        for metric in row["metrics"]:
            value = row[metric]
            if isinstance(value, Mapping):  # pass@k of HumanEval is a dict
                entry["metrics"] |= {
                    _label(k, row["filter"]): float(v)
                    for k, v in value.items()
                    if isinstance(v, int | float)
                }
            elif isinstance(value, int | float):  # an item of `perplexity` is its log-likelihood
                name_of_value = "log_likelihood" if metric == "perplexity" else metric
                entry["metrics"][_label(name_of_value, row["filter"])] = float(value)
            elif metric in PERPLEXITIES and isinstance(value, list | tuple):
                pair = [float(part) for part in value]  # log-likelihood, length
                entry.setdefault("pairs", {})[_label(metric, row["filter"])] = pair
        if unsafe:
            _add_verdicts(entry, row)
    return list(samples.values())


def _ids(rows: list[dict[str, Any]]) -> dict[int, str]:
    """Number of an item → its task_id; its number instead if task_ids are not unique in the task."""
    ids = {}
    for row in rows:
        own = row["doc"].get("task_id") if isinstance(row["doc"], dict) else None
        ids[row["doc_id"]] = str(row["doc_id"] if own is None else own)
    return ids if len(set(ids.values())) == len(ids) else {number: str(number) for number in ids}


def _add_verdicts(entry: dict[str, Any], row: Mapping[str, Any]) -> None:
    """Which programs passed, and why the others did not; run now if lm-eval ran only the first."""
    kept = row["filtered_resps"][0]
    texts = row["resps"][0]
    programs = kept if isinstance(kept, list) else [kept] if len(texts) == 1 else list(texts)
    tests = str(row["target"])
    METRIC.compute(references=[tests], predictions=[programs])
    verdicts = [METRIC.verdicts[program, tests] for program in programs]
    entry["passed"] = [verdict.passed for verdict in verdicts]
    entry["reasons"] = [verdict.reason for verdict in verdicts]
    n, c = len(verdicts), sum(entry["passed"])
    asked = [int(k) for k in re.findall(r"pass@(\d+)", " ".join(entry["metrics"]))]  # by the task
    ks = sorted({*_ks(n), *(k for k in asked if k <= n)})
    rates = {f"pass@{k}": pass_at_k(n, c, k) for k in ks}
    entry["metrics"] = {
        key: value for key, value in entry["metrics"].items() if not key.startswith("pass")
    } | rates
    prompt = row["doc"].get("prompt")
    if prompt is not None and all(program.startswith(prompt) for program in programs):
        entry["completions"] = [program[len(prompt) :] for program in programs]


def _ks(samples: int) -> list[int]:
    """k = 1, 2, 5, 10, 20, 50, 100 … that `samples` texts an item can tell, and all of them."""
    ks = [digit * 10**power for power in range(4) for digit in (1, 2, 5)]
    return sorted({k for k in ks if k < samples} | {samples})


def _pass_rates(samples: list[dict[str, Any]]) -> dict[str, Score]:
    names = [name for name in samples[0]["metrics"] if name.startswith("pass@")]
    scores = {}
    for name in names:
        values = [sample["metrics"][name] for sample in samples]
        mean, error = mean_and_std_err(values)
        interval = None
        if all(value in (0.0, 1.0) for value in values):
            interval = wilson_interval(sum(values), len(values))
        scores[name] = Score(
            mean, len(values), None if math.isnan(error) else error, None, interval
        )
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notices and progress bars off the screen; our own lines go through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    stderr = sys.stderr
    filtered = _WithoutBars(stderr)
    try:
        with contextlib.redirect_stderr(filtered):
            yield
    except MdmError:
        raise
    finally:
        logging.disable(level)


class _WithoutBars(io.TextIOBase):
    """Passes on whole lines; a progress bar writes carriage returns."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.in_bar = False

    def write(self, text: str) -> int:
        if "\r" in text:
            self.in_bar = True
        elif not (self.in_bar and text == "\n"):  # the end of a bar
            self.stream.write(text)
            self.in_bar = False
        return len(text)

    def flush(self) -> None:
        self.stream.flush()
