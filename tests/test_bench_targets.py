"""`mdm bench targets`: its distances are the definitions, its counts those of the model, no time."""

import dataclasses
import json
import math
import sysconfig
from pathlib import Path

import oracles
import pytest
import tiny
import tiny_run
import torch
from click.testing import CliRunner

from mdm.benchmarks import target_texts
from mdm.benchmarks import targets as bench
from mdm.benchmarks import targets_report as report
from mdm.benchmarks.command import bench as command
from mdm.checkpoint import SETTINGS_FILE, save_denoiser, weights_hash
from mdm.convert import StudentSettings, convert
from mdm.errors import ConfigError, DataError
from mdm.train.code_files import library_files
from mdm.train.documents import Document
from mdm.train.targets import SoftTargets, TargetSettings
from mdm.train.teachers.kinds import answer
from mdm.vocab import read_vocab

SETTINGS = bench.TargetsBench(
    teacher="ar",
    student=None,
    text="stdlib",
    rows=3,
    context=5,
    block=6,
    levels=(0.3, 0.7),
    fills=(2, 3),
    candidates=4,
    prune=1e-3,
    draws=2,
    reference="adaptive",
    reference_fills=8,
    dtype="fp32",
    seed=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher and a student of it."""
    place = tmp_path_factory.mktemp("bench")
    tiny_run.ar_folder(place / "ar")
    save_denoiser(convert(StudentSettings(init=str(place / "ar"))), place / "student")
    return place


@pytest.fixture(scope="module")
def settings(folder):
    return dataclasses.replace(
        SETTINGS, teacher=str(folder / "ar"), student=str(folder / "student")
    )


@pytest.fixture(scope="module")
def record(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "targets.jsonl"
    found = bench.run(settings, path)
    assert json.loads(path.read_text())["kind"] == "bench targets"
    return found


def toy_group(vocab_size=5, settings=SETTINGS, **changes):
    """(teacher, next log-probabilities, settings, first group) of an enumerable teacher."""
    model = tiny.toy_ar(vocab_size)
    teacher = bench.CountingTeacher.of(tiny_run.ar_teacher(model))
    settings = dataclasses.replace(
        settings, rows=1, context=2, block=4, levels=(0.5,), candidates=vocab_size, **changes
    )
    x0_BL = torch.tensor([[0, 3, 1, 4, 2, 2]])
    found = list(bench.groups(teacher, x0_BL, settings))
    return teacher, tiny.next_log_probs(model), settings, found


# --- groups and references --------------------------------------------------------------------------


def test_groups_are_the_masks_with_and_without_a_right_side(settings):
    teacher = bench.CountingTeacher.of(tiny_run.ar_teacher(tiny.toy_ar(7)))
    x0_BL = torch.arange(33).reshape(3, 11) % 7
    found = list(bench.groups(teacher, x0_BL, settings))
    for masks in (2, 4):
        own = {group.where: group for group in found if group.masks == masks}
        seen = {}
        for where, group in own.items():
            question = group.question
            rows = group.row_N.unique().tolist()
            assert group.num_rows == len(rows) == len(question.x0_BL)
            assert question.masked_BL.sum(1).tolist() == [masks] * len(rows)
            assert not question.masked_BL[:, : settings.context].any()
            assert torch.equal(question.x0_BL, x0_BL[group.row_N.unique()])
            assert len(group.row_N) == int(question.wanted_BL.sum()) == len(group.left_NV)
            for place, row in enumerate(rows):
                assert question.wanted_BL[place].any()
                assert (group.row_N == row).sum() == question.wanted_BL[place].sum()
                masked_L = question.masked_BL[place].tolist()
                for position in question.wanted_BL[place].nonzero()[:, 0].tolist():
                    followed = not all(masked_L[position:])
                    assert followed == (where == "hole")
                    seen[row, position] = masked_L
        assert len(seen) == masks * settings.rows  # every mask is asked for once
    shown = {
        (g.masks, row): g.question.masked_BL[i]
        for g in found
        for i, row in enumerate(g.row_N.unique().tolist())
    }
    assert all((shown[4, row] | ~shown[2, row]).all() for row in range(3))  # more noise, more masks


def test_random_numbers_differ_between_draws_rows_halves_and_levels(settings):
    group, *_ = toy_group()[3]
    keys = [bench.with_draw(group.question, draw).keys for draw in (-1, -2, 0, 1)]
    x0_BL, masked_BL = group.question.x0_BL.repeat(2, 1), group.question.masked_BL.repeat(2, 1)
    for masks, row in ((2, 0), (2, 1), (3, 0)):
        own = bench.question_of(x0_BL, masked_BL, masked_BL, (0, masks), [row])
        keys.append(bench.with_draw(own, 0).keys)
    assert keys[2] == keys[4]  # the same row, level and draw
    assert len(set(keys)) == 6
    assert not torch.equal(*group.halves)


@pytest.mark.parametrize("reference", ["adaptive", "importance"])
def test_a_large_reference_is_the_truth_and_knows_its_error(reference):
    _, next_log_probs, _, found = toy_group(reference_fills=4000, reference=reference)
    for group in found:
        question = group.question
        masked = question.masked_BL[0].nonzero()[:, 0].tolist()
        wanted = question.wanted_BL[0].nonzero()[:, 0].tolist()
        truth = [
            oracles.posterior_marginal(
                next_log_probs, question.x0_BL[0].tolist(), masked, i, 5, start=1
            )
            for i in wanted
        ]
        mean_NV = (group.halves[0] + group.halves[1]) / 2
        torch.testing.assert_close(mean_NV, torch.stack(truth), atol=0.04, rtol=0)
        line = bench.reference_line(group)
        assert line["floor"] == pytest.approx(
            float((group.halves[0] - group.halves[1]).abs().sum()) / 4 / len(wanted)
        )
        assert line["entropy"] == pytest.approx(
            float(-(mean_NV * mean_NV.log()).sum()) / len(wanted)
        )
        assert math.isnan(line["floor_std_err"])  # one row
        left = [oracles.left_only(next_log_probs, question.x0_BL[0].tolist(), i) for i in wanted]
        torch.testing.assert_close(group.left_NV, torch.stack(left), atol=1e-6, rtol=0)


def test_the_adaptive_reference_does_not_put_the_text_among_its_fills():
    """With one fill in a half the text would be the answer every time."""
    found = set()
    for seed in range(4):
        group = toy_group(fills=(1,), reference_fills=2, seed=seed)[3][0]
        text_N = group.question.x0_BL[group.question.wanted_BL]
        for half_NV in group.halves:
            assert half_NV.max(1).values.tolist() == pytest.approx([1.0] * len(text_N))
            found.add(bool((half_NV.argmax(1) == text_N).all()))
    assert False in found


# --- distances --------------------------------------------------------------------------------------


def toy_distributions(*shape):
    random = torch.Generator().manual_seed(0)
    return torch.rand(*shape, dtype=torch.float64, generator=random).softmax(-1)


def test_distances_follow_their_definitions():
    e_V, a_V, b_V, left_V = toy_distributions(4, 6)
    e_V[2] = 0
    e_V /= e_V.sum()
    group = toy_group()[3][0]
    group = dataclasses.replace(group, left_NV=left_V[None], halves=(a_V[None], b_V[None]))
    found = {name: float(value_N) for name, value_N in bench.distances(e_V[None], group).items()}
    q_V = (a_V + b_V) / 2
    assert found["tv"] == pytest.approx(float((e_V - q_V).clamp(min=0).sum()))
    assert found["kl"] == pytest.approx(
        float((q_V * (q_V / (0.99 * e_V + 0.01 * left_V)).log()).sum())
    )
    assert found["squared"] == pytest.approx(float(((e_V - a_V) * (e_V - b_V)).sum()))
    assert found["lean"] == pytest.approx(float(e_V @ q_V - a_V @ b_V))
    assert tuple(found) == bench.DISTANCES


def test_squared_and_lean_are_free_of_the_references_noise():
    """Halves with independent noise of mean 0: both come out as with the truth itself."""
    q_V, e_V = toy_distributions(2, 6)
    random = torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(2, 20000, 6, dtype=torch.float64, generator=random)
    group = dataclasses.replace(
        toy_group()[3][0], left_NV=q_V[None], halves=(q_V + noise[0], q_V + noise[1])
    )
    found = {name: float(value_N.mean()) for name, value_N in bench.distances(e_V, group).items()}
    assert found["squared"] == pytest.approx(float((e_V - q_V).square().sum()), abs=1e-3)
    assert found["lean"] == pytest.approx(float((e_V - q_V) @ q_V), abs=1e-3)


def test_hard_targets_lean_nowhere_over_the_teachers_own_texts():
    """Σ over texts of P(text) · lean = 0 for hard, not for left-only, when q is exact."""
    model = tiny.toy_ar(3)
    teacher = bench.CountingTeacher.of(tiny_run.ar_teacher(model))
    settings = dataclasses.replace(
        SETTINGS, rows=1, context=1, block=4, levels=(0.5,), candidates=3, reference_fills=6
    )
    next_log_probs = tiny.next_log_probs(model)
    masked = next(bench.groups(teacher, torch.zeros(1, 5).long(), settings)).question.masked_BL
    holes = masked[0].nonzero()[:, 0].tolist()
    total = {"hard": 0.0, "left": 0.0}
    for tail in oracles.enumerate_sequences(3, 4).tolist():
        x_L = [0, *tail]
        share = math.exp(oracles.ar_log_prob(next_log_probs, x_L, 1, 5))
        group = next(bench.groups(teacher, torch.tensor([x_L]), settings))
        position = int(group.question.wanted_BL[0].nonzero()[0, 0])
        q_V = oracles.posterior_marginal(next_log_probs, x_L, holes, position, 3, start=1)
        group = dataclasses.replace(group, halves=(q_V.expand(len(group.row_N), -1),) * 2)
        for estimator in bench.estimators(settings, with_student=False)[:2]:
            found = bench.turn(teacher, None, group, bench.with_draw(group.question, 0), estimator)
            total[estimator.name] += share * float(found.distances["lean"][0])
    assert total["hard"] == pytest.approx(0, abs=1e-9)
    assert abs(total["left"]) > 1e-3


def test_a_tail_is_shared_as_left_only_has_it():
    left_NV = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2, dtype=torch.float64)
    targets = SoftTargets(
        torch.tensor([[2, 0], [1, 1]]),
        torch.tensor([[0.5, 0.1], [0.7, 0.0]]).log(),
        torch.tensor([0.4, 0.3]),
        1.0,
        "test",
    )
    found_NV = bench.dense(targets, left_NV)
    expected_NV = torch.tensor([[0.1, 0.3, 0.5, 0.1], [1.2 / 7, 0.7, 0.6 / 7, 0.3 / 7]]).double()
    torch.testing.assert_close(found_NV, expected_NV, atol=1e-6, rtol=0)


def test_cut_left_only_targets_are_whole_again(settings):
    group = toy_group()[3][0]
    teacher = tiny_run.ar_teacher(tiny.toy_ar(5))
    cut = TargetSettings(top_k=2, window=0)
    found = bench.dense(
        answer(teacher, group.question, settings=cut, temperature=1.0), group.left_NV
    )
    torch.testing.assert_close(found, group.left_NV, atol=1e-6, rtol=0)


def test_errors_are_clustered_by_row():
    """All positions of a row alike: the error is that of the rows, however many positions there are."""
    rows = [1.0, 4.0, 2.5, 0.5]
    error = torch.tensor(rows).std().item() / 2
    row_N = torch.arange(4).repeat_interleave(5)
    found = bench.clustered(torch.tensor(rows).repeat_interleave(5), row_N)
    assert found == pytest.approx((2.0, error))
    assert bench.clustered(torch.tensor(rows), torch.tensor([7, 3, 9, 1])) == pytest.approx(
        (2.0, error)
    )
    mean, nothing = bench.clustered(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    assert mean == 2
    assert math.isnan(nothing)


# --- costs ------------------------------------------------------------------------------------------


def test_the_teacher_counts_what_it_reads():
    teacher, _, _, found = toy_group()
    group = next(group for group in found if group.where == "hole")
    question = bench.with_draw(group.question, 0)
    teacher.take()
    answer(teacher, question, settings=TargetSettings(window=0), temperature=1.0)
    wanted = len(group.row_N)
    assert teacher.take() == {"tokens": 6, "fed": 6, "heads": wanted, "forwards": 1}
    assert teacher.take() == dict.fromkeys(bench.COUNTS, 0)
    scored = TargetSettings("suffix", window=0, candidates=5)
    answer(teacher, question, settings=scored, temperature=1.0)
    end = int((~question.masked_BL[0]).nonzero()[-1])
    read = sum(4 * (end - i) for i in question.wanted_BL[0].nonzero()[:, 0].tolist())
    counts = teacher.take()
    assert counts["tokens"] == 6 + read  # 4 branches a position; the text's own token has none
    assert counts["fed"] == counts["tokens"]  # one row has no padding


def test_costs_are_those_of_one_target():
    group = toy_group()[3][0]
    value_N = torch.arange(float(len(group.row_N)))
    turns = [
        bench.Turn(
            seconds,
            dict.fromkeys(bench.COUNTS, 12),
            dict.fromkeys(bench.DISTANCES, value_N + shift),
            {"ess": value_N + shift},
        )
        for seconds, shift in ((1.0, 0.0), (3.0, 1.0))
    ]
    line = bench.line_of(group, bench.Estimator("smc", 2, None), turns)
    count = len(group.row_N)
    assert line["ms"] == pytest.approx(2000 / count)
    assert line["ms_std_err"] == pytest.approx(1000 / count)
    assert {line[name] for name in bench.COUNTS} == {12 / count}
    assert line["tv"] == line["ess"] == pytest.approx(float(value_N.mean()) + 0.5)
    assert line["fell_back"] is None


def test_padding_is_counted_apart(settings):
    teacher = bench.CountingTeacher.of(tiny_run.ar_teacher(tiny.toy_ar(7)))
    x0_BL = torch.arange(33).reshape(3, 11) % 7
    for group in bench.groups(teacher, x0_BL, settings):
        if group.where == "hole" and len(group.row_N) > group.num_rows:
            teacher.take()
            scored = TargetSettings("suffix", window=0, candidates=5)
            answer(teacher, group.question, settings=scored, temperature=1.0)
            counts = teacher.take()
            assert x0_BL[group.row_N.unique()].numel() < counts["tokens"] < counts["fed"]
            return
    pytest.fail("no group with rows of different lengths")


# --- the record -------------------------------------------------------------------------------------


def test_the_record_has_a_line_for_each_estimator(record, settings):
    results = record["results"]
    names = ["hard", "left", "suffix", "suffix_pruned"]
    filled = [(name, fills) for name in bench.FILLED for fills in (2, 3)]
    wanted = [(name, None) for name in names] + filled
    assert {"mc_literal", "importance", "smc", "i_sir", "csmc", "student"} <= set(bench.FILLED)
    for reference, lines in report.sections(results):
        assert [(line["estimator"], line["fills"]) for line in lines] == wanted
        for line in lines:
            assert line["n"] == reference["n"] > 0
            assert line["draws"] == 2
            assert line["rows"] == reference["rows"]
            assert 0 <= line["tv"] <= 1 + 1e-6
            assert line["kl"] >= -1e-9
            assert line["heads"] <= line["n"] * 1000
            if line["estimator"] == "hard":
                assert line["ms"] == line["tokens"] == line["forwards"] == 0
            else:
                assert line["ms"] > 0
                assert line["fed"] >= line["tokens"] > 0
            if line["fills"]:
                assert line["ess"] is None or 1 <= line["ess"] <= line["fills"] + 1e-6
            else:
                assert line["ess"] is None
            assert (line["dropped"] is not None) == (line["estimator"] == "suffix_pruned")
    assert {reference["where"] for reference in results["references"]} == {"hole", "tail"}
    total = sum(reference["n"] for reference in results["references"])
    assert total == settings.rows * (2 + 4)
    assert record["checkpoint"] == weights_hash(settings.student)


def test_without_a_student_its_lines_are_left_out_and_the_card_says_so(record, settings):
    lines = bench.estimators(settings, with_student=False)
    assert not any("student" in estimator.name for estimator in lines)
    assert len(lines) == 4 + 6 * 2
    without = {**record, "settings": {**record["settings"], "student": None}}
    assert "student: left out" in report.describe(without)
    assert settings.student in report.describe(record)


def test_the_front_is_what_nothing_beats():
    def line(name, ms, tv):
        return {"level": 0.5, "masks": 3, "where": "hole", "estimator": name, "fills": None,
                "ms": ms, "tv": tv}  # fmt: skip

    lines = [line("c", 3.0, 0.2), line("slow", 4.0, 0.195), line("a", 0.0, 0.9)]
    lines += [line("b", 3.0, 0.5), line("hardly", 1.0, 0.895)]
    assert [best["estimator"] for best in bench.front(lines)] == ["a", "c"]


def test_card_table_and_picture(record, settings, tmp_path):
    text = report.describe(record)
    assert json.loads(text.splitlines()[-1])["kind"] == "bench targets"
    card = text.splitlines()[:-1]
    assert max(map(len, card)) < 300
    for name in bench.FILLED:
        assert sum(f" {name} 3 " in row for row in card) == len(record["results"]["references"])
    assert sum(row.startswith("*") for row in card) == len(record["results"]["front"])
    table = report.markdown(record)
    rows = [row for row in table.splitlines() if row.startswith("| ")]
    assert len(rows) == len(record["results"]["lines"]) + 2 * len(record["results"]["references"])
    assert len({row.count("|") for row in rows}) == 1
    assert table.count("**") == 2 * len(record["results"]["front"])
    report.plot(record, tmp_path / "targets.png")
    assert (tmp_path / "targets.png").stat().st_size > 1000


def test_numbers_that_are_unknown_stay_out_of_the_table():
    line = dict.fromkeys([key for _, key, _ in report.COLUMNS], 1.0)
    line |= {"ess": None, "tv_std_err": math.nan, "kl_std_err": 0.25}
    cells = dict(zip([name for name, _, _ in report.COLUMNS], report.cells(line), strict=True))
    assert cells["ESS"] == ""
    assert cells["TV"] == "1.000"
    assert cells["KL"] == "1.00 ± 0.25"


# --- texts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocab():
    return read_vocab(tiny.byte_tokenizer())


def test_rows_of_the_standard_library_are_code_from_different_files(vocab):
    found = target_texts.library_rows(vocab, 3, 200, 0)
    assert found.shape == (3, 200)
    assert (found[:, 0] == vocab.start_id).all()
    texts = [vocab.tokenizer.decode(row[1:]) for row in found]
    library = Path(sysconfig.get_path("stdlib"))
    names = library_files(target_texts.MAX_FILE_KIB).names[:20]
    files = [(library / name).read_bytes().decode("utf-8", "replace") for name in names]
    origins = [[name for name, file in zip(names, files, strict=True) if t in file] for t in texts]
    assert all(origins)
    assert len({origin[0] for origin in origins}) == 3
    assert not torch.equal(found, target_texts.library_rows(vocab, 3, 200, 1))
    assert torch.equal(found[:2], target_texts.library_rows(vocab, 2, 200, 0))


def test_a_place_may_be_the_first_or_the_last_of_a_file(vocab, monkeypatch):
    class Two:
        def documents(self, skips):
            return iter(
                [Document("abc", "short"), Document("abcd", "fits"), Document("bcde", "fits")]
            )

    monkeypatch.setattr(target_texts, "open_source", lambda *_: Two())
    found = target_texts.library_rows(vocab, 2, 5, 0)
    assert [bytes(row[1:].tolist()) for row in found] == [b"abcd", b"bcde"]
    firsts = {
        bytes(target_texts.library_rows(vocab, 1, 4, seed)[0, 1:].tolist()) for seed in range(20)
    }
    assert firsts == {b"abc"}
    firsts = {
        bytes(target_texts.library_rows(vocab, 2, 4, seed)[1, 1:].tolist()) for seed in range(20)
    }
    assert firsts == {b"abc", b"bcd"}
    with pytest.raises(DataError, match=r"2 files of 5 tokens or more; 3"):
        target_texts.library_rows(vocab, 3, 5, 0)


def test_humaneval_rows_end_the_prompt_and_begin_the_solution(vocab, settings, monkeypatch):
    problems = {
        "a": {"prompt": "0123456", "canonical_solution": "abcdefgh"},
        "short": {"prompt": "012", "canonical_solution": "abcdefgh"},
        "brief": {"prompt": "0123456", "canonical_solution": "abcde"},
        "b": {"prompt": "9876", "canonical_solution": "ABCDEF"},
    }
    monkeypatch.setattr(target_texts, "human_eval_problems", lambda: problems)
    teacher = tiny_run.ar_teacher(tiny.toy_ar(5))
    two = dataclasses.replace(settings, rows=2)
    found = target_texts.TEXTS["humaneval"](teacher, vocab, two)
    assert [bytes(row[1:].tolist()) for row in found] == [b"3456abcdef", b"9876ABCDEF"]
    assert (found[:, 0] == vocab.start_id).all()
    one = dataclasses.replace(two, context=1)
    found = target_texts.TEXTS["humaneval"](teacher, vocab, one)
    assert bytes(found[0, 1:].tolist()) == b"abcdef"
    with pytest.raises(ConfigError, match="2 problems"):
        target_texts.TEXTS["humaneval"](teacher, vocab, settings)


def test_sampled_blocks_follow_the_teacher(vocab, settings, monkeypatch):
    """Many rows with one context: the frequencies of the block are the teacher's joint."""
    model = tiny.toy_ar(3)
    teacher = tiny_run.ar_teacher(model)
    many = dataclasses.replace(settings, rows=4000, context=2, block=2, seed=3)
    context = torch.tensor([1, 2, 0, 0])
    monkeypatch.setattr(target_texts, "stdlib", lambda *_: context.repeat(4000, 1))
    found = target_texts.TEXTS["teacher"](teacher, vocab, many)
    assert (found[:, :2] == context[:2]).all()
    next_log_probs = tiny.next_log_probs(model)
    for tail in oracles.enumerate_sequences(3, 2).tolist():
        share = math.exp(oracles.ar_log_prob(next_log_probs, [1, 2, *tail], 2, 4))
        seen = float((found[:, 2:] == torch.tensor(tail)).all(1).double().mean())
        assert seen == pytest.approx(share, abs=5 * math.sqrt(share / 4000) + 1e-3)


# --- the command and bad input ----------------------------------------------------------------------


def test_the_command_writes_everything(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["targets", "--teacher", str(folder / "ar"), "--rows", "2", "--context", "4",
                 "--block", "4", "--levels", "0.5", "--fills", "2", "--reference-fills", "4",
                 "--candidates", "2", "--draws", "1", "--table", "all.md", "--plot", "all.png",
                 "--record", "targets.jsonl", "--no-student"]  # fmt: skip
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["settings"]["levels"] == [0.5]
    assert record["settings"]["student"] is None
    assert record == json.loads((tmp_path / "targets.jsonl").read_text())
    assert (tmp_path / "all.md").read_text().startswith("soft targets of")
    assert (tmp_path / "all.png").exists()
    assert "positions" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_the_last_finished_run_is_the_student_if_there_is_one(there, tmp_path, monkeypatch):
    asked = {}

    def run(settings, path, tell):
        asked["student"] = settings.student
        raise DataError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run", run)
    if there:
        (tmp_path / "runs/demo/final").mkdir(parents=True)
        (tmp_path / "runs/demo/final" / SETTINGS_FILE).write_text("{}")
    with pytest.raises(DataError, match="far enough"):
        CliRunner().invoke(command, ["targets"], catch_exceptions=False)
    assert asked["student"] == ("runs/demo/final" if there else None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--levels", "0.5,x"], "0.5,x"),
        (["--fills", "4,0.5"], "whole numbers"),
        (["--student", "a", "--no-student"], "no-student"),
        (["--text", "stlib"], "stdlib"),
        (["--rows", "0"], "rows"),
    ],
)
def test_bad_options_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        CliRunner().invoke(command, ["targets", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"levels": ()}, "levels"),
        ({"levels": (0.05,)}, "0.05"),
        ({"levels": (1.2,)}, "1.2"),
        ({"fills": ()}, "fills"),
        ({"fills": (0, 4)}, "fills"),
        ({"fills": (5,)}, "reference-fills"),
        ({"block": 1}, "block"),
        ({"prune": 0.0}, "prune"),
        ({"dtype": "fp16"}, "fp16"),
        ({"reference": "smsc"}, "smc"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "named"), [({"candidates": 1000}, "1000"), ({"context": 2000}, "2006 tokens")]
)
def test_what_the_teacher_cannot_do_is_refused_before_it_begins(settings, tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        bench.run(dataclasses.replace(settings, **change), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
