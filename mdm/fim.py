"""Fill in the middle for AR models: what stands before and after a hole, as a text to continue.

Models trained for it mark the parts with special tokens of their own (arXiv 2207.14255); the family is
told by which of them a tokenizer has. Having the tokens is no proof of the training: Qwen3 and Mistral
NeMo have them too. Base models are better at it than instruct ones. For models without, `few_shot`.

Everything is token ids: nothing is decoded and encoded again at the borders of a hole, and no space is
added anywhere. That holds for CodeLlama too, whose published prompts have spaces: there they are the "▁"
of the marks' own names, or come from encoding the prefix as a text of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence

from .errors import VocabError, check_known
from .generate import Hole
from .vocab import Vocab

PSM, SPM = "psm", "spm"
FEW_SHOT = "few_shot"


class Slot(enum.Enum):
    """Where a template takes in what stands before the hole, and what stands after it."""

    PREFIX = "prefix"
    SUFFIX = "suffix"


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one family are prompted; the middle is written where the pieces end.

    orders  prefix first (psm) or suffix first (spm), as names of tokens and the two slots; the first
            order is the default
    ends    what closes the middle in training, the usual one first
    signs   tokens that tell this family from another one with the same marks
    """

    orders: Mapping[str, tuple[str | Slot, ...]]
    ends: tuple[str, ...]
    signs: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the tokens that every model of the family has."""
        names = [piece for pieces in self.orders.values() for piece in pieces]
        return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def _psm(prefix: str, suffix: str, middle: str) -> tuple[str | Slot, ...]:
    return (prefix, Slot.PREFIX, suffix, Slot.SUFFIX, middle)


def _spm(prefix: str, suffix: str, middle: str) -> tuple[str | Slot, ...]:
    """The middle goes on from the prefix: "variant 2" of arXiv 2207.14255, appendix D."""
    return (prefix, suffix, Slot.SUFFIX, middle, Slot.PREFIX)


_BARS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_STARCODER = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
_SANTACODER = ("<fim-prefix>", "<fim-suffix>", "<fim-middle>")
_CODELLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>")
# Full-width bars and "▁". The hole mark stands where the hole is, and "end" comes last.
_DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")

FAMILIES: dict[str, Family] = {
    "qwen": Family({PSM: _psm(*_BARS)}, ends=("<|endoftext|>",), signs=("<|fim_pad|>",)),
    # Its report says that it was trained in SPM as well, but not how that was written.
    "codegemma": Family(
        {PSM: _psm(*_BARS)},
        ends=("<|file_separator|>", "<eos>"),
        signs=("<|file_separator|>",),
    ),
    "starcoder": Family({PSM: _psm(*_STARCODER), SPM: _spm(*_STARCODER)}, ends=("<|endoftext|>",)),
    "santacoder": Family(
        {PSM: _psm(*_SANTACODER), SPM: _spm(*_SANTACODER)}, ends=("<|endoftext|>",)
    ),
    "codellama": Family({PSM: _psm(*_CODELLAMA), SPM: _spm(*_CODELLAMA)}, ends=("▁<EOT>",)),
    "deepseek": Family({PSM: _psm(*_DEEPSEEK)}, ends=("<｜end▁of▁sentence｜>",)),
    # No mark for the middle: it follows the prefix at once.
    "codestral": Family({SPM: ("[SUFFIX]", Slot.SUFFIX, "[PREFIX]", Slot.PREFIX)}, ends=("</s>",)),
}


@dataclasses.dataclass(frozen=True)
class Template:
    """A family's prompt for one tokenizer.

    family    its name in FAMILIES, or "few_shot"
    order     psm or spm
    pieces    token ids and the two slots, in the order of the prompt
    end_ids   tokens that close the middle, the usual one first
    start_id  opens a document: it stays in front of all marks
    eos_id    closes a document: the suffix goes without it, no model was trained to find it inside
    opened    the pieces open the document themselves, as a chat template does
    """

    family: str
    order: str
    pieces: tuple[int | Slot, ...]
    end_ids: tuple[int, ...]
    start_id: int
    eos_id: int
    opened: bool = False

    @property
    def num_marks(self) -> int:
        """Tokens of a prompt that are neither prefix nor suffix."""
        return sum(not isinstance(piece, Slot) for piece in self.pieces)

    def prompt(self, before_ids: Sequence[int], after_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens after which the middle comes.

        A start token that opens `before_ids` stands first, once; end tokens that close `after_ids` are
        left out. So it has at most num_marks + len(before_ids) + len(after_ids) tokens.
        """
        before, after = list(before_ids), list(after_ids)
        lead = before[:1] if before[:1] == [self.start_id] else []
        texts = {Slot.PREFIX: before[len(lead) :], Slot.SUFFIX: after}
        while after and after[-1] == self.eos_id:
            after.pop()
        ids = [] if self.opened else list(lead)
        for piece in self.pieces:
            ids += texts[piece] if isinstance(piece, Slot) else [piece]
        return tuple(ids)


