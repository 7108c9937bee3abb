"""`mdm bench cpu`: who is timed, what is counted, what a price is. Nothing here measures time.

Shapes: L length, N positions, V vocabulary.
"""

import contextlib
import dataclasses
import json
import os
import statistics

import oracles
import pytest
import torch
from click.testing import CliRunner
from students import random_ar, random_student
from tiny_run import ar_folder, tiny_denoiser

from mdm.benchmarks import cpu as bench
from mdm.benchmarks import cpu_price, cpu_report
from mdm.benchmarks.cpu_command import cpu as command
from mdm.checkpoint import save_denoiser
from mdm.errors import ConfigError
from mdm.int8 import INT8_DYNAMIC, is_quantised, quantise

BLOCK = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("cpu")
    teacher = ar_folder(place / "ar")
    save_denoiser(tiny_denoiser(teacher), place / "canvas")
    save_denoiser(tiny_denoiser(teacher, kind="bd3lm", block_size=BLOCK), place / "blocks")
    return {"teacher": teacher, "canvas": str(place / "canvas"), "blocks": str(place / "blocks")}


def settings_of(folders, student="blocks", **more):
    few = {"threads": (1,), "kept": 14, "length": 5, "tokens": 3, "repeats": 2, "texts": 2}
    few |= {"text_length": 20}
    return bench.CpuBench(model=folders[student], teacher=folders["teacher"], **{**few, **more})


