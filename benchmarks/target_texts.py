"""Texts that soft targets are measured on: rows of token ids, by name.

Shapes: B rows, L length, D width, V teacher vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mdm.config import require
from mdm.diffusion import generator
from mdm.errors import DataError
from mdm.eval.human_eval_data import human_eval_problems
from mdm.train.corpus import STDLIB, open_source
from mdm.train.documents import Skips
from mdm.train.teachers.ar import ARTeacher
from mdm.vocab import Vocab

if TYPE_CHECKING:
    from .targets import TargetsBench

MAX_FILE_KIB = 64


def library_rows(vocab: Vocab, count: int, length: int, seed: int) -> torch.Tensor:
    """(B, L) the start token and L - 1 tokens from a random place, each row from another file.

    Files of the standard library. Raises DataError if too few are long enough.
    """
    rows: list[list[int]] = []
    for document in open_source(STDLIB, (".py",), MAX_FILE_KIB).documents(Skips()):
        ids = vocab.encode(document.text)
        places = len(ids) - (length - 1) + 1
        if places > 0:
            random = generator("bench rows", seed, len(rows))
            first = int(torch.randint(places, (1,), generator=random))
            rows.append([vocab.start_id, *ids[first : first + length - 1]])
        if len(rows) == count:
            return torch.tensor(rows)
    raise DataError(
        f"the standard library has {len(rows)} files of {length} tokens or more; {count} are needed"
    )


def stdlib(teacher: ARTeacher, vocab: Vocab, settings: TargetsBench) -> torch.Tensor:
    """(B, L) rows of the standard library. A student trained on it has seen them."""
    return library_rows(vocab, settings.rows, settings.context + settings.block, settings.seed)


def humaneval(teacher: ARTeacher, vocab: Vocab, settings: TargetsBench) -> torch.Tensor:
    """(B, L) ends of HumanEval's prompts, and the first tokens of their solutions."""
    rows: list[list[int]] = []
    for problem in human_eval_problems().values():
        prompt = vocab.encode(problem["prompt"])
        solution = vocab.encode(problem["canonical_solution"])
        before = len(prompt) - (settings.context - 1)
        if before >= 0 and len(solution) >= settings.block:
            rows.append([vocab.start_id, *prompt[before:], *solution[: settings.block]])
    require(
        len(rows) >= settings.rows,
        f"HumanEval has {len(rows)} problems that fill --context {settings.context} and --block"
        f" {settings.block}; {settings.rows} rows are asked for",
    )
    return torch.tensor(rows[: settings.rows])


@torch.no_grad()
def sampled(teacher: ARTeacher, vocab: Vocab, settings: TargetsBench) -> torch.Tensor:
    """(B, L) rows of the standard library whose block is a sample of the teacher (T = 1).

    Only here are i_sir, csmc and hard targets unbiased.
    """
    x_BL = stdlib(teacher, vocab, settings).to(teacher.model.device)
    documents_BL = torch.zeros_like(x_BL)
    randoms = [generator("bench sample", settings.seed, row) for row in range(len(x_BL))]
    for position in range(settings.context, x_BL.shape[1]):
        wanted_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        wanted_BL[:, position] = True
        rows_BD = teacher.rows(x_BL, wanted_BL, documents_BL)  # blind to what stands to the right
        probs_BV = teacher.head(rows_BD).double().softmax(-1).cpu()
        drawn = [
            torch.multinomial(probs_V, 1, generator=random)
            for probs_V, random in zip(probs_BV, randoms, strict=True)
        ]
        x_BL[:, position] = torch.cat(drawn).to(x_BL.device)
    return x_BL


TEXTS: dict[str, Callable[[ARTeacher, Vocab, TargetsBench], torch.Tensor]] = {
    "stdlib": stdlib,
    "humaneval": humaneval,
    "teacher": sampled,
}
