"""`mdm demo` and `mdm bench …`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .on_policy_command import on_policy
from .study_command import study
from .tide_command import tide
from .tokenizers_command import tokenizers

COUNT = click.IntRange(min=1)
Number = TypeVar("Number", int, float)


@click.command(short_help="Train on this machine and show the gain.")
@click.option("--runs", default="runs", show_default=True, help="Folder that holds the runs.")
@click.option("--recipe", default="demo", show_default=True, help="Recipe by name or YAML file.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting of the recipe; may be repeated.")  # fmt: skip
@click.option(
    "--holes",
    type=click.IntRange(min=2),
    default=24,
    show_default=True,
    help="Holes filled before and after.",
)
def demo(runs: str, recipe: str, assignments: tuple[str, ...], holes: int) -> None:
    """Distil the embedded teacher on real Python code and show what was gained.

    Takes a few minutes on two CPU cores, replaces runs/demo, and prints one JSON object as its last
    line.
    """
    from rich.console import Console

    from mdm.train.recipe import read_recipe

    from .demo import last_line, run_demo

    settings = read_recipe(recipe, assignments)
    console = Console(highlight=False)
    numbers = run_demo(settings, Path(runs), num_holes=holes, console=console)
    click.echo(last_line(numbers))


@click.group(short_help="Measure time and memory.")
def bench() -> None:
    """Benchmarks: both sides in one run, a card for people, one JSON line last for programs."""


@bench.command("train-step")
@click.option("--kind", type=click.Choice(("mdlm", "bd3lm")), default="mdlm", show_default=True,
              help="Whole canvas and AR teacher, or blocks and diffusion teacher.")  # fmt: skip
@click.option("--model", default="embedded", show_default=True, help="AR model of both sides.")
@click.option("--layers", type=int, help="Layers of the student (bd3lm: of both).  [default: all]")
@click.option(
    "--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Rows in the batch."
)
@click.option(
    "--length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens in a row."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed steps of each side.",
)
@click.option("--no-checkpointing", is_flag=True, help="Keep all activations (both sides).")
@click.option("--block-size", type=click.IntRange(min=1),
              help="bd3lm: tokens a block.  [default: 32]")  # fmt: skip
@click.option("--vocab", type=click.IntRange(min=8),
              help="bd3lm: random weights in the shape of --model with this many tokens.")  # fmt: skip
@click.option("--tidal", is_flag=True, help="bd3lm: mixed targets (TIDAL).")
@click.option("--seed", default=0, show_default=True, help="Of masks and of random tokens.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/train_step.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def train_step(
    kind: str,
    no_checkpointing: bool,
    block_size: int | None,
    vocab: int | None,
    tidal: bool,
    path: Path,
    **common: Any,
) -> None:
    """Time and memory of one distillation step, against a straightforward twin.

    The twin computes full-vocabulary logits of student and teacher at all positions. Same model,
    same batch, same precision, same gradient checkpointing; memory is the peak above what stood
    before the step, each side in a fresh process.

    --kind bd3lm: student and teacher are block diffusion models of the same shape, and both sides have the
    same loss. What the logits take is also measured alone, as the peak less that of the same step without
    heads, and counted from the shapes: for this size and for 8 rows of 512 with Qwen3's vocabulary.
    """
    from mdm.config import require

    from . import train_step as canvas
    from . import train_step_blocks as blocks

    common["checkpointing"] = not no_checkpointing
    if kind == "bd3lm":
        asked = blocks.BlockStepSettings(
            **common,
            block_size=block_size or blocks.BlockStepSettings.block_size,
            vocab=vocab,
            tidal=tidal,
        )
        click.echo(blocks.describe(blocks.compare(asked, path)))
        return
    require(
        block_size is None and vocab is None and not tidal,
        "--block-size, --vocab and --tidal are for --kind bd3lm",
    )
    click.echo(canvas.describe(canvas.compare(canvas.StepSettings(**common), path)))


@bench.command("likelihood")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--items", default=6, show_default=True, help="Short answers, each with a wrong one.")
@click.option("--length", default=10, show_default=True, help="Tokens of a short answer.")
@click.option("--long-items", default=2, show_default=True, help="Long answers; 0 = none.")
@click.option("--long-length", default=32, show_default=True, help="Tokens of a long answer.")
@click.option("--context", default=32, show_default=True, help="Tokens of the prompt.")
@click.option("--budgets", default="8,16,32,64,128", show_default=True, help="Forwards an answer.")
@click.option("--draws", default=200, show_default=True, help="Draws a short answer.")
@click.option("--long-draws", default=8, show_default=True, help="Runs a long answer.")
@click.option("--seed", default=0, show_default=True, help="Of the masks.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/likelihood.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def likelihood(
    model: str | None, budgets: str, picture: Path | None, path: Path, **counts: int
) -> None:
    """Error of likelihood estimators against the truth, at equal forwards, on a real checkpoint.

    Short answers (HumanEval's solutions) are scored under every mask once; the estimators then draw
    from that table, so bias and spread are known exactly. Long answers are scored again and again.
    """
    from mdm.errors import ConfigError
    from mdm.runs import last_finished

    from . import likelihood as measured

    if not all(part.strip().isdigit() for part in budgets.split(",")):
        raise ConfigError(f"--budgets must be whole numbers like 8,16,32; got {budgets!r}")
    settings = measured.LikelihoodBench(
        model=model or str(last_finished()),
        budgets=tuple(int(part) for part in budgets.split(",")),
        **counts,
    )
    record = measured.run(settings, path)
    if picture is not None:
        measured.plot(record, picture)
    click.echo(measured.describe(record))


@bench.command("serve")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--workload", default="short", show_default=True,
              help="short (16 + 16 tokens), medium (32 + 32) or long (64 + 64).")  # fmt: skip
@click.option("--concurrency", default="1,2,4,8,16,32", show_default=True, help="Clients at once.")
@click.option("--requests", default=4, show_default=True, help="Of each client at each level.")
@click.option("--repeats", default=3, show_default=True, help="How often all is measured.")
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--threads", type=int, help="CPU threads of each side.  [default: the cores]")
@click.option("--soak", default=0.0, show_default=True, help="Seconds of mixed load; 0 = none.")
@click.option("--seed", default=0, show_default=True, help="Of prompts and of the requests' seeds.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/serve.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def serve(
    model: str | None,
    workload: str,
    concurrency: str,
    requests: int,
    repeats: int,
    dtype: str,
    threads: int | None,
    soak: float,
    seed: int,
    picture: Path | None,
    path: Path,
) -> None:
    """Throughput, latency and memory of `mdm serve`, against the same weights without its engine.

    Clients of a second process ask a server whose requests share forwards, and in turn one that takes
    one request at a time; a single client is compared with calls of the library. With --soak, load
    of all kinds for a while: is anything lost, does memory grow?
    """
    from mdm.errors import ConfigError
    from mdm.record import device
    from mdm.runs import last_finished

    from . import serve as measured
    from .serve_report import describe
    from .serve_report import plot as draw
    from .serve_requests import ServeBench

    if not all(part.strip().isdecimal() for part in concurrency.split(",")):
        raise ConfigError(f"--concurrency must be whole numbers like 1,4,16; got {concurrency!r}")
    settings = ServeBench(
        model=model or str(last_finished()),
        workload=workload,
        concurrency=tuple(int(part) for part in concurrency.split(",")),
        requests=requests,
        repeats=repeats,
        dtype=dtype,
        threads=device()["cores"] if threads is None else threads,
        soak=soak,
        seed=seed,
    )
    record = measured.run(settings, path, lambda text: click.echo(text, err=True))
    if picture is not None:
        draw(record, picture)
    click.echo(describe(record))


@bench.command("targets")
@click.option("--teacher", default="embedded", show_default=True, help="AR model that is asked.")
@click.option("--student", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--no-student", is_flag=True, help="Leave the student's proposals out.")
@click.option("--text", default="stdlib", show_default=True,
              help="stdlib, humaneval, or teacher (its own samples after stdlib contexts).")  # fmt: skip
@click.option("--rows", default=4, show_default=True, help="Texts.")
@click.option("--context", default=64, show_default=True, help="Clean tokens before the block.")
@click.option("--block", default=16, show_default=True, help="Tokens of the block.")
@click.option("--levels", default="0.2,0.5,0.8", show_default=True, help="Share that is masked.")
@click.option("--fills", default="4,8,16,32", show_default=True, help="Ways to fill the masks (K).")
@click.option("--candidates", default=16, show_default=True, help="Of suffix scoring.")
@click.option("--prune", default=1e-3, show_default=True, help="Mass that suffix_pruned may drop.")
@click.option("--draws", default=1, show_default=True, help="Answers of each estimator.")
@click.option("--reference", default="adaptive", show_default=True,
              help="adaptive, importance, smc, i_sir or csmc.")  # fmt: skip
@click.option("--reference-fills", default=256, show_default=True, help="In two halves.")
@click.option("--dtype", default="fp32", show_default=True, help="Of the teacher: fp32 or bf16.")
@click.option("--seed", default=0, show_default=True, help="Of texts, masks and fills.")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for all lines.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/targets.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def targets(
    student: str | None,
    no_student: bool,
    levels: str,
    fills: str,
    table: Path | None,
    picture: Path | None,
    path: Path,
    **others: Any,
) -> None:
    """Price and error of every soft target on a real teacher, against a high-budget reference.

    Real code, a block with some masks after clean text. Positions with visible tokens to their right
    (holes) and without (tails) are asked for separately.
    """
    from mdm.errors import CheckpointError, ConfigError
    from mdm.runs import last_finished

    from . import targets as measured
    from .targets_report import describe, markdown
    from .targets_report import plot as draw

    if student and no_student:
        raise ConfigError("--student and --no-student cannot both be given")
    if not student and not no_student:
        try:
            student = str(last_finished())
        except CheckpointError:
            student = None  # the card says so
    settings = measured.TargetsBench(
        student=student,
        levels=_numbers("--levels", levels, float),
        fills=_numbers("--fills", fills, int),
        **others,
    )
    record = measured.run(settings, path, lambda text: click.echo(text, err=True))
    if table is not None:
        table.write_text(markdown(record), encoding="utf-8")
    if picture is not None:
        draw(record, picture)
    click.echo(describe(record))


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list such as "8,16,32"; raises ConfigError."""
    from mdm.errors import ConfigError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} must be {'whole ' if kind is int else ''}numbers with commas; got {text!r}"
        ) from error


