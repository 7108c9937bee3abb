"""Data sets of tasks from files: formats, splits, and what is wrong with a file."""

import json

import datasets
import pytest
from tiny_eval import mbpp_row, write_rows

from mdm.errors import DataError
from mdm.eval.local_data import HUMAN_EVAL, dataset, mbpp_splits, read_folder, read_rows

ROWS = [{"q": "é 1", "n": 1}, {"q": "b", "n": 2}]
MBPP = "google-research-datasets/mbpp"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Tables are converted into a cache: not into the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def splits_of(files, source=None, split="test"):
    return dataset(mdm_files=files, mdm_source=source, mdm_split=split)


# --- files ---------------------------------------------------------------------------------------


def write(folder, form):
    path = folder / f"rows.{form}"
    if form == "jsonl":
        write_rows(path, ROWS)
    elif form == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif form == "csv":
        path.write_text("q,n\né 1,1\nb,2\n", encoding="utf-8")
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_form_has_the_same_rows(tmp_path, form):
    assert read_rows(write(tmp_path, form)) == ROWS


def test_an_object_with_one_list(tmp_path):
    path = tmp_path / "bbh.json"
    path.write_text(json.dumps({"canary": "x", "examples": ROWS}), encoding="utf-8")
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected an object; got list"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", '{"a": [], "b": []}', "must hold a list of objects, or an object with one"),
        ("a.json", "[1, 2]", "must hold a list of objects"),
        ("a.json", "3", "must hold a list of objects"),
        ("a.txt", "x", "unknown format; use one of .jsonl, .json, .parquet, .csv"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data"), [("a.parquet", b"PAR1 no"), ("a.csv", b'q,n\n1,2,3\n"'), ("b.csv", b"")]
)
def test_a_damaged_table(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} cannot be read as [a-z]+: \w+"):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no data file at .*none.jsonl"):
        read_rows(tmp_path / "none.jsonl")


def test_a_folder_has_one_file_a_split(tmp_path):
    write_rows(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "train.json").write_text(json.dumps(ROWS[:1]), encoding="utf-8")
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    assert read_folder(tmp_path) == {"test": ROWS, "train": ROWS[:1]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no file of the form SPLIT\.jsonl"):
        read_folder(tmp_path / "empty")


# --- splits --------------------------------------------------------------------------------------


def test_one_file_is_the_split_evaluated_on(tmp_path):
    found = splits_of({"*": write_rows(tmp_path / "a.jsonl", ROWS)})
    assert list(found["test"]) == ROWS
    # Examples from it would be questions with their answers.
    assert list(found["train"]) == []
    assert found["train"].features == found["test"].features


def test_a_task_of_unknown_split_gets_the_file_for_any(tmp_path):
    found = splits_of({"*": write_rows(tmp_path / "a.jsonl", ROWS)}, split=None)
    assert list(found["anything"]) == ROWS


def test_named_splits(tmp_path):
    test = write_rows(tmp_path / "a.jsonl", ROWS)
    train = write_rows(tmp_path / "b.jsonl", ROWS[1:])
    found = splits_of({"*": test, "train": train})
    assert (list(found["test"]), list(found["train"])) == (ROWS, ROWS[1:])
    found = splits_of({"test": train, "*": test})  # the name says it more exactly
    assert list(found["test"]) == ROWS[1:]


def test_a_missing_split_is_named(tmp_path):
    train = write_rows(tmp_path / "b.jsonl", ROWS)
    found = splits_of({"train": train, "dev": train})
    message = r"no split 'test' \(it has dev, train\); give it with --data TASK:test=FILE"
    with pytest.raises(DataError, match=message):
        found["test"]


def test_a_folder_for_a_task(tmp_path):
    write_rows(tmp_path / "validation.jsonl", ROWS)
    found = splits_of({"*": str(tmp_path)}, split="validation")
    assert list(found["validation"]) == ROWS
    assert list(found["train"]) == []


def test_humaneval_comes_with_its_package():
    found = splits_of({}, HUMAN_EVAL)
    assert len(found["test"]) == 164
    assert found["test"][0]["task_id"] == "HumanEval/0"


# --- MBPP ----------------------------------------------------------------------------------------

ALL_RANGES = [2, 10, 11, 510, 511, 600, 601, 974]


def test_mbpps_published_splits(tmp_path):
    rows = [mbpp_row(number) for number in ALL_RANGES]
    path = write_rows(tmp_path / "mbpp.jsonl", rows)
    found = splits_of({"*": path}, MBPP)
    numbers = {name: [row["task_id"] for row in found[name]] for name in found}
    assert numbers == {
        "prompt": [2, 10],
        "test": [11, 510],
        "validation": [511, 600],
        "train": [601, 974],
    }


@pytest.mark.parametrize("numbers", [[11, 12], [601], [2, 11, 511], ALL_RANGES[2:]])
def test_a_part_of_mbpp_is_the_test_split(numbers):
    rows = [mbpp_row(number) for number in numbers]
    assert mbpp_splits(rows) == {"test": rows}


def test_another_data_set_is_not_cut_like_mbpp(tmp_path):
    rows = [mbpp_row(number) for number in ALL_RANGES]
    found = splits_of({"*": write_rows(tmp_path / "a.jsonl", rows)}, "evalplus/mbppplus")
    assert len(found["test"]) == len(rows)
