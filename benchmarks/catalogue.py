"""The benchmarks by name: what each is told, for real and in small, and where its record goes.

A line of CATALOGUE is one call of `mdm bench`. The full settings are those of the records in
benchmarks/results (a test compares them), so that a new record can stand beside an old one; the smoke
settings ask for as little as gives every field of a record. Arguments name places in braces:

    {student} {teacher}   model folders; {teacher} may be "embedded"
    {recipe} {corpus}     smoke: a recipe of tiny models, and the files it reads (smoke.py)
    {runs}                a folder of the benchmark's own, kept until it has ended well
    {results}             the folder of records
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mdm.errors import ConfigError

from . import doc_markdown as shown

Record = dict[str, Any]
PLACES = ("student", "teacher", "recipe", "corpus", "runs", "results")
# Seconds that records have of their own, whatever a benchmark calls them; each is counted once.
SECONDS = ("seconds", "wall_s", "cpu_seconds", "cache_seconds", "measuring_seconds")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One call of `mdm bench`; `full` and `smoke` are its arguments as one would type them."""

    about: str
    full: str
    smoke: str
    file: str  # of its records, in the folder of results
    kind: str  # that its records have
    markdown: Callable[[Record], str]
    # Settings that tell its records from those of others with the same kind.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self, places: Mapping[str, str], *, smoke: bool) -> list[str]:
        """What stands after `mdm bench`, with places filled in."""
        words = shlex.split(self.smoke if smoke else self.full)
        return [word.format(**places) for word in words] + [
            "--record",
            f"{places['results']}/{self.file}",
        ]

    def needs(self, place: str, *, smoke: bool) -> bool:
        """Do its arguments name that place?"""
        return f"{{{place}}}" in (self.smoke if smoke else self.full)

    def records(self, results: Path) -> list[Record]:
        """All of its records, oldest first. Raises ConfigError if a line is no record."""
        path = results / self.file
        if not path.is_file():
            return []
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} has a line that is not JSON: {error}") from error
        return [record for record in found if self.made(record)]

    def made(self, record: Record) -> bool:
        """Is it one of this benchmark?"""
        return record["kind"] == self.kind and all(
            record["settings"].get(key) == value for key, value in self.settings.items()
        )


def seconds_in(results: Any) -> float:
    """The seconds that a record tells of: less than it took, as loading and the like are in no record."""
    if isinstance(results, list):
        return sum(map(seconds_in, results))
    if not isinstance(results, dict):
        return 0.0
    if isinstance(
        results.get("seconds_all"), list
    ):  # and `seconds` is one of them, or their median
        return float(sum(results["seconds_all"]))
    own = sum(results[key] for key in SECONDS if isinstance(results.get(key), int | float))
    return float(own) + sum(seconds_in(value) for value in results.values())


# Recipes of the smoke runs name their models themselves.
_TINY_RUNS = "--recipe {recipe} --runs {runs}"

