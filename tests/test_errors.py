"""The error tree and the "did you mean" text."""

import re

import pytest

from mdm import errors
from mdm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MdmError,
    RequestError,
    SandboxError,
    TrainingError,
    VocabError,
    check_known,
    unknown,
)

LEAVES = (
    ConfigError,
    DataError,
    VocabError,
    CheckpointError,
    TrainingError,
    RequestError,
    SandboxError,
)


def test_these_are_all_the_errors():
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert {kind for kind in defined if issubclass(kind, Exception)} == {MdmError, *LEAVES}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigError, ValueError),
        (DataError, ValueError),
        (VocabError, ValueError),
        (CheckpointError, OSError),
        (TrainingError, RuntimeError),
        (RequestError, ValueError),
        (SandboxError, RuntimeError),
    ],
)
def test_each_error_is_an_mdm_error_and_the_builtin_one(kind, builtin):
    assert issubclass(kind, MdmError)
    assert issubclass(kind, builtin)
    assert str(kind("no model at 'x'")) == "no model at 'x'"


def test_exit_codes_tell_the_errors_apart():
    codes = [kind.exit_code for kind in (MdmError, *LEAVES)]
    assert len(set(codes)) == len(codes)
    # 0 is success; shells use 126 and up for themselves.
    assert all(0 < code < 126 for code in codes)


def test_drawn_tree_names_every_error():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert drawn == [kind.__name__ for kind in LEAVES]


def test_unknown_suggests_the_nearest_name():
    text = unknown("strategy", "low_conf", ["random", "low_confidence", "margin"])
    assert text == (
        "unknown strategy 'low_conf'; did you mean 'low_confidence'?"
        " (known: low_confidence, margin, random)"
    )


def test_unknown_suggests_nothing_far_away():
    assert unknown("loss", "zzz", ["kl", "jsd"]) == "unknown loss 'zzz' (known: jsd, kl)"


def test_unknown_takes_any_object_as_name():
    # A YAML key can be a number.
    assert unknown("setting", 7, ["steps"]) == "unknown setting 7 (known: steps)"


def test_a_known_name_passes():
    check_known("loss", "kl", {"kl": 1, "jsd": 2})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown loss 'jds'; did you mean 'jsd'\?"):
        check_known("loss", "jds", {"kl": 1, "jsd": 2})
