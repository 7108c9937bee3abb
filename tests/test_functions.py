"""Functions cut into signature with docstring, and body: exact slices of tricky sources."""

import ast
import textwrap

import pytest

from mdm.errors import DataError
from mdm.train.documents import Skips
from mdm.train.functions import functions_in, read_functions


def pairs(text):
    """name → (prompt, response), after checking that each pair is a slice of the text."""
    found = list(functions_in(text, "origin"))
    for pair in found:
        assert pair.prompt + pair.response in text
        assert pair.origin == "origin"
    return {pair.name: (pair.prompt, pair.response) for pair in found}


def test_a_function_is_cut_after_its_docstring():
    text = (
        "import os\n\n\n"
        'def f(a,\n      b=1):\n    """Add."""\n\n    # why\n    return a + b  # sum\n'
        "\n\nx = 1\n"
    )
    (pair,) = functions_in(text, "m.py")
    assert pair.prompt == 'def f(a,\n      b=1):\n    """Add."""\n'
    assert pair.response == "\n    # why\n    return a + b  # sum\n"
    assert (pair.name, pair.line) == ("f", 4)


def test_methods_nested_and_async_functions_keep_their_place():
    text = textwrap.dedent('''\
        class A:
            @property
            @cache(
                1)
            def m(self):
                """Doc."""
                def inner():
                    "inner doc"
                    yield 1
                return inner

            async def n(self):
                r"""Raw \\d
                doc."""
                await x

        if True:
            def late():
                """Doc."""
                return x
        ''')
    found = pairs(text)
    assert list(found) == ["A.m", "A.m.inner", "A.n", "late"]
    assert found["A.m"][0].startswith("    @property\n    @cache(\n")
    assert found["A.m"][1].endswith("        return inner\n")
    assert found["A.m.inner"] == (
        '        def inner():\n            "inner doc"\n',
        "            yield 1\n",
    )
    assert found["A.n"][1] == "        await x\n"


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return x + 1\n",  # no docstring
        'def f():\n    """Doc."""\n',  # no body
        'def f():\n    """Doc."""\n    pass\n',
        'def f():\n    """Doc."""\n    ...\n',
        'def f():\n    """Doc."""\n    return\n',
        'def f():\n    """Doc."""\n    return None\n',
        'def f():\n    """Doc."""\n    raise NotImplementedError\n',
        'def f():\n    """Doc."""\n    raise NotImplementedError("x")\n',
        'def f(): """Doc."""; return x\n',
        'def f():\n    """Doc."""; return x\n',
        'def f():\n    """Doc."""; y = 1\n    return x\n',
        'def f():\n    """Doc."""; \\\n    return x\n',
        'def f():\n    f"""Doc."""\n    return x\n',
        'def f():\n    b"""Doc."""\n    return x\n',
        'class A:\n    """Doc."""\n    x = 1\n',
    ],
)
def test_nothing_to_learn(text):
    ast.parse(text)
    assert pairs(text) == {}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_line_ending_and_tabs_are_kept(newline):
    text = 'def f():\n\t"""é – \x0c\u2028 doc."""  # note\n\treturn x + "ü"\n'.replace(
        "\n", newline
    )
    assert pairs("x = 1" + newline + text) == {
        "f": (
            text.partition("\treturn")[0],
            '\treturn x + "ü"' + newline,
        )
    }


def test_a_file_may_end_without_a_line_ending():
    assert pairs('def f():\n    ("Doc, "\n     "longer")\n    return x') == {
        "f": ('def f():\n    ("Doc, "\n     "longer")\n', "    return x")
    }


def test_old_escapes_give_no_warning():
    assert list(pairs('def f():\n    "\\d"\n    return x\n')) == ["f"]


def test_deep_sources_do_not_overflow():
    long_sum = "x = " + " + ".join(["1"] * 900)
    chain = "if a:\n    pass\n" + "elif a:\n    pass\n" * 80
    assert list(pairs(f'{long_sum}\n{chain}def f():\n    """Doc."""\n    return x\n')) == ["f"]


def test_files_that_are_not_python_are_counted(tmp_path):
    good = 'def f():\n    """Doc."""\n    return x\n'
    for name, data in {
        "good.py": good.encode(),
        "sub/good.py": good.encode(),
        "two.py": b"print 'python 2'\n",
        "latin.py": b"# coding: latin-1\n# \xe9\n",
        "notes.txt": good.encode(),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    skips = Skips()
    found = list(read_functions(str(tmp_path), skips))
    assert {pair.origin for pair in found} == {"good.py", "sub/good.py"}
    assert skips.counts == {"not Python": 1, "not UTF-8": 1}


def test_rows_are_no_source_of_functions(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "def"}\n')
    with pytest.raises(DataError, match="holds rows"):
        list(read_functions(str(tmp_path / "a.jsonl"), Skips()))
    with pytest.raises(DataError, match="no source"):
        list(read_functions("no/such", Skips()))


def test_pairs_of_the_standard_library_parse():
    found = [pair for _, pair in zip(range(300), read_functions("stdlib", Skips()), strict=False)]
    assert len(found) == 300
    for pair in found:
        (node,) = ast.parse(textwrap.dedent(pair.prompt + pair.response)).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert node.name == pair.name.rpartition(".")[2]
        ast.parse(textwrap.dedent(pair.prompt))  # a docstring alone is a whole function
