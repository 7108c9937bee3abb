"""docs/scaling.md: its commands are commands, its recipe is one, and its table is what --dry-run says."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from test_recipe import PUBLISHED
from torch.distributed.run import get_args_parser

from mdm.cli import mdm
from mdm.train.estimate import GIB, describe
from mdm.train.memory import student_bytes, teacher_bytes
from mdm.train.outlines import config_of_student, outline
from mdm.train.recipe import read_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")

# Shapes of the public configs: type, width, feed-forward width, layers, heads, key heads, tied, rows.
SHAPES = {
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, True, 151_936),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, False, 151_936),
    "Qwen2.5-Coder-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, True, 151_936),
    "Qwen2.5-Coder-7B": ("qwen2", 3584, 18944, 28, 28, 4, False, 152_064),
    "Qwen2.5-Coder-32B": ("qwen2", 5120, 27648, 64, 40, 8, False, 152_064),
}
BILLIONS = {  # of the model cards, which count tied embeddings once
    "Qwen3-0.6B": 0.6,
    "Qwen3-8B": 8.2,
    "Qwen2.5-Coder-1.5B": 1.54,
    "Qwen2.5-Coder-7B": 7.61,
    "Qwen2.5-Coder-32B": 32.5,
}
NF4, CACHE = "teacher.quantization=nf4", "target.cache=targets"
LORA, FULL = "train.lora_rank=16", "train.sharding=full"
COLUMNS = {
    "1 GPU": (1, ()),
    "nf4": (1, (NF4,)),
    "offload": (1, ("teacher.offload=true",)),
    "cache": (1, (CACHE,)),
    "LoRA, nf4": (1, (LORA, NF4)),
    "LoRA, cache": (1, (LORA, CACHE)),
    "8 GPUs": (8, (FULL,)),
    "8, cache": (8, (FULL, CACHE)),
    "32 GPUs": (32, (FULL,)),
}


def commands() -> list[list[str]]:
    """Every command in the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the page's recipe, which is the current one."""
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "big.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "runs" / "sharded").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_one(place, words):
    """The options exist, and the recipe with its changes is valid; nothing is run."""
    program, *words = words
    if program == "torchrun":
        words = get_args_parser().parse_args(words).training_script_args
    command, context = mdm, click.Context(mdm)
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, info_name=name, parent=context)
    parsed = command.make_context(name, list(words)).params
    if parsed.get("recipe"):
        recipe = read_recipe(parsed["recipe"], parsed["assignments"])
        assert recipe.train.batch_rows % (parsed.get("world_size") or 1) == 0
    else:
        assert parsed["resume"] == Path("runs/sharded")


def test_every_command_is_found():
    found = commands()
    assert len(found) >= 12
    assert {words[0] for words in found} == {"mdm", "torchrun"}
    assert sum("--dry-run" in words for words in found) == 7
    for words in found:
        if words[0] == "torchrun":
            assert words[words.index("-m") + 1] == "mdm.cli"


def write_configs(folder):
    """config.json of each model under Qwen/…, so that the hub's names are folders here."""
    for name, (kind, width, inner, layers, heads, key_heads, tied, rows) in SHAPES.items():
        config = {
            "model_type": kind,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "tie_word_embeddings": tied,
            "vocab_size": rows,
            "max_position_embeddings": 2**15,
        }
        if kind == "qwen3":
            config["head_dim"] = 128
        (folder / "Qwen" / name).mkdir(parents=True)
        (folder / "Qwen" / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cells() -> dict[tuple[str, str], dict[str, str]]:
    """The table: (student, teacher) -> column -> cell."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    (head,) = [line for line in lines if line[:3] == ["student", "teacher", "1 GPU"]]
    rows = [line for line in lines if line[0] in SHAPES]
    return {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}


def test_the_table_is_what_is_estimated(place):
    """A cell is the sum of parts that a dry run prints; bold is what does not fit."""
    write_configs(place)
    table, outlines = cells(), {}
    assert len(table) == 9
    for name, billions in BILLIONS.items():
        config = config_of_student(read_recipe("big.yaml", [f"student.init=Qwen/{name}"]))
        outlines |= {(name, rank): outline(config, rank) for rank in (0, 16)}
        assert outlines[name, 0].size.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    for (student, teacher), row in table.items():
        assert list(row) == list(COLUMNS)
        for column, (processes, changes) in COLUMNS.items():
            recipe = read_recipe("big.yaml", changes)
            parts = student_bytes(recipe, outlines[student, recipe.train.lora_rank], processes)
            if not recipe.target.cache:
                parts |= teacher_bytes(recipe, outlines[teacher, 0], processes)
            total = sum(parts.values()) / GIB
            assert float(row[column].strip("*")) == pytest.approx(total, abs=0.56)
            assert row[column].startswith("**") == (total > 72), (student, teacher, column)


def test_a_cell_is_what_a_dry_run_says(place):
    write_configs(place)
    cell = cells()["Qwen2.5-Coder-1.5B", "Qwen2.5-Coder-32B"]["8 GPUs"]
    said = describe(read_recipe("big.yaml", [FULL]), 8)
    (found,) = re.findall(r"memory +about ([\d.]+) GiB a process, of 8", said)
    assert float(cell) == pytest.approx(float(found), abs=0.56)


@pytest.mark.parametrize(
    ("name", "teacher"), [("tide-shared", "WeDLM-8B"), ("tide-cross", "LLaDA2.0-mini")]
)
def test_what_is_said_of_the_recipes_of_tide(place, name, teacher):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` ({teacher}")]
    memory, step, share = re.findall(r"\| ([\d.e]+)", row)
    folders = {"student.init": "Qwen3-0.6B-bd3lm", "teacher.model": teacher}
    for folder in folders.values():
        (place / folder).mkdir()
        (place / folder / "config.json").write_text(json.dumps(PUBLISHED[folder]))
    recipe = read_recipe(name, [f"{key}=./{folder}" for key, folder in folders.items()])
    assert f"({teacher}, {recipe.train.batch_rows} rows of {recipe.data.length})" in row
    said = describe(recipe, 8)
    (found,) = re.findall(r"memory +about ([\d.]+) GiB a process, of 8", said)
    assert float(memory) == pytest.approx(float(found), abs=0.56)
    (total,) = re.findall(r"computing +([\d.e+]+) FLOPs a step", said)
    assert float(step) == pytest.approx(float(total), rel=0.03)
    parts = [float(part) for part in re.findall(r"teacher's \w+ +([\d.e+]+) FLOPs", said)]
    assert len(parts) == 3
    assert float(share) == pytest.approx(100 * sum(parts) / float(total), abs=0.6)
