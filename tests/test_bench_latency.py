"""`mdm bench latency`: what is counted, who writes the same, the sums. Nothing here measures time."""

import copy
import dataclasses
import json
import math
import statistics
import sys
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from click.testing import CliRunner
from students import random_student
from tiny_serve import byte_student, byte_teacher

from mdm.autoregressive import Autoregressive, log_likelihood
from mdm.benchmarks import latency as bench
from mdm.benchmarks import latency_memory as memory
from mdm.benchmarks import latency_models as opened
from mdm.benchmarks import latency_quality as quality
from mdm.benchmarks import latency_report as report
from mdm.benchmarks import latency_sides as sides
from mdm.benchmarks import latency_table as table
from mdm.benchmarks.catalogue import CATALOGUE
from mdm.benchmarks.latency_batches import batches, crossover
from mdm.benchmarks.latency_command import latency as command
from mdm.benchmarks.latency_plain import plain_text
from mdm.benchmarks.latency_plot import frontier, plot
from mdm.benchmarks.latency_settings import Decoding, LatencyBench
from mdm.buffers import EAGER
from mdm.checkpoint import save_denoiser, weights_hash
from mdm.errors import ConfigError, DataError
from mdm.eval.human_eval_data import human_eval_problems
from mdm.int8 import ENGINE
from mdm.likelihood import Pair
from mdm.record import to_json
from mdm.sampler import denoise, make_canvas

START, END = 256, 257  # of tiny.byte_tokenizer
CPU = torch.device("cpu")
SETTINGS = LatencyBench(
    model="student",
    teacher="ar",
    texts=2,
    repeats=2,
    prompt_length=10,
    gen_length=8,
    tokens_per_step=(1, 2),
    thresholds=(0.5,),
    plain_texts=1,
    holes=3,
    span=4,
    batches=(1, 2),
    batch_length=4,
    contexts=(16, 32, 2**12),
)


@pytest.fixture(scope="module")
def ar(tmp_path_factory):
    return tiny_run.ar_folder(tmp_path_factory.mktemp("ar"))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    save_denoiser(byte_student(block_size=4), folder)
    return str(folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save_denoiser(byte_student(), folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A small matrix to read, and no search for garbage among all that a test session has imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "READ_ROWS", 64)
        patch.setattr(memory.gc, "collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def models():
    return opened.Models.of(byte_student(block_size=4), byte_teacher())


def run_once(folder, model, ar, **changes):
    told = []
    settings = dataclasses.replace(SETTINGS, model=model, teacher=ar, **changes)
    record = bench.run(settings, folder / "latency.jsonl", told.append)
    return record, told


@pytest.fixture(scope="module")
def ran(blocks, ar, tmp_path_factory):
    """(record, what was told, file) of a student with blocks."""
    folder = tmp_path_factory.mktemp("records")
    return *run_once(folder, blocks, ar), folder / "latency.jsonl"


@pytest.fixture(scope="module")
def record(ran):
    return ran[0]


def line_of(record, who, decoding="", mode="eager"):
    (found,) = [
        line
        for line in record["results"]["sides"]
        if (line["who"], line["decoding"], line["mode"]) == (who, decoding, mode)
    ]
    return found


# --- a whole run: counts --------------------------------------------------------------------------


def test_the_sides_in_order(record):
    names = [(line["who"], line["decoding"]) for line in record["results"]["sides"]]
    assert names == [
        ("student", "schedule=1"),
        ("student", "schedule=2"),
        ("student", "threshold=0.5"),
        ("plain", "schedule=1"),
        ("teacher", ""),
        ("teacher_hf", ""),
    ]


@pytest.mark.parametrize(("each", "in_first"), [(1, 2), (2, 1)])
def test_forwards_of_a_student_in_blocks(record, each, in_first):
    """A prompt of 10 ends inside the third block of 4: open are 2, 4 and 2 positions."""
    line = line_of(record, "student", f"schedule={each}")
    assert record["results"]["prompt_tokens"] == [10, 10]
    forwards = 8 // each
    assert line["n"] == 2
    assert line["timed"] == 4  # two texts, twice
    assert line["tokens"] == 4 * 8
    assert line["forwards"] == {
        "prefill": 4 * 1,
        "store": 4 * 2,
        "denoise": 4 * (forwards - 3),
        "refresh": 0,
        "decode": 0,
    }
    assert line["passes"] == 4 * forwards
    assert line["tokens_per_forward"] == each
    assert line["tokens_per_forward_std_err"] == 0
    # 12 up to the end of the first block; later blocks of 4, beside the one that is stored (the last
    # has 2 positions left).
    first, second, third = 12 + 4 * (in_first - 1), 8 + 4 * (4 // each - 1), 6 + 2 * (2 // each - 1)
    assert line["token_forwards"] == 4 * (first + second + third)


def test_forwards_of_the_others(record):
    plain = line_of(record, "plain", "schedule=1")
    assert (plain["n"], plain["timed"], plain["tokens"]) == (1, 2, 16)
    assert plain["forwards"] == dict.fromkeys(sides.KINDS, 0) | {"denoise": 16}
    assert plain["token_forwards"] == 16 * 18  # the whole canvas each time
    for who in ("teacher", "teacher_hf"):
        line = line_of(record, who)
        assert line["forwards"] == dict.fromkeys(sides.KINDS, 0) | {"prefill": 4, "decode": 28}
        assert line["token_forwards"] == 4 * (10 + 7)
        assert line["tokens_per_forward"] == 1
        assert line["tokens"] == 32
    assert line_of(record, "teacher_hf")["texts_differ"] == 0
    assert line_of(record, "teacher_hf")["texts_compared"] == 2
    assert line_of(record, "teacher")["texts_differ"] is None
    assert plain["texts_differ"] is None  # blocks are read otherwise


def test_sums_are_sums(record):
    for line in record["results"]["sides"]:
        assert len(line["latency_s_all"]) == line["timed"]
        assert line["wall_s"] == pytest.approx(sum(line["latency_s_all"]))
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["wall_s"])
        assert line["latency_s"] == pytest.approx(line["wall_s"] / line["timed"])
        assert 0 < line["first_p50_s"] <= line["first_p95_s"] <= line["latency_p95_s"]
        assert line["latency_p50_s"] <= line["latency_p95_s"]
        assert line["forward_s"] == pytest.approx(line["wall_s"] / line["passes"])
        assert line["times_floor"] == pytest.approx(line["forward_s"] / line["floor_s"])
        assert line["peak_bytes"] == line["weight_bytes"] + line["growth_bytes"]


def test_what_the_record_says(record, blocks, ar):
    results = record["results"]
    assert record["kind"] == "bench latency"
    assert results["metrics"] == bench.METRICS
    assert results["shared_vocabulary"] is True
    assert record["checkpoint"] == results["models"]["student"]["weights"] == weights_hash(blocks)
    assert results["models"]["teacher"]["weights"] == weights_hash(ar)
    assert results["models"]["student"]["block_size"] == 4
    assert record["device"]["threads"] == 1
    assert record["settings"]["block_length"] is None
    assert set(bench.DEFINITIONS) == set(results["definitions"])
    assert results["left_out"] == []
    assert results["overhead"] is None
    student = results["models"]["student"]
    assert results["sides"][0]["floor_s"] == student["read_bytes"] / results["bytes_per_s"]


def test_every_line_is_told_as_it_comes(ran):
    told = ran[1]
    assert sum("repeat" in text for text in told) == 2 * 2 * 5 + 2 * 1
    assert any(
        "text 2 of 2: student schedule=2 eager: 8 tokens" in text and "4 forwards" in text
        for text in told
    )


def test_who_is_compared_with_whom(record):
    found = [(one["decoding"], one["against"], one["n"]) for one in record["results"]["ratios"]]
    assert found == [
        ("schedule=1", "plain", 1),
        ("schedule=1", "teacher", 2),
        ("schedule=1", "teacher_hf", 2),
        ("schedule=2", "teacher", 2),
        ("schedule=2", "teacher_hf", 2),
        ("threshold=0.5", "teacher", 2),
        ("threshold=0.5", "teacher_hf", 2),
    ]
    against_teacher = record["results"]["ratios"][1]
    ours, theirs = line_of(record, "student", "schedule=1"), line_of(record, "teacher")
    assert against_teacher["ratio"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])


def test_quality_of_every_decoding(record):
    found = record["results"]["quality"]
    assert [line["decoding"] for line in found["texts"]] == [
        "schedule=1",
        "schedule=2",
        "threshold=0.5",
        "",
    ]
    assert found["texts"][0]["minus_reference"] == 0
    teacher, first = found["texts"][-1], found["texts"][0]
    assert teacher["log_likelihood"] > first["log_likelihood"]  # its own greedy text
    assert teacher["minus_reference"] == pytest.approx(
        teacher["log_likelihood"] - first["log_likelihood"]
    )
    lines = found["infilling"]["lines"]
    assert [line["decoding"] for line in lines] == ["schedule=1", "schedule=2", "threshold=0.5"]
    assert all(line["n"] == 3 for line in lines)
    assert lines[0]["tokens_per_forward"] == 1
    assert 1 < lines[1]["tokens_per_forward"] <= 2  # a hole may lie in two blocks


def test_batches_of_both_sides(record):
    found = record["results"]["batches"]
    assert found["decoding"] == "schedule=2"
    assert [(line["batch"], line["who"]) for line in found["lines"]] == [
        (1, "student"),
        (1, "teacher"),
        (2, "student"),
        (2, "teacher"),
    ]
    for line in found["lines"]:
        assert line["tokens"] == 2 * 4 * line["batch"]  # repeats, new tokens, rows
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["wall_s"])
        assert line["tokens_per_forward"] == (2 if line["who"] == "student" else 1)
        assert line["passes"] == 2 * (2 if line["who"] == "student" else 4)
    assert [one["mode"] for one in found["crossovers"]] == ["eager"]


