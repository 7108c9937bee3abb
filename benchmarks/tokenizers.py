"""What does another tokenizer cost? A small study in which everything is trained on the spot.

Two tokenizers are learnt on one corpus, a small one for the student and a larger one. Two AR teachers of
the same shape are trained for as many bytes, one in each. Then students with the small tokenizer, all
from the same weights and on the same rows, masks and number of tokens, learn from

    ce            no teacher
    shared        the teacher with their own tokenizer, its left-only distributions
    mapped        the teacher with the other one, its distributions split into student tokens
    embedding     the same teacher's hidden states (cosine), through a learnt projection
    embedding_l2  the same with the mean squared difference

The bound is measured on the same held-out masks, so differences are paired by seed and row.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mdm.checkpoint import load_tokenizer, load_vocab, quiet
from mdm.config import build, require
from mdm.errors import check_known
from mdm.record import append_record, make_record
from mdm.train.corpus import open_source, read_in_turn
from mdm.train.dataset import DataSettings, PreparedData, prepare
from mdm.train.documents import Skips
from mdm.train.progress import read_metrics
from mdm.train.recipe import Recipe
from mdm.train.rows import RowBatch, Rows, sample_indices
from mdm.train.run import new_run
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.chunks import token_log_probs
from mdm.train.tokenizer import train_tokenizer
from mdm.train.trainer import train

from .study import held_out_units
from .study_report import Units, comparisons

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "ce": {"objective": {"kd_lambda": 0.0}},
    "shared": {"target": {"kind": "left"}},
    "mapped": {"target": {"kind": "mapped"}},
    "embedding": {"target": {"kind": "embedding"}},
    "embedding_l2": {"target": {"kind": "embedding"}, "objective": {"distance": "l2"}},
}


@dataclasses.dataclass(frozen=True)
class TokenizersBench:
    """What is measured; see `mdm bench tokenizers --help`.

    `small` and `large` are the sizes of the tokenizers; `teacher_steps` and `steps` have
    `rows` rows of `length` student tokens (teachers: as many bytes).
    """

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    sources: tuple[str, ...] = ("stdlib",)
    documents: int = 400
    small: int = 1024
    large: int = 4096
    width: int = 128
    layers: int = 4
    length: int = 96
    rows: int = 16
    teacher_steps: int = 600
    steps: int = 200
    kd_lambda: float = 0.5

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_known("arm", arm, ARMS)
        require(len({*self.seeds}) == len(self.seeds) > 0, f"seeds must differ; got {self.seeds}")
        require(
            self.small < self.large, f"--small ({self.small}) must be below --large ({self.large})"
        )
        for name in ("steps", "teacher_steps", "rows", "layers"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1; got {getattr(self, name)}")


def run(
    settings: TokenizersBench, folder: Path, path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train everything below `folder`, which is new or empty; the record is appended to `path`."""
    require(
        not folder.exists() or not any(folder.iterdir()),
        f"{folder} is not empty; give another --runs",
    )
    folder.mkdir(parents=True, exist_ok=True)
    teachers: dict[str, dict[str, Any]] = {}
    for name, size in (("small", settings.small), ("large", settings.large)):
        began = time.monotonic()
        # The small one first: the other sees as many bytes, in fewer tokens.
        same = teachers.get("small", {}).get("bytes_per_token")
        teachers[name] = make_teacher(settings, folder / name, size, same)
        say(
            f"teacher with {teachers[name]['tokens']} tokens:"
            f" {teachers[name]['nats_per_byte']:.3f} nats per byte on held-out text,"
            f" {time.monotonic() - began:.0f} s"
        )
    runs: list[dict[str, Any]] = []
    units: dict[tuple[str, int], dict[str, Units]] = {}
    for seed, arm in itertools.product(settings.seeds, settings.arms or tuple(ARMS)):
        recipe = recipe_of(settings, folder, arm, seed)
        outcome = train(recipe, new_run(recipe, folder))
        units[arm, seed] = {"bound": held_out_units(outcome.after)["bound"]}
        steps = [e for e in read_metrics(outcome.folder / "metrics.jsonl") if "kd" in e]
        runs.append(
            {
                "arm": arm,
                "seed": seed,
                "bound": outcome.after.summary()["nelbo"],
                "bound_std_err": outcome.after.summary()["nelbo_std_err"],
                "bound_before": outcome.before.summary()["nelbo"],
                "steps": outcome.steps,
                "tokens": outcome.tokens,
                "seconds": outcome.seconds,
                **{
                    name: sum(e[name] for e in steps) / len(steps)
                    for name in ("target_answered", "target_lost")
                    if name in steps[0]
                },
            }
        )
        say(f"{arm} seed {seed}: bound {runs[-1]['bound']:.3f}, {outcome.seconds:.0f} s")
    results = {
        "teachers": teachers,
        "runs": runs,
        "differences": comparisons(units, ("ce", "shared")),
    }
    record = make_record(
        "bench tokenizers", results, settings=dataclasses.asdict(settings), seed=None
    )
    append_record(path, record)
    return record


