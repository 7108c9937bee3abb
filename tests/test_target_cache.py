"""The cache's bytes, its reading, and training on it: the same loss and gradients as with the teacher."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file
from test_mapped import TEACHER_WORDS, vocab_of

from mdm.errors import CheckpointError, ConfigError, DataError
from mdm.train import supervision
from mdm.train.cache_targets import cache_targets
from mdm.train.run import new_run, start
from mdm.train.target_bytes import decode, encode, no_answer, width
from mdm.train.target_cache import (
    MASK_FREE,
    Manifest,
    TargetCache,
    check_cacheable,
    read_manifest,
    rows_of_a_shard,
)
from mdm.train.targets import NOT_KEPT, SoftTargets
from mdm.train.trainer import micro_batches, train, train_step

HALF_STEP = 2.0**-19


def targets_of(log_probs_NK, ids_NK=None, tail_N=None):
    log_probs_NK = torch.as_tensor(log_probs_NK, dtype=torch.float32)
    ids_NK = torch.zeros_like(log_probs_NK).long() if ids_NK is None else torch.as_tensor(ids_NK)
    tail_N = torch.zeros(len(log_probs_NK)) if tail_N is None else torch.as_tensor(tail_N)
    return SoftTargets(ids_NK, log_probs_NK, tail_N, 1.0, "left")


# --- bytes ---------------------------------------------------------------------------------------


def test_a_token_takes_388_bytes_at_top_64():
    assert width(64) == 388
    assert encode(targets_of(torch.full((3, 64), -1.0)), 64).shape == (3, 388)


def test_round_trip_within_half_a_step():
    generator = torch.Generator().manual_seed(1)
    ids_NK = torch.randint(0, 2**24, (200, 7), generator=generator)
    ids_NK[0] = 2**24 - 1
    log_probs_NK = -63.9 * torch.rand(200, 7, generator=generator) ** 3
    tail_N = torch.rand(200, generator=generator)
    tail_N[:4] = torch.tensor([0.0, 1.0, 1e-38, 1e-45])
    bytes_NW = encode(targets_of(log_probs_NK, ids_NK, tail_N), 7)
    assert bytes_NW.dtype == torch.uint8
    found_ids, found, found_tail = decode(bytes_NW)
    assert torch.equal(found_ids, ids_NK)
    assert found_ids.dtype == torch.int64
    assert torch.equal(found_tail, tail_N)  # to the bit
    assert float((found.double() - log_probs_NK.double()).abs().max()) <= HALF_STEP


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (1e-7, 0.0),  # rounding of a log_softmax
        (-HALF_STEP * 0.9, 0.0),
        (-HALF_STEP * 1.1, -2 * HALF_STEP),
        (-63.99, -63.99),
        (-64.0, -64.0),
        (-1e30, -64.0),
        (NOT_KEPT, NOT_KEPT),
    ],
)
def test_extreme_log_probabilities(value, expected):
    ids, found, _ = decode(encode(targets_of([[value, -1.0]], [[5, 6]]), 2))
    assert found[0, 0].item() == pytest.approx(expected, abs=4.1 * HALF_STEP)
    assert (found[0, 0] > NOT_KEPT) == (value > NOT_KEPT)
    assert ids.tolist() == [[5 if value > NOT_KEPT else 0, 6]]
    assert found[0, 1].item() == -1.0


def test_slots_that_are_not_there_are_unused():
    ids, found, tail = decode(encode(targets_of([[-1.0, -2.0]], [[3, 4]], [0.5]), 4))
    assert ids.tolist() == [[3, 4, 0, 0]]
    assert found.tolist() == [[-1.0, -2.0, NOT_KEPT, NOT_KEPT]]
    assert tail.tolist() == [0.5]
    ids, found, tail = decode(no_answer(3)[None])
    assert (ids.tolist(), tail.tolist()) == ([[0, 0, 0]], [0.0])
    assert found.tolist() == [[NOT_KEPT] * 3]
    with pytest.raises(AssertionError, match="slots"):
        encode(targets_of([[-1.0, -2.0]]), 1)
    with pytest.raises(AssertionError, match="three bytes"):
        encode(targets_of([[-1.0]], [[2**24]]), 1)


def test_the_bytes_are_what_the_file_says():
    """Lowest byte first: a cache can be read on any machine."""
    bytes_NW = encode(targets_of([[-1.0, NOT_KEPT]], [[0x030201, 9]], [1.0]), 2)
    assert bytes_NW.tolist() == [
        [1, 2, 3, 0, 0, 0, 0, 0, 4, 255, 255, 255, 0, 0, 128, 63]  # the last four: 1.0
    ]
    assert encode(targets_of(torch.empty(0, 2)), 2).shape == (0, 16)


@pytest.mark.parametrize(
    ("rows", "length", "top_k", "batch_rows", "expected"),
    [
        (1, 8, 4, 1, 8),
        (512, 8, 4, 1, 8),
        (512, 8, 4, 64, 64),  # a batch is not cut by a shard
        (6400, 8, 4, 8, 100),
        (10**9, 2**20, 64, 8, 1),
        (10**6, 256, 64, 8, 2702),
    ],
)
def test_shards_are_neither_few_nor_large(rows, length, top_k, batch_rows, expected):
    assert rows_of_a_shard(rows, length, top_k, batch_rows) == expected
    assert expected == 1 or expected * length * width(top_k) <= 2**28


# --- what cannot be cached -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return SimpleNamespace(
        folder=folder,
        ar=tiny_run.ar_folder(folder / "ar"),
        corpus=tiny_run.corpus_folder(folder / "corpus"),
    )


@pytest.fixture(scope="module")
def settings(place):
    """`settings(train={"steps": 9})`: a tiny recipe."""
    return lambda **sections: tiny_run.recipe(place.ar, place.corpus, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"target": {"kind": "suffix"}}, r"target\.kind=suffix has other answers for other masks"),
        ({"target": {"infill": "psm"}}, r"target\.infill=psm shows"),
        ({"objective": {"kd_lambda": 0.0}}, r"kd_lambda is 0"),
    ],
)
def test_only_answers_that_do_not_look_at_masks(settings, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        check_cacheable(settings(**sections))
    with pytest.raises(ConfigError, match=message):
        cache_targets(settings(**sections), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_cacheable(settings())
    assert set(MASK_FREE) == {"left", "mapped"}


# --- training on a cache -------------------------------------------------------------------------

SECTIONS = {
    "all positions": {},
    "some positions": {
        "objective": {"kd_positions": 3, "ce_positions": "rest"},
        "train": {"micro_rows": 3},
    },
    "many micro-batches, fewer tokens": {
        "target": {"top_k": 5},
        "train": {"micro_rows": 2, "batch_rows": 6},
    },
    "nucleus, temperature": {
        "target": {"top_p": 0.8, "top_k": 300},
        "objective": {"kd_temperature": 2.0},
    },
    "one document a row": {"data": {"packing": False, "min_tokens": 4}},
}


def gradients(recipe, runs):
    """Metrics of two steps, the second over rows in another order, and the first's gradients."""
    run = start(recipe, new_run(recipe, runs))
    run.denoiser.train()
    found = {}

    def note(*_):
        for name, parameter in run.denoiser.named_parameters():
            found.setdefault(name, parameter.grad.clone())

    run.optimizer.register_step_pre_hook(note)
    return [train_step(run, 0), train_step(run, 5)], found


