"""One step of a block diffusion student with a diffusion teacher, against a twin with all its logits.

The twin does what TIDE's trainer does (arXiv 2604.26951): student and teacher make logits of the whole
vocabulary for both streams of [x_t ; x_0], of which those at masks are then used. Loss and gradients are
those of mdm, so nothing but the way there is compared.

What logits take is measured as the peak of a step less the peak of the same step without heads, which
ends in the states at the masks. It holds what the head's own weights need for a moment, too (a half
precision copy, their gradient). It is too little, more so for mdm, where the layers' own peak comes at
another time: measure with few layers. The ratio of whole peaks bounds that of logits from above.
By arithmetic it is the vocabulary-wide tensors alone: `counted_bytes`.
Shapes: B batch, L length, S = 2L tokens of [x_t ; x_0], N masked positions, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mdm import attention
from mdm.checkpoint import load_config
from mdm.config import require
from mdm.convert import StudentSettings, convert
from mdm.denoiser import Denoiser, max_length, row_chunks
from mdm.diffusion import apply_mask
from mdm.record import append_record, make_record, to_json
from mdm.train.lambdas import MixSettings
from mdm.train.loss_sums import loss_sums
from mdm.train.masking import MaskedBatch, mask_batch
from mdm.train.objective import ObjectiveSettings, term_weights, with_mix
from mdm.train.placement import MaskSettings
from mdm.train.targets import TargetSettings
from mdm.train.teachers.denoised import DiffusionTeacher, ask_denoised, passes, shared_tokens

from .train_step import (
    Step,
    StepSettings,
    memory_in_fresh_process,
    require_linux,
    run_once,
    std_err,
    step_memory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As published for TIDE; with --tidal its mixture, too, in the middle of the training.
OBJECTIVE = ObjectiveSettings(kd_weight=1.0, kd_reduce="mean_masked", kd_temperature=2.0)
TARGET = TargetSettings(kind="denoised")
TIDAL = MixSettings(first=0.1, last=0.9, by_noise=True, weight="midrange")
PLAIN = MixSettings()
PROGRESS = 0.5

# Bytes a token of the vocabulary that are there at once, at most, for each masked row at work, without and
# with TIDAL: float32 logits, log-probabilities, mixtures and gradients, as torch's profiler counts them.
WIDE = {"mdm": {False: 45, True: 49}, "twin": {False: 24, True: 24}}
HALF = 2  # bytes of a logit as the models give it, in bfloat16
# The size that the aim "a quarter of the twin's logits" is stated for: Qwen3's vocabulary.
FULL_SIZE = {"rows": 8, "length": 512, "vocab": 1187 * 2**7, "masked": 8 * 512 // 2}


@dataclasses.dataclass(frozen=True)
class BlockStepSettings(StepSettings):
    """What is measured; see `mdm bench train-step --help`."""

    kind: str = "bd3lm"
    block_size: int = 32
    vocab: int | None = None
    tidal: bool = False


@dataclasses.dataclass(frozen=True)
class BlockSetting:
    """Everything one step needs."""

    denoiser: Denoiser
    teacher: DiffusionTeacher
    batch: MaskedBatch


def compare(settings: BlockStepSettings, path: Path) -> dict[str, Any]:
    """Measure both sides; the record is appended to `path`. Raises ConfigError."""
    longest = max_length(load_config(settings.model))
    require(
        settings.length <= longest,
        f"--length {settings.length} is more than the context of {settings.model}, {longest} tokens",
    )
    require_linux()
    # First: this process holds no models yet.
    memory = {side: memory_in_fresh_process(side, settings, __name__) for side in STEPS}
    setting = make_setting(settings)
    losses = {side: run_once(*step_of(setting, side)) for side in SIDES}  # warms up, too
    seconds = take_turns(setting, settings.repeats)
    ratios = [ours / twin for ours, twin in zip(seconds["mdm"], seconds["twin"], strict=True)]
    masked = int(setting.batch.masked_BL.sum())
    counted = counted_bytes(
        settings.rows, settings.length, head_rows(setting.denoiser), masked, tidal=settings.tidal
    )
    full = counted_bytes(**FULL_SIZE, tidal=settings.tidal)
    logits = {side: memory[side] - memory[BODIES] for side in SIDES}
    tokens = settings.rows * settings.length
    results: dict[str, Any] = {
        side: {
            "loss": losses[side],
            "activation_bytes": memory[side],
            "logits_bytes": logits[side],
            "logits_bytes_counted": counted[side],
            "seconds": statistics.median(seconds[side]),
            "seconds_all": seconds[side],
            "tokens_per_second": tokens / statistics.median(seconds[side]),
        }
        for side in SIDES
    }
    record = make_record(
        "train_step",
        {
            **results,
            "without_heads_bytes": memory[BODIES],
            "memory_ratio": memory["mdm"] / memory["twin"],
            "logits_ratio": logits["mdm"] / logits["twin"] if logits["twin"] > 0 else float("nan"),
            "logits_ratio_counted": counted["mdm"] / counted["twin"],
            "time_ratio": statistics.median(ratios),
            "time_ratio_std_err": std_err(ratios),
            "n": settings.repeats,
            "masked_tokens": masked,
            "full_size": {
                **FULL_SIZE,
                "logits_bytes_counted": full,
                "logits_ratio_counted": full["mdm"] / full["twin"],
            },
        },
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
    )
    append_record(path, record)
    return record


def take_turns(setting: BlockSetting, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of the two sides, which go first in turn."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    order = list(SIDES)
    for _ in range(repeats):
        for side in order:
            began = time.perf_counter()
            run_once(*step_of(setting, side))
            seconds[side].append(time.perf_counter() - began)
        order.reverse()
    return seconds


# --- student, teacher and a batch ----------------------------------------------------------------


def make_setting(settings: BlockStepSettings) -> BlockSetting:
    """Student, teacher and one batch of random tokens, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = open_denoiser(settings, settings.seed).to(device)
    guide = open_denoiser(settings, settings.seed + 1).to(device, torch.bfloat16)
    guide.requires_grad_(False)
    shared = shared_tokens(guide.vocab, denoiser.vocab)
    require(
        denoiser.mask_id == guide.mask_id == shared - 1,
        f"the mask token of {settings.model} is not its last token, at which the twin cuts the"
        " vocabulary; choose another model",
    )
    teacher = DiffusionTeacher(guide, shared, torch.tensor([guide.mask_id]))
    if settings.checkpointing:
        denoiser.model.activation_checkpointing_enable()
    denoiser.train()
    random = torch.Generator().manual_seed(settings.seed)
    shape = (settings.rows, settings.length)
    tokens_BL = torch.randint(0, denoiser.mask_id, shape, generator=random)
    maskable_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    maskable_BL[:, 0] = False
    batch = mask_batch(
        OBJECTIVE,
        tokens_BL,
        torch.zeros_like(tokens_BL),
        maskable_BL,
        torch.zeros_like(tokens_BL),
        masks=MaskSettings(),
        mask_id=denoiser.mask_id,
        seed=settings.seed,
        step=0,
        samples=range(settings.rows),
        samples_per_step=settings.rows,
        block_size=settings.block_size,
    )
    batch = with_mix(batch, TIDAL if settings.tidal else PLAIN, PROGRESS)
    return BlockSetting(denoiser, teacher, batch.to(device))