@pytest.fixture(scope="module")
def record(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "cpu.jsonl"
    before = torch.get_num_threads()
    found = bench.run(settings_of(folders, threads=(1, 2)), path)
    assert torch.get_num_threads() == before
    assert json.loads(path.read_text())["kind"] == "bench cpu"
    return found


# --- a run -----------------------------------------------------------------------------------------


def test_every_side_has_a_line(record):
    lines = record["results"]["times"]
    keys = {(one["who"], one["numbers"], one["mode"], one["threads"]) for one in lines}
    assert keys == {
        (who, number, "eager", threads)
        for who in ("student", "teacher")
        for number in ("float32", "bfloat16", "int8_dynamic")
        for threads in (1, 2)
    }
    assert len(lines) == len(keys)
    for line in lines:
        # A block of 4 tokens: the first forward reads the prompt, three read the block.
        assert (line["forwards"], line["tokens_read"]) == (
            (3, BLOCK) if line["who"] == "student" else (3, 1)
        )
        assert line["n"] == len(line["seconds_all"]) == 2
        assert line["first_seconds"] > 0
        if line["numbers"] == "float32":
            assert (line["times_faster"], line["times_faster_std_err"]) == (1, 0)
    assert record["settings"]["threads"] == (1, 2)
    assert record["settings"]["numbers"] == ("float32", "bfloat16", "int8_dynamic")
    assert record["checkpoint"]


def test_models_are_told(record, folders):
    models = record["results"]["models"]
    assert models["student"]["block_size"] == BLOCK
    assert models["student"]["kept"] == 12  # whole blocks of 14
    assert (models["teacher"]["kept"], models["teacher"]["block_size"]) == (14, None)
    assert models["teacher"]["source"] == folders["teacher"]
    for model in models.values():
        sizes = model["weight_bytes"]
        assert sizes["float32"] > sizes["bfloat16"]
        assert sizes["float32"] > sizes["int8_dynamic"]
        assert sizes["float32"] >= 4 * model["parameters"]


def test_prices_are_small_and_there(record):
    for who in ("student", "teacher"):
        prices = record["results"]["price"][who]
        assert prices.keys() == {"bfloat16", "int8_dynamic"}
        for price in prices.values():
            assert 0 < price["kl"]["mean"] < 0.1
            assert abs(price["cross_entropy"]["mean"]) < 0.1
            assert 0.5 < price["same_argmax"]["mean"] <= 1
            assert price["n"] == 2
        assert prices["bfloat16"] != prices["int8_dynamic"]
    assert record["results"]["price"]["teacher"]["bfloat16"]["tokens"] == 2 * 19


def test_a_student_without_blocks_reads_all(folders, tmp_path):
    found = bench.run(settings_of(folders, "canvas", numbers=("int8_dynamic",)), tmp_path / "r")
    lines = [one for one in found["results"]["times"] if one["who"] == "student"]
    assert [one["numbers"] for one in lines] == ["float32", "int8_dynamic"]
    for line in lines:
        assert (line["forwards"], line["tokens_read"]) == (5, 19)
        assert line["first_seconds"] is None
    assert found["results"]["price"]["student"].keys() == {"int8_dynamic"}


def test_sides_take_turns(monkeypatch):
    """Each number of threads: two texts of every side that are not counted, then all of them in turn."""
    written = []

    def write(side, prompt, settings):
        written.append((torch.get_num_threads(), side.number, prompt))
        seconds = 1.0 + len(written) if side.number == "float32" else 2.0
        return bench.Written(9.0, (seconds, 99.0, 0.0), 7)

    monkeypatch.setattr(bench, "write", write)
    sides = [bench.Side("student", number, "eager", None) for number in ("float32", "bfloat16")]
    settings = bench.CpuBench(model="m", threads=(1, 2), repeats=2)
    told = []
    lines = bench.take_turns(sides, {"student": [5]}, settings, told.append)
    assert written == [
        (threads, number, [5])
        for threads in (1, 2)
        for _ in range(4)
        for number in ("float32", "bfloat16")
    ]
    assert told[0] == "1 thread: warming up"
    assert told[-1] == "2 threads: repeat 2 of 2"
    first, second = lines[:2]
    assert first["seconds_all"] == [6.0, 8.0]  # medians of a text
    assert first["median_seconds"] == 7.0
    assert first["std_err"] == pytest.approx(statistics.stdev([6, 8]) / 2**0.5)
    assert second["times_faster"] == pytest.approx((6 / 2 + 8 / 2) / 2)
    assert second["times_faster_std_err"] == pytest.approx(statistics.stdev([3, 4]) / 2**0.5)
    assert second["tokens_read"] == 7
    assert second["first_seconds"] == 9.0


def test_an_end_token_does_not_end_a_text(folders):
    settings = settings_of(folders)
    student = random_student(shift=True)
    eos = student.vocab.eos_id
    student.never_sampled = torch.tensor([i for i in range(len(student.vocab)) if i != eos])
    assert len(bench.write_canvas(student, [1, 2, 3], settings).later) == 5
    ar = random_ar()
    ar.more_ends = [i for i in range(len(ar.vocab)) if i != 2]
    written = bench.write_text(ar, [1, 2, 3], settings)
    assert (len(written.later), written.tokens) == (3, 1)


def test_compiled_sides_have_the_same_weights(folders, monkeypatch):
    compiled = []
    monkeypatch.setattr(bench, "accelerate", lambda model, mode: compiled.append((model, mode)))
    sides = bench.open_sides(settings_of(folders, compile=True))
    names = [(one.who, one.number, one.mode) for one in sides]
    assert names == [
        (who, number, mode)
        for who in ("student", "teacher")
        for number in ("float32", "bfloat16", "int8_dynamic")
        for mode in ("eager", "compile")
        if (number, mode) != ("int8_dynamic", "compile")
    ]
    by_name = dict(zip(names, sides, strict=True))
    assert [mode for _, mode in compiled] == ["compile"] * 4
    eager, other = (by_name["teacher", "float32", mode] for mode in ("eager", "compile"))
    assert other.model is not eager.model
    assert other.model.model is eager.model.model
    assert other.model in [model for model, _ in compiled]
    assert [is_quantised(one.model.model) for one in sides] == [n[1] == INT8_DYNAMIC for n in names]
    # Forwards without a cache are not run by what can be compiled.
    canvas = bench.open_sides(settings_of(folders, "canvas", compile=True, numbers=("float32",)))
    assert [(one.who, one.mode) for one in canvas] == [
        ("student", "eager"),
        ("teacher", "eager"),
        ("teacher", "compile"),
    ]


# --- price -----------------------------------------------------------------------------------------


def test_apart_is_its_definition():
    exact_NV, other_NV = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    target_N = torch.tensor([0, 6, 3, 3, 1])
    found = cpu_price.apart(exact_NV, other_NV, target_N)
    p, q = exact_NV.double().softmax(-1), other_NV.double().softmax(-1)
    assert found["kl"] == pytest.approx(float(oracles.forward_kl(p, q).mean()))
    rows = range(5)
    rise = [float(p[n, target_N[n]].log() - q[n, target_N[n]].log()) for n in rows]
    assert found["cross_entropy"] == pytest.approx(statistics.fmean(rise))
    assert found["same_argmax"] == sum(int(p[n].argmax() == q[n].argmax()) for n in rows) / 5
    assert found["largest"] == pytest.approx(float((exact_NV - other_NV).abs().max()))
    assert found["tokens"] == 5


def test_a_model_is_not_apart_from_itself():
    for model in (random_student(shift=True), random_student(block_size=4), random_ar()):
        x0_RL = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [3, 3, 2, 1, 0, 5, 4]])
        found = cpu_price.prices(model, {"same": model}, x0_RL, 0)["same"]
        assert found["kl"]["mean"] == pytest.approx(0, abs=1e-12)
        assert (found["largest"], found["same_argmax"]["mean"]) == (0, 1)


