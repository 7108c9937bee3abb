"""lm-eval's tasks by name, with local data; what is said when a name or its data is missing.

Reading lm-eval's index takes ten seconds or more; a process does it once.
"""

import json
import logging

import datasets
import huggingface_hub.constants as hub
import pytest
import tiny_eval
import yaml
from tiny_eval import HUMAN, ROWS, mbpp_row, write_rows

from mdm.errors import ConfigError, DataError, SandboxError
from mdm.eval import tasks
from mdm.eval.code_eval import METRIC
from mdm.eval.human_eval_data import human_eval_problems
from mdm.eval.tasks import leaves, load_tasks, parse_data, task_manager

OWN = {
    "task": "own_task",
    "dataset_path": "nobody/own",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{q}} is",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
OWN_ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    tiny_eval.no_network(monkeypatch)


@pytest.fixture
def own(tmp_path):
    """A folder of task files; `own(name, **changes)` adds one and gives its path."""
    folder = tmp_path / "own"
    folder.mkdir()

    def add(name, **config):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return str(path)

    add.folder = str(folder)
    return add


def rows_file(tmp_path, rows, name="rows.jsonl"):
    return write_rows(tmp_path / name, rows)


def load(name, *data, **options):
    return load_tasks([name], [parse_data(text) for text in data], **options)[1]["tasks"]


# --- --data --------------------------------------------------------------------------------------


