"""Infilling: what is hidden, what each kind of model is shown, and how the results are counted."""

import dataclasses
import math

import pytest
import torch
from students import word_vocab
from tiny import END, byte_alphabet, byte_tokenizer
from tiny_run import ar_folder, tiny_denoiser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from mdm.canvas import SamplerSettings
from mdm.checkpoint import save_denoiser
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError, RequestError
from mdm.eval.answers import Answers
from mdm.eval.human_eval_data import human_eval_problems
from mdm.eval.infilling import (
    RANDOM_SPAN,
    SINGLE_LINE,
    TASKS,
    InfillSettings,
    cut_to_fit,
    holes_of,
    is_nearest,
    run_infilling,
    split_text,
    split_tokens,
    surest,
    written,
)
from mdm.eval.metrics import clustered_std_err, wilson_interval
from mdm.eval.models import ModelSettings, open_evaluated
from mdm.eval.responses import Responses
from mdm.eval.sandbox import Limits
from mdm.generate import Generation, visible
from mdm.vocab import Vocab, read_vocab

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
START = 256
LIMITS = Limits(seconds=5.0)
PROBLEM = {
    "task_id": "HumanEval/7",
    "prompt": "def f(x):\n",
    "canonical_solution": "    y = x\n\n    return y\n",
    "test": "def check(candidate):\n    assert candidate(3) == 3\n",
    "entry_point": "f",
}


def items_of(task, settings=InfillSettings(), problems=None):  # noqa: B008
    problems = human_eval_problems() if problems is None else problems
    return [item for p in problems.values() for item in TASKS[task](p, settings)]


@pytest.fixture(scope="module")
def ar_source(tmp_path_factory):
    return ar_folder(tmp_path_factory.mktemp("ar"), extra_special=FIM_TOKENS)


@pytest.fixture(scope="module")
def student_source(tmp_path_factory, ar_source):
    folder = tmp_path_factory.mktemp("student") / "model"
    save_denoiser(tiny_denoiser(ar_source), folder)
    return str(folder)


def opened(source, **settings):
    return Answers(open_evaluated(source, ModelSettings(**settings), "cpu"), Responses(None))


# --- models with a script ------------------------------------------------------------------------


class Oracle(Denoiser):
    """Writes the hidden text of the item whose sides it sees; at another length, x's unsurely."""

    block_size = None
    shift = False
    max_length = 8192
    device = torch.device("cpu")

    def __init__(self, vocab: Vocab, items) -> None:
        nn.Module.__init__(self)
        self.vocab = vocab
        self.mask_id = vocab.mask_id
        self.targets = {
            (item.prefix.encode(), item.suffix.encode()): item.target.encode() for item in items
        }

    def head(self, logits_NV):
        return logits_NV

    def chunks(self, rows):
        return [slice(0, rows)]

    def rows(self, xt_BL, wanted_BL, *, document_ids_BL):
        rows = []
        for ids_L, wanted_L, valid_L in zip(xt_BL, wanted_BL, document_ids_BL >= 0, strict=True):
            open_n = (ids_L == self.mask_id).nonzero()[:, 0].tolist()
            first, last, length = open_n[0], open_n[-1] + 1, int(valid_L.sum())
            assert ids_L[0] == START
            assert open_n == list(range(first, last)), "the oracle decides all at once"
            sides = bytes(ids_L[1:first].tolist()), bytes(ids_L[last:length].tolist())
            target = self.targets[sides]
            logits_nV = torch.zeros(last - first, len(self.vocab))
            if len(target) == last - first:
                logits_nV[range(len(target)), list(target)] = 20.0
            else:
                logits_nV[:, ord("x")] = 5.0 / len(open_n)  # less sure, the more so the longer
            rows.append(logits_nV[wanted_L[first:last]])
        return torch.cat(rows)


