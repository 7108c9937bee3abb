"""Tiny training runs, made on the spot: an AR model folder, a corpus, a recipe, the command line.

A run of a few steps takes a second in process and four as a subprocess (imports).
"""

import os
import subprocess
import sys
from pathlib import Path

import tiny

from mdm.config import build, to_tree
from mdm.convert import StudentSettings, convert
from mdm.denoiser import has_plain_head
from mdm.train.recipe import Recipe
from mdm.train.teachers.ar import ARTeacher

VOCAB = 259  # tiny.byte_tokenizer without extras
LENGTH = 24


def ar_teacher(model, num_tokens=None, mask_id=None):
    """A tiny model as teacher, without tokenizer."""
    rows = model.get_output_embeddings().weight.shape[0]
    return ARTeacher(model, num_tokens or rows, has_plain_head(model), mask_id)


def ar_folder(folder, *, extra_special=(), family="llama", hidden=16, **overrides):
    """A tiny AR checkpoint with the byte tokenizer, as `transformers` saves it."""
    vocab_size = VOCAB + len(extra_special)
    model = tiny.tiny_model(family, vocab_size, hidden=hidden, **overrides)
    model.save_pretrained(folder)
    tiny.byte_tokenizer(extra_special).save_pretrained(folder)
    return str(folder)


def tiny_denoiser(folder, **settings):
    """The student that a checkpoint becomes."""
    return convert(StudentSettings(init=str(folder), **settings))


def corpus_folder(folder, files=24):
    """A few small Python files with something to learn in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"def f{number}_{i}(x):\n    return x + {i}\n" for i in range(2 + number % 3)]
        (folder / f"m{number}.py").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def tree(ar, corpus, **sections):
    """A recipe as nested dicts; `train={"steps": 9}` and the like change it section by section."""
    base = {
        "name": "tiny",
        "student": {"init": str(ar)},
        "teacher": {"model": str(ar), "dtype": "fp32"},
        "data": {"sources": [str(corpus)], "length": LENGTH, "held_out_fraction": 0.2},
        "objective": {"kd_lambda": 0.5},
        "train": {
            "steps": 4,
            "batch_rows": 8,
            "micro_rows": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "precision": "fp32",
            "eval_rows": 8,
            "eval_draws": 1,
        },
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def recipe(ar, corpus, **sections) -> Recipe:
    """The settings of a tiny run."""
    return build(Recipe, tree(ar, corpus, **sections))


def write_recipe(path, settings) -> Path:
    """A recipe file."""
    import yaml

    path.write_text(yaml.safe_dump(to_tree(settings)), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """One thread, whatever the machine: sums come in the same order in every process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments) -> list[str]:
    """`mdm …` with this interpreter."""
    return [sys.executable, "-m", "mdm.cli", *map(str, arguments)]


def mdm(*arguments, check=True, **options) -> subprocess.CompletedProcess:
    """Run `mdm …` to its end."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), **options
    )
    assert not check or done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done
