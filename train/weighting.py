"""What kind of code a token is: its class, read off the text by a lexer when data is prepared.

    other       white space, plain text, what the lexer does not understand
    identifier  names, built-in ones too; tags and attributes
    literal     strings and numbers
    keyword     keywords, operators that are words (`and`), directives (`#include`)
    operator    operators and punctuation
    comment     comments and docstrings

The lexers are those of pygments: any language it knows, about 1 MB of text a second. They do not
parse, so broken code has classes, too. Knows nothing of masks; train/placement.py gives the classes
their weights.
Shapes: C characters of a text.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pygments.lexers import find_lexer_class_for_filename, get_all_lexers, get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

from mdm.errors import ConfigError

# A class is stored as its place in this list.
CLASSES = ("other", "identifier", "literal", "keyword", "operator", "comment")
OTHER = CLASSES.index("other")

NO_LANGUAGE, BY_FILE_NAME = "none", "auto"

# The nearest ancestor of a token type counts: Name.Builtin is a Name.
_CLASS_OF_TYPE = {
    Token.Name: "identifier",
    Token.Literal: "literal",
    Token.Literal.String.Doc: "comment",
    Token.Keyword: "keyword",
    Token.Operator.Word: "keyword",
    Token.Operator: "operator",
    Token.Punctuation: "operator",
    Token.Comment: "comment",
    Token.Comment.Preproc: "keyword",  # pygments calls the directives of C comments
    Token.Comment.PreprocFile: "literal",
}


def check_language(name: str) -> None:
    """Raise ConfigError unless `name` is "none", "auto" or a language that pygments knows."""
    if name in (NO_LANGUAGE, BY_FILE_NAME):
        return
    try:
        get_lexer_by_name(name)
    except ClassNotFound as error:
        # Not errors.unknown: it lists what is known, and that is a thousand names.
        aliases = [alias for _, aliases, _, _ in get_all_lexers() for alias in aliases]
        near = difflib.get_close_matches(name, aliases, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown data.language {name!r}{hint} Give none (no classes), auto (by the names of"
            " files) or a name that `pygmentize -L lexers` lists"
        ) from error


@functools.lru_cache(maxsize=1024)
def find_lexer(language: str, file_name: str) -> Any | None:
    """The pygments lexer of a text from this file, for a checked `language`.

    None where there is nothing to lex: language "none", or "auto" and no language has such files.
    """
    if language == NO_LANGUAGE:
        return None
    if language != BY_FILE_NAME:
        return get_lexer_by_name(language)
    kind = find_lexer_class_for_filename(file_name)
    return None if kind is None else kind()


def token_classes(text: str, spans: Sequence[tuple[int, int]], lexer: Any | None) -> list[int]:
    """The class of each token, given the characters (from, to) that it covers.

    It is that of its first character that is not white space; without one, and without a lexer,
    it is "other". Tokens that share a character (the bytes of an emoji) share its class.
    """
    if lexer is None or not spans:
        return [OTHER] * len(spans)
    end = len(text)
    space_C = np.fromiter(map(str.isspace, text), np.bool_, end)
    place_C = np.where(space_C, end, np.arange(end))
    next_C = np.append(np.minimum.accumulate(place_C[::-1])[::-1], end)
    classes_C = np.append(character_classes(text, lexer), np.uint8(OTHER))
    begin, stop = np.array(spans, np.int64).T
    first = next_C[begin]
    classes: list[int] = np.where(first < stop, classes_C[first], OTHER).tolist()
    return classes


def character_classes(text: str, lexer: Any) -> npt.NDArray[np.uint8]:
    """(C,) the class of each character. Any text will do."""
    # Lexers are written for lines that end in \n, the last one too. `get_tokens` of pygments sees to
    # that, but strips lines and loses the places of characters.
    dropped = np.fromiter((m.start() for m in re.finditer("\r\n", text)), np.int64)
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    plain_classes = np.full(len(plain) + 1, OTHER, np.uint8)
    for start, kind, value in lexer.get_tokens_unprocessed(plain + "\n"):
        plain_classes[start : start + len(value)] = _class_of(kind)
    kept_C = np.ones(len(text), np.bool_)
    kept_C[dropped] = False
    classes_C = np.full(len(text), OTHER, np.uint8)
    classes_C[kept_C] = plain_classes[:-1]
    return classes_C


@functools.cache
def _class_of(kind: Any) -> int:
    while kind is not None and kind not in _CLASS_OF_TYPE:
        kind = kind.parent
    return OTHER if kind is None else CLASSES.index(_CLASS_OF_TYPE[kind])