def oracle(student_source, task, settings=InfillSettings(), **sampler):  # noqa: B008
    evaluated = open_evaluated(student_source, ModelSettings(), "cpu")
    chosen = ModelSettings(sampler=SamplerSettings(steps=1, **sampler), batch_size=4)
    model = Oracle(evaluated.vocab, items_of(task, settings))
    return Answers(dataclasses.replace(evaluated, model=model, settings=chosen), Responses(None))


@pytest.fixture
def scribe(monkeypatch):
    """Replaces an AR model's writing by `answer(hole) -> text`; notes the holes it was given."""
    seen = []

    def use(answer):
        def write(ar, holes, settings, *, batch_size, done):
            results = []
            for i, hole in enumerate(holes):
                seen.append(hole)
                ids = ar.vocab.encode(answer(hole))[: hole.length]
                text, ids, tokens, reason = visible(ar.vocab, ids, hole.stop)
                results.append(Generation(text, ids, tokens, reason, len(ids), -0.1))
                done(i, results[-1])
            return results

        monkeypatch.setattr("mdm.autoregressive.write", write)
        return seen

    return use


# --- what is hidden ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_parts_make_the_solution(task):
    settings = InfillSettings(spans_per_problem=3)
    items = items_of(task, settings)
    assert len({item.id for item in items}) == len(items)
    for item in items:
        whole = item.problem["prompt"] + item.problem["canonical_solution"]
        assert item.prefix + item.target + item.suffix == whole
        assert item.prefix.startswith(item.problem["prompt"])
        assert item.target


def test_every_line_that_is_not_blank_is_hidden_once():
    items = items_of(SINGLE_LINE)
    assert len(items) == 1033  # as published
    for item in items:
        assert item.prefix.endswith("\n")
        assert item.suffix.startswith("\n")
        assert "\n" not in item.target
        assert item.target.strip()


def test_a_line_by_hand():
    first, second = TASKS[SINGLE_LINE](PROBLEM, InfillSettings())
    assert (first.id, second.id) == ("HumanEval/7:line0", "HumanEval/7:line2")
    assert first.prefix == "def f(x):\n"
    assert (first.target, first.suffix) == ("    y = x", "\n\n    return y\n")
    assert second.prefix == "def f(x):\n    y = x\n\n"
    assert (second.target, second.suffix) == ("    return y", "\n")


def test_a_solution_without_a_last_newline():
    problem = {**PROBLEM, "canonical_solution": "    return x"}
    (item,) = TASKS[SINGLE_LINE](problem, InfillSettings())
    assert (item.target, item.suffix) == ("    return x", "")


def test_spans_depend_on_seed_problem_and_number_alone():
    problems = human_eval_problems()
    few, many = InfillSettings(spans_per_problem=1), InfillSettings(spans_per_problem=10)
    all_items = {item.id: item for item in items_of(RANDOM_SPAN, many)}
    assert len(all_items) == 1640  # as published
    backwards = dict(reversed(problems.items()))
    for item in items_of(RANDOM_SPAN, few, backwards):
        assert item.id.endswith(":span0")
        assert item == all_items[item.id]
    other = items_of(RANDOM_SPAN, InfillSettings(spans_per_problem=10, seed=1))
    assert sum(item == all_items[item.id] for item in other) < 20
    assert all_items["HumanEval/0:span0"].target != all_items["HumanEval/0:span1"].target
    twin = {**problems["HumanEval/0"], "task_id": "twin"}
    assert next(TASKS[RANDOM_SPAN](twin, few)).target != all_items["HumanEval/0:span0"].target


def test_both_ends_of_a_span_are_uniform():
    """The mean length of a span between two of the n + 1 places is (n + 2) / 3."""
    ratios, at_start, at_end = [], 0, 0
    for item in items_of(RANDOM_SPAN, InfillSettings(spans_per_problem=10)):
        n = len(item.problem["canonical_solution"])
        ratios.append(len(item.target) / ((n + 2) / 3))
        at_start += len(item.prefix) == len(item.problem["prompt"])
        at_end += item.suffix == ""
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.06)
    assert at_start > 0
    assert at_end > 0


