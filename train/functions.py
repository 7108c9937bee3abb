"""Python functions as (prompt, response) pairs: signature and docstring → body.

Pairs are exact slices of the source: prompt + response is one piece of the file, whole lines from
the first decorator to the end of the body. Left out: functions without a docstring, with nothing to
learn in the body (`pass`, `...`, `return` of a constant, `raise NotImplementedError`), or with a
body that shares a line with the signature or the docstring.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from mdm.errors import DataError

from .corpus import RowFile, open_source, read_in_turn
from .documents import Skips

MAX_FILE_KIB = 1024

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_LINE = re.compile(
    r"[^\r\n]*(?:\r\n|\r|\n|\Z)"
)  # where Python ends lines; str.splitlines adds others


@dataclass(frozen=True)
class FunctionPair:
    """A function cut after its docstring; its prompt begins at `line` (from 1) of `origin`."""

    prompt: str
    response: str
    origin: str
    name: str
    line: int


def read_functions(source: str, skips: Skips) -> Iterator[FunctionPair]:
    """The functions in a folder of Python files, a file, or the standard library ("stdlib").

    Files that cannot be used are counted in `skips`. Raises DataError if the source does not exist
    or holds rows instead of code.
    """
    opened = open_source(source, (".py",), MAX_FILE_KIB)
    if isinstance(opened, RowFile):
        raise DataError(f"{source!r} holds rows; functions are read from Python files")
    for document in read_in_turn([opened], skips):
        try:
            yield from functions_in(document.text, document.origin)
        except (SyntaxError, ValueError, RecursionError):
            skips.add("not Python", document.origin)


def functions_in(text: str, origin: str) -> Iterator[FunctionPair]:
    """The functions of one file in order, nested ones and methods too ("Class.method").

    Raises SyntaxError, ValueError or RecursionError if `text` cannot be parsed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in other people's strings
        tree = ast.parse(text)
    lines = _LINE.findall(text)
    for name, function in _functions(tree):
        first = min(node.lineno for node in (function, *function.decorator_list))
        docstring = function.body[0]
        if _can_be_cut(function, lines):
            yield FunctionPair(
                prompt="".join(lines[first - 1 : docstring.end_lineno]),
                response="".join(lines[docstring.end_lineno : function.end_lineno]),
                origin=origin,
                name=name,
                line=first,
            )


def _functions(tree: ast.Module) -> Iterator[tuple[str, _Function]]:
    """Every function with its dotted name, in source order; a stack, as sources may nest deeply."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        scope, node = stack.pop()
        if isinstance(node, _Function):
            yield scope + node.name, node
        if isinstance(node, _Function | ast.ClassDef):
            scope += node.name + "."
        children = [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr)]
        stack.extend((scope, child) for child in reversed(children))


def _can_be_cut(function: _Function, lines: list[str]) -> bool:
    """Whether there is a docstring that ends its line, and a body worth learning after it."""
    docstring, *body = function.body
    if ast.get_docstring(function, clean=False) is None or all(map(_is_trivial, body)):
        return False
    assert docstring.end_lineno is not None, "ast.parse sets it"
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].strip()
    return not after or after.startswith(b"#")


def _is_trivial(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Return(value=None | ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError")):
            return True
        case ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False
