"""Small things that a smoke run of the benchmarks works on, made on the spot: nothing is downloaded.

Weights are random, so numbers mean nothing; what can be checked is that every benchmark runs, and counts.

    code/        a few Python files
    ar/          an AR model of two narrow layers, its tokenizer learnt on the files: the teacher
    student/     the masked diffusion model that it becomes
    recipe.yaml  a training run of seconds
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES, FUNCTIONS = 40, 9
TOKENS = 300
RECIPE: dict[str, Any] = {
    "name": "smoke",
    "data": {
        "length": 80,
        "min_tokens": 4,
        "held_out_fraction": 0.2,
        "max_held_out_rows": 6,
    },
    "objective": {"kd_lambda": 0.5},
    "train": {
        "steps": 2,
        "batch_rows": 2,
        "micro_rows": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "precision": "fp32",
        "eval_rows": 2,
        "eval_draws": 1,
    },
}


def make(folder: Path) -> dict[str, str]:
    """Write all of them into an empty folder; where each is, by the names that arguments use."""
    from mdm.checkpoint import save_denoiser
    from mdm.convert import StudentSettings, convert

    corpus, ar, student, recipe = (
        folder / name for name in ("code", "ar", "student", "recipe.yaml")
    )
    _write_code(corpus)
    _write_ar(corpus, ar)
    save_denoiser(convert(StudentSettings(init=str(ar))), student)
    tree = {
        **RECIPE,
        "student": {"init": str(ar)},
        "teacher": {"model": str(ar), "dtype": "fp32"},
        "data": {**RECIPE["data"], "sources": [str(corpus)]},
    }
    recipe.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return {
        "corpus": str(corpus),
        "teacher": str(ar),
        "student": str(student),
        "recipe": str(recipe),
    }


def _write_code(folder: Path) -> None:
    folder.mkdir()
    for number in range(FILES):
        functions = [
            f"def f{number}_{i}(x):\n    return x + {i}\n" for i in range(FUNCTIONS + number % 3)
        ]
        (folder / f"m{number}.py").write_text("\n".join(functions), encoding="utf-8")


def _write_ar(corpus: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mdm.loading import quiet
    from mdm.train.tokenizer import train_tokenizer

    texts = (path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir()))
    config = LlamaConfig(
        vocab_size=train_tokenizer(texts, TOKENS, folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2**11,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