def test_a_longest_span_cuts_the_long_ones_only():
    whole = items_of(RANDOM_SPAN)
    cut = items_of(RANDOM_SPAN, InfillSettings(max_span=20))
    for one, other in zip(whole, cut, strict=True):
        assert other.prefix == one.prefix
        assert other.target == one.target[:20]
    assert max(len(item.target) for item in cut) == 20 < max(len(item.target) for item in whole)


# --- where tokens are cut ------------------------------------------------------------------------


def indenting_vocab():
    """Bytes, and tokens of a newline with one to four spaces, as GPT-2's pattern makes them."""
    table = {char: byte for byte, char in enumerate(byte_alphabet())}
    merges, merged = [], "Ċ"
    for _ in range(4):
        merges.append((merged, "Ġ"))
        merged += "Ġ"
        table[merged] = 300 + len(merges)
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return read_vocab(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END))


def test_parts_by_themselves_are_not_the_tokens_of_the_program():
    vocab = indenting_vocab()
    first, second = TASKS[SINGLE_LINE](PROBLEM, InfillSettings())
    for item in (first, second):
        same, before, target, after = split_text(item, vocab)
        assert same is item
        assert [vocab.decode(ids) for ids in (before, target, after)] == [
            item.prefix, item.target, item.suffix,
        ]  # fmt: skip
        assert before + target + after != vocab.encode(item.prefix + item.target + item.suffix)


def test_whole_tokens_hide_the_newline_too():
    vocab = indenting_vocab()
    first, second = TASKS[SINGLE_LINE](PROBLEM, InfillSettings())
    grown, before, target, after = split_tokens(first, vocab)
    assert (grown.prefix, grown.target) == ("def f(x):", "\n    y = x")
    assert grown.suffix == first.suffix
    assert before + target + after == vocab.encode("def f(x):\n" + PROBLEM["canonical_solution"])
    assert vocab.decode(target) == grown.target
    assert len(target) == 1 + len("y = x")
    assert split_tokens(second, vocab)[0].target == "\n    return y"


@pytest.mark.parametrize("task", TASKS)
def test_with_a_token_a_byte_both_are_the_same(task):
    vocab = read_vocab(byte_tokenizer())
    problem = {**PROBLEM, "canonical_solution": "    x = 'é'\n    return '☃é'\n"}
    for item in TASKS[task](problem, InfillSettings(spans_per_problem=40)):
        assert split_tokens(item, vocab) == split_text(item, vocab)


def test_hidden_tokens_are_those_that_hold_hidden_text_and_no_more():
    vocab = indenting_vocab()
    problem = {**PROBLEM, "canonical_solution": "    if 'é☃':\n        x = 1\n    return x\n"}
    for item in TASKS[RANDOM_SPAN](problem, InfillSettings(spans_per_problem=60)):
        grown, before, target, after = split_tokens(item, vocab)
        assert grown.prefix + grown.target + grown.suffix == item.prefix + item.target + item.suffix
        assert (vocab.decode(before), vocab.decode(after)) == (grown.prefix, grown.suffix)
        # Without its first or last token some hidden text would be seen.
        assert len(grown.prefix) <= len(item.prefix) < len(vocab.decode(before + target[:1]))
        assert len(grown.suffix) <= len(item.suffix) < len(vocab.decode(target[-1:] + after))


def test_a_tokenizer_that_loses_text_is_refused():
    (item, _) = TASKS[SINGLE_LINE](PROBLEM, InfillSettings())
    with pytest.raises(RequestError, match=r"HumanEval/7:line0: .*use boundary=text"):
        split_tokens(item, word_vocab())


