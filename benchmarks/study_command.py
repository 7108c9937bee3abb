"""`mdm bench study`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("study")
@click.option("--synthetic", is_flag=True, help="On a language that can be enumerated; minutes.")
@click.option("--arms", default="", help="Names, like ce,left,suffix.  [default: all]")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of masks, rows and holes.")
@click.option(
    "--steps", type=click.IntRange(min=4), help="Of each run.  [default: 80; synthetic 200]"
)
@click.option("--layers", default=0, show_default=True, help="Layers of the student; 0 = all.")
@click.option("--length", default=128, show_default=True, help="Tokens in a row.")
@click.option("--holes", default=64, show_default=True, help="Held-out holes to fill.")
@click.option("--recipe", default="ce", show_default=True, help="What the arms change.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting of that recipe; may be repeated.")  # fmt: skip
@click.option("--runs", default="runs/study", show_default=True, help="Folder that holds the runs.")
@click.option("--keep", is_flag=True, help="Keep the weights and rows of finished runs.")
@click.option("--fills", default=4, show_default=True, help="Synthetic: fills of a target (K).")
@click.option("--language", default=0, show_default=True, help="Synthetic: seed of the teacher.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG file to draw.")
@click.option("--record", "path", type=click.Path(path_type=Path),
              default=Path("benchmarks/results/study.jsonl"), show_default=True,
              help="JSONL file to add the record to.")  # fmt: skip
def study(
    synthetic: bool,
    arms: str,
    seeds: str,
    steps: int | None,
    layers: int,
    length: int,
    holes: int,
    recipe: str,
    assignments: tuple[str, ...],
    runs: str,
    keep: bool,
    fills: int,
    language: int,
    picture: Path | None,
    path: Path,
) -> None:
    """Train students on different soft targets and masks, and compare them in pairs.

    Same rows, steps, seeds and initial student; held-out bound, accuracy at few masks, infilled holes,
    each with a t-interval over seeds and a standard error over rows. On two CPU cores from a minute a run
    (ce, left) to some ten; finished runs are not repeated. With --synthetic on a toy
    language, where the truth is known.
    """
    from mdm.errors import ConfigError

    from . import study_report as report

    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise ConfigError(f"--seeds must be whole numbers like 0,1,2; got {seeds!r}")
    chosen = tuple(arm.strip() for arm in arms.split(",") if arm.strip())
    numbers = tuple(int(part) for part in seeds.split(","))

    def say(text: str) -> None:
        click.echo(text, err=True)

    if synthetic:
        from . import synthetic as toy

        settings = toy.SyntheticBench(
            arms=chosen, seeds=numbers, steps=steps or 200, fills=fills, language=language
        )
        record = toy.run(settings, path, say)
        describe, draw = report.describe_synthetic, report.plot_synthetic
    else:
        from . import study as real

        wanted = real.StudyBench(
            arms=chosen,
            seeds=numbers,
            steps=steps or 80,
            layers=layers or None,
            length=length,
            holes=holes,
            recipe=recipe,
            assignments=assignments,
        )
        record = real.run(wanted, Path(runs), path, say, keep=keep)
        describe, draw = report.describe, report.plot
    if picture is not None:
        draw(record, picture)
    click.echo(describe(record))