def test_forms_of_data(tmp_path, monkeypatch):
    path = rows_file(tmp_path, OWN_ROWS)
    whole, part = parse_data(f"gsm8k={path}"), parse_data(f"gsm8k:train={path}")
    assert (whole.task, whole.split, str(whole.path)) == ("gsm8k", "*", path)
    assert (part.task, part.split) == ("gsm8k", "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert parse_data("gsm8k=~/rows.jsonl").path == whole.path
    assert parse_data("gsm8k=rows.jsonl").path == whole.path
    assert parse_data(f"gsm8k={tmp_path}").path == tmp_path


@pytest.mark.parametrize("text", ["gsm8k", "gsm8k=", "=a.jsonl", "gsm8k:=a.jsonl", ""])
def test_other_forms_are_refused(text):
    with pytest.raises(ConfigError, match=r"cannot read --data .*; write task=FILE or task:split"):
        parse_data(text)


def test_data_that_is_not_there():
    with pytest.raises(DataError, match=r"--data gsm8k=none.jsonl: there is no file or folder at"):
        parse_data("gsm8k=none.jsonl")


# --- names ---------------------------------------------------------------------------------------


def test_an_unknown_task_is_suggested(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown task 'humanevl'; did you mean humaneval, .*ls"):
        load("humanevl")
    with pytest.raises(ConfigError, match="unknown task 'gsm9k'"):
        load("humaneval", f"gsm9k={rows_file(tmp_path, OWN_ROWS)}")


def test_data_of_a_task_that_is_not_asked(tmp_path):
    path = rows_file(tmp_path, HUMAN)
    with pytest.raises(
        ConfigError, match="--data mbpp=…: this task is not among --tasks humaneval"
    ):
        load("humaneval", f"mbpp={path}")


def test_leaves_of_groups_and_tags(own):
    manager = task_manager(None)
    assert leaves(manager, "humaneval") == ["humaneval"]
    assert len(set(leaves(manager, "mmlu"))) == 57
    assert len(leaves(manager, "bbh_zeroshot")) == 27
    assert "gsm8k" in leaves(manager, "math_word_problems")  # a tag
    assert len(set(leaves(manager, "mmlu_generative"))) == 57  # groups written inside the group
    assert "hellaswag" in leaves(manager, "openllm")  # tasks with changes
    assert leaves(manager, "no_such") == ["no_such"]


def test_the_index_is_not_changed_by_loading(tmp_path):
    before = tasks._built_in()["humaneval"].yaml_path
    load("humaneval", f"humaneval={rows_file(tmp_path, HUMAN)}")
    assert tasks._built_in()["humaneval"].yaml_path == before
    assert len(load("humaneval")["humaneval"].eval_docs) == 164


# --- local data sets -----------------------------------------------------------------------------


def test_humaneval_offline_with_lm_evals_prompts():
    (task,) = load("humaneval").values()
    problems = list(human_eval_problems().values())
    docs = list(task.eval_docs)
    assert [doc["task_id"] for doc in docs] == [problem["task_id"] for problem in problems]
    assert [task.doc_to_text(doc) for doc in docs] == [problem["prompt"] for problem in problems]
    assert task.doc_to_target(docs[0]) == f"{problems[0]['test']}\ncheck(has_close_elements)"
    assert task.config.generation_kwargs["max_gen_toks"] == 1024
    (task,) = load("humaneval_instruct").values()
    assert task.doc_to_text(docs[0]).startswith("Write a solution to the following problem")


def test_the_code_metric_of_the_tasks_is_ours():
    import importlib

    load("humaneval")
    assert importlib.import_module("lm_eval.tasks.humaneval.utils").compute_ is METRIC


def test_mbpp_with_all_ranges_and_with_a_part(tmp_path):
    rows = [mbpp_row(number) for number in (5, 11, 12, 520, 700)]
    (task,) = load("mbpp", f"mbpp={rows_file(tmp_path, rows)}").values()
    assert [doc["task_id"] for doc in task.eval_docs] == [11, 12]
    (task,) = load("mbpp", f"mbpp={rows_file(tmp_path, rows[1:])}").values()
    assert [doc["task_id"] for doc in task.eval_docs] == [11, 12, 520, 700]
    text = task.doc_to_text(task.eval_docs[0])
    assert text.startswith("You are an expert Python programmer, and here is your task: Write a f")


def test_bbh_as_published(tmp_path):
    path = tmp_path / "navigate.json"
    path.write_text(json.dumps({"canary": "x", "examples": ROWS["bbh_zeroshot_navigate"]}))
    (task,) = load("bbh_zeroshot_navigate", f"bbh_zeroshot_navigate={path}").values()
    assert len(task.eval_docs) == 2


def test_a_folder_with_one_file_a_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows_file(folder, ROWS["gsm8k"], "test.jsonl")
    rows_file(folder, ROWS["gsm8k"] * 2, "train.jsonl")
    (task,) = load("gsm8k", f"gsm8k={folder}").values()
    assert (len(task.eval_docs), len(task.sampler.df)) == (3, 6)
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no split 'test' \(it has train\)"):
        load("gsm8k", f"gsm8k={folder}")


def test_no_question_is_its_own_example(tmp_path):
    (task,) = load("gsm8k", f"gsm8k={rows_file(tmp_path, ROWS['gsm8k'])}").values()
    assert len(task.eval_docs) == 3
    assert task.sampler.df == []
    (task,) = load("hellaswag", f"hellaswag={rows_file(tmp_path, ROWS['hellaswag'])}").values()
    assert task.sampler.df == []


def test_a_group_with_a_folder_of_subsets(tmp_path, own):
    names = ["own_ants", "own_bees", "own_cats"]
    for name in names:
        subset = name.removeprefix("own_")
        own(name, **{**OWN, "task": name, "dataset_name": subset})
    own("group", group="own_group", task=["own_ants", {"group": "inner", "task": names[1:]}])
    folder = tmp_path / "subsets"
    (folder / "cats").mkdir(parents=True)
    for place in ("ants.jsonl", "bees.jsonl", "cats/test.jsonl"):
        rows_file(folder, [{"q": place, "a": "1"}], place)
    found = load("own_group", f"own_group={folder}", include_path=own.folder)
    assert {name: task.eval_docs[0]["q"] for name, task in found.items()} == {
        "own_ants": "ants.jsonl",
        "own_bees": "bees.jsonl",
        "own_cats": "cats/test.jsonl",
    }
    # One of them from somewhere else.
    other = rows_file(tmp_path, [{"q": "other", "a": "1"}])
    data = (f"own_group={folder}", f"own_bees={other}")
    found = load("own_group", *data, include_path=own.folder)
    assert found["own_bees"].eval_docs[0]["q"] == "other"


def test_a_task_file_of_ones_own(tmp_path, own):
    path = own("mine", **OWN)
    rows = rows_file(tmp_path, OWN_ROWS)
    (task,) = load("own_task", f"own_task={rows}", include_path=own.folder).values()
    assert task.doc_to_text(task.eval_docs[1]) == "two is"
    found = load(path, f"{path}={rows}")  # by its path
    assert list(found) == ["own_task"]
    assert len(found["own_task"].eval_docs) == 2
    no_task = tmp_path / "no_task.yaml"
    no_task.write_text("a: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no_task\.yaml is no task file: Unknown config shape"):
        load(str(no_task))
    with pytest.raises(DataError, match="--include-path: there is no folder at 'nowhere'"):
        load("own_task", include_path="nowhere")


def test_an_own_task_stands_above_lm_evals(tmp_path, own):
    own("mine", **{**OWN, "task": "gsm8k"})
    rows = rows_file(tmp_path, OWN_ROWS)
    (task,) = load("gsm8k", f"gsm8k={rows}", include_path=own.folder).values()
    assert task.doc_to_text(task.eval_docs[0]) == "one is"
    with pytest.raises(DataError, match="needs the data set openai/gsm8k"):
        load("gsm8k")


def test_keys_of_a_task_can_be_changed(tmp_path):
    path = rows_file(tmp_path, ROWS["gsm8k"])
    changes = {"gsm8k": {"doc_to_text": "Q {{question}} – ü", "num_fewshot": 0}}
    (task,) = load("gsm8k", f"gsm8k={path}", overrides=changes).values()
    assert task.doc_to_text(task.eval_docs[0]) == "Q 0 + 1? – ü"
    assert task.doc_to_target(task.eval_docs[0]) == "One more.\n#### 1"


# --- what is missing -----------------------------------------------------------------------------


def test_missing_data_says_all_that_is_needed():
    with pytest.raises(DataError) as caught:
        load("gsm8k")
    text = str(caught.value)
    assert text.startswith(
        "task gsm8k needs the data set openai/gsm8k (main), split test, which is"
    )
    assert (
        "give it as a file: --data gsm8k=FILE.jsonl, rows with the fields answer, question" in text
    )
    assert text.endswith(
        "examples for the prompt: --data gsm8k:train=FILE.jsonl, or --num-fewshot 0"
    )
    assert "\n" not in text


def test_missing_data_of_a_group(own):
    for name in ("own_ants", "own_bees"):
        own(name, **{**OWN, "task": name, "dataset_name": name, "doc_to_target": "a"})
    own("group", group="own_group", task=["own_ants", "own_bees"])
    with pytest.raises(DataError) as caught:
        load("own_group", include_path=own.folder)
    text = str(caught.value)
    assert "needs the data set nobody/own (own_ants), split test" in text
    assert "--data own_ants=FILE.jsonl, rows with the fields a, q; for all of own_group" in text
    assert "--num-fewshot" not in text
    assert text.endswith("--data own_group=FOLDER with one file or folder a subset")


def test_rows_of_the_wrong_form_are_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"does not fit task gsm8k .* fields answer, question"):
        load("gsm8k", f"gsm8k={rows_file(tmp_path, [{'x': 1}])}")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "1"}\n{"quest', encoding="utf-8")
    with pytest.raises(DataError, match=r"broken.jsonl, line 2 is not JSON"):
        load("gsm8k", f"gsm8k={broken}")


def test_a_task_without_data_set_that_fails(own, tmp_path):
    own("mine", **{name: value for name, value in OWN.items() if name != "dataset_path"})
    with pytest.raises(DataError, match=r"task own_task cannot be loaded \(\w+"):
        load("own_task", include_path=own.folder)


@pytest.mark.parametrize("kind", [ModuleNotFoundError, AssertionError])
def test_a_package_that_is_missing(monkeypatch, kind):
    def fail(self, names):
        raise kind("`math_verify` is\n required")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    with pytest.raises(
        ConfigError, match=r"task gsm8k needs a package .*`math_verify` is required"
    ):
        load("gsm8k")


def test_our_own_errors_stay_as_they_are(monkeypatch):
    def fail(self, names):
        raise SandboxError("no sandbox")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    with pytest.raises(SandboxError, match="no sandbox"):
        load("humaneval")


# --- the network ---------------------------------------------------------------------------------


class Connection:
    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        return None


@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_out_of_reach_is_not_asked(monkeypatch, reachable):
    asked = []

    def connect(place, timeout):
        asked.append((place, timeout))
        if not reachable:
            raise TimeoutError
        return Connection()

    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(tasks.socket, "create_connection", connect)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with tasks.offline_unless_reachable():
        assert hub.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is not reachable
    assert hub.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False
    assert asked == [(("hub.example", 443), tasks.REACH_SECONDS)]


def test_the_port_of_a_mirror(monkeypatch):
    places = []
    monkeypatch.setattr(
        tasks.socket,
        "create_connection",
        lambda place, timeout: places.append(place) or Connection(),
    )
    for endpoint in ("http://mirror:8080", "http://mirror"):
        monkeypatch.setattr(hub, "ENDPOINT", endpoint)
        with tasks.offline_unless_reachable():
            pass
    assert places == [("mirror", 8080), ("mirror", 80)]


def test_an_error_inside_is_not_taken_for_a_missing_network(monkeypatch):
    monkeypatch.setattr(tasks.socket, "create_connection", lambda place, timeout: Connection())
    with pytest.raises(OSError, match="disk full"), tasks.offline_unless_reachable():
        raise OSError("disk full")


def test_loading_is_quiet(capfd):
    load("humaneval")
    assert capfd.readouterr() == ("", "")
    assert not logging.root.manager.disable