def test_a_line_that_begins_with_a_newline(ar_source):
    """A teacher may not stop at the newline it begins with, and is cut at the next."""
    answers = opened(ar_source)
    answers.evaluated.model.vocab = indenting_vocab()
    _, asked = hole_of(answers, SINGLE_LINE, InfillSettings(boundary="token"))
    (hole,) = asked.holes
    assert hole.stop == ()
    assert asked.item.target == "\n    return y"
    assert hole.length == 1 + len("return y")
    assert written(answers, SINGLE_LINE, asked.item, "\n    z\n    y\n") == "\n    z"
    assert written(answers, RANDOM_SPAN, asked.item, "\n    z\n    y\n") == "\n    z\n    y\n"


def test_a_student_may_write_more_lines(student_source):
    item, _ = hole_of(opened(student_source), SINGLE_LINE)
    assert written(opened(student_source), SINGLE_LINE, item, "a\nb") == "a\nb"


@pytest.mark.parametrize("task", TASKS)
def test_the_hidden_text_may_grow_and_the_program_stays_right(ar_source, scribe, task):
    answers = opened_wide(ar_source)
    answers.evaluated.model.vocab = vocab = indenting_vocab()
    settings = InfillSettings(boundary="token")
    items = {item.id: split_tokens(item, vocab)[0] for item in items_of(task)}
    targets = {item.prefix: item.target for item in items.values()}
    scribe(lambda hole: targets[vocab.decode(hole.before)])
    outcome = run_infilling(answers, task, settings, limit=2, limits=LIMITS)
    assert outcome.scores["pass@1"].value == outcome.scores["exact_match"].value == 1.0
    for sample in outcome.samples:
        assert sample["target"] == items[sample["id"]].target
        assert sample["target_tokens"] == len(vocab.encode(sample["target"]))


def test_another_boundary_makes_other_items(ar_source, scribe):
    scribe(lambda hole: "")
    answers = opened_wide(ar_source)
    answers.evaluated.model.vocab = indenting_vocab()
    both = [
        run_infilling(answers, SINGLE_LINE, InfillSettings(boundary=name), limit=1, limits=LIMITS)
        for name in ("text", "token")
    ]
    text, token = ({sample["doc_hash"] for sample in outcome.samples} for outcome in both)
    assert not text & token


# --- what a model sees ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "room", "context", "expected"),
    [
        (5, 5, 20, None, (5, 5)),
        (10, 10, 8, None, (4, 4)),
        (10, 10, 7, None, (4, 3)),
        (2, 10, 8, None, (2, 6)),
        (10, 2, 8, None, (6, 2)),
        (10, 0, 8, None, (8, 0)),
        (0, 10, 8, None, (0, 8)),
        (10, 10, 8, 3, (3, 3)),
        (10, 1, 20, 3, (3, 1)),
        (2, 2, 1, None, (1, 0)),
    ],
)
def test_far_ends_are_cut(before, after, room, context, expected):
    left, right = list(range(before)), list(range(100, 100 + after))
    kept_left, kept_right = cut_to_fit(left, right, room, context)
    assert (len(kept_left), len(kept_right)) == expected
    assert kept_left == left[before - expected[0] :]
    assert kept_right == right[: expected[1]]


def hole_of(answers, task, settings=InfillSettings(), number=1):  # noqa: B008
    item = list(TASKS[task](PROBLEM, settings))[number]
    return item, holes_of(answers, task, item, settings)


def test_a_student_sees_both_sides_and_the_length(student_source):
    item, asked = hole_of(opened(student_source), SINGLE_LINE)
    (hole,) = asked.holes
    assert hole.before == (START, *item.prefix.encode())
    assert hole.after == tuple(item.suffix.encode())
    assert hole.length == asked.true_length == len(item.target)
    assert hole.stop == ()
    assert hole.key == ("infill", 0, "HumanEval/7:line2")


def test_the_context_can_be_narrowed(student_source):
    settings = InfillSettings(context=4, seed=3)
    item, asked = hole_of(opened(student_source), SINGLE_LINE, settings, 0)
    (hole,) = asked.holes
    assert hole.before == (START, *item.prefix.encode()[-4:])
    assert hole.after == tuple(item.suffix.encode()[:4])
    assert hole.key == ("infill", 3, "HumanEval/7:line0")


