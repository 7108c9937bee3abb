"""A diffusion model as teacher: asked at the masks of the student, in the attention it was trained with.

It is a Denoiser, so it builds its own input: a full canvas reads x_t, a model with blocks [x_t ; x_0] on
its own grid. What it answers is kept as the inputs of its head (HeadTargets): whole distributions without
a vocabulary-sized tensor. Teacher and student share the ids up to the first that differ; both
distributions are taken over those, as TIDE does.
Complementary demasking (comp_demo.py) wraps any function from masks to answers.
Shapes: B batch, L length, N distilled positions, W width of the teacher, V shared vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mdm.checkpoint import load_denoiser
from mdm.denoiser import Denoiser
from mdm.diffusion import apply_mask, generator
from mdm.errors import VocabError
from mdm.vocab import Vocab

from ..comp_demo import halves, merge
from ..masking import MaskedBatch
from ..targets import HeadTargets, TargetSettings, refuse_nan

DENOISED, CHUNKS = "denoised", "chunks"
SEES_MASKS = (DENOISED, CHUNKS)  # kinds of target whose teacher is a diffusion model

# What is masked, and which of it is asked for, to the answers for the latter, row-major.
AskMasks = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class DiffusionTeacher:
    """A frozen denoiser whose first `num_tokens` ids mean the same to the student.

    `never_N` are the shared ids that the student cannot write. `num_tokens` is 0 for a teacher with
    another tokenizer, whose likelihoods alone are asked for.
    """

    denoiser: Denoiser
    num_tokens: int
    never_N: torch.Tensor

    @property
    def max_length(self) -> int:
        """Longest row the model was built for, in tokens."""
        return self.denoiser.max_length

    @property
    def model(self) -> torch.nn.Module:
        """The transformers model."""
        return self.denoiser.model

    @property
    def vocab(self) -> Vocab | None:
        """Its own vocabulary, if that is not the student's."""
        return None if self.num_tokens else self.denoiser.vocab

    def logits(self, rows_NW: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 logits over the shared ids, -inf where the student cannot write."""
        with torch.autocast(rows_NW.device.type, enabled=False):
            logits_NV = self.denoiser.head(rows_NW)[:, : self.num_tokens]
        return logits_NV.index_fill(1, self.never_N.to(rows_NW.device), float("-inf"))


def load_diffusion_teacher(
    source: str,
    student: Vocab,
    *,
    dtype: torch.dtype,
    foreign: bool = False,
    trust_remote_code: bool = False,
) -> DiffusionTeacher:
    """A frozen diffusion teacher on the CPU for a student with this vocabulary.

    `foreign`: it may have any tokenizer. Raises CheckpointError if it is no denoiser, VocabError if the
    tokens differ.
    """
    denoiser = load_denoiser(source, dtype=dtype, trust_remote_code=trust_remote_code)
    denoiser.requires_grad_(False)
    shared = 0 if foreign else shared_tokens(denoiser.vocab, student)
    never = sorted({i for i in (student.mask_id, denoiser.mask_id) if i is not None and i < shared})
    return DiffusionTeacher(denoiser, shared, torch.tensor(never, dtype=torch.long))


def shared_tokens(teacher: Vocab, student: Vocab) -> int:
    """The number of leading ids that mean the same to both, but for their masks.

    Raises VocabError if that is not most of the teacher's: then the tokenizers are different ones.
    """
    theirs, ours = (
        {i: token for token, i in vocab.tokenizer.get_vocab().items() if i != vocab.mask_id}
        for vocab in (teacher, student)
    )
    masks = (teacher.mask_id, student.mask_id)
    ids = sorted(i for i in theirs.keys() | ours.keys() if i not in masks)
    differ = next((i for i in ids if theirs.get(i) != ours.get(i)), None)
    shared = max(len(teacher), len(student)) if differ is None else differ
    if shared < 0.9 * len(teacher):
        raise VocabError(
            f"the tokens of teacher and student differ from id {differ} on ({theirs.get(differ or 0)!r} /"
            f" {ours.get(differ or 0)!r}) of {len(teacher)}: they have different tokenizers; set"
            " target.kind=chunks, or choose a teacher with the student's tokenizer"
        )
    return min(shared, len(teacher), len(student))


def ask_denoised(
    teacher: DiffusionTeacher, settings: TargetSettings
) -> Callable[[MaskedBatch, Denoiser | None], HeadTargets]:
    """How a step asks a teacher with the student's tokens."""

    def ask(batch: MaskedBatch, _student: Denoiser | None) -> HeadTargets:
        wanted_BL = batch.distilled_BL
        rows_NW = demonstrated(passes(teacher.denoiser, batch), batch, wanted_BL, settings)
        targets = HeadTargets(rows_NW, teacher.logits, conditioned_on(teacher.denoiser, settings))
        refuse_nan(targets)
        return targets

    return ask


def passes(denoiser: Denoiser, batch: MaskedBatch) -> AskMasks:
    """One forward of the teacher on the batch's text, whatever is masked in it."""

    def ask(masked_BL: torch.Tensor, wanted_BL: torch.Tensor) -> torch.Tensor:
        xt_BL = apply_mask(batch.x0_BL, masked_BL, denoiser.mask_id)
        x0_bL = None if denoiser.block_size is None else batch.x0_bL
        with torch.no_grad(), torch.autocast(xt_BL.device.type, enabled=False):
            return denoiser.rows(
                xt_BL, wanted_BL, x0_bL=x0_bL, document_ids_BL=batch.document_ids_BL
            )

    return ask


def demonstrated(
    ask: AskMasks,
    batch: MaskedBatch,
    wanted_BL: torch.Tensor,
    settings: TargetSettings,
    chunk_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """The answers for the wanted positions, from one pass, or with CompDemo from two.

    In the two, what is masked is split, and each part is asked for while the other shows its true tokens.
    """
    masked_BL = batch.masked_BL
    if not settings.comp_demo:
        return ask(masked_BL, wanted_BL)
    exact, share = settings.comp_demo == "exact", settings.comp_demo_share
    one_BL, other_BL = halves(masked_BL, demo_uniforms(batch), share, exact, chunk_BL)
    found = [ask(part_BL, part_BL & wanted_BL) for part_BL in (one_BL, other_BL)]
    return merge(wanted_BL, one_BL & wanted_BL, *found)


def demo_uniforms(batch: MaskedBatch) -> torch.Tensor:
    """(B, L) uniforms of the split, functions of the rows' keys alone."""
    length = batch.x0_BL.shape[1]
    rows = [torch.rand(length, generator=generator("complement", *key)) for key in batch.keys]
    return torch.stack(rows).to(batch.x0_BL.device)


def conditioned_on(denoiser: Denoiser, settings: TargetSettings) -> str:
    """What the answers are conditioned on."""
    sees = {
        "full": "all that is visible",
        "block": "clean blocks before and what is visible in its block",
        "context_causal": "clean blocks before and what is visible in its block",
        "reordered": "clean blocks before and what is visible in its block",
    }[denoiser.attention]
    return sees + (", with half of the masks shown" if settings.comp_demo else "")
