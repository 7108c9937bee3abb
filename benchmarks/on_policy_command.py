"""`mdm bench on-policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .option_lists import numbers, parts, shares


@click.command("on-policy")
@click.option("--model", default="embedded", show_default=True,
              help="AR model that students begin as, and their teacher.")  # fmt: skip
@click.option("--arms", default="", callback=parts,
              help="Names, like off_policy,on_policy; ce_corpus comes along.  [default: all]")  # fmt: skip
@click.option("--blocks", default="4,8,16", show_default=True, callback=numbers,
              help="Sizes of blocks.")  # fmt: skip
@click.option("--seeds", default="0,1,2", show_default=True, callback=numbers,
              help="Of rows, masks, rollouts and holes.")  # fmt: skip
@click.option("--steps", default=10, show_default=True, help="Of each student.")
@click.option("--rows", default=2, show_default=True, help="Rows in a step.")
@click.option("--prompt-tokens", default=23, show_default=True, help="Of a prompt.")
@click.option("--length", default=40, show_default=True, help="Tokens behind it.")
@click.option("--documents", default=300, show_default=True, help="That give prompts.")
@click.option("--learning-rate", default=1e-4, show_default=True, help="Of all students.")
@click.option("--steps-per-batch", default=5, show_default=True,
              help="Steps that learn from a batch of rollouts.")  # fmt: skip
@click.option("--thresholds", default="0.5,0.8,0.9,1.0", show_default=True, callback=shares,
              help="At which students write greedily, to be judged.")  # fmt: skip
@click.option("--samples", default=4, show_default=True, help="Texts at each of them.")
@click.option("--eval-rows", default=12, show_default=True, help="Held-out rows of either text.")
@click.option("--eval-draws", default=1, show_default=True, help="Masks drawn for each.")
@click.option("--holes", default=24, show_default=True, help="Held-out holes to fill.")
@click.option("--recipe", default="ce", show_default=True, help="What the arms change.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting of that recipe; may be repeated.")  # fmt: skip
@click.option("--runs", default="runs/on-policy", show_default=True,
              help="Folder that holds the runs.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the weights and rows of finished runs.")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for the tables.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/on_policy.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def on_policy(
    runs: str, keep: bool, table: Path | None, picture: Path | None, path: Path, **settings: Any
) -> None:
    """An AR model becomes a block diffusion model: by a corpus, its own text, or the student's.

    Cross-entropy and distillation off and on policy at equal tokens, for several sizes of blocks: held-out
    bound, infilling, and what the teacher thinks of the student's text at several thresholds. Finished
    runs are not repeated, so it may be stopped at any time.
    """
    from . import on_policy as measured
    from .on_policy_report import describe, page, plot

    bench_settings = measured.OnPolicyBench(**settings)
    record = measured.run(
        bench_settings, Path(runs), path, lambda text: click.echo(text, err=True), keep=keep
    )
    if table is not None:
        table.write_text(page(record) + "\n", encoding="utf-8")
    if picture is not None:
        plot(record, picture)
    click.echo(describe(record))