def test_a_search_tries_every_candidate_in_one_place(student_source):
    settings = InfillSettings(length="search", candidates=(2, 5, 1000, 9))
    _, asked = hole_of(opened(student_source), SINGLE_LINE, settings)
    assert [hole.length for hole in asked.holes] == [2, 5, 1000, 9]
    assert len({(hole.before, hole.after, hole.key) for hole in asked.holes}) == 1
    assert asked.holes[0].total < asked.holes[2].total <= 1024


def test_candidates_longer_than_the_context_are_left_out(student_source):
    settings = InfillSettings(length="search", candidates=(2, 1022, 1023, 4000))
    _, asked = hole_of(opened(student_source), SINGLE_LINE, settings)
    assert [hole.length for hole in asked.holes] == [2, 1022]
    assert [hole.total for hole in asked.holes] == [4, 1024]
    with pytest.raises(RequestError, match=r"HumanEval/7:line2: .*does not fit.*context of 1024"):
        hole_of(
            opened(student_source), SINGLE_LINE, InfillSettings(length="search", candidates=(1023,))
        )


def test_a_teacher_sees_the_left_side_and_stops_at_the_line(ar_source):
    item, asked = hole_of(opened(ar_source), SINGLE_LINE)
    (hole,) = asked.holes
    assert hole.before == tuple(item.prefix.encode())  # its tokenizer adds no start token
    assert (hole.after, hole.stop) == ((), ("\n",))
    assert hole.length == len(item.target)


def test_a_teacher_of_spans_is_cut_at_the_length(ar_source):
    _, asked = hole_of(opened(ar_source), RANDOM_SPAN, InfillSettings(spans_per_problem=2))
    (hole,) = asked.holes
    assert (hole.after, hole.stop, hole.length) == ((), (), asked.true_length)


def test_a_teacher_that_knows_fim_is_given_both_sides(ar_source):
    item, asked = hole_of(opened(ar_source), SINGLE_LINE, InfillSettings(teacher="fim"))
    (hole,) = asked.holes
    assert hole.before == tuple(item.prefix.encode())
    assert (hole.after, hole.stop) == (tuple(item.suffix.encode()), ("\n",))


def test_the_marks_of_fim_need_room(ar_source):
    long = {**PROBLEM, "prompt": "# long\n" * 300}
    answers = opened(ar_source)
    for teacher, total in (("left", 1024), ("fim", 1024 - 3)):
        settings = InfillSettings(teacher=teacher)
        item = next(iter(TASKS[SINGLE_LINE](long, settings)))
        (hole,) = holes_of(answers, SINGLE_LINE, item, settings).holes
        assert hole.total == total
        assert answers.evaluated.seen_by_teacher(hole).total == 1024


def test_a_teacher_without_the_length_may_write_the_longest_candidate(ar_source):
    settings = InfillSettings(length="search", teacher="fim", candidates=(4, 30, 8))
    for task in TASKS:
        _, asked = hole_of(opened(ar_source), task, settings, 0)
        assert [hole.length for hole in asked.holes] == [30]


