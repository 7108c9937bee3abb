"""A document: text to learn from, and where it was found. Also what was left out, and why.

Knows nothing of files, tokens or rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mdm.errors import DataError

Message = Mapping[str, str]

_EXAMPLES = 3


@dataclass(frozen=True)
class Document:
    """Text to learn, and the name of the file or row it came from.

    `prompt` is None for plain text. A prompt (text, or chat messages before the assistant's turn)
    is read but never learnt; then `text` is the response to it. Documents of one `group` (pieces of
    one file, say) fall on the same side of the held-out split. A text that is `cut` goes on where it
    came from: nothing is learnt about its end. `tokens` are those it was written in, if it was sampled.
    `learnt` is what training reads in its place, if it was read as a prompt to be continued.
    """

    text: str
    origin: str
    prompt: str | tuple[Message, ...] | None = None
    group: str | None = None
    cut: bool = False
    tokens: tuple[int, ...] | None = None
    learnt: Document | None = None

    @property
    def file_name(self) -> str:
        """The file that the text is from, as far as it is known: its ending tells the language."""
        return self.group or self.origin

    def hash(self, seed: int) -> int:
        """A 64-bit hash of the content; blind to trailing white space and kinds of line ending."""
        prompt = self.prompt if isinstance(self.prompt, str | None) else json.dumps(self.prompt)
        lines = (line.rstrip() for line in self.text.rstrip().split("\n"))
        content = "\n".join(lines) if prompt is None else "\0".join((prompt, *lines))
        return _hash(content, seed)

    def split_hash(self, seed: int) -> int:
        """The 64-bit hash that decides the split: that of the group if there is one."""
        if self.learnt is not None:
            return self.learnt.split_hash(seed)
        return self.hash(seed) if self.group is None else _hash(self.group, seed)


def _hash(content: str, seed: int) -> int:
    key = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "little")


class Skips:
    """What was left out: counts by reason, and the first few names for each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count `name` as left out for `reason`."""
        self.counts[reason] += 1
        if self.counts[reason] <= _EXAMPLES:
            self.examples.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        """For people: "2 not UTF-8 (a.py, b.py), 9 empty (c.py, d.py, e.py, …)"."""
        parts = []
        for reason, count in self.counts.most_common():
            more = ", …" if count > _EXAMPLES else ""
            parts.append(f"{count} {reason} ({', '.join(self.examples[reason])}{more})")
        return ", ".join(parts) or "nothing skipped"


def document_of_row(row: object, origin: str, column: str | None = None) -> Document:
    """The document in a row of a data file; what the row holds decides what it is.

    `column` takes plain text from that key. Otherwise the first found of: `messages`, a chat whose
    last assistant turn is the response; `prompt` with `response`; `text`, plain text. An `origin` in
    the row names the file it was cut from, which is then its group; a true `cut` says that the text
    to learn did not end there; `token_ids` are the tokens a teacher wrote it in. All three are read unless
    `column` is given: then `cut` may mean anything.
    Raises DataError naming `origin` if the row is none of these.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be an object with keys; got {_short(row)}")
    group = row.get("origin")
    group = group if isinstance(group, str) else None
    if column is not None:
        return Document(_text(row, column, origin), origin, group=group)
    cut = row.get("cut")
    if not isinstance(cut, bool | None):
        raise DataError(f"{origin}: `cut` must be true or false; got {_short(cut)}")
    cut, tokens = bool(cut), _token_ids(row.get("token_ids"), origin)
    if "messages" in row:
        return replace(_chat(row["messages"], origin), group=group, cut=cut, tokens=tokens)
    if "prompt" in row and "response" in row:
        prompt = _text(row, "prompt", origin)
        return Document(_text(row, "response", origin), origin, prompt, group, cut, tokens)
    if "text" in row:
        return Document(_text(row, "text", origin), origin, group=group, cut=cut, tokens=tokens)
    raise DataError(
        f"{origin}: the row has the keys {', '.join(map(str, row)) or '(none)'}; expected `text`,"
        " or `prompt` and `response`, or `messages`"
    )


def prompt_of_row(row: object, origin: str) -> Document:
    """As document_of_row, but a prompt needs no response, and a chat may end with another's turn."""
    if not isinstance(row, Mapping):
        return document_of_row(row, origin)
    turns, given = row.get("messages"), row
    if isinstance(turns, list) and turns and not _is_answer(turns[-1]):
        row = {**row, "messages": [*turns, {"role": "assistant", "content": ""}]}
    elif "prompt" in row and "messages" not in row:
        row = {"response": "", **row}
    found = document_of_row(row, origin)
    if row == given:
        return found
    try:
        return replace(found, learnt=document_of_row(given, origin))
    except DataError:  # nothing that could be learnt
        return found


def _is_answer(turn: object) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


def _token_ids(value: object, origin: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise DataError(
            f"{origin}: `token_ids` must be a list of whole numbers; got {_short(value)}"
        )
    return tuple(value)


def _chat(messages: object, origin: str) -> Document:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin}: `messages` must be a list of turns; got {_short(messages)}")
    turns = []
    for turn in messages:
        if not isinstance(turn, Mapping):
            raise DataError(f"{origin}: a turn must have `role` and `content`; got {_short(turn)}")
        turns.append({key: _text(turn, key, origin) for key in ("role", "content")})
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(f"{origin}: `messages` needs an assistant turn after another turn")
    return Document(turns[answers[-1]]["content"], origin, tuple(turns[: answers[-1]]))


def _text(row: Mapping[Any, Any], key: str, origin: str) -> str:
    """`row[key]`, which must be text that UTF-8 can write."""
    if key not in row:
        raise DataError(f"{origin}: no `{key}` in the keys {', '.join(map(str, row)) or '(none)'}")
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{origin}: `{key}` must be text; got {_short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: `{key}` is not valid Unicode: {error.reason}") from error
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