def open_denoiser(settings: BlockStepSettings, seed: int) -> Denoiser:
    """A block diffusion model made of --model, or with --vocab a random one of the same shape."""
    asked = partial(
        StudentSettings,
        init=settings.model,
        layers=settings.layers,
        kind="bd3lm",
        block_size=settings.block_size,
    )
    if settings.vocab is None:
        return convert(asked())
    with tempfile.TemporaryDirectory() as folder:
        made_up_tokenizer(settings.vocab - 1).save_pretrained(folder)
        return convert(asked(random=True, tokenizer=folder, seed=seed))


def made_up_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """Words w0, w1 … and an end token: `size` tokens in all, and no mask token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size - 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    end = "<|end|>"
    tokenizer.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def head_rows(denoiser: Denoiser) -> int:
    """Columns of the logits."""
    return int(denoiser.model.get_output_embeddings().weight.shape[0])


# --- the sides -----------------------------------------------------------------------------------


def step_of(setting: BlockSetting, side: str) -> Step:
    """A step of this side, ready to be taken."""
    return setting.denoiser, partial(STEPS[side], setting)


def mdm_loss(setting: BlockSetting) -> torch.Tensor:
    """The step as the trainer takes it."""
    batch = setting.batch
    targets = ask_denoised(setting.teacher, TARGET)(batch, setting.denoiser)
    ce, kd, _ = loss_sums(setting.denoiser, batch, targets, OBJECTIVE)
    return weighed(ce, kd, batch)


def twin_loss(setting: BlockSetting) -> torch.Tensor:
    """The same objective from the logits of both streams, which stay until the loss is there.

    It takes less than the published trainer, whose cross-entropy is over all L positions; like that one it
    drops what it no longer needs of the rows at masks.
    """
    batch, temperature = setting.batch, OBJECTIVE.kd_temperature
    ours_BSV = all_logits(setting.denoiser, batch)
    with torch.no_grad(), torch.autocast(batch.x0_BL.device.type, enabled=False):
        theirs_BSV = all_logits(setting.teacher.denoiser, batch)
    # The mask token is the last that the model knows; it and unused rows of the head are cut off.
    words = setting.denoiser.mask_id
    masked_BL = batch.masked_BL
    ours_NV = ours_BSV[outputs_at_masks(setting.denoiser, batch)][:, :words].float()
    ce_N = F.cross_entropy(ours_NV, batch.x0_BL[masked_BL], reduction="none")
    scaled_NV = ours_NV / temperature
    del ours_NV
    theirs_NV = theirs_BSV[outputs_at_masks(setting.teacher.denoiser, batch)][:, :words].float()
    wanted_NV = theirs_NV / temperature
    del theirs_NV
    if batch.share_BL is not None:
        share_N1 = batch.share_BL[masked_BL][:, None]
        wanted_NV = (1 - share_N1) * scaled_NV.detach() + share_N1 * wanted_NV
    log_p_NV = wanted_NV.log_softmax(-1)
    del wanted_NV
    log_q_NV = scaled_NV.log_softmax(-1)
    del scaled_NV
    kd_N = F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
    ce = (batch.ce_weight_BL[masked_BL] * ce_N).sum()
    kd = (batch.kd_weight_BL[masked_BL] * kd_N).sum() * temperature**2
    return weighed(ce, kd, batch)


def bodies_loss(setting: BlockSetting) -> torch.Tensor:
    """What is left without heads: both models up to the states at the masks, and the way back."""
    batch, denoiser = setting.batch, setting.denoiser
    with torch.no_grad():
        passes(setting.teacher.denoiser, batch)(batch.masked_BL, batch.masked_BL)
    states_ND = denoiser.rows(
        batch.xt_BL, batch.masked_BL, x0_bL=batch.x0_bL, document_ids_BL=batch.document_ids_BL
    )
    return states_ND.float().square().mean()


SIDES: dict[str, Callable[[BlockSetting], torch.Tensor]] = {"mdm": mdm_loss, "twin": twin_loss}
BODIES = "without heads"
STEPS = {**SIDES, BODIES: bodies_loss}


def weighed(ce: torch.Tensor, kd: torch.Tensor, batch: MaskedBatch) -> torch.Tensor:
    """() the loss from the sums of its two terms."""
    ce_share, kd_share, _ = term_weights(OBJECTIVE, 0, teacher=True)
    return ce_share * ce / batch.denominator + kd_share * kd / batch.kd_denominator


def all_logits(denoiser: Denoiser, batch: MaskedBatch) -> torch.Tensor:
    """(B, S, V) the model's own forward of [x_t ; x_0], in the attention that mdm trains it in."""
    model = denoiser.model
    xt_BL = apply_mask(batch.x0_BL, batch.masked_BL, denoiser.mask_id)
    tokens = attention.two_stream(batch.document_ids_BL, batch.masked_BL)
    visible_BSS = attention.block_visible(tokens, tokens, batch.block_size, denoiser.attention)
    logits_BSV: torch.Tensor = model(
        torch.cat([xt_BL, batch.x0_BL], dim=1),
        attention_mask=attention.float_mask(visible_BSS, model.dtype),
        position_ids=tokens.position,
        use_cache=False,
    ).logits
    return logits_BSV


