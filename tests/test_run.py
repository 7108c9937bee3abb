"""What a run refuses before its first step, although each setting is right by itself."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import tiny
from tiny_published import write_own_code
from tiny_run import ar_folder, ar_teacher, corpus_folder, recipe

from mdm.checkpoint import load_denoiser, save_denoiser
from mdm.errors import CheckpointError, ConfigError, DataError, VocabError
from mdm.fim import template
from mdm.train.estimate import describe
from mdm.train.run import initial_student, initial_vocab, new_run, require_classes, start
from mdm.train.supervision import require_room
from mdm.vocab import read_vocab

MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    return ar_folder(place / "ar"), corpus_folder(place / "corpus", files=2)


def with_marks(max_positions):
    """A teacher that fills in the middle, and its longest row."""
    vocab = read_vocab(tiny.byte_tokenizer(MARKS))
    model = tiny.tiny_model("llama", len(vocab), max_position_embeddings=max_positions)
    return dataclasses.replace(ar_teacher(model), template=template(vocab, "psm", ""))


def test_a_row_must_fit_into_the_teachers_prompt(folders):
    settings = recipe(*folders, data={"length": 24}, target={"infill": "psm"})
    require_room(settings, with_marks(28))  # three marks and the end
    with pytest.raises(ConfigError, match=r"infill=psm adds 4 tokens to rows of 24.* at most 27"):
        require_room(settings, with_marks(27))
    require_room(settings, ar_teacher(tiny.toy_ar(5)))  # not asked through a prompt


def test_weighted_masks_need_more_than_one_class(folders):
    def data(**classes):
        return SimpleNamespace(manifest={"splits": {"train": {"classes": classes}}})

    weighted = recipe(*folders, data={"language": "auto"}, masks={"where": "tilted"})
    require_classes(weighted, data(other=3, identifier=1))
    with pytest.raises(DataError, match=r"all tokens are 'other'.*data\.language=auto"):
        require_classes(weighted, data(other=3, identifier=0))
    require_classes(recipe(*folders), data(other=3, identifier=0))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ({"infill": "psm"}, VocabError, "fill"),
        ({"kind": "suffix", "candidates": 60_000}, ConfigError, "60000 tokens"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(folders, target, error, message):
    with pytest.raises(error, match=message):
        describe(recipe(*folders, target=target))


def test_a_dry_run_counts_the_branches_of_a_target(folders):
    assert "branches" not in describe(recipe(*folders))
    said = describe(recipe(*folders, target={"kind": "i_sir", "infill": "few_shot"}))
    assert "teacher's branches" in said
    assert "asked through few_shot" in said


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"family": "qwne", "infill": "psm"}, r"target\.family 'qwne'; did you mean 'qwen'"),
        ({"family": "qwen"}, r"target\.infill to psm or spm"),
        ({"family": "qwen", "infill": "few_shot"}, r"target\.infill to psm or spm"),
    ],
)
def test_a_family_needs_its_marks(folders, target, message):
    with pytest.raises(ConfigError, match=message):
        recipe(*folders, target=target)


def test_a_run_does_not_start_with_rows_that_do_not_fit_or_have_no_classes(folders, tmp_path):
    ar = ar_folder(tmp_path / "marks", extra_special=MARKS, max_position_embeddings=27)
    settings = recipe(ar, folders[1], target={"infill": "psm"})
    with pytest.raises(ConfigError, match="infill=psm adds 4 tokens"):
        start(settings, new_run(settings, tmp_path / "runs"))

    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    nameless = {"sources": [str(tmp_path / "rows.jsonl")], "language": "auto"}
    settings = recipe(*folders, data=nameless, masks={"where": "tilted"})
    with pytest.raises(DataError, match="all tokens are 'other'"):
        start(settings, new_run(settings, tmp_path / "other"))


def test_a_student_with_its_own_code_is_trained_further_with_consent(tmp_path, monkeypatch):
    monkeypatch.delenv("MDM_TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    before = set(sys.modules)
    published = write_own_code(tmp_path / "own", tmp_path / "marker")
    try:
        ours = tmp_path / "ours"
        save_denoiser(load_denoiser(published, trust_remote_code=True), ours)
        with pytest.raises(CheckpointError, match="comes with its own code"):
            initial_student(recipe(ours, tmp_path))
        consent = {"trust_remote_code": True}
        same = initial_student(recipe(ours, tmp_path, student=consent))
        assert (same.block_size, len(same.lineage)) == (32, 0)
        blocks = {**consent, "kind": "bd3lm", "block_size": 8}
        settings = recipe(ours, tmp_path, student=blocks)
        other = initial_student(settings)
        assert (other.block_size, other.attention, len(other.lineage)) == (8, "block", 1)
        assert initial_vocab(settings).fingerprint == other.vocab.fingerprint
        for student in (same, other):
            save_denoiser(student, tmp_path / "again")
            assert load_denoiser(tmp_path / "again", **consent).block_size == student.block_size
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("transformers_modules"):
                del sys.modules[name]
