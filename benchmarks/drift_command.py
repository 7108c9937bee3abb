"""`mdm bench drift`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("drift")
@click.option("--model", help="Student folder.  [default: the last finished run in runs/]")
@click.option("--caches", default="prefix,dual,dual:4", show_default=True,
              help="Approximate caches, with the steps between refreshes behind a colon.")  # fmt: skip
@click.option("--texts", default=4, show_default=True, help="Texts, after prompts of HumanEval.")
@click.option("--prompt-length", default=48, show_default=True, help="Tokens of a prompt at most.")
@click.option("--gen-length", default=64, show_default=True, help="Tokens of a text.")
@click.option("--block-length", default=16, show_default=True, help="Tokens decoded together.")
@click.option("--tokens-per-step", default=1, show_default=True, help="Tokens decided in a step.")
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--threads", type=int, help="CPU threads.  [default: the cores]")
@click.option("--table", type=click.Path(path_type=Path), help="Markdown file for the table.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/drift.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def drift(
    model: str | None,
    caches: str,
    threads: int | None,
    table: Path | None,
    path: Path,
    **others: Any,
) -> None:
    """How far approximate caches of a full-canvas model are off, and what they save.

    The same texts with and without: differences of logits step by step, and texts written alone.
    """
    from mdm.record import device, to_json
    from mdm.runs import last_finished

    from . import drift as measured

    settings = measured.DriftBench(
        model=model or str(last_finished()),
        caches=tuple(part.strip() for part in caches.split(",") if part.strip()),
        threads=device()["cores"] if threads is None else threads,
        **others,
    )
    record = measured.run(settings, path, lambda text: click.echo(text, err=True))
    page = measured.markdown(record)
    if table is not None:
        table.write_text(page, encoding="utf-8")
    click.echo(page)
    click.echo(to_json(record["results"]))
