"""The command `mdm`. Knows where each command lives and imports it only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys

import click

from .errors import CheckpointError, MdmError, unknown

COMMANDS = {
    "train": "mdm.train.command:train",
    "convert": "mdm.commands:convert",
    "generate": "mdm.commands:generate",
    "score": "mdm.score_command:score",
    "eval": "mdm.eval.command:evaluate",
    "serve": "mdm.serve.command:serve",
    "data": "mdm.train.data_command:data",
    "bench": "mdm.benchmarks.command:bench",
    "demo": "mdm.benchmarks.command:demo",
}


class LazyGroup(click.Group):
    """A group whose commands are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(unknown("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("mdm-code"), prog_name="mdm")
def mdm() -> None:
    """Masked diffusion language models of code, distilled from autoregressive teachers.

    \b
    mdm train                      distil the embedded teacher on Python code (recipe "demo")
    mdm generate --prefix A --suffix B --span 12      fill what stands between
    mdm score "def f(x):" "  return x"                 how likely the second text is after the first
    mdm eval --tasks humaneval --limit 20             a benchmark, with standard errors
    mdm serve --teacher embedded                      HTTP, OpenAI's endpoints, a page
    mdm convert MODEL --output DIR                    an AR checkpoint as initial student

    Commands that take --model use the last finished run in runs/ if it is left out.
    """


def main() -> None:
    """Run the command line; errors a user can mend are one line and an exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        mdm(prog_name="mdm")
    except MdmError as error:
        print(f"mdm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(
            f"mdm: {error.strerror or error}: {error.filename or 'while writing'}", file=sys.stderr
        )
        sys.exit(CheckpointError.exit_code)


if __name__ == "__main__":
    main()