bench.add_command(on_policy)
bench.add_command(study)
bench.add_command(tide)
bench.add_command(tokenizers)


@bench.command("suffix")
@click.option("--model", default="embedded", show_default=True, help="AR model of all sides.")
@click.option("--candidates", default=128, show_default=True, help="Candidates a position.")
@click.option("--length", default=256, show_default=True, help="Tokens of a text.")
@click.option("--rows", default=3, show_default=True, help="Texts, from the standard library.")
@click.option("--positions", default=6, show_default=True, help="Masked positions of each text.")
@click.option("--loop-positions", default=2, show_default=True,
              help="Of them, how many the plain loop is timed on.")  # fmt: skip
@click.option("--repeats", default=1, show_default=True, help="How often all is timed.")
@click.option("--prune", default=2e-3, show_default=True, help="Mass that the fast mode may drop.")
@click.option("--tail-draws", default=16, show_default=True,
              help="Draws for the mass outside the candidates, not timed.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of texts and positions.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/suffix.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def suffix(path: Path, **settings: Any) -> None:
    """Suffix scoring against the plain loop of one full forward for each candidate.

    The exact mode has to agree with the loop; the fast mode's distance from it is measured.
    """
    from . import suffix_cost as measured

    bench_settings = measured.SuffixBench(**settings)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    click.echo(measured.describe(record))


@bench.command("cache")
@click.option("--model", default="embedded", show_default=True, help="AR model: both sides of it.")
@click.option("--source", default="stdlib", show_default=True, help="Text, as in data.sources.")
@click.option("--rows", default=4, show_default=True, help="Rows of a step.")
@click.option("--length", default=256, show_default=True, help="Tokens in a row.")
@click.option("--cached-rows", default=32, show_default=True, help="Rows of the cache.")
@click.option("--pairs", default=16, show_default=True, help="Timed steps of each side.")
@click.option("--top-k", default=64, show_default=True, help="Tokens kept a position.")
@click.option("--precision", default="bf16", show_default=True, help="bf16 or fp32, both models.")
@click.option("--seed", default=0, show_default=True, help="Of masks and of the order of rows.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/cache.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def cache(path: Path, **settings: Any) -> None:
    """Training steps with a teacher at work, against cached targets: time, bytes, same loss?

    Teacher and student are the same model. The sides take turns; about two minutes on two CPU cores.
    """
    from . import cache as measured

    bench_settings = measured.CacheBench(**settings)
    record = measured.run(bench_settings, path, lambda text: click.echo(text, err=True))
    click.echo(measured.describe(record))
