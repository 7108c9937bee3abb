"""The step of a block diffusion student: both sides have one loss, and what their logits take is known."""

import dataclasses
import json
import math
import re

import pytest
import torch
from click.testing import CliRunner
from test_memory import peak_allocation
from tiny import randomise_
from tiny_run import ar_folder

from mdm import denoiser as of_denoiser
from mdm.benchmarks import train_step_blocks as bench
from mdm.benchmarks.command import train_step
from mdm.benchmarks.train_step import memory_in_fresh_process, run_once
from mdm.errors import ConfigError

VOCAB = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ar_folder(tmp_path_factory.mktemp("model") / "ar")


def settings_of(model, **changes):
    common = {"layers": None, "rows": 3, "length": 40, "repeats": 2, "seed": 0}
    return bench.BlockStepSettings(
        **{"model": model, "checkpointing": True, "block_size": 8, **common, **changes}
    )


def exact(model, *, shift=True, attention="block", **changes):
    """A setting in float32 whose two models are clearly different, and far from uniform."""
    setting = bench.make_setting(settings_of(model, vocab=VOCAB, **changes))
    for number, denoiser in enumerate((setting.denoiser, setting.teacher.denoiser)):
        denoiser.float()
        randomise_(denoiser.model, number)
        denoiser.shift, denoiser.attention = shift, attention
    return setting


def loss_and_gradients(setting, side):
    setting.denoiser.zero_grad()
    loss = side(setting)
    loss.backward()
    named = setting.denoiser.named_parameters()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in named}


@pytest.mark.parametrize("tidal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shift": False},
        {"shift": False, "attention": "context_causal"},
        {"attention": "reordered", "block_size": 7},
        {"block_size": 1},
        {"block_size": 40, "checkpointing": False},
        {"rows": 1, "layers": 1},
    ],
    ids=str,
)
def test_both_sides_have_the_same_loss_and_gradients(model, monkeypatch, changes, tidal):
    setting = exact(model, tidal=tidal, **changes)
    monkeypatch.setattr(of_denoiser, "CHUNK_BYTES", 11 * 4 * VOCAB)  # several chunks
    (ours, our_gradients), (twin, twin_gradients) = (
        loss_and_gradients(setting, side) for side in (bench.mdm_loss, bench.twin_loss)
    )
    assert ours == pytest.approx(twin, rel=1e-4)
    for name, gradient in our_gradients.items():
        size = twin_gradients[name].abs().max()
        assert size > 0, name
        assert (gradient - twin_gradients[name]).abs().max() <= 1e-4 * size, name


def test_both_terms_count(model, monkeypatch):
    """With equal models there is nothing to distil; the cross-entropy alone is left."""
    setting = exact(model)
    full = bench.mdm_loss(setting).item()
    setting.teacher.denoiser.load_state_dict(setting.denoiser.state_dict())
    alone = bench.mdm_loss(setting).item()
    batch = setting.batch
    logits_NV = setting.denoiser(
        batch.xt_BL, batch.masked_BL, x0_bL=batch.x0_BL, document_ids_BL=batch.document_ids_BL
    )
    ids_N = batch.x0_BL[batch.masked_BL]
    nll_N = -logits_NV.log_softmax(-1)[torch.arange(len(ids_N)), ids_N]
    expected = (nll_N * batch.ce_weight_BL[batch.masked_BL]).sum() / batch.denominator
    assert alone == pytest.approx(expected.item(), rel=1e-4)
    assert full > 1.1 * alone


def test_terms_are_divided_as_published(model):
    """The cross-entropy by the tokens that can be masked, distillation by those that are."""
    batch = bench.make_setting(settings_of(model)).batch
    found = bench.weighed(torch.tensor(2.0), torch.tensor(3.0), batch).item()
    assert found == pytest.approx(2 / (3 * 39) + 3 / int(batch.masked_BL.sum()))


def test_tidal_mixes_and_weighs_by_noise(model):
    """Its target is nearer to the student's, and noise levels away from the middle count less."""
    plain, mixed = (exact(model, tidal=tidal) for tidal in (False, True))
    assert plain.batch.share_BL is None
    level_BL = mixed.batch.level_BL
    assert torch.allclose(mixed.batch.share_BL, 0.5 * (1 - level_BL))
    weight_BL = torch.exp(-((level_BL - 0.5) ** 2) / (2 * 0.15**2)) * mixed.batch.masked_BL
    assert torch.allclose(mixed.batch.kd_weight_BL, weight_BL)
    assert bench.twin_loss(mixed).item() < bench.twin_loss(plain).item()


# --- student and teacher -------------------------------------------------------------------------


