"""Settings from YAML and `--set`: what is accepted, what fails, and what the failure says."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import yaml

from mdm.config import build, override, read_yaml, require, to_tree
from mdm.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    lr: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.99)


@dataclass(frozen=True)
class Train:
    steps: int = 10
    seed: int | None = None
    resume: bool = False
    files: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)
    warmup: Optimizer | None = None

    def __post_init__(self):
        require(self.steps > 0, f"train.steps must be positive; got {self.steps}")


@dataclass(frozen=True)
class Recipe:
    teacher: str
    train: Train = field(default_factory=Train)


def recipe(**train):
    return build(Recipe, {"teacher": "embedded", "train": train})


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- build: what is accepted ---------------------------------------------------------------------


def test_defaults_fill_what_is_not_given():
    assert build(Recipe, {"teacher": "x"}) == Recipe("x", Train())


def test_nested_sections_are_built():
    built = recipe(steps=5, optimizer={"lr": 0.5})
    assert built.train == Train(steps=5, optimizer=Optimizer(lr=0.5))


def test_optional_section_is_built_or_none():
    assert recipe(warmup=None).train.warmup is None
    assert recipe(warmup={"lr": 2.0}).train.warmup == Optimizer(lr=2.0)


@pytest.mark.parametrize("seed", [None, 0, -3])
def test_optional_takes_null_or_the_type(seed):
    assert recipe(seed=seed).train.seed == seed


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1.0), (0.5, 0.5), ("1e-4", 1e-4), ("1E5", 1e5), ("-2", -2.0)],
)
def test_float_takes_whole_numbers_and_exponents_without_a_dot(given, expected):
    lr = recipe(optimizer={"lr": given}).train.optimizer.lr
    assert lr == expected
    assert type(lr) is float


def test_exponent_without_a_dot_reaches_build_as_text():
    # The reason for the rule above: YAML 1.1 wants 1.0e-4.
    assert yaml.safe_load("1e-4") == "1e-4"


@pytest.mark.parametrize("given", [["a", "b"], ("a", "b")])
def test_list_becomes_a_tuple(given):
    assert recipe(files=given).train.files == ("a", "b")


def test_items_of_a_list_are_converted():
    assert recipe(optimizer={"betas": [1, "1e-1"]}).train.optimizer.betas == (1.0, 0.1)


# --- build: what fails ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": "ten"}, "train.steps must be a whole number; got 'ten'"),
        ({"steps": 1.0}, "train.steps must be a whole number; got 1.0"),
        ({"steps": True}, "train.steps must be a whole number; got True"),
        ({"steps": None}, "train.steps must be a whole number; got None"),
        ({"seed": "1"}, "train.seed must be a whole number; got '1'"),
        ({"resume": 1}, "train.resume must be true or false; got 1"),
        ({"resume": "yes"}, "train.resume must be true or false; got 'yes'"),
        ({"files": "a.py"}, "train.files must be a list; got 'a.py'"),
        ({"files": {"a": 1}}, "train.files must be a list; got {'a': 1}"),
        ({"files": ["a", 3]}, "train.files[1] must be text; got 3"),
        ({"optimizer": 3}, "train.optimizer is a section; got 3"),
        ({"optimizer": None}, "train.optimizer is a section; got None"),
        ({"optimizer": {"lr": "fast"}}, "train.optimizer.lr must be a number; got 'fast'"),
        ({"optimizer": {"lr": True}}, "train.optimizer.lr must be a number; got True"),
        ({"optimizer": {"betas": [None]}}, "train.optimizer.betas[0] must be a number; got None"),
        ({"steps": -1}, "train.steps must be positive; got -1"),
    ],
)
def test_wrong_value_names_the_setting_and_the_value(train, message):
    with pytest.raises(ConfigError) as caught:
        recipe(**train)
    assert str(caught.value) == message


def test_unknown_key_suggests_the_nearest_with_its_full_name():
    with pytest.raises(ConfigError) as caught:
        recipe(optimizer={"l_r": 1.0})
    assert str(caught.value) == (
        "unknown setting 'train.optimizer.l_r'; did you mean 'train.optimizer.lr'?"
        " (known: train.optimizer.betas, train.optimizer.lr)"
    )


@pytest.mark.parametrize("key", [1, None, True])
def test_key_that_is_no_text_is_unknown(key):
    with pytest.raises(ConfigError, match="unknown setting"):
        build(Recipe, {"teacher": "x", key: 1})


def test_missing_setting_is_named():
    with pytest.raises(ConfigError, match=r"^missing setting teacher$"):
        build(Recipe, {})


def test_missing_setting_of_a_section_is_named_in_full():
    @dataclass
    class Outer:
        recipe: Recipe

    with pytest.raises(ConfigError, match=r"^missing setting recipe\.teacher$"):
        build(Outer, {"recipe": {}})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().teacher = "other"


# --- override ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("1e-4", "1e-4"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[a, b]", ["a", "b"]),
        ("a=b", "a=b"),
        (" spaced ", "spaced"),
    ],
)
def test_override_reads_the_value_as_yaml(text, value):
    assert override({}, [f"key={text}"]) == {"key": value}


def test_override_changes_one_setting_and_leaves_the_rest():
    tree = {"train": {"steps": 1, "files": ["a"]}, "teacher": "x"}
    assert override(tree, ["train.steps=2"]) == {
        "train": {"steps": 2, "files": ["a"]},
        "teacher": "x",
    }


def test_override_does_not_touch_its_input():
    tree = {"train": {"optimizer": {"lr": 1}, "files": ["a"]}}
    changed = override(tree, ["train.optimizer.lr=2"])
    changed["train"]["files"].append("b")
    assert tree == {"train": {"optimizer": {"lr": 1}, "files": ["a"]}}


def test_override_makes_missing_sections():
    assert override({}, ["train.optimizer.lr=2"]) == {"train": {"optimizer": {"lr": 2}}}


def test_later_override_wins():
    assert override({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize("assignment", ["steps", "=1", "train.=1", ".steps=1", "a..b=1", ""])
def test_override_without_key_or_equals_fails(assignment):
    with pytest.raises(ConfigError, match=r"write section\.key=value"):
        override({}, [assignment])


def test_override_with_broken_yaml_fails():
    with pytest.raises(ConfigError, match=r"--set 'files=\[a' is not valid YAML"):
        override({}, ["files=[a"])


def test_override_inside_a_value_fails():
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        override({"train": {"steps": 1}}, ["train.steps.more=1"])


def test_override_of_an_unknown_key_fails_when_built():
    tree = override({"teacher": "x"}, ["train.step=3"])
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        build(Recipe, tree)


# --- read_yaml -----------------------------------------------------------------------------------


def test_yaml_file_is_read(tmp_path):
    path = written(tmp_path, "teacher: é\ntrain: {steps: 3}\n")
    assert read_yaml(path) == {"teacher": "é", "train": {"steps": 3}}
    assert read_yaml(str(path)) == read_yaml(path)


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_empty_yaml_is_no_settings(tmp_path, text):
    assert read_yaml(written(tmp_path, text)) == {}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the settings file '.*absent\.yaml'"):
        read_yaml(tmp_path / "absent.yaml")


def test_folder_is_no_settings_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        read_yaml(tmp_path)


def test_file_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        read_yaml(written(tmp_path, b"teacher: \xff\xfe"))


@pytest.mark.parametrize(
    "text", ["train: [1", "a: b: c", "a: !!python/name:os.system x", "a: \x00"]
)
def test_broken_or_unsafe_yaml_fails_in_one_line(tmp_path, text):
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML: ") as caught:
        read_yaml(written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("just text", "str"), ("3", "int")])
def test_yaml_that_is_no_mapping_fails(tmp_path, text, kind):
    with pytest.raises(ConfigError, match=rf"recipe\.yaml holds a {kind}; expected"):
        read_yaml(written(tmp_path, text))


# --- to_tree -------------------------------------------------------------------------------------

CHANGED = Recipe(
    teacher="m",
    train=Train(
        steps=3,
        seed=4,
        resume=True,
        files=("a", "b"),
        optimizer=Optimizer(lr=1e-05, betas=()),
        warmup=Optimizer(betas=(0.5,)),
    ),
)


@pytest.mark.parametrize("settings", [Recipe("x"), CHANGED], ids=["defaults", "all changed"])
def test_build_undoes_to_tree(settings):
    assert build(Recipe, to_tree(settings)) == settings


@pytest.mark.parametrize("settings", [Recipe("x"), CHANGED], ids=["defaults", "all changed"])
def test_settings_survive_a_yaml_file(tmp_path, settings):
    path = written(tmp_path, yaml.safe_dump(to_tree(settings)))
    assert build(Recipe, read_yaml(path)) == settings


def test_tree_is_plain():
    assert to_tree(Optimizer()) == {"lr": 0.1, "betas": [0.9, 0.99]}


# --- require -------------------------------------------------------------------------------------


def test_require_raises_only_when_it_does_not_hold():
    require(True, "fine")
    with pytest.raises(ConfigError, match=r"^t must be in \[0, 1\]$"):
        require(False, "t must be in [0, 1]")