def data_settings(settings: TokenizersBench, steps: int) -> DataSettings:
    """As much of the corpus as these steps read once."""
    return DataSettings(
        sources=settings.sources,
        length=settings.length,
        held_out_fraction=0.05,
        max_held_out_rows=64,
        max_tokens=steps * settings.rows * settings.length,
    )


def make_teacher(
    settings: TokenizersBench, folder: Path, size: int, bytes_per_token_of_first: float | None
) -> dict[str, Any]:
    """Learn a tokenizer and an AR model in it; what was measured of the model."""
    skips, defaults = Skips(), DataSettings()
    sources = [
        open_source(name, defaults.extensions, defaults.max_file_kib) for name in settings.sources
    ]
    documents = itertools.islice(read_in_turn(sources, skips), settings.documents)
    train_tokenizer((document.text for document in documents), size, folder)
    tokenizer = load_tokenizer(str(folder))
    vocab = load_vocab(str(folder))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8 * settings.length,
        tie_word_embeddings=True,
        bos_token_id=vocab.start_id,
        eos_token_id=vocab.eos_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    data = prepare(data_settings(settings, settings.teacher_steps), vocab, folder / "data")
    bytes_a_token = bytes_per_token(data, vocab)
    rows = max(
        1, round(settings.rows * (bytes_per_token_of_first or bytes_a_token) / bytes_a_token)
    )
    teacher = ARTeacher(model, len(tokenizer), plain_head=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(settings.teacher_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, 3 * (1 - step / settings.teacher_steps))
        index = sample_indices(len(data.train), 0, step * rows, rows)
        loss = next_token_loss(teacher, data.train.batch(index))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with quiet():
        model.eval().save_pretrained(folder)
    nats = held_out_nats(teacher, data.held_out)
    return {
        "tokens": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_token": bytes_a_token,
        "rows_per_step": rows,
        "nats_per_token": nats,
        "nats_per_byte": nats / bytes_a_token,
    }


def next_token_loss(teacher: ARTeacher, batch: RowBatch) -> torch.Tensor:
    """Mean cross-entropy of the learnt tokens of packed rows."""
    rows_ND = teacher.rows(batch.tokens_BL, batch.maskable_BL, batch.document_ids_BL)
    logits_NV = teacher.model.get_output_embeddings()(rows_ND).float()
    return torch.nn.functional.cross_entropy(logits_NV, batch.tokens_BL[batch.maskable_BL])


@torch.no_grad()
def held_out_nats(teacher: ARTeacher, rows: Rows) -> float:
    """Mean -log p of the held-out tokens, nats a token."""
    batch = rows.batch(range(len(rows)))
    rows_ND = teacher.rows(batch.tokens_BL, batch.maskable_BL, batch.document_ids_BL)
    return -float(
        token_log_probs(teacher, rows_ND, batch.tokens_BL[batch.maskable_BL]).double().mean()
    )


def bytes_per_token(data: PreparedData, vocab: Any) -> float:
    """Of the held-out text, end tokens counted as no bytes."""
    batch = data.held_out.batch(range(len(data.held_out)))
    text = vocab.decode(batch.tokens_BL[batch.maskable_BL].tolist())
    return len(text.encode()) / int(batch.maskable_BL.sum())


def recipe_of(settings: TokenizersBench, folder: Path, arm: str, seed: int) -> Recipe:
    """The recipe of one run; all arms of a seed share everything but the target."""
    teacher = "small" if arm == "shared" else "large"
    own = ARMS[arm]
    data = dataclasses.asdict(data_settings(settings, settings.steps))
    return build(
        Recipe,
        {
            "name": f"{arm}-seed{seed}",
            "student": {"init": str(folder / "small"), "random": True, "seed": seed},
            "teacher": {"model": str(folder / teacher), "dtype": "fp32"},
            "data": data,
            "target": own.get("target", {}),
            "objective": {
                "weight": "mean_masked",
                "kd_lambda": settings.kd_lambda,
                **own.get("objective", {}),
            },
            "train": {
                "steps": settings.steps,
                "batch_rows": settings.rows,
                "micro_rows": settings.rows,
                "learning_rate": 2e-3,
                "warmup_steps": min(20, settings.steps),
                "precision": "fp32",
                "seed": seed,
                "eval_rows": 64,
                "eval_draws": 4,
                "checkpoint_every": 0,
            },
        },
    )