def test_a_made_up_vocabulary_has_as_many_tokens_as_were_asked_for(model):
    setting = bench.make_setting(settings_of(model, vocab=5000, layers=1))
    student, teacher = setting.denoiser, setting.teacher.denoiser
    for denoiser in (student, teacher):
        assert bench.head_rows(denoiser) == len(denoiser.vocab) == 5000
        assert denoiser.mask_id == 4999
        assert denoiser.block_size == 8
        assert denoiser.never_sampled.tolist() == [4999]
        assert denoiser.model.config.num_hidden_layers == 1
    assert setting.teacher.num_tokens == 5000
    assert teacher.model.dtype == torch.bfloat16
    assert student.model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    ours, theirs = (d.model.get_input_embeddings().weight for d in (student, teacher))
    assert not torch.allclose(ours, theirs.float(), atol=0.01)
    tokens_BL = setting.batch.x0_BL
    assert tokens_BL.min() >= 0
    assert 4000 < tokens_BL.max() < 4999


def test_without_a_made_up_vocabulary_the_weights_are_the_models(model):
    setting = bench.make_setting(settings_of(model))
    ours, theirs = (
        d.model.get_output_embeddings().weight for d in (setting.denoiser, setting.teacher.denoiser)
    )
    assert len(ours) == 260
    assert torch.equal(ours.bfloat16(), theirs)


def test_the_first_token_is_not_masked_and_the_seed_decides_the_rest(model):
    batches = [bench.make_setting(settings_of(model, seed=seed)).batch for seed in (0, 0, 1)]
    assert not batches[0].masked_BL[:, 0].any()
    assert batches[0].block_size == 8
    assert torch.equal(batches[0].xt_BL, batches[1].xt_BL)
    assert not torch.equal(batches[0].masked_BL, batches[2].masked_BL)
    assert not torch.equal(batches[0].x0_BL, batches[2].x0_BL)


def test_a_mask_token_in_the_middle_is_refused(model, tmp_path):
    folder = ar_folder(tmp_path / "ar", extra_special=("<|mask|>", "<|more|>"))
    with pytest.raises(ConfigError, match=r"the mask token of .* is not its last token"):
        bench.make_setting(settings_of(folder))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tidal", [False, True])
@pytest.mark.parametrize("chunk_rows", [9, 1000])
def test_logits_take_what_is_counted(model, monkeypatch, tidal, chunk_rows):
    """Allocations are counted by torch's profiler: exact, and the same on every machine."""
    vocab = 6000
    monkeypatch.setattr(of_denoiser, "CHUNK_BYTES", chunk_rows * 4 * vocab)
    setting = bench.make_setting(
        settings_of(model, vocab=vocab, layers=1, rows=2, length=64, tidal=tidal)
    )
    masked = int(setting.batch.masked_BL.sum())
    counted = bench.counted_bytes(2, 64, vocab, masked, tidal=tidal)
    peaks = {}
    for side in bench.STEPS:
        step = bench.step_of(setting, side)
        run_once(*step)
        peaks[side] = peak_allocation(lambda step=step: run_once(*step))
    # Beside the logits the head needs copies and gradients of its own weights, 16 values a token.
    head = 2 * 16 * 4 * vocab
    for side in bench.SIDES:
        took = peaks[side] - peaks[bench.BODIES]
        # One float32 tensor more or less is 9 % of mdm's: then bench.WIDE should be counted anew.
        assert 0.88 * counted[side] <= took <= 1.12 * counted[side] + head, (side, took, counted)


def test_counted_bytes_by_hand():
    # 64 MiB are 2**24 float32 values: 1024 rows of 2**14 tokens.
    counted = bench.counted_bytes(2, 512, 2**14, 600, tidal=False)
    both_models_both_streams = 2 * (2 * 1024) * 2**14 * 2
    assert counted == {
        "mdm": 600 * 2**14 * 45,
        "twin": both_models_both_streams + 600 * 2**14 * 24,
    }
    counted = bench.counted_bytes(8, 512, 2**14, 2048, tidal=True)
    assert counted["mdm"] == 1024 * 2**14 * 49


@pytest.mark.parametrize("tidal", [False, True])
def test_at_full_size_a_quarter_is_enough(tidal):
    assert bench.FULL_SIZE == {"rows": 8, "length": 512, "vocab": 151936, "masked": 2048}
    counted = bench.counted_bytes(**bench.FULL_SIZE, tidal=tidal)
    assert counted["mdm"] <= counted["twin"] / 4


# --- the measurement -----------------------------------------------------------------------------


def test_the_sides_go_first_in_turn(model, monkeypatch):
    order = []

    def side(name):
        def step(setting):
            order.append(name)
            return next(setting.denoiser.parameters()).sum()

        return step

    monkeypatch.setattr(bench, "STEPS", {name: side(name) for name in bench.STEPS})
    setting = bench.make_setting(settings_of(model))
    seconds = bench.take_turns(setting, 3)
    assert order == ["mdm", "twin", "twin", "mdm", "mdm", "twin"]
    assert {name: len(values) for name, values in seconds.items()} == {"mdm": 3, "twin": 3}


