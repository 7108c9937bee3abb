"""Teachers in few bits, and teachers whose weights stay in CPU memory: near the plain one, or equal."""

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_run import ar_folder, ar_teacher, corpus_folder, recipe, tiny_denoiser
from tiny_targets import question, random_proposals

from mdm.checkpoint import QUANTIZATIONS, load_ar
from mdm.errors import ConfigError
from mdm.train.recipe import TeacherSettings
from mdm.train.run import new_run, start
from mdm.train.sharding import check_sharding
from mdm.train.supervision import open_teacher, place
from mdm.train.targets import TargetSettings
from mdm.train.teachers.ar import load_foreign, load_teacher
from mdm.train.teachers.kinds import TARGETS, answer
from mdm.train.trainer import train, train_step

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher wide enough that a block of weights is a part of a matrix, and a corpus."""
    place = tmp_path_factory.mktemp("teacher")
    return ar_folder(place / "ar", hidden=64), corpus_folder(place / "corpus")


@pytest.fixture(scope="module")
def student(folders):
    return tiny_denoiser(folders[0])


def asked(student, kind):
    proposals = random_proposals(4, torch.Generator().manual_seed(0), student.mask_id)
    return question([[256, *b"def f()"]], [2, 3, 5, 7], proposals=proposals), TargetSettings(
        kind=kind, top_k=10**6, candidates=32, student_candidates=4, fills=8
    )


def targets(teacher, student, kind):
    asking, settings = asked(student, kind)
    return answer(teacher, asking, settings=settings, temperature=1.0)


@pytest.mark.parametrize("kind", TARGETS)
def test_an_offloaded_teacher_answers_the_same(folders, student, kind):
    """Every weight is away between forwards, and every way to ask brings it back."""
    plain = load_teacher(folders[0], student.vocab, dtype=torch.float32)
    away = load_teacher(folders[0], student.vocab, dtype=torch.float32)
    place(away, TeacherSettings(model=folders[0], dtype="fp32", offload=True))
    assert {parameter.device.type for parameter in away.model.parameters()} == {"meta"}
    expected, found = targets(plain, student, kind), targets(away, student, kind)
    assert torch.equal(found.token_ids_NK, expected.token_ids_NK)
    assert torch.equal(found.log_probs_NK, expected.log_probs_NK)
    assert {parameter.device.type for parameter in away.model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_offloaded(family):
    x_BL = torch.arange(12)[None]
    wanted_BL = torch.zeros_like(x_BL).bool()
    wanted_BL[:, 3:6] = True
    teacher = ar_teacher(tiny.tiny_model(family, 50).eval())
    with torch.no_grad():
        expected = teacher.head(teacher.rows(x_BL, wanted_BL, torch.zeros_like(x_BL)))
        place(teacher, TeacherSettings(offload=True))
        found = teacher.head(teacher.rows(x_BL, wanted_BL, torch.zeros_like(x_BL)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_offloading_makes_no_copy(tmp_path, student, tied):
    folder = ar_folder(tmp_path, hidden=64, tie_word_embeddings=tied)
    teacher = load_teacher(folder, student.vocab, dtype=torch.float32)
    before = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    expected = targets(teacher, student, "left").log_probs_NK
    place(teacher, TeacherSettings(offload=True))
    kept = {
        tensor.data_ptr()
        for module in teacher.model.modules()
        if (hook := getattr(module, "_hf_hook", None)) is not None
        and (weights := getattr(hook, "weights_map", None)) is not None
        for tensor in weights.dataset.values()
    }
    assert kept == before
    assert torch.equal(targets(teacher, student, "left").log_probs_NK, expected)


def total_variation(one, other):
    """Mean over positions; both keep all tokens, in their own order."""
    dense = []
    for found in (one, other):
        full_NV = torch.zeros(len(found), int(found.token_ids_NK.max()) + 1)
        dense.append(full_NV.scatter_add(1, found.token_ids_NK, found.log_probs_NK.exp()))
    return float((dense[0] - dense[1]).abs().sum(1).mean() / 2)


@needs_bitsandbytes
def test_a_quantised_teacher_is_near(folders, student, caplog):
    """int8 rounds a weight by less than a hundredth of the largest, nf4 by about a tenth."""
    plain = load_teacher(folders[0], student.vocab, dtype=torch.bfloat16)
    apart = {}
    for name in QUANTIZATIONS:
        few = load_teacher(folders[0], student.vocab, dtype=torch.bfloat16, quantization=name)
        assert few.num_tokens == plain.num_tokens
        assert few.plain_head
        assert few.model.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in few.model.parameters())
        assert few.model.get_output_embeddings().weight.dtype == torch.bfloat16
        answers = (targets(teacher, student, "left") for teacher in (plain, few))
        apart[name] = total_variation(*answers)
    # The weights are spiky, so that small changes show; unrelated targets would be .95 apart.
    assert 1e-4 < apart["int8"] < 0.05
    assert apart["int8"] < apart["nf4"] < 0.5
    assert "inputs will be cast" not in caplog.text


@needs_bitsandbytes
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantised_weights_are_small(folders, name):
    """Bytes of a linear layer, which the estimate of --dry-run counts on."""
    from mdm.train.estimate import BYTES

    model, _ = load_ar(folders[0], dtype=torch.bfloat16, quantization=name)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.element_size() == 1
    numbers = 64 * 128
    state = getattr(weight, "quant_state", None)
    scales = state.absmax.numel() * state.absmax.element_size() if state else 0
    assert weight.numel() + scales == BYTES[name] * numbers


@needs_bitsandbytes
@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_can_ask_a_quantised_teacher(folders, student, kind):
    teacher = load_teacher(folders[0], student.vocab, dtype=torch.bfloat16, quantization="nf4")
    found = targets(teacher, student, kind)
    torch.testing.assert_close(found.log_probs_NK.exp().sum(1), torch.ones(4))


@needs_bitsandbytes
def test_a_foreign_teacher_can_be_quantised(folders):
    teacher = load_foreign(folders[0], dtype=torch.float32, quantization="int8")
    assert teacher.vocab is not None
    assert teacher.model.model.layers[0].mlp.down_proj.weight.dtype == torch.int8


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": True},
        pytest.param({"quantization": "int8"}, marks=needs_bitsandbytes),
        pytest.param({"quantization": "nf4", "dtype": "bf16"}, marks=needs_bitsandbytes),
    ],
    ids=str,
)
def test_a_run(folders, tmp_path, settings):
    """The recipe's settings arrive, and training goes through; offloading changes no bit."""
    changed = recipe(*folders, teacher=settings, train={"steps": 2, "precision": "bf16"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = start(changed, new_run(changed, tmp_path / "changed"))
        found = train_step(run, 0)
    plain = recipe(*folders, train={"steps": 2, "precision": "bf16"})
    expected = train_step(start(plain, new_run(plain, tmp_path / "plain")), 0)
    assert found["ce"] == expected["ce"]
    if "offload" in settings:
        assert found["kd"] == expected["kd"]
    else:
        assert found["kd"] != expected["kd"]
        assert found["kd"] == pytest.approx(expected["kd"], rel=0.5)
    train(changed, tmp_path / "changed" / "tiny")


@pytest.mark.parametrize("kind", ["mapped", "embedding"])
def test_an_offloaded_teacher_with_another_tokenizer(folders, tmp_path, kind):
    found = {}
    for name, offload in (("away", True), ("here", False)):
        chosen = recipe(*folders, target={"kind": kind}, teacher={"offload": offload})
        found[name] = train_step(start(chosen, new_run(chosen, tmp_path / name)), 0)
    assert found["away"]["kd"] == found["here"]["kd"] > 0


def test_a_quantised_model_stays_where_it_was_loaded():
    """bitsandbytes ties its layers to a device, and some releases refuse to move them."""
    moved = []
    teacher = SimpleNamespace(model=SimpleNamespace(to=moved.append))
    place(teacher, TeacherSettings(quantization="int8"))
    assert not moved
    place(teacher, TeacherSettings())
    assert moved == [torch.device("cpu")]


def test_the_settings_reach_the_teacher(folders, student, monkeypatch):
    seen = {}

    def spied(_source, _vocab, **options):
        seen.update(options)
        raise ZeroDivisionError

    monkeypatch.setattr("mdm.train.supervision.load_teacher", spied)
    with pytest.raises(ZeroDivisionError):
        open_teacher(recipe(*folders, teacher={"quantization": "nf4"}), student.vocab)
    assert seen["quantization"] == "nf4"
    assert seen["device"] == torch.device("cpu")


# --- what is refused --------------------------------------------------------------------------------


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"GGUF file, which is quantised already.*int8 needs"):
        load_ar(str(tmp_path / "model.gguf"), quantization="int8")


def test_bitsandbytes_missing(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(
        ConfigError, match=r"nf4 needs bitsandbytes: `pip install mdm-code\[quant\]"
    ):
        load_ar(folders[0], quantization="nf4")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teacher": {"quantization": "int4"}},
            r"teacher\.quantization 'int4'; did you mean 'int8'",
        ),
        ({"teacher": {"quantization": "nf4", "offload": True}}, "do not go together"),
        (
            {"teacher": {"quantization": "nf4"}, "train": {"sharding": "full"}},
            r"sharding=full shares out .* teacher\.quantization",
        ),
        (
            {"teacher": {"offload": True}, "train": {"sharding": "full"}},
            r"sharding=full shares out .* teacher\.offload",
        ),
        ({"train": {"lora_alpha": 8}}, r"lora_alpha=8 scales adapters, but .*lora_rank is 0"),
    ],
)
def test_settings_that_do_not_go_together(folders, sections, message):
    with pytest.raises(ConfigError, match=message):
        check_sharding(recipe(*folders, **sections))


def test_few_bits_and_sharding_go_together_with_a_cache(folders):
    """Then no teacher is loaded, but the cache was made by one in few bits."""
    both = {"teacher": {"quantization": "nf4"}, "train": {"sharding": "full"}}
    check_sharding(recipe(*folders, **both, target={"cache": "somewhere"}))
    check_sharding(recipe(*folders, **both, objective={"kd_lambda": 0.0}))
