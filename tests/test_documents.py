"""What a row of a data file says about the text in it. More about rows is in test_corpus.py."""

import pytest

from mdm.errors import DataError
from mdm.train.documents import Document, document_of_row, prompt_of_row

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [{"text": "a"}, {"prompt": "p", "response": "a"}, {"messages": CHAT}]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize(("cut", "expected"), [(True, True), (False, False), (None, False)])
def test_a_row_says_if_its_text_was_cut(row, cut, expected):
    found = document_of_row({**row, "cut": cut, "origin": "x.py"}, "line 1")
    assert found.cut is expected
    assert found.group == "x.py"
    assert document_of_row(row, "line 1").cut is False


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("cut", ["yes", 1, 0.0, []])
def test_cut_is_true_or_false(row, cut):
    with pytest.raises(DataError, match=r"line 7: `cut` must be true or false; got "):
        document_of_row({**row, "cut": cut}, "line 7")


def test_a_column_of_other_peoples_data_may_have_any_neighbours():
    assert document_of_row({"code": "a", "cut": "fine"}, "row 1", "code") == Document("a", "row 1")


def test_a_cut_text_is_a_copy_of_the_whole_one():
    whole, cut = (document_of_row({"text": "a", "cut": cut}, "") for cut in (False, True))
    assert whole.hash(0) == cut.hash(0)


def test_prompts_need_no_response():
    assert prompt_of_row({"prompt": "say"}, "o") == Document("", "o", "say")
    assert prompt_of_row({"prompt": "say", "response": "no"}, "o").text == "no"
    user = {"role": "user", "content": "hi"}
    assert prompt_of_row({"messages": [user]}, "o").prompt == (user,)
    answered = [user, {"role": "assistant", "content": "ho"}, user]
    assert prompt_of_row({"messages": answered}, "o").prompt == tuple(answered)
    assert prompt_of_row({"messages": answered[:2]}, "o").prompt == (user,)
    assert prompt_of_row({"text": ""}, "o") == Document("", "o")
    with pytest.raises(DataError, match="expected `text`"):
        prompt_of_row({"code": "x"}, "o")
    with pytest.raises(DataError, match="must be an object"):
        prompt_of_row([1], "o")
