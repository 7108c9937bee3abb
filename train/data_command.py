"""`mdm data`: look at training data, and make some from Python code or by a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cache_command import cache_targets
from .teacher_text_command import sample_teacher

if TYPE_CHECKING:
    from mdm.vocab import Vocab

    from .dataset import PreparedData


@click.group()
def data() -> None:
    """Look at training data, and make some from Python code or by a teacher."""


data.add_command(sample_teacher)
data.add_command(cache_targets)


@data.command()
@click.argument("source")
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write, one JSON row a line; replaced if it exists.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many functions.")
def functions(source: str, output: Path, limit: int | None) -> None:
    """Write the functions of SOURCE as rows: signature and docstring, then the body.

    SOURCE is a folder of Python files, one file, or `stdlib`. Rows have the keys prompt, response,
    origin, name and line, and can be trained on: --set data.sources=[FILE].
    """
    import contextlib
    import dataclasses
    import itertools
    import json
    import os

    from mdm.errors import DataError

    from .documents import Skips
    from .functions import read_functions

    skips = Skips()
    draft = output.with_name(f".{output.name}.{os.getpid()}.draft")
    count = characters = 0
    try:
        with open(draft, "w", encoding="utf-8") as stream:
            for pair in itertools.islice(read_functions(source, skips), limit):
                stream.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")
                count += 1
                characters += len(pair.prompt) + len(pair.response)
        if not count:
            raise DataError(f"no function with a docstring and a body in {source!r}: {skips}")
        os.replace(draft, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            draft.unlink()
    click.echo(f"{count} functions, {characters} characters → {output}")
    click.echo(f"files left out: {skips}")


@data.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--size", default=2**13, show_default=True, help="Most tokens, 256 bytes included.")
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder."
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many documents.")
def train_tokenizer(sources: tuple[str, ...], size: int, output: Path, limit: int | None) -> None:
    """Learn a tokenizer of --size tokens from SOURCES: byte-level BPE.

    A student can be given it: --set student.tokenizer=FOLDER, with a teacher of another tokenizer
    (--recipe mapped or embedding). SOURCES are those of `mdm data inspect`.
    """
    import itertools

    from .corpus import open_source, read_in_turn
    from .dataset import DataSettings
    from .documents import Skips
    from .tokenizer import train_tokenizer as learn

    settings, skips = DataSettings(), Skips()
    opened = [open_source(name, settings.extensions, settings.max_file_kib) for name in sources]
    documents = itertools.islice(read_in_turn(opened, skips), limit)
    tokens = learn((document.text for document in documents), size, output)
    click.echo(f"{tokens} tokens → {output}")
    click.echo(f"left out: {skips}")


@data.command()
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--tokenizer",
    default="embedded",
    show_default=True,
    help='Model or tokenizer folder, or "embedded".',
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="data.KEY=VALUE",
    help="A data setting, such as data.length=512; may be repeated.",
)
def inspect(sources: tuple[str, ...], tokenizer: str, assignments: tuple[str, ...]) -> None:
    """Count what SOURCES hold, as training would read them, and show one row.

    A source is a folder, a text file, a .jsonl, .jsonl.gz or .json file of rows, the word `stdlib`,
    or hub:owner/name[:split[:column]]. Nothing is kept; a large source takes its time, which
    --set data.max_tokens=N shortens. Kinds of tokens are told apart by the names of files;
    --set data.language=python names the language of rows without one, data.language=none leaves
    that out.
    """
    import tempfile

    from mdm.checkpoint import load_vocab
    from mdm.config import build, override
    from mdm.errors import ConfigError, unknown

    from .dataset import DataSettings, prepare

    tree = override({"data": {"sources": list(sources), "language": "auto"}}, assignments)
    for section in set(tree) - {"data"}:
        raise ConfigError(unknown("section", section, ["data"]))
    settings = build(DataSettings, tree["data"], where="data.")
    vocab = load_vocab(tokenizer)
    with tempfile.TemporaryDirectory(prefix="mdm-inspect-") as folder:
        prepared = prepare(settings, vocab, Path(folder) / "data")
        click.echo("\n".join(_summary(prepared.manifest, settings.length)))
        click.echo("\nthe first training row:")
        click.echo("\n".join(_first_row(prepared, vocab)))


def _summary(manifest: Any, length: int) -> list[str]:
    lines = []
    for name, counts in manifest["splits"].items():
        room = max(1, counts["rows"] * length)
        lines.append(
            f"{name:<9} {counts['documents']} documents, {counts['rows']} rows of {length},"
            f" {counts['tokens']} tokens ({counts['tokens'] / room:.1%} of the rows),"
            f" {counts['maskable_tokens']} maskable"
        )
        learnt = max(1, counts["maskable_tokens"])
        shares = sorted(counts["classes"].items(), key=lambda item: -item[1])
        lines.append(f"{'':10}" + ", ".join(f"{name} {n / learnt:.1%}" for name, n in shares))
    lines.append(f"left out  {manifest['duplicates']} duplicates")
    for reason, count in manifest["skipped"].items():
        lines.append(f"          {count} {reason}, e.g. {manifest['skipped_examples'][reason][0]}")
    return lines


def _first_row(prepared: PreparedData, vocab: Vocab) -> list[str]:
    """Each segment of the row: what is only read, and what is learnt, as text."""
    tokens_L, document_ids_L, maskable_L, _ = (column[0] for column in prepared.train.batch([0]))
    lines = []
    for number in range(int(document_ids_L.max()) + 1):
        segment = document_ids_L == number
        parts = {"read": segment & ~maskable_L, "learnt": segment & maskable_L}
        for part, chosen in parts.items():
            text = vocab.decode(tokens_L[chosen].tolist(), keep_special=True)
            lines += [f"--- document {number}, {part}: {int(chosen.sum())} tokens", text]
    lines.append(f"--- padding: {int((document_ids_L < 0).sum())} tokens")
    return lines