def outputs_at_masks(denoiser: Denoiser, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and places (N,) of the outputs from which masked positions are read.

    Without a shift that is their own place in x_t; with it the place before, which at the start of a block
    is that of x_0.
    """
    row_N, place_N = batch.masked_BL.nonzero(as_tuple=True)
    if not denoiser.shift:
        return row_N, place_N
    length = batch.x0_BL.shape[1]
    starts_N = place_N % batch.block_size == 0
    return row_N, place_N - 1 + length * starts_N


# --- by arithmetic -------------------------------------------------------------------------------


def counted_bytes(
    rows: int, length: int, vocab: int, masked: int, *, tidal: bool
) -> dict[str, int]:
    """Bytes of vocabulary-wide tensors that are there at once, for each side, from shapes alone.

    The twin holds logits of two models for both streams, and float32 tensors of the masked rows; mdm
    float32 tensors of a chunk of masked rows.
    """
    chunk = next(row_chunks(masked, vocab))
    of_a_row = {side: vocab * wide[tidal] for side, wide in WIDE.items()}
    all_logits_of_both = 2 * HALF * rows * 2 * length * vocab
    return {
        "mdm": of_a_row["mdm"] * min(masked, chunk.stop),
        "twin": all_logits_of_both + of_a_row["twin"] * masked,
    }


def describe(record: dict[str, Any]) -> str:
    """The card for people and, last, the record as one JSON line."""
    results, settings, full = record["results"], record["settings"], record["results"]["full_size"]
    made_up = f" (random, {settings['vocab']} tokens)" if settings["vocab"] else ""
    lines = [
        f"one {'TIDAL' if settings['tidal'] else 'distillation'} step in blocks of"
        f" {settings['block_size']}: {settings['model']}{made_up}, {settings['rows']} rows of"
        f" {settings['length']}, {results['masked_tokens']} masked, gradient checkpointing"
        f" {'on' if settings['checkpointing'] else 'off'}",
        f"{'':8}{'tokens/s':>10}{'seconds':>10}{'peak memory':>16}{'of it logits':>16}"
        f"{'counted':>14}{'loss':>10}",
    ]
    for side in SIDES:
        r = results[side]
        lines.append(
            f"{side:8}{r['tokens_per_second']:>10.0f}{r['seconds']:>10.2f}"
            f"{_mib(r['activation_bytes']):>16}{_mib(r['logits_bytes']):>16}"
            f"{_mib(r['logits_bytes_counted']):>14}{r['loss']:>10.3f}"
        )
    counted = full["logits_bytes_counted"]
    lines += [
        "logits: the peak less that of the same step without heads"
        f" ({_mib(results['without_heads_bytes'])}); counted: from the shapes alone",
        f"mdm / twin: memory {results['memory_ratio']:.2f}, logits {results['logits_ratio']:.2f}"
        f" (counted {results['logits_ratio_counted']:.2f}), time {results['time_ratio']:.2f}"
        f" ± {results['time_ratio_std_err']:.2f} (n={results['n']})",
        f"counted for {full['rows']} rows of {full['length']}, {full['vocab']} tokens, half masked:"
        f" {_mib(counted['mdm'])} / {_mib(counted['twin'])} = {full['logits_ratio_counted']:.3f}",
    ]
    return "\n".join([*lines, to_json(record)])


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _open(side: str, settings: BlockStepSettings) -> Step:
    return step_of(make_setting(settings), side)


if __name__ == "__main__":
    print(step_memory(partial(_open, sys.argv[1]), BlockStepSettings(**json.loads(sys.argv[2]))))