def test_memory_against_context(record):
    found = record["results"]["contexts"]
    assert [(line["context"], line["who"]) for line in found["lines"]] == [
        (16, "student"),
        (16, "teacher"),
        (32, "student"),
        (32, "teacher"),
    ]
    assert found["left_out"] == [2**12]
    for line in found["lines"]:
        # keys and values, 2 layers, 2 heads of 8 (hidden 32 in 4 heads; the teacher: 4), float32
        width = 2 * 8 if line["who"] == "student" else 2 * 4
        assert line["kept_bytes"] == 2 * 2 * width * 4 * (line["context"] + memory.NEW_TOKENS)
        assert line["growth_bytes"] >= 0


# --- other runs -----------------------------------------------------------------------------------


def test_a_student_without_blocks_writes_what_the_published_loop_writes(full, ar, tmp_path):
    record, _ = run_once(
        tmp_path, full, ar, tokens_per_step=(2,), thresholds=(), batches=(), contexts=(16,), holes=0,
        repeats=1, plain_texts=2,
    )  # fmt: skip
    results = record["results"]
    plain = line_of(record, "plain", "schedule=2")
    assert (plain["texts_compared"], plain["texts_differ"]) == (2, 0)
    student = line_of(record, "student", "schedule=2")
    assert student["forwards"] == dict.fromkeys(sides.KINDS, 0) | {"denoise": 8}
    assert student["token_forwards"] == 8 * 18
    assert record["settings"]["block_length"] == 32
    assert results["batches"] is None
    assert results["quality"]["infilling"] is None
    assert results["quality"]["reference"] == "schedule=2"  # there is no schedule=1
    assert results["contexts"]["lines"][0]["kept_bytes"] == 0  # it keeps nothing
    assert results["contexts"]["lines"][1]["kept_bytes"] > 0
    page = report.page(record)
    assert "only its time" not in page


def test_an_approximate_cache_is_timed_and_its_drift_is_told(full, ar, tmp_path):
    record, _ = run_once(
        tmp_path, full, ar, tokens_per_step=(1,), thresholds=(), batches=(), contexts=(16,), holes=0,
        repeats=1, cache="prefix", block_length=4, quality=False,
    )  # fmt: skip
    line = line_of(record, "student", "schedule=1")
    assert line["forwards"]["refresh"] > 0
    assert line["token_forwards"] < line_of(record, "plain", "schedule=1")["token_forwards"] * 2
    assert record["results"]["quality"] is None
    assert record["results"]["contexts"]["lines"][0]["kept_bytes"] > 0