def cached(recipe, folder):
    """The same recipe with the targets of a folder, and no other change."""
    return dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, cache=str(folder)))


@pytest.mark.parametrize("name", SECTIONS)
def test_training_on_a_cache_is_training_with_the_teacher(settings, tmp_path, name):
    recipe = settings(**SECTIONS[name])
    done = cache_targets(recipe, tmp_path / "cache", batch_rows=5)
    assert done.cache.num_shards > 1
    metrics, online = gradients(recipe, tmp_path / "online")
    others, offline = gradients(cached(recipe, tmp_path / "cache"), tmp_path / "cached")
    for one, other in zip(metrics, others, strict=True):
        assert one["kd"] > 0.01
        assert other == pytest.approx(one, rel=1e-5)
    scale = max(float(g.abs().max()) for g in online.values())
    for parameter, value in online.items():
        torch.testing.assert_close(value, offline[parameter], atol=1e-5 * scale, rtol=0)


def test_a_teacher_with_another_tokenizer(settings, tmp_path):
    """Its answers are cached as well, and where it has no counterpart there is none."""
    words = vocab_of(TEACHER_WORDS)
    tiny.tiny_model("qwen2", len(words), hidden=24, seed=4).save_pretrained(tmp_path / "teacher")
    words.tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher")}
    recipe = settings(teacher=teacher, target={"kind": "mapped"}, train={"micro_rows": 4})
    done = cache_targets(recipe, tmp_path / "cache")
    assert 0.5 < done.measures["target_answered"] < 1
    metrics, online = gradients(recipe, tmp_path / "online")
    others, offline = gradients(cached(recipe, tmp_path / "cache"), tmp_path / "cached")
    for one, other in zip(metrics, others, strict=True):
        assert other == pytest.approx({name: one[name] for name in other}, rel=1e-5)
    for parameter, value in online.items():
        torch.testing.assert_close(value, offline[parameter], atol=1e-5, rtol=0)


