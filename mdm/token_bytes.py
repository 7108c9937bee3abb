"""Which bytes of a text each token stands for.

`token_bytes` answers it for a vocabulary, `encode_with_ends` for the tokens of a text. Only content is
encoded, as everywhere (mdm/vocab.py): no special or template token is added, and a literal
"<|endoftext|>" in a text is ordinary text with ordinary tokens.

Two vocabularies spell bytes in their tokens: byte-level ones (GPT-2's alphabet) and sentencepiece's
(`▁` is a space, `<0x0A>` one byte). Where the tokens of a text spell the text, byte by byte, their
lengths say it all. Where they do not (a normalizer changed the text, a sentencepiece met a literal
`▁`), the spans of characters that the tokenizer reports say it, and inside a character the spelling
again; what neither knows is left open: see `encode_with_ends`.

Shapes: V ids of the vocabulary, N tokens of a text, G groups of tokens, K bytes that they spell.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .vocab import Vocab

Ints = npt.NDArray[np.int64]

SPACE = ord(" ")
META = "▁"  # U+2581, a space in the pieces of sentencepiece
FIRST_MARK = 0x300  # no character before it composes with the one before
ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(vocab: Vocab) -> tuple[bytes | None, ...]:
    """The bytes that each id spells, up to the highest id.

    None for holes, for special tokens, and for all tokens of a kind of tokenizer that does not spell
    bytes (WordPiece, whole words). Added tokens that are not special are ordinary text.
    """
    return _spelling(vocab).bytes_V


def encode_with_ends(vocab: Vocab, texts: Sequence[str]) -> list[tuple[list[int], Ints]]:
    """The ids of each text, and the byte of `text.encode()` at which each token ends, (N,) int64.

    A token starts where the one before it ends, the first one at 0, and the last one ends at the end
    of the text. So bytes that no token covers (white space that was dropped) belong to the token
    after them, at the end to the last one; accents that were merged or dropped belong to their letter.
    Tokens may have no byte at all (the space that a sentencepiece puts before a text). Where the bytes
    inside a group of tokens that share a character are not known, because a normalizer changed it, all
    of the group end where the group does. A text may have no tokens; then it has no ends either,
    whatever its length.
    """
    spelling = _spelling(vocab)
    ids = vocab.encode_batch(texts)
    raws = [text.encode() for text in texts]
    known: dict[int, Ints] = {}
    rest: list[int] = []
    for i, (tokens, raw) in enumerate(zip(ids, raws, strict=True)):
        ends_N = _spelled_ends(spelling, tokens, raw)
        if ends_N is None:
            rest.append(i)
        else:
            known[i] = ends_N
    # Spans are slow to make, and seldom needed.
    covered = vocab.encode_batch_with_spans([texts[i] for i in rest])
    for i, (tokens, spans) in zip(rest, covered, strict=True):
        known[i] = _covered_ends(spelling, tokens, spans, texts[i], raws[i])
    return [(tokens, known[i]) for i, tokens in enumerate(ids)]


# --- what a vocabulary spells --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Spelling:
    """What is looked up for every token.

    bytes_V      the bytes of each id, or None
    lengths_V    their number, 0 if they are unknown
    trimmed_V    the spaces at the end of each id that its span leaves out
    trimmed_in_front  the same of a single space at the start of a text, which is taken for the space
                 that the tokenizer puts there
    dropped      bytes that no id spells; a byte-level BPE without an unknown token leaves them out
    """

    bytes_V: tuple[bytes | None, ...]
    lengths_V: Ints
    trimmed_V: Ints
    trimmed_in_front: int
    dropped: bytes


@functools.lru_cache(maxsize=8)
def _spelling(vocab: Vocab) -> _Spelling:
    backend = vocab.tokenizer.backend_tokenizer
    settings = json.loads(backend.to_str())
    spell = _speller(settings["decoder"])
    pieces = backend.get_vocab(with_added_tokens=False)
    added = vocab.tokenizer.added_tokens_decoder
    bytes_V: list[bytes | None] = [None] * (max([*pieces.values(), *added]) + 1)
    if spell is not None:
        # Some added tokens are pieces too (Gemma's "▁▁"): they are spelled as pieces.
        texts = {i: token.content.encode() for i, token in added.items()}
        texts |= {i: spell(piece) for piece, i in pieces.items()}
        for i, spelled in texts.items():
            bytes_V[i] = None if i in added and added[i].special else spelled
    trims = [part for part in _parts(settings["post_processor"]) if part.get("trim_offsets")]
    trimmed = [_spaces_at_end(known) if trims and known else 0 for known in bytes_V]
    return _Spelling(
        bytes_V=tuple(bytes_V),
        lengths_V=np.array([len(known or b"") for known in bytes_V], np.int64),
        trimmed_V=np.array(trimmed, np.int64),
        trimmed_in_front=int(any(part.get("add_prefix_space") for part in trims)),
        dropped=_dropped(settings["decoder"], pieces),
    )


def _speller(decoder: Any) -> Callable[[str], bytes] | None:
    """The function from a piece to its bytes, told by how the tokenizer decodes; None if unknown."""
    parts = {part["type"]: part for part in _parts(decoder)}
    if "ByteLevel" in parts:
        return functools.partial(_byte_level, byte_of=_byte_alphabet())
    if "Metaspace" in parts:
        return functools.partial(_sentencepiece, space=parts["Metaspace"]["replacement"])
    if "ByteFallback" in parts or parts.get("Replace", {}).get("pattern") == {"String": META}:
        return functools.partial(_sentencepiece, space=META)
    return None


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer, and the components in it."""
    if not node:
        return
    yield node
    for inner in (*node.get("decoders", ()), *node.get("processors", ())):
        yield from _parts(inner)