CATALOGUE: dict[str, Benchmark] = {
    "train-step": Benchmark(
        "one distillation step against a plain twin",
        full="train-step --model {teacher} --repeats 3",
        smoke="train-step --model {teacher} --rows 1 --length 32 --repeats 1",
        file="train_step.jsonl",
        kind="train_step",
        markdown=shown.card("train_step"),
        settings={"kind": None, "checkpointing": True},
    ),
    "train-step-kept": Benchmark(
        "the same with all activations kept",
        full="train-step --model {teacher} --no-checkpointing --rows 2 --repeats 1",
        smoke="train-step --model {teacher} --no-checkpointing --rows 1 --length 32 --repeats 1",
        file="train_step.jsonl",
        kind="train_step",
        markdown=shown.card("train_step"),
        settings={"kind": None, "checkpointing": False},
    ),
    "train-step-blocks": Benchmark(
        "the same in blocks, with a diffusion teacher and Qwen3's vocabulary",
        full="train-step --kind bd3lm --model {teacher} --vocab 151936 --layers 2 --repeats 3",
        smoke="train-step --kind bd3lm --model {teacher} --vocab 400 --layers 1 --rows 1 --length 32"
        " --repeats 1",
        file="train_step.jsonl",
        kind="train_step",
        markdown=shown.card("train_step_blocks"),
        settings={"kind": "bd3lm"},
    ),
    "likelihood": Benchmark(
        "error of likelihood estimators at equal forwards",
        full="likelihood --model {student} --items 3 --long-items 1 --long-length 24 --context 16"
        " --budgets 16,32,64,128 --long-draws 6",
        smoke="likelihood --model {student} --items 2 --length 3 --long-items 1 --long-length 4"
        " --context 8 --budgets 2,4 --draws 3 --long-draws 2",
        file="likelihood.jsonl",
        kind="bench likelihood",
        markdown=shown.likelihood,
    ),
    "serve": Benchmark(
        "the server under load, against one request at a time and the library",
        # The soak of ten minutes is told in docs/serving.md from a record of its own.
        full="serve --model {student} --requests 2 --dtype bfloat16 --soak 600",
        smoke="serve --model {student} --concurrency 1,2 --requests 1 --repeats 1 --threads 1",
        file="serve.jsonl",
        kind="bench serve",
        markdown=shown.serve,
    ),
    "targets": Benchmark(
        "price and error of every soft target",
        full="targets --teacher {teacher} --student {student} --text humaneval --rows 3"
        " --levels 0.2,0.5 --fills 4,16 --dtype bf16",
        smoke="targets --teacher {teacher} --student {student} --rows 2 --context 4 --block 4"
        " --levels 0.5 --fills 2 --reference-fills 4 --candidates 2",
        file="targets.jsonl",
        kind="bench targets",
        markdown=shown.targets,
    ),
    "study": Benchmark(
        "students trained on each target, on real code",
        full="study --arms ce,left_2,suffix,i_sir,student,ce_weighted --steps 10 --holes 24"
        " --set train.eval_rows=24 --set train.eval_draws=1 --set train.warmup_steps=2 --runs {runs}",
        smoke=f"study {_TINY_RUNS} --arms ce,left_2 --seeds 0 --steps 4 --layers 1 --length 80"
        " --holes 3 --set train.eval_rows=6 --set train.eval_draws=1",
        file="study.jsonl",
        kind="bench study",
        markdown=shown.report("study_report"),
    ),
    "study-synthetic": Benchmark(
        "the same on a language that can be enumerated",
        full="study --synthetic",
        smoke="study --synthetic --arms ce --seeds 0 --steps 4 --fills 2",
        file="study.jsonl",
        kind="bench study synthetic",
        markdown=shown.report("study_report", "describe_synthetic"),
    ),
    "suffix": Benchmark(
        "suffix scoring against one forward a candidate",
        full="suffix --model {teacher} --rows 2 --positions 3 --loop-positions 1 --prune 0.0025"
        " --tail-draws 4",
        smoke="suffix --model {teacher} --candidates 4 --length 12 --rows 1 --positions 3"
        " --loop-positions 2 --tail-draws 2",
        file="suffix.jsonl",
        kind="bench suffix",
        markdown=shown.card("suffix_cost"),
    ),
    "cache": Benchmark(
        "training steps with cached targets, and with a teacher at work",
        full="cache --model {teacher}",
        smoke="cache --model {teacher} --source {corpus} --rows 2 --length 24 --cached-rows 6 --pairs 1"
        " --top-k 8",
        file="cache.jsonl",
        kind="bench cache",
        markdown=shown.card("cache"),
    ),
    "tide": Benchmark(
        "block diffusion students of a diffusion teacher, loss by loss",
        full="tide --arms ce,kl,kl_weak,tidal,tidal_comp_demo,tidal_normalised,ce_cross,ce_chunks,"
        "forward_calm,reverse_calm,bernoulli_kl --rows 2 --steps 30 --teacher-steps 80"
        " --first-steps 60 --holes 32 --set train.eval_rows=32 --set train.eval_draws=1 --runs {runs}",
        smoke=f"tide {_TINY_RUNS} --arms tidal,bernoulli_kl --seeds 0 --steps 2 --teacher-steps 2"
        " --first-steps 1 --layers 1 --block 4 --length 80 --rows 2 --holes 2 --tokens 270"
        " --documents 20 --set train.eval_rows=2 --set train.eval_draws=1",
        file="tide.jsonl",
        kind="bench tide",
        markdown=shown.page("tide_report"),
    ),
    "tokenizers": Benchmark(
        "students of teachers with another tokenizer",
        full="tokenizers --teacher-steps 400 --steps 120",
        smoke="tokenizers --arms ce,shared,mapped --seeds 0 --sources {corpus} --documents 30"
        " --small 270 --large 300 --width 16 --layers 1 --length 24 --rows 4 --teacher-steps 4"
        " --steps 2",
        file="tokenizers.jsonl",
        kind="bench tokenizers",
        markdown=shown.report("tokenizers_report"),
    ),
    "on-policy": Benchmark(
        "students on their own text, and on others'",
        full="on-policy --model {teacher} --arms ce_corpus,ce_teacher,off_policy,on_policy,on_policy_8,"
        "on_policy_right --runs {runs} --table {results}/on_policy.md --plot {results}/on_policy.png",
        smoke=f"on-policy --model {{teacher}} {_TINY_RUNS} --arms ce_corpus,on_policy --blocks 4,8"
        " --seeds 0 --steps 1 --rows 2 --documents 30 --steps-per-batch 1 --thresholds 0.5"
        " --samples 2 --eval-rows 2 --holes 2",
        file="on_policy.jsonl",
        kind="bench on-policy",
        markdown=shown.on_policy,
    ),
    "latency": Benchmark(
        "the student against its teacher: speed, memory, and quality beside them",
        # A device that cannot do graphs is told in the record.
        full="latency --model {student} --teacher {teacher} --mode eager,graphs --plain-texts 2"
        " --overhead --table {results}/latency.md --plot {results}/latency.png",
        smoke="latency --model {student} --teacher {teacher} --texts 2 --prompt-length 16 --gen-length 8"
        " --tokens-per-step 1,2 --thresholds 0.5 --holes 2 --span 4 --batches 1,2 --batch-length 4"
        " --contexts 8 --threads 1",
        file="latency.jsonl",
        kind="bench latency",
        markdown=shown.page("latency_report"),
        settings={"cache": "none", "random_teacher": False, "quality": True},
    ),
    "drift": Benchmark(
        "what an approximate cache changes and saves (full canvas)",
        full="drift --model {student}",
        smoke="drift --model {student} --caches prefix,dual:2 --texts 2 --prompt-length 8"
        " --gen-length 8 --block-length 4 --threads 1",
        file="drift.jsonl",
        kind="bench drift",
        markdown=shown.page("drift", "markdown"),
        settings={"tokens_per_step": 1, "dtype": "float32"},
    ),
    "cpu": Benchmark(
        "number types, 8 bits, threads and compiled code on a CPU",
        full="cpu --model {student} --teacher {teacher} --compile",
        smoke="cpu --model {student} --teacher {teacher} --numbers int8_dynamic --threads 1 --kept 8"
        " --length 4 --tokens 2 --repeats 2 --texts 2 --text-length 16",
        file="cpu.jsonl",
        kind="bench cpu",
        markdown=shown.page("cpu_report"),
    ),
}