def test_random_weights_of_the_teacher(blocks, ar, tmp_path):
    record, _ = run_once(
        tmp_path, blocks, ar, tokens_per_step=(4,), thresholds=(), batches=(), contexts=(),
        texts=1, repeats=1, random_teacher=True, quality=False, plain_texts=0,
    )  # fmt: skip
    teacher = record["results"]["models"]["teacher"]
    assert teacher["weights"] == "random"
    assert teacher["parameters"] > 0
    assert [line["who"] for line in record["results"]["sides"]] == [
        "student",
        "teacher",
        "teacher_hf",
    ]
    assert record["results"]["contexts"] is None
    assert "random weights" in report.page(record)
    again, _ = opened.random_ar(ar, torch.float32, 0)
    other, _ = opened.random_ar(ar, torch.float32, 1)
    same, _ = opened.random_ar(ar, torch.float32, 0)
    one, two, three = (model.state_dict()["lm_head.weight"] for model in (again, same, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_an_interrupted_run_keeps_nothing(blocks, ar, tmp_path):
    settings = dataclasses.replace(SETTINGS, model=blocks, teacher=ar, gen_length=2)

    def note(text):
        if "text 1" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(settings, tmp_path / "latency.jsonl", note)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_given_back(monkeypatch, tmp_path):
    threads = []

    def loading(settings):
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "open_models", loading)
    with pytest.raises(KeyboardInterrupt):
        bench.run(dataclasses.replace(SETTINGS, threads=2), tmp_path / "latency.jsonl")
    assert threads == [2]
    assert torch.get_num_threads() == 1


def refuse(*modes):
    """A stand-in for mdm.acceleration that cannot do these modes, and marks what it has done."""

    def accelerate(model, mode):
        if mode in modes:
            raise ConfigError(f"{mode} needs a GPU")

    return SimpleNamespace(accelerate=accelerate)


def test_a_mode_that_cannot_be_is_told(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdm.acceleration", refuse("graphs"))
    settings = dataclasses.replace(SETTINGS, modes=("eager", "graphs", "compile"), plain_texts=0)
    told = []
    opened_ = bench.open_sides(settings, models, told.append)
    found = opened_.sides
    assert opened_.left_out == [
        {"who": who, "mode": "graphs", "reason": "graphs needs a GPU"}
        for who in ("student", "teacher")
    ]
    assert len(told) == 2
    modes = {
        who: [side.mode for side in found if side.who == who] for who in ("student", "teacher")
    }
    assert modes == {"student": ["eager"] * 3 + ["compile"] * 3, "teacher": ["eager", "compile"]}
    assert [(a.mode, b.mode) for a, b in bench.chosen_pairs(settings, found)] == [
        ("eager", "eager"),
        ("compile", "compile"),
    ]
    assert {a.decoding for a, _ in bench.chosen_pairs(settings, found)} == {"schedule=2"}


def test_no_mode_at_all_is_an_error(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdm.acceleration", refuse("graphs", "compile"))
    settings = dataclasses.replace(SETTINGS, modes=("graphs",))
    with pytest.raises(ConfigError, match=r"student can be run in no --mode .*graphs needs a GPU"):
        bench.open_sides(settings, models, lambda text: None)


def test_a_mode_leaves_the_eager_model_as_it_is(models):
    for model in (models.student, models.teacher):
        fast = opened.in_mode(model, "compile")
        assert fast is not model
        assert fast.runner is not EAGER
        assert model.runner is EAGER
        assert fast.model is model.model
        assert opened.fallbacks(model) == {}
        fast.runner.body.__self__.reasons["too long"] += 3
        assert opened.fallbacks(fast) == {"too long": 3}


def test_what_was_run_eagerly_after_all_is_told(models, record):
    fast = opened.in_mode(models.student, "compile")
    fast.runner.body.__self__.reasons["too long"] += 3
    readers = [("student", "eager", models.student), ("student", "compile", fast)]
    found = bench.Opened([], [], readers).fallbacks()
    assert found == [{"who": "student", "mode": "compile", "reason": "too long", "forwards": 3}]
    changed = json.loads(to_json(record))
    assert changed["results"]["fallbacks"] == []
    changed["results"]["fallbacks"] = found
    assert "Run eagerly in student compile: 3 forwards (too long)" in report.page(changed)


def test_what_no_mode_would_change_is_refused(models):
    student = byte_student()
    with pytest.raises(ConfigError, match="a student without blocks keeps none; give it a --cache"):
        opened.in_mode(student, "compile")
    assert opened.in_mode(student, "compile", cache="dual").runner is not EAGER
    strange = copy.copy(models.teacher)
    strange.plain_head = False
    with pytest.raises(ConfigError, match="more than a projection"):
        opened.in_mode(strange, "compile")


def test_eager_asks_for_no_acceleration(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdm.acceleration", None)  # importing it would fail
    assert opened.in_mode(models.student, "eager") is models.student


# --- the sides ------------------------------------------------------------------------------------

WORDS = [12, 3, 5, 7]  # start, words


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("length", "block", "each"), [(12, 4, 1), (11, 4, 3), (9, 32, 2)])
def test_the_published_loop_is_mdms_sampler_without_a_cache(shift, length, block, each):
    student = random_student(shift=shift, layers=2)
    decoding = Decoding("schedule", each)
    settings = decoding.sampler(suppress_eos=True, block_length=block)
    canvas = make_canvas(
        student, [*WORDS, *[student.mask_id] * length], settings, tokens_per_step=each
    )
    commits = [step.commits[0] for step in denoise(student, [canvas])]
    never = torch.tensor([*student.never_sampled.tolist(), student.vocab.eos_id])
    row, kept = plain_text(
        student.model, WORDS, length=length, tokens_per_step=each, mask_id=student.mask_id,
        never=never, shift=shift, block_length=block,
    )  # fmt: skip
    assert row == canvas.ids_L[len(WORDS) :].tolist()
    assert [sorted(chosen_k.tolist()) for chosen_k in kept] == [
        sorted(commit.positions_k.tolist()) for commit in commits
    ]
    assert student.mask_id not in row


def test_two_steps_of_the_published_loop_warm_up():
    student = random_student()
    side = sides.plain_side(student, Decoding("schedule", 2), suppress_eos=False, block_length=32)
    found = side.warm_up([WORDS], 12)
    assert found.passes == 2
    assert found.token_forwards == 2 * 16
    assert found.rows[0].count(student.mask_id) == 12 - 4
    assert 0 < found.first_s <= found.wall_s


def test_the_published_loop_ends_no_text_if_nobody_may():
    rows = {}
    for seed in range(9):
        student = random_student(seed=seed)
        for suppress in (False, True):
            side = sides.plain_side(
                student, Decoding("schedule", 1), suppress_eos=suppress, block_length=32
            )
            rows[seed, suppress] = side.write([WORDS], 16).rows[0]
    end = student.vocab.eos_id
    assert any(end in row for (_, suppress), row in rows.items() if not suppress)
    assert not any(end in row for (_, suppress), row in rows.items() if suppress)


def test_generate_writes_what_mdms_loop_writes(models):
    prompt = [START, *b"def add(a, b):"]
    for suppress in (True, False):
        mine = sides.teacher_side(models.teacher, suppress_eos=suppress).write([prompt], 24)
        theirs = sides.hf_side(models.teacher, suppress_eos=suppress).write([prompt], 24)
        assert mine.rows == theirs.rows
        assert mine.forwards == theirs.forwards
        assert mine.token_forwards == theirs.token_forwards
        assert mine.passes == theirs.passes


def test_both_loops_end_at_the_same_end_token(models):
    prompt = [START, *b"def add(a, b):"]
    free = sides.teacher_side(models.teacher, suppress_eos=True).write([prompt], 24).rows[0]
    end = free[5]
    before = free.index(end)
    ar = Autoregressive(models.teacher.model, models.teacher.vocab, more_ends=[end])
    for make in (sides.teacher_side, sides.hf_side):
        side = make(ar, suppress_eos=False)
        natural = side.write([prompt], 24)
        assert natural.rows[0] == free[: before + 1]
        assert side.visible(natural.rows[0]) == free[:before]
        assert natural.passes == before + 1
        held = make(ar, suppress_eos=True)
        suppressed = held.write([prompt], 24).rows[0]
        assert len(suppressed) == len(held.visible(suppressed)) == 24  # end not in it


def test_what_a_checkpoint_says_of_generation_is_put_aside(models):
    """A penalty of its own would make another text and take time of its own."""
    network, prompt = models.teacher.model, [START, 97, 98]
    side = sides.hf_side(models.teacher, suppress_eos=True)
    expected = side.write([prompt], 12).rows
    own = network.generation_config
    own.repetition_penalty = 9.0
    try:
        assert side.write([prompt], 12).rows == expected
        assert network.generation_config is own
    finally:
        own.repetition_penalty = None
    assert not network._forward_pre_hooks  # those that counted are gone


def test_rows_of_a_batch_are_counted_one_by_one(models):
    prompts = [[START, *b"abc"], [START, *b"abcdefg"]]
    found = sides.teacher_side(models.teacher, suppress_eos=True).write(prompts, 5)
    assert found.forwards == dict.fromkeys(sides.KINDS, 0) | {"prefill": 2, "decode": 8}
    assert found.passes == 5
    assert found.token_forwards == 4 + 8 + 8  # no padding
    alone = [
        sides.teacher_side(models.teacher, suppress_eos=True).write([prompt], 5).rows[0]
        for prompt in prompts
    ]
    assert found.rows == alone
    decoding = Decoding("schedule", 2)
    student = sides.student_side(models.student, decoding, decoding.sampler(suppress_eos=True))
    found = student.write(prompts, 8)  # blocks of 4: both begin with a whole one
    assert found.forwards == dict.fromkeys(sides.KINDS, 0) | {
        "prefill": 2,
        "store": 2,
        "denoise": 4,
    }
    assert found.passes == 4
    assert found.token_forwards == (8 + 4 + 8 + 4) + (12 + 4 + 8 + 4)
    assert found.rows == [student.write([prompt], 8).rows[0] for prompt in prompts]


def test_the_first_token_counts_from_where_there_is_no_gap(models, monkeypatch):
    """The clock counts its readings: the begin, a step each, the end."""
    ticks = iter(range(100))
    monkeypatch.setattr(sides.time, "perf_counter", lambda: float(next(ticks)))
    decoding = Decoding("schedule", 1)
    side = sides.student_side(models.student, decoding, decoding.sampler(suppress_eos=True))
    prompt = [START, *b"abc"]
    canvas = make_canvas(
        models.student,
        [*prompt, *[models.student.mask_id] * 8],
        decoding.sampler(suppress_eos=True),
        key=("latency", 0),
    )
    for _ in denoise(models.student, [canvas]):
        pass
    found = side.write([prompt], 8)
    assert found.first_s == 1 + int(canvas.decided_L[4])
    assert found.wall_s == 9


@pytest.mark.parametrize(
    ("make", "first_s"),
    [
        (sides.teacher_side, 1),  # once the first step is there
        (sides.hf_side, 2),  # when the second forward begins
    ],
)
def test_the_first_token_of_the_teacher_is_that_of_its_first_forward(
    models, monkeypatch, make, first_s
):
    side = make(models.teacher, suppress_eos=True)
    side.write([[START, *b"abc"]], 2)  # imports and the like read the clock, too
    ticks = iter(range(100))
    monkeypatch.setattr(sides, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    found = side.write([[START, *b"abc"]], 5)
    assert (found.first_s, found.wall_s, found.passes) == (first_s, 6, 5)


@pytest.mark.parametrize(
    ("ends", "shared"), [("natural", True), ("natural", False), ("suppressed", True)]
)
def test_texts_that_may_end_end_alike_for_all(models, ends, shared):
    ar = Autoregressive(models.teacher.model, models.teacher.vocab, more_ends=[65])
    own = dataclasses.replace(models, teacher=ar, shared=shared)
    settings = dataclasses.replace(SETTINGS, ends=ends)
    found = bench.open_sides(settings, own, lambda text: None).sides
    for side in found:
        alike = ends == "natural" and shared
        knows = alike or side.who in ("teacher", "teacher_hf")
        assert side.ends == frozenset([END, 65] if knows else [END])


def test_a_kind_without_a_column_is_noticed():
    with pytest.raises(AssertionError, match="thinking"):
        sides.counted(iter(["prefill", "thinking"]))


def test_ends_are_those_of_the_side():
    assert sides.before_end([5, 6, 7], {7, 9}) == [5, 6]
    assert sides.before_end([7, 6], {7}) == []
    assert sides.before_end([5, 6], {7}) == [5, 6]


# --- turns and sums -------------------------------------------------------------------------------


def scripted(who, log, decoding="", rows=((1, 2, 3, END),), wall_s=1.0, mode="eager"):
    """A side that notes its calls and always writes the same."""

    def write(prompts, length):
        log.append((who, decoding, prompts[0][0], length))
        return texts_of(rows, wall_s)

    return sides.Side(who, mode, decoding, write, frozenset([END]), write)


def texts_of(rows, wall_s, passes=2, first_s=0.1):
    forwards = {"prefill": 1, "denoise": passes - 1}
    return sides.Texts([list(row) for row in rows], wall_s, first_s, forwards, passes, 7)


def test_sides_take_turns_after_a_warm_up():
    log, told = [], []
    prompts = opened.Prompts([[0], [1], [2]], [[10], [11], [12]])
    three = [
        scripted("student", log, "schedule=1"),
        scripted("plain", log),
        scripted("teacher", log),
    ]
    found = table.take_turns(
        three, prompts, texts=3, plain_texts=1, repeats=2, length=5, device=CPU, note=told.append
    )
    assert [(who, length) for who, _, _, length in log[:6]] == [
        ("student", 2),
        ("plain", 2),
        ("teacher", 2),
        ("student", 5),
        ("plain", 5),
        ("teacher", 5),
    ]
    assert [(who, first) for who, _, first, _ in log[6:]] == [
        ("student", 0), ("plain", 0), ("teacher", 10),
        ("teacher", 11), ("student", 1),  # the plain loop would have begun
        ("teacher", 12), ("student", 2),
        ("student", 0), ("plain", 0), ("teacher", 10),
        ("teacher", 11), ("student", 1),
        ("teacher", 12), ("student", 2),
    ]  # fmt: skip
    assert [sorted(one.texts) for one in found] == [[0, 1, 2], [0], [0, 1, 2]]
    assert all(len(some) == 2 for one in found for some in one.texts.values())
    assert told[-1].startswith("repeat 2 of 2, text 3 of 3: student schedule=1 eager: 3 tokens")


def written(who, walls, tokens, decoding="", mode="eager", passes=2):
    """A side that has written texts of so many visible tokens in these times, all repeats of each."""
    side = scripted(who, [], decoding, mode=mode)
    texts = {
        number: [texts_of([[*range(count), END]], wall, passes) for wall in own]
        for number, (own, count) in enumerate(zip(walls, tokens, strict=True))
    }
    return table.Written(side, texts, growth=5)


MODEL = {"parameters": 100, "weight_bytes": 400, "read_bytes": 300}


def test_a_line_is_sums_over_sums():
    own = written("student", [[1.0, 3.0], [5.0, 2.0], [9.0, 4.0]], [10, 20, 60])
    line = table.side_line(own, MODEL, 100.0, None)
    assert line["tokens"] == 2 * 90  # the end token is not visible
    assert line["tokens_per_s"] == 180 / 24
    assert line["tokens_per_forward"] == 180 / 12
    assert line["latency_s"] == 4
    assert line["latency_s_std_err"] == pytest.approx(statistics.stdev([2, 3.5, 6.5]) / 3**0.5)
    assert line["latency_p50_s"] == 3.5
    assert line["latency_p95_s"] == 5 + 0.75 * 4
    assert line["forward_s"] == 2
    assert line["floor_s"] == 3
    assert line["times_floor"] == pytest.approx(2 / 3)
    assert line["peak_bytes"] == 405
    assert line["passes"] == 12
    assert line["forwards"]["prefill"] == 6
    assert line["token_forwards"] == 42
    without = [40 + 120, 20 + 120, 20 + 40], [20, 17, 11]
    rates = [tokens / wall for tokens, wall in zip(*without, strict=True)]
    centre = sum(rates) / 3
    assert line["tokens_per_s_std_err"] == pytest.approx(
        math.sqrt(2 / 3 * sum((rate - centre) ** 2 for rate in rates))
    )


def test_ratios_are_of_texts_that_both_wrote():
    ours = written("student", [[1.0], [2.0]], [10, 20], "schedule=1")
    theirs = written("plain", [[4.0]], [10], "schedule=1")
    found = table.ratio_line(ours, theirs)
    assert (found["ratio"], found["n"]) == (4, 1)
    assert math.isnan(found["std_err"])
    slow = written("teacher", [[2.0], [6.0]], [10, 10])
    found = table.ratio_line(ours, slow)
    assert found["ratio"] == pytest.approx((30 / 3) / (20 / 8))
    one_left = [(20 / 2) / (10 / 6), (10 / 1) / (10 / 2)]
    assert found["std_err"] == pytest.approx(abs(one_left[0] - one_left[1]) / 2)


def test_students_are_compared_with_the_teacher_in_every_mode_and_with_generate():
    sides_ = [
        written("student", [[1.0]], [4], "schedule=1", "eager"),
        written("student", [[1.0]], [4], "schedule=1", "graphs"),
        written("plain", [[1.0]], [4], "schedule=2"),
        written("teacher", [[1.0]], [4], "", "eager"),
        written("teacher", [[1.0]], [4], "", "graphs"),
        written("teacher_hf", [[1.0]], [4]),
    ]
    found = [(one["mode"], one["against"], one["against_mode"]) for one in table.ratios(sides_)]
    assert found == [
        ("eager", "teacher", "eager"),
        ("eager", "teacher", "graphs"),
        ("eager", "teacher_hf", "eager"),
        ("graphs", "teacher", "eager"),
        ("graphs", "teacher", "graphs"),
        ("graphs", "teacher_hf", "eager"),
    ]


def test_who_must_write_the_same(models):
    full = dataclasses.replace(models, student=SimpleNamespace(block_size=None))
    every = [
        written("student", [[1.0]], [4], "schedule=1", "eager"),
        written("student", [[1.0]], [5], "schedule=1", "graphs"),
        written("plain", [[1.0]], [4], "schedule=1"),
        written("teacher", [[1.0]], [4], "", "eager"),
        written("teacher_hf", [[1.0]], [4]),
    ]
    twins = [bench.twin_of(one, every, full) for one in every]
    assert twins == [None, every[0], every[0], None, every[3]]
    assert bench.twin_of(every[2], every, models) is None
    assert table.texts_differ(every[1], every[0]) == 1
    assert table.texts_differ(every[2], every[0]) == 0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 4.0, 4.5, 9.0]
    value, error = table.jackknife(values, statistics.fmean)
    assert value == statistics.fmean(values)
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(table.jackknife([3.0], statistics.fmean)[1])


# --- batches --------------------------------------------------------------------------------------


def test_where_the_teacher_overtakes():
    found = crossover([(1, 30.0, 10.0), (4, 50.0, 40.0), (16, 60.0, 90.0)])
    # ahead by 10 at 4, behind by 30 at 16: a quarter of the way from log2 4 to log2 16
    assert found == {"batch": pytest.approx(2**2.5), "leads": "student first", "changes": 1}


def test_an_exact_tie_is_no_overtaking():
    none, one = [(1, 5.0, 5.0), (2, 9.0, 9.0)], [(1, 5.0, 5.0), (2, 8.0, 9.0)]
    assert crossover(none) == {"batch": None, "leads": "student", "changes": 0}
    assert crossover(one) == {"batch": 1.0, "leads": "student first", "changes": 1}


@pytest.mark.parametrize(
    ("gaps", "changes"), [((1, -1, 1), 2), ((-1, 1, -1), 2), ((1, -1, 0, -2), 3)]
)
def test_leads_that_change_more_than_once_have_no_single_batch(gaps, changes):
    points = [(2**i, 5.0 + gap, 5.0) for i, gap in enumerate(gaps)]
    found = crossover(points)
    assert found == {"batch": None, "leads": "changing", "changes": changes}
    told = report.crossover_text({"mode": "eager", **found})
    assert told == f"eager: the leads change more than once ({changes} times)."


@pytest.mark.parametrize(
    ("points", "leads"),
    [
        ([(1, 3.0, 2.0), (2, 5.0, 4.0)], "student"),
        ([(1, 2.0, 3.0), (2, 4.0, 5.0)], "teacher"),
        ([(1, 2.0, 3.0), (2, 6.0, 5.0)], "teacher first"),
        ([(8, 2.0, 3.0)], "teacher"),
    ],
)
def test_nobody_overtakes(points, leads):
    changes = int(leads == "teacher first")
    assert crossover(points) == {"batch": None, "leads": leads, "changes": changes}


def test_batches_are_warmed_up_and_who_begins_changes():
    log = []
    pair = (scripted("student", log, "schedule=2"), scripted("teacher", log))
    prompts = opened.Prompts([[0], [1]], [[10], [11]])
    found = batches([pair], prompts, (2, 1), repeats=2, length=3, note=lambda text: None)
    warm_up, turns = ["student", "teacher"], ["student", "teacher", "teacher", "student"]
    assert [who for who, *_ in log] == [*warm_up, *turns, *warm_up, *turns[2:], *turns[:2]]
    assert [line["batch"] for line in found["lines"]] == [1, 1, 2, 2]
    assert found["lines"][0]["tokens_per_s"] == 2 * 3 / 2.0
    assert found["crossovers"] == [
        {"mode": "eager", "batch": None, "leads": "student", "changes": 0}
    ]


# --- quality --------------------------------------------------------------------------------------


def test_repetition():
    assert quality.distinct_share([1, 2, 3, 4, 5]) == 1
    assert quality.distinct_share([1] * 10) == 1 / 7
    assert quality.distinct_share([1, 2, 1, 2, 1, 2]) == 2 / 3
    assert quality.distinct_share([1, 2, 3]) == 1  # too short to repeat


def of_texts(who, rows, decoding=""):
    side = scripted(who, [], decoding)
    return table.Written(side, {i: [texts_of([row], 1.0)] for i, row in enumerate(rows)})


def test_texts_are_judged_by_the_teacher_text_by_text(models):
    prompts = opened.Prompts([[START, 97], [START, 98, 99]], [[START, 97], [START, 98, 99]])
    rows = [[97, 98, 97, END, 5, 5], [100, 101]]
    base = of_texts("student", [[97] * 12, [98] * 12], "schedule=1")
    own = of_texts("student", rows, "schedule=2")
    lines = quality.text_lines([base, own], models, prompts, "schedule=1")
    # the end token was decided, what stands after it was not written
    pairs = [Pair((START, 97), (97, 98, 97, END)), Pair((START, 98, 99), (100, 101))]
    expected = [score.value / n for score, n in zip(
        log_likelihood(models.teacher, pairs), (4, 2), strict=True
    )]  # fmt: skip
    assert lines[1]["log_likelihood"] == pytest.approx(statistics.fmean(expected), rel=1e-5)
    assert lines[1]["log_likelihood_std_err"] == pytest.approx(
        abs(expected[0] - expected[1]) / 2, rel=1e-4
    )
    reference = quality.nats_per_token(base, models, prompts)
    gaps = [a - b for a, b in zip(expected, reference, strict=True)]
    assert lines[1]["minus_reference"] == pytest.approx(statistics.fmean(gaps), rel=1e-4)
    assert lines[1]["minus_reference_std_err"] == pytest.approx(
        abs(gaps[0] - gaps[1]) / 2, rel=1e-4
    )
    assert lines[0]["repetitive"] == 1
    assert lines[0]["distinct_grams"] == pytest.approx(1 / 9)
    assert lines[1]["repetitive"] == 0


def test_another_vocabulary_is_encoded_anew(models):
    apart = dataclasses.replace(models, shared=False)
    prompts = opened.Prompts([[START, 1]], [[START, 97, 98]])
    student = of_texts("student", [[104, 105, END, 7]], "schedule=1")
    (found,) = quality.nats_per_token(student, apart, prompts)
    (score,) = log_likelihood(models.teacher, [Pair((START, 97, 98), (104, 105, END))])
    assert found == pytest.approx(score.value / 3)
    (nothing,) = quality.nats_per_token(of_texts("student", [[END]], "x"), apart, prompts)
    (score,) = log_likelihood(models.teacher, [Pair((START, 97, 98), (END,))])
    assert nothing == pytest.approx(score.value)


def test_holes_are_cut_from_solutions(models):
    vocab = models.student.vocab
    programs = {one["prompt"] + one["canonical_solution"] for one in human_eval_problems().values()}
    found = quality.code_holes(vocab, 12, 9, context=2**10, longest=2**10, seed=3)
    assert len(found) == 12
    for hole in found:
        assert hole.before[0] == START
        assert len(hole.truth) == 9
        assert hole.after
        whole = vocab.decode([*hole.before[1:], *hole.truth, *hole.after])
        assert whole in programs
    again = quality.code_holes(vocab, 12, 9, context=2**10, longest=2**10, seed=3)
    other = quality.code_holes(vocab, 12, 9, context=2**10, longest=2**10, seed=4)
    assert found == again
    assert found != other
    short = quality.code_holes(vocab, 12, 9, context=5, longest=200, seed=3)
    assert all(len(h.before) + len(h.truth) + len(h.after) <= 200 for h in short)
    lengths = [len(one["canonical_solution"].encode()) for one in human_eval_problems().values()]
    most = {"context": 5, "longest": 2**12, "seed": 0}
    tight = quality.code_holes(vocab, 164, min(lengths) - 1, **most)
    assert len(tight) == 164 - lengths.count(min(lengths))  # a token on either side
    assert len(quality.code_holes(vocab, 164, min(lengths) - 2, **most)) == 164
    with pytest.raises(DataError, match=r"no solution .* --span"):
        quality.code_holes(vocab, 12, 2**12, context=5, longest=2**10, seed=0)


def test_fills_are_counted_hole_by_hole(models):
    holes = [quality.CodeHole([START, 97], [98, 99, 100], [101]),
             quality.CodeHole([START, 97, 98], [99, 100, 101], [102])]  # fmt: skip
    settings = dataclasses.replace(SETTINGS, ends="natural")
    found = quality.fill_holes(models.student, holes, Decoding("schedule", 2), settings)
    assert [(one.tokens, one.forwards) for one in found] == [(3, 2), (3, 2)]  # 2 + 1; 1 then 2
    fills = {
        "a": [quality.Filled(3, 3, 3), quality.Filled(0, 3, 3)],
        "b": [quality.Filled(2, 3, 1), quality.Filled(1, 3, 2)],
    }
    one, two = quality.hole_lines(fills, "a")
    assert (one["right"], one["minus_reference"], one["tokens_per_forward"]) == (0.5, 0, 1)
    assert two["right"] == 0.5
    assert two["right_std_err"] == pytest.approx(1 / 6)
    assert two["minus_reference"] == pytest.approx(0)
    assert two["minus_reference_std_err"] == pytest.approx(1 / 3)
    assert two["tokens_per_forward"] == 2


@pytest.mark.parametrize("ends", ["natural", "suppressed"])
def test_a_hole_has_no_end_in_it(models, monkeypatch, ends):
    given = []

    def make(denoiser, ids, settings, **options):
        given.append(settings.suppress_eos)
        return make_canvas(denoiser, ids, settings, **options)

    monkeypatch.setattr(quality, "make_canvas", make)
    hole = quality.CodeHole([START, 97], [98], [101])
    settings = dataclasses.replace(SETTINGS, ends=ends)
    quality.fill_holes(models.student, [hole], Decoding("schedule", 1), settings)
    assert given == [True]


def test_right_tokens_are_those_of_the_solution(models):
    settings = dataclasses.replace(SETTINGS, ends="natural")
    before, after = [START, 97, 98], [101]
    guess = quality.CodeHole(before, [0, 0, 0], after)
    one = Decoding("schedule", 1)
    canvas = make_canvas(
        models.student,
        [*before, *[models.student.mask_id] * 3, *after],
        one.sampler(suppress_eos=True),
    )
    for _ in denoise(models.student, [canvas]):
        pass
    filled = canvas.ids_L[3:6].tolist()
    assert END not in filled
    truth = quality.CodeHole(before, [filled[0], (filled[1] + 1) % 256, filled[2]], after)
    found = quality.fill_holes(models.student, [guess, truth], one, settings)
    assert found[1].right == 2


# --- models, prompts, memory ----------------------------------------------------------------------


def test_prompts_are_cut_on_the_left_and_shared(models):
    found = opened.human_eval_prompts(models, 6, 20, seed=1)
    assert found.student is found.teacher
    texts = [one["prompt"] for one in human_eval_problems().values()]
    for prompt in found.student:
        assert len(prompt) == 20
        assert prompt[0] == START
        assert any(text.endswith(models.student.vocab.decode(prompt[1:])) for text in texts)
    assert opened.human_eval_prompts(models, 6, 20, seed=1) == found
    assert opened.human_eval_prompts(models, 6, 20, seed=2) != found
    assert found.of("plain") is found.student
    assert found.of("teacher_hf") is found.teacher
    many = opened.human_eval_prompts(models, 200, 5, seed=1)
    assert many.student[164:] == many.student[:36]  # there are 164 problems


def test_vocabularies_are_shared_apart_from_the_mask(models):
    assert models.shared
    assert not opened.Models.of(random_student(), models.teacher).shared


def test_without_a_shared_vocabulary_each_encodes_for_itself(models):
    apart = dataclasses.replace(models, shared=False)
    found = opened.human_eval_prompts(apart, 2, 20, seed=1)
    assert found.student is not found.teacher
    assert found.teacher[0][0] == START  # no opening of its own: as its documents begin
    assert found.of("teacher_hf") is found.teacher
    assert found.of("student") is found.student


def test_a_long_prompt_goes_on_with_the_next_program(models):
    ids = opened.long_prompt(models.student.vocab, 1000)
    assert len(ids) == 1000
    assert ids[0] == START
    first = next(iter(human_eval_problems().values()))
    text = models.student.vocab.decode(ids[1:])
    assert text.startswith(first["prompt"] + first["canonical_solution"])
    assert opened.long_prompt(models.student.vocab, 1) == [START]


def test_bytes_that_a_forward_reads():
    untied = random_student(num_words=20, tie_word_embeddings=False).model
    tied = random_student(num_words=20, tie_word_embeddings=True).model
    table_bytes = untied.get_input_embeddings().weight.nbytes
    assert opened.weight_bytes(untied) - opened.read_bytes(untied) == table_bytes
    assert opened.read_bytes(tied) == opened.weight_bytes(tied)
    assert opened.weight_bytes(tied) == opened.weight_bytes(untied) - table_bytes


@pytest.mark.skipif(
    ENGINE not in torch.backends.quantized.supported_engines, reason="no kernels for it here"
)
def test_both_sides_in_8_bits(blocks, ar, tmp_path):
    changes = {"tokens_per_step": (1,), "thresholds": (), "texts": 1, "repeats": 1, "batches": ()}
    whole, _ = run_once(tmp_path, blocks, ar, **changes)
    record, _ = run_once(tmp_path, blocks, ar, **changes, quantization="int8_dynamic")
    for line, before in zip(record["results"]["sides"], whole["results"]["sides"], strict=True):
        assert line["parameters"] == before["parameters"]
        assert line["tokens"] == before["tokens"]
        assert line["floor_s"] > 0
    for who, own in record["results"]["models"].items():
        assert own["read_bytes"] < whole["results"]["models"][who]["read_bytes"]
        assert own["read_bytes"] < own["weight_bytes"]  # an embedding is not all read
        assert own["weights"] == whole["results"]["models"][who]["weights"]
    kept = [[line["kept_bytes"] for line in one["results"]["contexts"]["lines"]]
            for one in (record, whole)]  # fmt: skip
    assert kept[0] == kept[1]
    assert "float32, int8_dynamic, on" in report.page(record)


def test_a_text_longer_than_a_model_is_refused_before_anything(full, ar, tmp_path):
    settings = dataclasses.replace(SETTINGS, model=full, teacher=ar, gen_length=2**10)
    with pytest.raises(ConfigError, match="up to 1034 tokens, but the student was built for 1024"):
        bench.run(settings, tmp_path / "latency.jsonl")
    with pytest.raises(ConfigError, match="lower --gen-length"):
        bench.run(
            dataclasses.replace(settings, gen_length=8, batch_length=2**10),
            tmp_path / "latency.jsonl",
        )


def test_a_student_is_no_teacher(full, blocks, tmp_path):
    settings = dataclasses.replace(SETTINGS, model=blocks, teacher=full)
    with pytest.raises(ConfigError, match="is a diffusion model; name an autoregressive one"):
        bench.run(settings, tmp_path / "latency.jsonl")


def test_growth_is_above_what_was_held():
    held = torch.ones(2**20)
    size = 2**25
    growth = memory.peak_of(CPU, lambda: torch.ones(size // 4).sum())
    assert size * 0.9 <= growth <= size * 1.5
    assert held.sum() == 2**20
    assert memory.peak_of(CPU, lambda: None) < size // 8


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": 0}, "--texts must be at least 1; got 0"),
        ({"prompt_length": 1}, "--prompt-length must be at least 2"),
        ({"plain_texts": -1}, "--plain-texts must be at least 0"),
        ({"batches": (1, 1)}, "--batches must be different whole numbers"),
        ({"contexts": (0,)}, "--contexts must be different whole numbers from 1 on"),
        ({"modes": ()}, "--mode must name one or more of eager, compile, graphs"),
        ({"modes": ("eagre",)}, "did you mean 'eager'"),
        ({"ends": "naturally"}, "did you mean 'natural'"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"quantization": "int8"}, "int8_dynamic"),
        ({"quantization": "int8_dynamic", "dtype": "bfloat16"}, "dtype=bfloat16"),
        ({"tokens_per_step": (), "thresholds": ()}, "give at least one decoding"),
        ({"thresholds": (0.5, 0.5)}, "a decoding is there twice"),
        ({"thresholds": (1.5,)}, r"threshold must be in \(0, 1\]"),
        ({"batch_decoding": "schedule=3"}, "did you mean 'schedule="),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_decodings_have_names_and_settings():
    settings = dataclasses.replace(
        SETTINGS, factors=(1.0,), entropy_bounds=(0.25,), ends="natural", block_length=4
    )
    assert [one.name for one in settings.decodings] == [
        "schedule=1",
        "schedule=2",
        "threshold=0.5",
        "factor=1",
        "entropy_bound=0.25",
    ]
    samplers = [settings.sampler(one) for one in settings.decodings]
    assert [one.rule for one in samplers] == [None, None, "threshold", "factor", "entropy_bound"]
    assert [one.remasking for one in samplers] == ["low_confidence"] * 4 + ["entropy"]
    assert all(one.block_length == 4 and not one.suppress_eos for one in samplers)
    assert (samplers[2].threshold, samplers[3].factor, samplers[4].entropy_bound) == (0.5, 1, 0.25)
    assert settings.chosen.name == "schedule=2"
    assert settings.reference.name == "schedule=1"
    assert dataclasses.replace(settings, batch_decoding="factor=1").chosen.name == "factor=1"
    only = dataclasses.replace(SETTINGS, tokens_per_step=(), batch_decoding="")
    assert only.plain_decoding is None
    assert only.chosen.name == only.reference.name == "threshold=0.5"


def test_the_block_length_of_a_student_without_blocks():
    assert SETTINGS.of_student(None).block_length == 32
    assert SETTINGS.of_student(4).block_length is None
    assert dataclasses.replace(SETTINGS, block_length=8).of_student(None).block_length == 8


# --- for people -----------------------------------------------------------------------------------


def test_the_page(record):
    *lines, last = report.describe(record).splitlines()
    page = "\n".join(lines)
    assert json.loads(last)["kind"] == "bench latency"
    assert "2 prompts of HumanEval (at most 10 tokens), 8 new tokens at batch 1" in page
    assert "nobody may end a text" in page
    assert "1 + 2 + 5" in page  # forwards of schedule=1: prefill + store + others
    assert "0 + 0 + 8" in page  # of the plain loop
    assert "of a model with blocks its text means nothing, only its time" in page
    assert "| schedule=2 | eager |  | " in page  # no plain loop at this schedule
    assert "Longer than a model was built for: 4096." in page
    assert "minus schedule=1" in page
    tables = [line for line in lines if line.startswith("| ---")]
    assert len(tables) == 5
    for start in (i for i, line in enumerate(lines) if line.startswith("| ---")):
        assert lines[start - 1].count("|") == lines[start].count("|") == lines[start + 1].count("|")


def test_the_page_says_what_the_student_keeps(record):
    def told(**changes):
        own = json.loads(to_json(record))
        own["results"]["models"]["student"]["block_size"] = changes.pop("block_size", None)
        own["settings"] |= changes
        return report.title(own)

    assert "decodes 4 tokens together with the exact cache of its blocks." in report.title(record)
    assert "decodes 32 tokens together with no cache." in told(block_length=32)
    approximate = told(block_length=16, cache="dual", refresh=8)
    assert (
        "16 tokens together with the approximate cache `dual`, made anew every 8 steps"
        in approximate
    )
    assert "approximate cache `prefix`, made anew for each block" in told(
        block_length=16, cache="prefix"
    )


def test_the_page_says_from_how_many_texts_a_line_is(record):
    lines = report.page(record).splitlines()
    (plain,) = [line for line in lines if line.startswith("| plain schedule=1 ")]
    teacher = next(line for line in lines if line.startswith("| teacher |"))
    assert [line.split(" | ")[2] for line in (plain, teacher)] == ["1", "2"]
    assert "| / plain eager (1 of 2 texts) | / teacher eager | / teacher_hf eager |" in "\n".join(
        lines
    )


def test_nothing_visible_divides_nothing(record):
    changed = json.loads(to_json(record))
    for line in [*changed["results"]["batches"]["lines"], *changed["results"]["sides"]]:
        line["tokens_per_s"] = 0.0
    assert "| eager | 2 | 0.0 | 0.0 | – |" in report.batches_table(changed)
    assert report.compared(record, changed).count("| – |") == len(record["results"]["sides"])


def test_a_record_of_before_is_shown_all_the_same(record):
    old = json.loads(to_json(record))
    for one in old["results"]["batches"]["crossovers"]:
        del one["changes"]
        one |= {"batch": 2.0, "leads": "student first"}
    del old["results"]["quality"]["texts_left_out"]
    for line in old["results"]["batches"]["lines"]:
        line["tokens_per_s"] = 9.0
    page = report.page(old)
    assert "the student is ahead at every batch" in page  # what the lines say


def test_a_random_teacher_judges_no_text(models, record):
    settings = dataclasses.replace(SETTINGS, random_teacher=True, texts=1)
    prompts = opened.Prompts([[START, 97]], [[START, 97]])
    own = of_texts("student", [[97, 98]], "schedule=1")
    told = []
    found = quality.quality([own], models, prompts, settings, told.append)
    assert found["texts"] == []
    assert told[0].startswith("texts are not judged")
    assert [line["decoding"] for line in found["infilling"]["lines"]] == [
        one.name for one in settings.decodings
    ]
    changed = json.loads(to_json(record))
    changed["results"]["quality"] = found
    page = report.quality_table(changed["results"])
    assert "Texts were not judged: the teacher has random weights" in page
    assert "nats a token" not in page
    assert "| student | holes: right |" in page
    found = {**found, "infilling": None}
    assert "|" not in report.quality_table({"quality": found})


def test_crossings_in_words():
    told = [
        report.crossover_text({"mode": "eager", "batch": batch, "leads": leads})
        for batch, leads in [(5.657, "student first"), (None, "student"), (None, "teacher")]
    ]
    assert told[0] == "eager: the teacher overtakes at a batch of about 5.7."
    assert "student is ahead at every batch" in told[1]
    assert "teacher is ahead at every batch" in told[2]


def test_numbers_in_words():
    assert report.with_error(1.234, 0.056, ".2f") == "1.23 ± 0.06"
    assert report.with_error(1.234, None, ".2f") == "1.23"
    assert report.with_error(1.234, math.nan, "+.1f") == "+1.2"
    assert report.with_error(0.5, 0.25, "+.1%") == "+50.0% ± 25.0%"
    assert report.with_error(None, None, ".2f") == "–"


def test_modes_left_out_are_on_the_page(record):
    changed = json.loads(to_json(record))
    changed["results"]["left_out"] = [{"who": "student", "mode": "graphs", "reason": "no GPU"}]
    changed["results"]["sides"][-1]["texts_differ"] = 1
    page = report.page(changed)
    assert "Left out: student graphs: no GPU" in page
    assert "teacher_hf eager: 1 of 2" in page


def test_a_picture(record, tmp_path):
    pytest.importorskip("matplotlib")
    plot(record, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    read = json.loads(to_json(record))  # as it comes from a file: NaN is null
    read["results"] |= {"quality": None, "batches": None, "contexts": None}
    plot(read, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size < (tmp_path / "all.png").stat().st_size


def test_the_frontier_has_text_and_speed_of_one_mode(record):
    figures = pytest.importorskip("matplotlib.figure")
    results = json.loads(to_json(record))["results"]
    slow = [{**line, "mode": "compile", "tokens_per_s": 1.0} for line in results["sides"]]
    fast = [{**line, "mode": "graphs", "tokens_per_s": 1e6} for line in results["sides"]]
    axes = figures.Figure().subplots()
    frontier(axes, {**results, "sides": [*slow, *results["sides"], *fast]})
    found = {one.get_label(): one.lines[0].get_xdata()[0] for one in axes.containers}
    assert found == {
        line["decoding"]: line["tokens_per_s"]
        for line in results["sides"]
        if line["who"] == "student"
    }
    assert axes.get_xlabel().endswith("eager")


def test_only_like_is_compared_with_like(record):
    before = json.loads(to_json(record))
    told = report.compared(record, before)
    assert told.count("| 1.00 |") == len(record["results"]["sides"])
    student = record["results"]["models"]["student"]["source"]
    assert told.splitlines()[0].count(f"of `{student}` at") == 2
    for path, value in [
        (("results", "metrics"), 2),
        (("device", "cpu"), "another"),
        (("device", "threads"), 7),
        (("results", "device"), "cuda"),
        (("settings", "dtype"), "bfloat16"),
        (("settings", "gen_length"), 9),
        (("settings", "cache"), "dual"),
        (("settings", "refresh"), 3),
        (("settings", "block_length"), 16),
        (("settings", "random_teacher"), True),
        (("results", "models", "teacher", "weights"), "another"),
    ]:
        other = json.loads(to_json(record))
        place = other
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        with pytest.raises(ConfigError, match=r"cannot be compared: .*in the other"):
            report.compared(record, other)


def test_a_teacher_of_random_weights_is_known_by_its_source(record):
    one, other = (json.loads(to_json(record)) for _ in range(2))
    for own, source in ((one, "a"), (other, "b")):
        own["results"]["models"]["teacher"] |= {"weights": "random", "source": source}
    report.require_comparable(one, one)
    with pytest.raises(ConfigError, match="teacher is"):
        report.require_comparable(one, other)


def test_what_a_token_is_matters_where_texts_may_end(record):
    one, other = (json.loads(to_json(record)) for _ in range(2))
    other["results"]["definitions"]["tokens"] = "otherwise"
    report.require_comparable(one, other)
    for own in (one, other):
        own["settings"]["ends"] = "natural"
    with pytest.raises(ConfigError, match="meaning of tokens"):
        report.require_comparable(one, other)


def test_the_table_of_the_docs_is_of_a_plain_run(record):
    own = CATALOGUE["latency"]
    assert own.made(json.loads(to_json(record)))
    for changes in ({"cache": "dual"}, {"random_teacher": True}, {"quality": False}):
        assert not own.made({**record, "settings": {**record["settings"], **changes}})


def test_the_last_record_of_a_file(ran, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "bench serve"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no record of `mdm bench latency`"):
        report.last_record(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(ran[2].read_text() + '{"kind": "bench serve"}\n')
    assert report.last_record(path) == json.loads(to_json(ran[0]))
    with pytest.raises(DataError, match="cannot read records"):
        report.last_record(tmp_path / "none")


def test_the_command(blocks, ar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model", blocks, "--teacher", ar, "--texts", "1", "--prompt-length", "8", "--threads", "1",
        "--gen-length", "4", "--tokens-per-step", "2", "--thresholds", "", "--holes", "2", "--span",
        "4", "--batches", "", "--contexts", "", "--plain-texts", "0", "--ends", "natural",
        "--device", "cpu",
    ]  # fmt: skip
    files = ["--table", "latency.md", "--plot", "latency.png", "--json", "latency.json"]
    done = CliRunner().invoke(command, [*arguments, *files], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    kept = tmp_path / "benchmarks/results/latency.jsonl"
    assert json.loads(kept.read_text()) == record
    assert json.loads((tmp_path / "latency.json").read_text()) == record
    assert (tmp_path / "latency.md").read_text().strip() in done.stdout
    assert (tmp_path / "latency.png").is_file()
    assert "texts end where they end" in done.stdout
    assert "repeat 1 of 1, text 1 of 1: student schedule=2 eager" in done.stderr
    assert record["results"]["sides"][0]["latency_s_std_err"] is None  # one text
    again = CliRunner().invoke(
        command, [*arguments, "--against", str(kept)], catch_exceptions=False
    )
    assert f"tokens/s of `{blocks}` at" in again.stdout
    other = CliRunner().invoke(
        command, [*arguments, "--against", str(kept), "--gen-length", "5"], catch_exceptions=False
    )
    assert "not compared: these records cannot be compared: gen_length" in other.stderr
    assert json.loads(other.stdout.splitlines()[-1])["settings"]["gen_length"] == 5


def test_the_overhead_in_words():
    from mdm.benchmarks.latency_report import overhead_line

    found = {"decoding": "schedule=2", "step_s_median": 0.044, "bare_s_median": 0.042}
    found |= {"median_share": 0.036, "steps": 90, "share": 0.08, "share_std_err": 0.06, "texts": 3}
    line = overhead_line(found)
    assert "a step takes 44.0 ms, the call 42.0 (medians)" in line
    assert "+3.6% in the middle of 90 steps, +8.0% ± 6.0% of the time of 3 texts" in line