def _byte_level(piece: str, *, byte_of: dict[str, int]) -> bytes:
    # The library's decoder does the same with characters outside the alphabet.
    if all(char in byte_of for char in piece):
        return bytes(byte_of[char] for char in piece)
    return piece.encode()


def _sentencepiece(piece: str, *, space: str) -> bytes:
    found = ONE_BYTE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace(space, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies (Radford et al. 2019, GPT-2).

    Bytes that are printable in Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


def _dropped(decoder: Any, pieces: Mapping[str, int]) -> bytes:
    """The bytes that a byte-level vocabulary has no piece for; vocabularies pruned to a corpus do."""
    if not any(part["type"] == "ByteLevel" for part in _parts(decoder)):
        return b""
    return bytes(byte for char, byte in _byte_alphabet().items() if char not in pieces)


def _spaces_at_end(spelled: bytes) -> int:
    """Of a word and spaces; spaces alone are trimmed to the place where they end, so none is lost."""
    rest = spelled.rstrip(b" ")
    return len(spelled) - len(rest) if rest else 0


# --- the tokens of a text ------------------------------------------------------------------------


def _spelled_ends(spelling: _Spelling, tokens: list[int], raw: bytes) -> Ints | None:
    """Ends by the lengths of the tokens, if these spell the text; else None."""
    if not tokens:
        return np.zeros(0, np.int64)
    lengths_N = spelling.lengths_V[tokens]
    # A tokenizer may put a space before a text: part of its first token, but not of the text.
    kept = raw.translate(None, spelling.dropped)
    surplus = int(lengths_N.sum()) - len(kept)
    if surplus not in (0, 1) or _joined(spelling, tokens) != b" " * surplus + kept:
        return None
    ends_N = np.maximum(np.cumsum(lengths_N) - surplus, 0)
    if len(kept) < len(raw):
        is_dropped_U = np.isin(np.arange(256), list(spelling.dropped))
        kept_at_K = np.flatnonzero(~is_dropped_U[np.frombuffer(raw, np.uint8)])
        ends_N = np.concatenate([[0], kept_at_K + 1])[ends_N]
        ends_N[-1] = len(raw)
    return ends_N


def _covered_ends(
    spelling: _Spelling, tokens: list[int], spans: Sequence[tuple[int, int]], text: str, raw: bytes
) -> Ints:
    """Ends by the spans of characters, and by the spelling within groups that share characters."""
    begin_N, stop_N = np.array(spans, np.int64).T
    # Spaces at the end of a token are part of it, even where its span was trimmed.
    trimmed_N = spelling.trimmed_V[tokens]
    if spelling.bytes_V[tokens[0]] == b" ":
        trimmed_N[0] = spelling.trimmed_in_front
    next_N = np.append(begin_N[1:], len(text))
    stop_N = np.maximum(stop_N, np.minimum(stop_N + trimmed_N, next_N))
    stop_N[-1] = len(text)
    # Nothing before is open at `reached`, nothing after begins before `ahead`.
    reached_N = np.maximum.accumulate(stop_N)
    ahead_N = np.append(np.minimum.accumulate(begin_N[::-1])[::-1][1:], len(text))
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    gaps = np.flatnonzero(reached_N < ahead_N)
    for i in gaps[code_points[reached_N[gaps]] >= FIRST_MARK]:
        while reached_N[i] < ahead_N[i] and _composes(text[reached_N[i]]):
            reached_N[i] += 1
    closes_N = reached_N <= ahead_N
    end_G = _byte_offsets(code_points)[reached_N[closes_N]]
    return _split(spelling, tokens, closes_N, end_G, raw)


def _composes(char: str) -> bool:
    """Can NFC have merged this character into the one before? A merged one has that one's span."""
    return unicodedata.category(char)[0] == "M" or 0x1160 <= ord(char) < 0x1200  # parts of Hangul


def _split(
    spelling: _Spelling, tokens: list[int], closes_N: npt.NDArray[np.bool_], end_G: Ints, raw: bytes
) -> Ints:
    """Ends of tokens, given those of groups: by the lengths where a group's tokens spell its bytes.

    closes_N marks the last token of every group.
    """
    group_N: Ints = np.cumsum(closes_N) - closes_N
    begin_G = _begins(end_G)
    spelled_N = np.cumsum(spelling.lengths_V[tokens])
    spelled_G = spelled_N[closes_N]
    size_G = spelled_G - _begins(spelled_G)
    # Here too a space may have been put before the bytes of the text.
    surplus_G = size_G - (end_G - begin_G)
    shift_G = begin_G - _begins(spelled_G) - surplus_G
    # The bytes (K of them) that the tokens spell, against those of the text where they would lie.
    group_K = np.repeat(np.arange(len(end_G)), size_G)
    place_K = np.arange(len(group_K)) + shift_G[group_K]
    text_K = np.frombuffer(raw + b"\0", np.uint8)[np.clip(place_K, 0, len(raw))]
    expected_K = np.where(place_K < begin_G[group_K], SPACE, text_K)
    wrong_K = np.frombuffer(_joined(spelling, tokens), np.uint8) != expected_K
    known_G = (surplus_G == 0) | (surplus_G == 1)
    known_G[group_K[wrong_K]] = False
    inner_N = np.maximum(spelled_N + shift_G[group_N], begin_G[group_N])
    return np.where(known_G[group_N], inner_N, end_G[group_N])


def _begins(ends: Ints) -> Ints:
    return np.concatenate([[0], ends[:-1]])


def _joined(spelling: _Spelling, tokens: list[int]) -> bytes:
    return b"".join([spelling.bytes_V[i] or b"" for i in tokens])


def _byte_offsets(code_points: npt.NDArray[np.uint32]) -> Ints:
    """(characters + 1,) the byte at which each character begins in UTF-8, and the end of the text."""
    widths = np.ones(len(code_points), np.int64)
    for first in (0x80, 0x800, 2**16):  # of the code points that take a byte more
        widths += code_points >= first
    return np.concatenate([[0], np.cumsum(widths)])
