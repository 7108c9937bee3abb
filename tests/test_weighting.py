"""Classes of tokens: what a lexer says, at the right characters, for any text."""

import itertools
import random

import numpy as np
import pytest
from pygments.lexers import get_all_lexers, get_lexer_by_name

from mdm.errors import ConfigError
from mdm.train import weighting
from mdm.train.weighting import (
    CLASSES,
    OTHER,
    character_classes,
    check_language,
    find_lexer,
    token_classes,
)

LETTERS = {"other": ".", "identifier": "i", "literal": "l", "keyword": "k"}
LETTERS |= {"operator": "o", "comment": "c"}
SNAKE = "\N{SNAKE}"


def letters(text, language):
    """One letter for each character; white space is shown as it is."""
    classes = character_classes(text, get_lexer_by_name(language))
    assert classes.dtype == np.uint8
    assert len(classes) == len(text)
    return "".join(
        character if character.isspace() else LETTERS[CLASSES[number]]
        for character, number in zip(text, classes, strict=True)
    )


# --- what a lexer says ---------------------------------------------------------------------------


def test_every_class_of_python():
    text = '''@wraps
def f(x, *y):  # note
    """Doc, "quoted"."""
    return x.a + 1.5 if not x and len(y) else f"é{y}"
'''
    expected = """iiiiii
kkk ioio oioo  c cccc
    ccccccc cccccccccccc
    kkkkkk ioi o lll kk kkk i kkk iiioio kkkk llllill
"""
    assert letters(text, "python") == expected


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("js", "let a = 'b'; // c", "kkk i o lllo cc c"),
        ("c", "#include <a.h>\nint f = 0x1F; /* d */", "kkkkkkkk lllll\nkkk i o llllo cc c cc"),
        ("java", "final int n = 3; // c", "kkkkk kkk i o lo cc c"),
        ("rust", "let s = \"a\"; // c", "kkk i o lllo cc c"),
        ("html", "<p id='x'>text</p>", "oi iiolllo....ooio"),
        ("text", "if x = 1", ".. . . ."),
    ],
)  # fmt: skip
def test_other_languages(language, text, expected):
    assert letters(text, language) == expected


# --- the right characters ------------------------------------------------------------------------

AWKWARD = {
    "python": f"\n\n\tx = '{SNAKE}'  # {SNAKE} é\n\n# end",
    "js": "\n \n\tx = 1; // a\n/* b\n c */ y",
    "c": "\n\n#define A \\\n  2\n\tint x; // end",
    "java": "\n\tclass A { } // \u2028 end",
    "rust": "\n\n// a\nfn f() {}\n// end",
    "html": "\n\n<b>\n\tx</b> <!-- a\n -->",
}


@pytest.mark.parametrize("language", AWKWARD)
def test_line_endings_change_no_other_character(language):
    text = AWKWARD[language]
    plain = character_classes(text, get_lexer_by_name(language)).tolist()
    for ending in ("\r\n", "\r"):
        other = text.replace("\n", ending)
        classes = character_classes(other, get_lexer_by_name(language)).tolist()
        kept = [c for c, a in zip(classes, other, strict=True) if a not in "\r\n"]
        assert kept == [c for c, a in zip(plain, text, strict=True) if a != "\n"]


@pytest.mark.parametrize(
    ("language", "comment"), [("python", "# end"), ("c", "// end"), ("rust", "// end")]
)
def test_a_last_line_without_newline_is_lexed_like_others(language, comment):
    for before in ("", "\n\n\tx\0", "y;\n"):
        found = letters(before + comment, language)[len(before) :]
        assert found.replace(" ", "") == "c" * (len(comment) - 1)


def test_mixed_line_endings():
    assert letters("a\r\r\n\n\rb", "python") == "i\r\r\n\n\ri"
    assert letters("", "python") == ""
    assert letters("\r\n", "python") == "\r\n"


def test_broken_code_has_classes():
    text = "def f(:\n  x = 'open\n))] \0 return"
    assert letters(text, "python") == "kkk ioo\n  i o lllll\nooo . kkkkkk"
    assert letters('x = """open', "python") == "i o lllllll"