def template(vocab: Vocab, order: str = "", family: str = "") -> Template:
    """The template of a tokenizer; order and family default to its own.

    Raises VocabError if the marks are not there, ConfigError for an unknown family or an order in which
    it was not trained.
    """
    known = vocab.tokenizer.get_vocab()
    if family:
        check_known("fill-in-the-middle family", family, FAMILIES)
    else:
        family = _family_of(known)
    marks = FAMILIES[family].marks if family else ()
    missing = [name for name in marks if name not in known]
    if missing or not family:
        what = f"{', '.join(missing)} of the family {family!r}" if family else "of any family"
        raise VocabError(
            f"this tokenizer lacks the fill-in-the-middle tokens {what}"
            f" (known families: {', '.join(FAMILIES)}); choose a teacher that was trained to fill in"
            " the middle, or another kind of target"
        )
    chosen = FAMILIES[family]
    order = order or next(iter(chosen.orders))
    check_known(f"fill-in-the-middle order of the family {family!r}", order, chosen.orders)
    return Template(
        family=family,
        order=order,
        pieces=tuple(
            piece if isinstance(piece, Slot) else known[piece] for piece in chosen.orders[order]
        ),
        end_ids=tuple(known[name] for name in chosen.ends if name in known) or (vocab.eos_id,),
        start_id=vocab.start_id,
        eos_id=vocab.eos_id,
    )


def find_template(vocab: Vocab) -> Template | None:
    """The template of a tokenizer in its usual order; None if it has no family's marks."""
    family = _family_of(vocab.tokenizer.get_vocab())
    return template(vocab, family=family) if family else None


def end_ids(vocab: Vocab) -> tuple[int, ...]:
    """What closes the middle of a hole for these models; nothing if they have no marks."""
    found = find_template(vocab)
    return found.end_ids if found else ()


def _family_of(known: Mapping[str, int]) -> str:
    """The family whose marks are all there, "" if none.

    Of several the one with more signs, then the first: Qwen for bare `<|fim_prefix|>` and the like.
    """
    complete = [name for name, one in FAMILIES.items() if all(mark in known for mark in one.marks)]
    return max(
        complete, key=lambda name: sum(sign in known for sign in FAMILIES[name].signs), default=""
    )


def as_continuation(hole: Hole, template: Template) -> Hole:
    """The hole as a text to continue: nothing stands after it any more."""
    return dataclasses.replace(hole, before=template.prompt(hole.before, hole.after), after=())


def nearest(before: Sequence[int], after: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Both sides of a hole without their far ends: at most `room` tokens together.

    Each side may have half the room, and what the other one leaves of its half.
    """
    half = room // 2
    kept_after = min(len(after), max(half, room - len(before)))
    kept_before = min(len(before), room - kept_after)
    return list(before[len(before) - kept_before :]), list(after[:kept_after])


# --- models that were not trained for it ------------------------------------------------------------

_TASK = (
    "A piece of code is missing between the text in <before> and the text in <after>."
    " The answer is that piece, exactly as it stands there, and nothing else.\n"
)
# (before, missing, after): the end of a line, a whole line, one word inside a line
_EXAMPLES = (
    ("def area(width, height):\n    return ", "width * height", "\n\nprint(area(2, 3))\n"),
    ("for name in names:\n", "    print(name)\n", "    count += 1\n"),
    ("total = sum(", "x", " for x in values)\n"),
)
_OPEN, _CLOSE = "<missing>", "</missing>"
# Private-use characters: they stand for the slots while the text is put together, and occur in no template.
_STANDS_FOR = {"\ue010": Slot.PREFIX, "\ue011": Slot.SUFFIX}


def few_shot(vocab: Vocab) -> Template:
    """Infilling by examples, for a model that follows instructions but has no marks.

    A task, three examples and the question; in the tokenizer's chat template, if it has one, each
    example is a turn and the answer is begun for the assistant. The text around the slots is encoded
    piece by piece, so prefix and suffix stay the ids they are. It ends where the middle begins,
    after "<missing>"; `end_ids` is the first token of "</missing>", often "</".

    An approximation twice: the model was not trained on this form, and a middle whose last characters
    usually share a token with "</" is underrated. Raises VocabError if the chat template loses a part.
    """
    prefix, suffix = _STANDS_FOR
    asked = [(before, after) for before, _, after in _EXAMPLES] + [(prefix, suffix)]
    questions = [f"<before>{before}</before>\n<after>{after}</after>\n" for before, after in asked]
    questions[0] = _TASK + questions[0]
    answers = [f"{_OPEN}{missing}{_CLOSE}" for _, missing, _ in _EXAMPLES] + [_OPEN]
    chat = bool(vocab.tokenizer.chat_template)
    if chat:
        messages = []
        for question, answer in zip(questions, answers, strict=True):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        text, _ = vocab.chat(messages, open_last=True)
    else:
        text = "\n\n".join(q + a for q, a in zip(questions, answers, strict=True))
    parts = re.split(f"([{prefix}{suffix}])", text)
    if parts[1::2] != [prefix, suffix]:
        raise VocabError(
            "the chat template of this tokenizer does not keep the text before and after a hole, so"
            " it cannot be asked by examples; choose another teacher, or another kind of target"
        )
    pieces: list[int | Slot] = []
    for part in parts:
        slot = _STANDS_FOR.get(part)
        pieces += [slot] if slot else _ids_of(vocab, part)
    return Template(
        family=FEW_SHOT,
        order=PSM,
        pieces=tuple(pieces),
        end_ids=(vocab.encode(_CLOSE)[0],),
        start_id=vocab.start_id,
        eos_id=vocab.eos_id,
        opened=chat,
    )


def _ids_of(vocab: Vocab, text: str) -> list[int]:
    """Ids of text of ours; the special tokens of a chat template count as such."""
    return list(vocab.tokenizer(text, add_special_tokens=False)["input_ids"])
