"""lm-eval's own command line with our model and our sandbox in it.

This release of lm-eval looks for models in its own package only, so ours has to be imported first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from unittest import mock

from . import sandbox
from .code_eval import in_place_of_code_eval


def run_native(arguments: Sequence[str]) -> None:
    """`lm-eval ARGUMENTS…`; a code task needs --confirm_run_unsafe_code there as ever.

    Raises SandboxError before anything runs if this machine cannot isolate generated code.
    """
    from lm_eval.__main__ import cli_evaluate

    from . import harness

    assert harness.__name__  # importing it registers "mdm"
    if any("unsafe" in argument for argument in arguments):
        sandbox.require_level(os.environ.get("MDM_SANDBOX_LEVEL", sandbox.DEFAULT_LEVEL))
    with in_place_of_code_eval(), mock.patch.object(sys, "argv", ["lm-eval", *arguments]):
        cli_evaluate()