def test_no_lexer_chokes_on_noise():
    draw = random.Random(0)
    noise = "abc 01\n\r\t\"'`#/*<>{}()[]$@!%&|;:.,\\=-\0é" + SNAKE
    texts = ["".join(draw.choice(noise) for _ in range(60)) for _ in range(2)]
    names = [aliases[0] for _, aliases, _, _ in get_all_lexers(plugins=False) if aliases]
    assert len(names) > 400
    for name in draw.sample(names, 60):
        for text in texts:
            assert len(character_classes(text, get_lexer_by_name(name))) == len(text)


# --- tokens --------------------------------------------------------------------------------------


def slow_token_classes(text, spans, lexer):
    classes = character_classes(text, lexer)
    result = []
    for begin, stop in spans:
        inside = [i for i in range(begin, stop) if not text[i].isspace()]
        result.append(int(classes[inside[0]]) if inside else OTHER)
    return result


def test_a_token_has_the_class_of_its_first_visible_character():
    text = f"x = '{SNAKE}'  # {SNAKE}\n\n  "
    lexer = get_lexer_by_name("python")
    spans = [(0, 1), (1, 3), (3, 5), (5, 6), (5, 6), (6, 8), (8, 10), (9, 11), (9, 12), (12, 15)]
    spans += [(15, 15), (0, 0), (7, 8), (2, 2)]
    found = token_classes(text, spans, lexer)
    assert found == slow_token_classes(text, spans, lexer)
    named = dict(zip(spans, [CLASSES[c] for c in found], strict=True))
    assert named[0, 1] == "identifier"
    assert named[1, 3] == "operator"
    assert named[3, 5] == named[5, 6] == named[6, 8] == "literal"
    assert named[8, 10] == named[9, 12] == "comment"
    assert {named[s] for s in [(12, 15), (15, 15), (0, 0), (7, 8), (2, 2)]} == {"other"}
    assert all(type(c) is int for c in found)


def test_tokens_of_random_text_by_definition():
    draw = random.Random(1)
    lexer = get_lexer_by_name("python")
    for _ in range(50):
        text = "".join(draw.choice("ab1 \n\r\t'#+(") for _ in range(30))
        cuts = sorted(draw.sample(range(31), 12))
        spans = list(itertools.pairwise(cuts))
        assert token_classes(text, spans, lexer) == slow_token_classes(text, spans, lexer)


def test_without_lexer_or_tokens():
    assert token_classes("def f", [(0, 3), (3, 5)], None) == [OTHER, OTHER]
    assert token_classes("", [], get_lexer_by_name("python")) == []
    assert token_classes("", [(0, 0)], get_lexer_by_name("python")) == [OTHER]


# --- which lexer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "file_name", "expected"),
    [
        ("auto", "a/b/c.py", "Python"),
        ("auto", "Makefile", "Makefile"),
        ("auto", "x.RS", None),
        ("auto", "x.rs", "Rust"),
        ("auto", "notes.txt", "Text only"),
        ("auto", "rows.jsonl line 3", None),
        ("auto", "hub:a/b.py:train row 3", None),
        ("auto", "no_ending", None),
        ("none", "a.py", None),
        ("javascript", "a.py", "JavaScript"),
        ("JS", "", "JavaScript"),
    ],
)
def test_the_lexer_is_found(language, file_name, expected):
    lexer = find_lexer(language, file_name)
    assert (lexer and lexer.name) == expected


def test_unknown_languages():
    for name in ("none", "auto", "python", "c++", "Rust"):
        check_language(name)
    with pytest.raises(ConfigError, match=r"'pyton'; did you mean 'python'\? Give none"):
        check_language("pyton")
    with pytest.raises(ConfigError, match=r"unknown data\.language '' Give none"):
        check_language("")


def test_classes_are_stored_by_place():
    """Prepared rows hold these numbers: changing them needs another format of rows."""
    expected = ("other", "identifier", "literal", "keyword", "operator", "comment")
    assert expected == weighting.CLASSES
    assert OTHER == 0