# --- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_student_that_knows_the_text_passes(student_source, task, capsys):
    settings = InfillSettings(spans_per_problem=2)
    answers = oracle(student_source, task, settings)
    outcome = run_infilling(answers, task, settings, limit=3, limits=LIMITS, workers=2)
    items = items_of(task, settings, dict(list(human_eval_problems().items())[:3]))
    assert outcome.task == task
    assert outcome.scores["pass@1"].value == outcome.scores["exact_match"].value == 1.0
    assert outcome.scores["pass@1"].interval == wilson_interval(3, 3)  # 3 problems
    assert outcome.scores["tokens"].value == pytest.approx(
        sum(len(item.target) for item in items) / len(items)
    )
    assert outcome.scores["nfe"] == dataclasses.replace(
        outcome.scores["nfe"], value=1, interval=None
    )
    assert "nearest_length" not in outcome.scores
    assert {score.n for score in outcome.scores.values()} == {len(items)}
    for sample, item in zip(outcome.samples, items, strict=True):
        assert sample["id"] == item.id
        assert sample["task"] == task
        assert sample["cluster"] == item.id.partition(":")[0]
        assert sample["outputs"] == [item.target] == [sample["target"]]
        assert (sample["passed"], sample["reasons"]) == ([True], ["passed"])
        assert sample["length"] == sample["target_tokens"] == len(item.target)
        assert sample["prefix_tokens"] == 1 + len(item.prefix.encode())
        assert sample["suffix_tokens"] == len(item.suffix.encode())
        assert sample["confidence"] > -1e-4
    assert len({sample["doc_hash"] for sample in outcome.samples}) == len(items)
    assert outcome.settings["spans_per_problem"] == 2
    assert outcome.settings["limit"] == 3
    assert outcome.settings["problems"] == 3
    assert f"tests: {len(items)}/{len(items)}" in capsys.readouterr().err


def test_a_random_student_fails_and_a_second_run_knows_it(student_source):
    answers = opened(student_source, sampler=SamplerSettings(steps=2))
    settings = InfillSettings(context=20)
    outcome = run_infilling(answers, SINGLE_LINE, settings, limit=2, limits=LIMITS)
    assert outcome.scores["pass@1"].value == outcome.scores["exact_match"].value == 0.0
    assert outcome.scores["pass@1"].std_err == 0.0
    assert outcome.scores["pass@1"].interval == wilson_interval(0, 2)
    assert all(sample["reasons"] != ["passed"] for sample in outcome.samples)
    assert {sample["prefix_tokens"] for sample in outcome.samples} == {21}
    answers.evaluated.model.forward = None  # is not asked again
    again = run_infilling(answers, SINGLE_LINE, settings, limit=2, limits=LIMITS)
    assert [s["outputs"] for s in again.samples] == [s["outputs"] for s in outcome.samples]


@pytest.mark.parametrize("length", ["true", "search"])
def test_a_block_model_fills_holes(tmp_path, ar_source, length):
    save_denoiser(tiny_denoiser(ar_source, kind="bd3lm", block_size=4), tmp_path / "blocks")
    answers = opened(str(tmp_path / "blocks"))
    assert answers.evaluated.model.block_size == 4
    settings = InfillSettings(context=20, length=length, candidates=(2, 5))
    outcome = run_infilling(answers, SINGLE_LINE, settings, limit=1, limits=LIMITS)
    assert outcome.scores["pass@1"].value == 0.0
    for sample in outcome.samples:
        (text,) = sample["outputs"]
        assert len(text.encode()) > 0
    if length == "true":  # a token a forward
        tokens = [sample["target_tokens"] for sample in outcome.samples]
        assert [sample["metrics"]["nfe"] for sample in outcome.samples] == tokens


def test_problems_are_the_clusters_of_the_standard_error(ar_source, scribe):
    """Right on the lines of one problem only."""
    targets = {item.prefix: item for item in items_of(SINGLE_LINE)}

    def answer(hole):
        item = targets[bytes(hole.before).decode()]
        return item.target if item.id.startswith("HumanEval/0:") else "    ("

    scribe(answer)
    outcome = run_infilling(
        opened_wide(ar_source), SINGLE_LINE, InfillSettings(), limit=3, limits=LIMITS
    )
    values = [sample["metrics"]["pass@1"] for sample in outcome.samples]
    clusters = [sample["cluster"] for sample in outcome.samples]
    assert [v == (c == "HumanEval/0") for v, c in zip(values, clusters, strict=True)]
    score = outcome.scores["pass@1"]
    assert score.value == sum(values) / len(values)
    assert score.std_err == pytest.approx(clustered_std_err(values, clusters))
    assert score.interval is None
    assert math.isnan(clustered_std_err(values[:2], clusters[:2]))