def test_a_reused_mask_is_never_a_target(place, settings, tmp_path):
    """A student whose mask is a token that the teacher knows."""
    ar = tiny_run.ar_folder(tmp_path / "ar", extra_special=("<|m|>",))
    student = {"init": ar, "mask_token": "<|m|>"}
    recipe = settings(student=student, teacher={"model": ar}, target={"top_k": 300})
    done = cache_targets(recipe, tmp_path / "cache")
    metrics, _ = gradients(recipe, tmp_path / "online")
    others, _ = gradients(cached(recipe, tmp_path / "cache"), tmp_path / "cached")
    assert others[0] == pytest.approx(metrics[0], rel=1e-5)
    ids, log_probs, _ = decode(torch.from_numpy(np.load(done.cache.path(0))).flatten(0, 1))
    used = log_probs > NOT_KEPT
    assert used.any()
    assert int(used.sum(1).max()) == 259  # all but the mask
    assert not (ids[used] == 259).any()


def test_a_whole_run_loads_no_teacher(settings, tmp_path, monkeypatch):
    recipe = settings(train={"steps": 3})
    cache_targets(recipe, tmp_path / "cache")
    train(recipe, new_run(recipe, tmp_path / "online"))
    monkeypatch.delattr(supervision, "load_teacher")
    recipe = cached(recipe, tmp_path / "cache")
    train(recipe, new_run(recipe, tmp_path / "cached"))
    online, offline = (
        load_file(tmp_path / name / "tiny" / "final" / "model.safetensors")
        for name in ("online", "cached")
    )
    for key, value in online.items():
        torch.testing.assert_close(value, offline[key], atol=1e-5, rtol=0)


# --- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(settings, place):
    """A finished cache, not to be changed."""
    return cache_targets(settings(), place.folder / "whole", made_by=("--recipe", "a b.yaml")).cache


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(whole.folder, tmp_path / "copy")
    return dataclasses.replace(whole, folder=tmp_path / "copy")


def new(recipe, runs):
    return start(recipe, new_run(recipe, runs))


def test_answers_come_in_the_order_of_the_question(settings, whole, tmp_path):
    """Row-major, whatever shards the rows are in; only what was asked for."""
    run = new(cached(settings(objective={"kd_positions": 2}), whole.folder), tmp_path)
    (batch,) = micro_batches(run, 0)
    assert len({row // whole.manifest.shard_rows for row in batch.rows}) > 1
    found = run.ask(batch, run.denoiser)
    assert len(found) == int(batch.distilled_BL.sum())
    assert found.answered_N.all()
    assert (found.temperature, found.conditioned_on) == (1.0, "left")
    places = batch.distilled_BL.nonzero().tolist()
    for number, (place, column) in enumerate(places):
        shard, inside = divmod(batch.rows[place], whole.manifest.shard_rows)
        token_W = torch.from_numpy(np.load(whole.path(shard))[inside, column])
        for value, expected in zip(found.tensors, decode(token_W[None]), strict=True):
            assert torch.equal(value[number], expected[0])
    nothing = dataclasses.replace(batch, distilled_BL=torch.zeros_like(batch.distilled_BL))
    assert len(run.ask(nothing, run.denoiser)) == 0


def test_every_maskable_position_has_an_answer_and_no_other(settings, whole, tmp_path):
    run = new(settings(), tmp_path)
    rows = range(len(run.data.train))
    bytes_RLW = np.concatenate([np.load(whole.path(s)) for s in range(whole.num_shards)])
    _, log_probs, _ = decode(torch.from_numpy(bytes_RLW).flatten(0, 1))
    answered = (log_probs > NOT_KEPT).any(-1).view(len(rows), -1)
    assert torch.equal(answered, run.data.train.batch(rows).maskable_BL)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"kd_temperature": 2.0}},
            r"with objective\.kd_temperature 1\.0, now 2\.0; ",
        ),
        ({"target": {"top_k": 9}}, r"target\.top_k 64, now 9; "),
        ({"target": {"top_p": 0.5}}, r"target\.top_p 1\.0, now 0\.5; "),
        ({"teacher": {"dtype": "bf16"}}, r'teacher\.dtype "fp32", now "bf16"; '),
        ({"data": {"max_tokens": 99}}, r"data\.max_tokens null, now 99; rows 99, now 5; "),
    ],
)
def test_a_cache_of_something_else_is_refused(settings, whole, tmp_path, sections, message):
    recipe = settings(**sections)
    with pytest.raises(ConfigError, match=message) as caught:
        new(cached(recipe, whole.folder), tmp_path)
    assert "leave target.cache empty" in str(caught.value)
    assert "\n" not in str(caught.value)
    if "data" not in sections:
        with pytest.raises(ConfigError, match=message + r"give another --output, or --overwrite"):
            cache_targets(recipe, whole.folder)