def test_the_record_and_the_card(model, monkeypatch, tmp_path):
    """Memory is faked, so that ratios are known; below it is really measured."""
    memory = {"mdm": 30 * 2**20, "twin": 110 * 2**20, bench.BODIES: 10 * 2**20}
    monkeypatch.setattr(bench, "memory_in_fresh_process", lambda side, *_: memory[side])
    settings = settings_of(model, vocab=VOCAB, tidal=True, repeats=3)
    record = bench.compare(settings, tmp_path / "records.jsonl")
    results = record["results"]
    assert results["memory_ratio"] == pytest.approx(30 / 110)
    assert results["logits_ratio"] == pytest.approx(0.2)
    assert results["without_heads_bytes"] == 10 * 2**20
    masked = results["masked_tokens"]
    counted = bench.counted_bytes(3, 40, VOCAB, masked, tidal=True)
    for side in bench.SIDES:
        r = results[side]
        assert r["activation_bytes"] == memory[side]
        assert r["logits_bytes"] == memory[side] - 10 * 2**20
        assert r["logits_bytes_counted"] == counted[side]
        assert len(r["seconds_all"]) == 3
        assert r["tokens_per_second"] == pytest.approx(120 / sorted(r["seconds_all"])[1])
    assert results["mdm"]["loss"] == pytest.approx(results["twin"]["loss"], rel=0.01)  # bf16
    assert results["n"] == 3
    pairs = zip(results["mdm"]["seconds_all"], results["twin"]["seconds_all"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    assert results["time_ratio"] == pytest.approx(ratios[1])
    mean = sum(ratios) / 3
    spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / 2)
    assert results["time_ratio_std_err"] == pytest.approx(spread / math.sqrt(3))
    full = results["full_size"]
    assert full["logits_ratio_counted"] == pytest.approx(
        full["logits_bytes_counted"]["mdm"] / full["logits_bytes_counted"]["twin"]
    )
    assert (record["kind"], record["seed"]) == ("train_step", 0)
    assert record["settings"] == dataclasses.asdict(settings)
    assert json.loads((tmp_path / "records.jsonl").read_text()) == json.loads(json.dumps(record))
    card = bench.describe(record)
    assert card.startswith("one TIDAL step in blocks of 8: ")
    assert f"(random, {VOCAB} tokens), 3 rows of 40, {masked} masked" in card
    assert re.search(r"^mdm .* 30 MiB +20 MiB", card, re.M)
    assert re.search(r"^twin .* 110 MiB +100 MiB", card, re.M)
    assert "mdm / twin: memory 0.27, logits 0.20" in card
    assert json.loads(card.splitlines()[-1])["results"]["n"] == 3


def run(*arguments):
    return CliRunner().invoke(train_step, [str(argument) for argument in arguments])


def test_memory_in_a_fresh_process_is_what_is_counted(model):
    # Large enough that logits outweigh what a process does beside.
    settings = settings_of(model, vocab=20000, rows=2, length=128, layers=1)
    twin, bodies = (
        memory_in_fresh_process(side, settings, bench.__name__) for side in ("twin", bench.BODIES)
    )
    masked = int(bench.make_setting(settings).batch.masked_BL.sum())
    counted = bench.counted_bytes(2, 128, 20000, masked, tidal=False)["twin"]
    assert 0.7 * counted < twin - bodies < 1.3 * counted


def test_the_command_measures_and_keeps_a_record(model, monkeypatch, tmp_path):
    asked = []

    def fake(side, settings, module):
        asked.append((side, module))
        return settings.vocab * len(side)

    monkeypatch.setattr(bench, "memory_in_fresh_process", fake)
    path = tmp_path / "records.jsonl"
    size = ("--rows", 2, "--length", 16, "--repeats", 1, "--layers", 1, "--no-checkpointing")
    done = run("--kind", "bd3lm", "--model", model, "--vocab", 400, *size, "--record", path)
    assert done.exit_code == 0, done.output
    assert asked == [(side, "mdm.benchmarks.train_step_blocks") for side in bench.STEPS]
    record = json.loads(path.read_text())
    assert record["settings"] == {
        "model": model,
        "layers": 1,
        "rows": 2,
        "length": 16,
        "repeats": 1,
        "checkpointing": False,
        "seed": 0,
        "kind": "bd3lm",
        "block_size": 32,
        "vocab": 400,
        "tidal": False,
    }
    assert record["results"]["time_ratio_std_err"] is None  # one pair has no spread
    assert json.loads(done.output.splitlines()[-1]) == record
    done = run("--kind", "bd3lm", "--model", model, *size, "--block-size", 4, "--tidal",
               "--vocab", 300, "--record", path)  # fmt: skip
    record = json.loads(path.read_text().splitlines()[-1])
    assert (record["settings"]["block_size"], record["settings"]["tidal"]) == (4, True)
    assert record["results"]["logits_ratio"] is None  # such a twin takes less than without heads


@pytest.mark.parametrize("option", [("--block-size", 8), ("--vocab", 300), ("--tidal",)], ids=str)
def test_options_of_blocks_are_refused_without_them(model, option):
    error = run("--model", model, *option).exception
    assert isinstance(error, ConfigError)
    assert "are for --kind bd3lm" in str(error)


def test_a_row_longer_than_the_context_is_refused(model, tmp_path):
    error = run("--kind", "bd3lm", "--model", model, "--length", 1025).exception
    assert isinstance(error, ConfigError)
    assert "--length 1025 is more than the context of" in str(error)
    assert "1024 tokens" in str(error)