def test_the_mask_and_unused_rows_do_not_count():
    """They are at -inf on both sides, before and behind the tokens that are read."""
    exact, other = (random_student(unused_rows=5, seed=seed) for seed in (0, 1))
    x0_L, wanted_L = torch.tensor([1, 2, 3, 4]), torch.tensor([False, True, False, True])
    exact_NV, other_NV = (cpu_price.logits_of(one, x0_L, wanted_L) for one in (exact, other))
    found = cpu_price.apart(exact_NV, other_NV, x0_L[wanted_L])
    xt_BL = torch.tensor([[1, exact.mask_id, 3, exact.mask_id]])
    kept = [i for i in range(exact_NV.shape[1]) if i not in exact.never_sampled.tolist()]
    with torch.no_grad():
        p, q = (
            one(xt_BL, wanted_L[None])[:, kept].double().log_softmax(-1) for one in (exact, other)
        )
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    rise = (p - q)[[0, 1], [kept.index(2), kept.index(4)]].mean()
    assert found["cross_entropy"] == pytest.approx(float(rise))
    assert found["largest"] < 100


def test_what_an_ar_model_is_asked():
    ar = random_ar()
    x0_L = torch.tensor([1, 2, 3, 4])
    wanted_L = cpu_price.questions(ar, x0_L, (0, 0))
    assert wanted_L.tolist() == [False, True, True, True]
    logits_NV = cpu_price.logits_of(ar, x0_L, wanted_L)
    with torch.no_grad():
        expected_LV = ar.model(x0_L[None]).logits[0]
    assert torch.allclose(logits_NV, expected_LV[:3, : len(ar.vocab)], atol=1e-5)