def test_another_corpus_is_refused(place, settings, whole, tmp_path):
    added = place.folder / "corpus" / "new.py"
    try:
        added.write_text("def added(a, b, c):\n    return a * b * c\n" * 3)
        with pytest.raises(ConfigError, match=r"the files of data\.sources .*, now .*; rows 99"):
            new(cached(settings(), whole.folder), tmp_path)
    finally:
        added.unlink()


def test_another_teacher_is_refused_and_one_that_is_gone(place, settings, whole, tmp_path):
    other = tiny_run.ar_folder(tmp_path / "other", seed=7)
    recipe = cached(settings(teacher={"model": other}), whole.folder)
    with pytest.raises(ConfigError, match=r"the teacher's weights \"\w{16}\", now \"\w{16}\"; "):
        new(recipe, tmp_path)
    recipe = cached(settings(teacher={"model": str(tmp_path / "gone")}), whole.folder)
    named = whole.manifest.identity["the teacher's weights"]
    with pytest.raises(CheckpointError, match=f"cannot be read.*teacher.model=weights:{named}"):
        new(recipe, tmp_path / "gone")
    recipe = cached(settings(teacher={"model": f"weights:{named}"}), whole.folder)
    run = new(recipe, tmp_path / "named")
    assert train_step(run, 0)["kd"] > 0
    recipe = cached(settings(teacher={"model": "weights:0000"}), whole.folder)
    with pytest.raises(ConfigError, match=r"the teacher's weights .*, now \"0000\"; "):
        new(recipe, tmp_path / "wrong")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_the_teachers_other_files_belong_to_it(settings, whole, tmp_path, file):
    """Same weights, another rope or chat template: other answers."""
    teacher = tmp_path / "teacher"
    shutil.copytree(settings().teacher.model, teacher)
    again = cached(settings(teacher={"model": str(teacher)}), whole.folder)
    new(again, tmp_path / "same")
    values = json.loads((teacher / file).read_text())
    values |= {"rms_norm_eps": 0.1, "chat_template": "{{ messages }}"}
    (teacher / file).write_text(json.dumps(values))
    what = "config" if file == "config.json" else "tokenizer"
    with pytest.raises(ConfigError, match=f"the teacher's {what} "):
        new(again, tmp_path / "other")


def test_a_folder_without_a_cache_is_named(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"target\.cache=.*none holds no targets; make them with"):
        new(cached(settings(), tmp_path / "none"), tmp_path)


def test_missing_shards_are_named_with_the_command(settings, copied, tmp_path):
    copied.path(2).unlink()
    copied.path(3).write_bytes(copied.path(3).read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        new(cached(settings(), copied.folder), tmp_path)
    assert str(caught.value) == (
        f"{copied.folder} lacks 2 of {copied.num_shards} shards (targets-00002.npy,"
        " targets-00003.npy; damaged: targets-00003.npy); make them with `mdm data cache-targets"
        f" --recipe 'a b.yaml' --output {copied.folder}`"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"what is this"),
        lambda path: np.save(path, np.load(path)[:-1]),
        lambda path: np.save(path, np.load(path)[:, :-1]),
        lambda path: np.save(path, np.load(path)[..., 1:]),
        lambda path: np.save(path, np.load(path).astype(np.int8)),
    ],
)
def test_shards_of_another_form_count_as_missing(copied, spoil):
    assert copied.missing() == []
    copied.require_complete()
    spoil(copied.path(1))
    assert copied.missing() == [1]
    with pytest.raises(DataError, match=r"lacks 1 of .*targets-00001"):
        copied.require_complete()


def test_what_breaks_during_a_run_is_named(settings, copied, tmp_path):
    run = new(cached(settings(), copied.folder), tmp_path)
    for shard in range(copied.num_shards):
        array = np.load(copied.path(shard))
        array[..., 2] = 255  # the highest byte of the first id
        np.save(copied.path(shard), array)
    with pytest.raises(DataError, match=r"targets-\d+\.npy is damaged: it names tokens that the"):
        train_step(run, 0)
    for shard in range(copied.num_shards):
        copied.path(shard).unlink()
    with pytest.raises(DataError, match=r"targets-\d+\.npy is missing or damaged; run `mdm data"):
        train_step(run, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 99}', "has format 99; this version of mdm reads format 1"),
    ],
)
def test_a_manifest_that_cannot_be_read(copied, text, message):
    (copied.folder / "cache.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(copied.folder)


def test_the_manifest_comes_back(tmp_path):
    assert read_manifest(tmp_path) is None
    manifest = Manifest({"rows": 17, "data.length": 5, "target.top_k": 2}, 8, ["--recipe", "x"])
    manifest.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "cache.json").read_text())["shard_rows"] == 8
    cache = TargetCache(tmp_path, manifest)
    assert cache.num_shards == 3
    assert [len(cache.rows(shard)) for shard in range(3)] == [8, 8, 1]
    assert cache.row_shape == (5, 16)
    assert cache.missing() == [0, 1, 2]