def opened_wide(ar_source):
    """A teacher whose context holds every problem; only for scripts."""
    answers = opened(ar_source)
    answers.evaluated.model.model.config.max_position_embeddings = 8192
    return answers


def test_a_limited_run_is_a_part_of_a_longer_one(student_source):
    answers = oracle(student_source, RANDOM_SPAN)
    short, long = (
        run_infilling(answers, RANDOM_SPAN, InfillSettings(), limit=n, limits=LIMITS)
        for n in (2, 4)
    )
    assert len(short.samples) == 2
    assert short.samples == long.samples[:2]


def test_white_space_at_the_end_does_not_count(ar_source, scribe):
    targets = {item.prefix: item.target for item in items_of(SINGLE_LINE)}
    seen = scribe(lambda hole: targets[bytes(hole.before).decode()].rstrip() + "  \nmore")
    settings = InfillSettings(length="search", candidates=(200,))
    outcome = run_infilling(opened_wide(ar_source), SINGLE_LINE, settings, limit=1, limits=LIMITS)
    assert outcome.scores["exact_match"].value == outcome.scores["pass@1"].value == 1.0
    assert all(sample["outputs"][0].endswith("  ") for sample in outcome.samples)
    assert {hole.length for hole in seen} == {200}
    assert all(sample["finish_reason"] == "stop" for sample in outcome.samples)


def test_white_space_at_the_start_counts(ar_source, scribe):
    targets = {item.prefix: item.target for item in items_of(SINGLE_LINE)}
    scribe(lambda hole: targets[bytes(hole.before).decode()][1:])
    outcome = run_infilling(
        opened_wide(ar_source), SINGLE_LINE, InfillSettings(), limit=1, limits=LIMITS
    )
    assert outcome.scores["exact_match"].value == 0.0


def test_a_teacher_with_fim_goes_through_its_marks(ar_source, scribe):
    seen = scribe(lambda hole: "x")
    answers = opened_wide(ar_source)
    run_infilling(answers, SINGLE_LINE, InfillSettings(teacher="fim"), limit=1, limits=LIMITS)
    marks = answers.evaluated.vocab.tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    for hole in seen:
        assert [hole.before[0], hole.before[-1]] == [marks[0], marks[2]]
        assert marks[1] in hole.before
        assert hole.after == ()


@pytest.mark.parametrize("teacher", ["left", "fim"])
@pytest.mark.parametrize("task", TASKS)
def test_a_real_teacher_end_to_end(ar_source, task, teacher):
    settings = InfillSettings(teacher=teacher, context=30, max_span=10)
    outcome = run_infilling(opened(ar_source), task, settings, limit=2, limits=LIMITS)
    assert outcome.scores["pass@1"].value == 0.0
    for sample in outcome.samples:
        assert 0 <= sample["metrics"]["tokens"] <= sample["target_tokens"]
        assert ("\n" in sample["outputs"][0]) <= (task == RANDOM_SPAN)


def test_temperature_and_nucleus_reach_the_model(ar_source, monkeypatch):
    asked = []

    def complete(self, requests):
        asked.extend(requests)
        return [Generation("", [], 0, "stop", 1) for _ in requests]

    monkeypatch.setattr(Answers, "complete", complete)
    run_infilling(
        opened(ar_source), SINGLE_LINE, InfillSettings(), limit=1, temperature=0.3, top_p=0.9,
        limits=LIMITS,
    )  # fmt: skip
    assert {(request.temperature, request.top_p) for request in asked} == {(0.3, 0.9)}


# --- the search for a length ---------------------------------------------------------------------