def test_what_a_student_is_asked():
    student = random_student(shift=True)
    x0_L = torch.zeros(400, dtype=torch.long)
    one, same, other = (cpu_price.questions(student, x0_L, (0, row)) for row in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not one[0]
    assert one[-1]
    assert 150 < int(one.sum()) < 250
    short = [cpu_price.questions(student, x0_L[:2], (0, row)) for row in range(9)]
    assert all(wanted_L.tolist() == [False, True] for wanted_L in short)


def test_a_worse_model_costs_more():
    exact = random_ar(layers=2)
    near, far = quantise(random_ar(layers=2)), random_ar(layers=2, seed=1)
    x0_RL = torch.randint(0, 12, (3, 30))
    found = cpu_price.prices(exact, {"near": near, "far": far}, x0_RL, 0)
    assert found["near"]["kl"]["mean"] < 0.1 * found["far"]["kl"]["mean"]
    values = [cpu_price.prices(exact, {"far": far}, row[None], 0)["far"] for row in x0_RL]
    kl = [value["kl"]["mean"] for value in values]
    assert found["far"]["kl"]["mean"] == pytest.approx(statistics.fmean(kl))
    assert found["far"]["kl"]["std_err"] == pytest.approx(statistics.stdev(kl) / 3**0.5)
    assert found["far"]["largest"] == max(value["largest"] for value in values)
    assert values[0]["kl"]["std_err"] is None


# --- the command -----------------------------------------------------------------------------------


def test_the_tables(record):
    *card, last = cpu_report.describe(record).splitlines()
    assert json.loads(last)["kind"] == "bench cpu"
    cells = [line.split(" | ") for line in card if line.startswith("| ")]
    assert sum(len(row) == 8 for row in cells) == 2 + 12
    assert sum(len(row) == 7 for row in cells) == 2 + 6
    assert "blocks of 4) after 12 tokens" in card[0]
    assert cpu_report.page(record) == "\n".join(card)


def test_units():
    line = {
        "who": "student",
        "threads": 2,
        "numbers": "bfloat16",
        "mode": "eager",
        "tokens_read": 8,
    }
    line |= {"median_seconds": 0.0314, "std_err": 0.0012, "first_seconds": 0.25}
    line |= {"times_faster": 1.5, "times_faster_std_err": 0.04}
    found = cpu_report.table_of_times([line, {**line, "std_err": None, "first_seconds": None}])
    start = "| student | 2 | bfloat16 | eager | 8 | 31.4"
    assert found.splitlines()[2:] == [
        f"{start} ± 1.2 | 1.50 ± 0.04 | 250 |",
        f"{start} | 1.50 ± 0.04 | – |",
    ]


def test_a_page_of_float32_alone(folders, tmp_path):
    settings = settings_of(folders, numbers=("float32",), repeats=1)
    found = bench.run(settings, tmp_path / "record")
    page = cpu_report.page(found)
    assert "KL" not in page
    assert found["results"]["times"][0]["std_err"] is None
    assert "±" not in page.splitlines()[4]


def test_the_command(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", folders["canvas"], "--teacher", folders["teacher"], "--threads", "1",
                 "--numbers", "bfloat16", "--kept", "9", "--length", "2", "--tokens", "2", "--repeats",
                 "1", "--texts", "1", "--text-length", "12",
                 "--table", "t.md", "--json", "r.json"]  # fmt: skip
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "benchmarks/results/cpu.jsonl").read_text())
    assert record == json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "t.md").read_text().count("| student |") == 4
    assert record["settings"]["numbers"] == ["float32", "bfloat16"]
    assert "loading" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "--repeats must be at least 1; got 0"),
        ({"text_length": 1}, "--text-length must be at least 2; got 1"),
        ({"numbers": ("bfloat",)}, "unknown --numbers 'bfloat'; did you mean 'bfloat16'"),
        ({"threads": (2, 0)}, "--threads must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        bench.CpuBench(model="m", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 3}, "--kept 3 is less than a block of 4 tokens"),
        ({"kept": 1021}, "--model was built for 1024 tokens, not 1025"),
        ({"text_length": 1025}, "--model was built for 1024 tokens, not 1025"),
        ({"kept": 1020, "tokens": 4}, "--teacher was built for 1024 tokens, not 1025"),
    ],
)
def test_what_does_not_fit_the_models(folders, change, message):
    with pytest.raises(ConfigError, match=message):
        bench.open_sides(settings_of(folders, **change))


def test_models_of_the_wrong_kind(folders, tmp_path):
    with pytest.raises(ConfigError, match="is a diffusion model; name an autoregressive one"):
        bench.open_sides(dataclasses.replace(settings_of(folders), teacher=folders["canvas"]))
    save_denoiser(tiny_denoiser(folders["teacher"], kind="bd3lm", block_size=1), tmp_path / "one")
    with pytest.raises(ConfigError, match="blocks of 1 token"):
        bench.open_sides(dataclasses.replace(settings_of(folders), model=str(tmp_path / "one")))


def test_threads_that_make_sense():
    assert [bench.sensible_threads(most) for most in (1, 2, 3, 4, 6, 8)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 6), (1, 2, 4, 8)
    ]  # fmt: skip
    assert bench.CpuBench(model="m").thread_counts == bench.sensible_threads(bench.cores())
    assert 1 <= bench.cores() <= (os.cpu_count() or 1)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), bench.threads(before + 1):
        inside = torch.get_num_threads()
        raise ZeroDivisionError
    assert inside == before + 1
    assert torch.get_num_threads() == before