def test_the_surest_length_is_chosen(student_source):
    items = items_of(SINGLE_LINE, problems=dict(list(human_eval_problems().items())[:2]))
    lengths = {len(item.target) for item in items}
    settings = InfillSettings(length="search", candidates=tuple(sorted({3, *lengths, 60})))
    answers = oracle(student_source, SINGLE_LINE)
    outcome = run_infilling(answers, SINGLE_LINE, settings, limit=2, limits=LIMITS)
    for name in ("pass@1", "exact_match", "nearest_length"):
        assert outcome.scores[name].value == 1.0, name
    assert [s["length"] for s in outcome.samples] == [len(item.target) for item in items]
    assert outcome.scores["nfe"].value == len(settings.candidates)  # all were tried


def test_a_length_that_is_not_there_is_not_found(student_source):
    """The least unsure of the others is taken then, nearest or not."""
    settings = InfillSettings(length="search", candidates=(3, 200))
    answers = oracle(student_source, SINGLE_LINE)
    outcome = run_infilling(answers, SINGLE_LINE, settings, limit=1, limits=LIMITS)
    assert {sample["length"] for sample in outcome.samples} == {3}
    assert outcome.scores["exact_match"].value == 0.0
    expected = [len(s["target"]) - 3 < 200 - len(s["target"]) for s in outcome.samples]
    assert [s["metrics"]["nearest_length"] for s in outcome.samples] == expected


def test_surest():
    def made(confidence):
        return Generation("", [], 0, "stop", 1, confidence)

    assert surest([made(-2.0), made(-0.5), made(-1.0)]) == 1
    assert surest([made(-1.0), made(-1.0)]) == 0
    assert surest([made(math.nan)]) == 0


@pytest.mark.parametrize(
    ("length", "true", "expected"),
    [(4, 4, True), (8, 6, True), (4, 6, True), (8, 5, False), (4, 5, True), (16, 90, True)],
)
def test_nearest(length, true, expected):
    assert is_nearest(length, true, (2, 4, 8, 16)) is expected


def test_a_teacher_has_no_nearest_length(ar_source):
    settings = InfillSettings(length="search", teacher="fim", candidates=(3,), context=8)
    outcome = run_infilling(opened(ar_source), RANDOM_SPAN, settings, limit=1, limits=LIMITS)
    assert "nearest_length" not in outcome.scores


# --- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": "serch"}, "unknown length mode 'serch'; did you mean 'search'"),
        ({"boundary": "tokens"}, "unknown boundary 'tokens'; did you mean 'token'"),
        ({"teacher": "both"}, "unknown teacher mode 'both'"),
        ({"spans_per_problem": 0}, "spans_per_problem must be at least 1; got 0"),
        ({"max_span": 0}, "max_span must be at least 1; got 0"),
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"candidates": ()}, r"candidates must be .*got \[\]"),
        ({"candidates": (4, 0)}, r"candidates must be .*got \[4, 0\]"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        InfillSettings(**values)


def test_a_search_needs_confidence(student_source):
    answers = oracle(student_source, SINGLE_LINE, remasking="random")
    with pytest.raises(ConfigError, match=r"only remasking=low_confidence.*got remasking=random"):
        run_infilling(answers, SINGLE_LINE, InfillSettings(length="search"), limits=LIMITS)


def test_a_left_side_does_not_tell_where_a_span_ends(ar_source):
    with pytest.raises(ConfigError, match="cannot know where a random span ends"):
        run_infilling(
            opened(ar_source), RANDOM_SPAN, InfillSettings(length="search"), limits=LIMITS
        )


@pytest.mark.parametrize(
    ("task", "limit", "message"),
    [
        ("infill_line", None, "unknown infilling task 'infill_line'; did you mean"),
        (SINGLE_LINE, 0, "limit must be at least 1; got 0"),
    ],
)
def test_unknown_task_and_limit(student_source, task, limit, message):
    with pytest.raises(ConfigError, match=message):
        run_infilling(opened(student_source), task, InfillSettings(), limit=limit, limits=LIMITS)
