"""Students and teachers behind the same calls, and what tells them apart in the store."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_run import ar_folder, tiny_denoiser
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mdm import autoregressive, likelihood
from mdm.autoregressive import Autoregressive, DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.checkpoint import save_denoiser, weights_hash
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError, RequestError
from mdm.eval.models import STUDENT, TEACHER, ModelSettings, model_settings, open_evaluated
from mdm.generate import Hole, fill
from mdm.likelihood import LikelihoodSettings, Pair

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
START = 256
SETTINGS = ModelSettings(likelihood=LikelihoodSettings(mc_samples=4))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return ar_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def fim_folder(tmp_path_factory):
    return ar_folder(tmp_path_factory.mktemp("fim"), extra_special=FIM_TOKENS)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("student") / "model"
    save_denoiser(tiny_denoiser(teacher_folder), folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(student_folder):
    return open_evaluated(student_folder, SETTINGS, "cpu")


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return open_evaluated(teacher_folder, SETTINGS, "cpu")


def hole(before, length, after="", key=0, stop=()):
    return Hole((START, *before.encode()), length, tuple(after.encode()), stop, ("t", key))


# --- opening -------------------------------------------------------------------------------------


def test_a_folder_of_ours_is_a_student(student, student_folder):
    assert student.kind == STUDENT
    assert isinstance(student.model, Denoiser)
    assert student.identity["kind"] == STUDENT
    assert student.identity["weights"] == weights_hash(student_folder)
    assert student.vocab is student.model.vocab
    assert student.max_length == 1024


def test_any_other_model_is_a_teacher(teacher, teacher_folder):
    assert teacher.kind == TEACHER
    assert isinstance(teacher.model, Autoregressive)
    assert teacher.identity["kind"] == TEACHER
    assert teacher.identity["weights"] == weights_hash(teacher_folder)
    assert teacher.identity["vocab"] == teacher.vocab.fingerprint[:16]
    assert teacher.max_length == 1024


def test_other_weights_have_another_identity(student, tmp_path, teacher_folder):
    denoiser = tiny_denoiser(teacher_folder)
    with torch.no_grad():
        next(denoiser.parameters()).add_(1.0)
    save_denoiser(denoiser, tmp_path / "other")
    other = open_evaluated(str(tmp_path / "other"), SETTINGS, "cpu")
    differ = [name for name in other.identity if other.identity[name] != student.identity[name]]
    assert differ == ["weights"]


@pytest.mark.parametrize("name", ["student_folder", "teacher_folder"])
def test_the_type_of_numbers_is_part_of_it(name, request):
    settings = ModelSettings(dtype="bfloat16")
    evaluated = open_evaluated(request.getfixturevalue(name), settings, "cpu")
    network = evaluated.model.model
    assert next(network.parameters()).dtype == torch.bfloat16
    assert evaluated.identity["dtype"] == "bfloat16"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(teacher_folder, device):
    with pytest.raises(ConfigError, match=f"cannot use --device '{device}'"):
        open_evaluated(teacher_folder, SETTINGS, device)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ({"batch_size": 0}, "batch_size must be .*1; got 0"),
        ({"window": 1}, "window must be .*2; got 1"),
        ({"gen_length": 0}, "gen_length must be .*1; got 0"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelSettings(**values)


def test_settings_from_one_list_of_names():
    found = model_settings(steps=8, cfg_scale=0.5, mc_samples=3, seed=4, gen_length=9)
    assert found.sampler == SamplerSettings(steps=8, cfg_scale=0.5)
    assert found.likelihood == LikelihoodSettings(cfg_scale=0.5, mc_samples=3, seed=4)
    assert (found.seed, found.gen_length) == (4, 9)
    assert model_settings() == ModelSettings()


def test_an_unknown_name_in_it_is_refused():
    with pytest.raises(ConfigError, match="unknown setting 'mc_sample'; did you mean 'mc_samples'"):
        model_settings(mc_sample=3)
    with pytest.raises(ConfigError, match="unknown setting 'temperature'"):
        model_settings(temperature=0.5)


def test_what_opens_a_text(student, teacher, teacher_folder, tmp_path):
    assert student.opening == (START,)
    assert teacher.opening == ()  # its tokenizer adds nothing
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", START)]
    )
    shutil.copytree(teacher_folder, tmp_path / "adds")
    tokenizer.save_pretrained(tmp_path / "adds")
    assert open_evaluated(str(tmp_path / "adds"), SETTINGS, "cpu").opening == (START,)


# --- completing ----------------------------------------------------------------------------------

HOLES = [hole("def f(x):", 5, key=1), hole("a", 2, key=2), hole("if x:\n", 9, key=3)]


def test_a_student_fills_with_its_sampler(student):
    settings = dataclasses.replace(SETTINGS, sampler=SamplerSettings(steps=2), batch_size=2)
    evaluated = dataclasses.replace(student, settings=settings)
    wanted = [hole("a = ", 4, "\nb", key=1), hole("x", 2, "y" * 9, key=2), hole("", 3, ")", key=3)]
    noisy = SamplerSettings(steps=2, temperature=0.7, top_p=0.9)
    alone = [fill(student.model, [one], noisy)[0] for one in wanted]
    seen = {}
    found = evaluated.complete(wanted, temperature=0.7, top_p=0.9, done=seen.__setitem__)
    assert [result.token_ids for result in found] == [result.token_ids for result in alone]
    assert [len(result.token_ids) for result in found] == [4, 2, 3]
    assert seen == dict(enumerate(found))
    assert {result.nfe for result in found} == {2}


def test_a_student_has_the_temperature_of_the_request(student):
    settings = dataclasses.replace(SETTINGS, sampler=SamplerSettings(temperature=5.0))
    evaluated = dataclasses.replace(student, settings=settings)
    (greedy,) = evaluated.complete([hole("a", 8, ")")])
    assert greedy.token_ids == student.complete([hole("a", 8, ")", key=9)])[0].token_ids


def test_a_teacher_continues(teacher):
    seen = {}
    found = teacher.complete(HOLES, temperature=0.8, top_p=0.9, done=seen.__setitem__)
    settings = DecodingSettings(0.8, 0.9)
    alone = [autoregressive.write(teacher.model, [one], settings)[0] for one in HOLES]
    assert [result.token_ids for result in found] == [result.token_ids for result in alone]
    assert seen == dict(enumerate(found))


def test_a_teacher_is_not_told_silently_of_half_the_hole(teacher):
    with pytest.raises(ConfigError, match=r"no fill-in-the-middle tokens.*left-only"):
        teacher.complete([hole("a", 2, "b")])
    with pytest.raises(RequestError, match="cannot see the 1 tokens"):
        autoregressive.write(teacher.model, [hole("a", 2, "b")], DecodingSettings())


def test_a_teacher_that_knows_fim_sees_both_sides(fim_folder):
    evaluated = open_evaluated(fim_folder, SETTINGS, "cpu")
    prefix, suffix, middle = evaluated.vocab.tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    wanted = hole("ab", 3, "c", key=4, stop=("\n",))
    seen = evaluated.seen_by_teacher(wanted)
    assert seen.before == (START, prefix, *b"ab", suffix, *b"c", middle)
    assert (seen.length, seen.after, seen.stop, seen.key) == (3, (), ("\n",), ("t", 4))
    assert evaluated.seen_by_teacher(HOLES[0]) == HOLES[0]  # nothing after it
    (found,) = evaluated.complete([wanted])
    (expected,) = autoregressive.write(evaluated.model, [seen], DecodingSettings())
    assert found == expected


def test_a_teacher_ends_where_its_family_closes_the_middle(tmp_path, fim_folder):
    source = ar_folder(tmp_path, extra_special=(*FIM_TOKENS, "<|endoftext|>"))
    model = open_evaluated(source, SETTINGS, "cpu").model
    closes = model.vocab.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert closes in model.end_ids
    assert model.end_ids - {closes} == open_evaluated(fim_folder, SETTINGS, "cpu").model.end_ids


# --- scoring -------------------------------------------------------------------------------------

PAIRS = [Pair((START, *b"def "), tuple(b"f()"), "one"), Pair((START,), tuple(b"x"), "two")]


def test_a_student_scores_a_bound(student):
    told = {}
    found = student.score(PAIRS, done=told.__setitem__)
    assert found == likelihood.log_likelihood(student.model, PAIRS, SETTINGS.likelihood)
    assert [result.is_bound for result in found] == [True, False]  # one token has one mask
    assert [told[i] for i in range(2)] == found


def test_a_teacher_scores_exactly(teacher):
    told = {}
    found = teacher.score(PAIRS, done=told.__setitem__)
    assert [told[i] for i in range(2)] == found
    for pair, result in zip(PAIRS, found, strict=True):
        ids = torch.tensor([pair.prompt + pair.answer])
        with torch.no_grad():
            log_probs = teacher.model.model(ids).logits[0].log_softmax(-1)
        first = len(pair.prompt)
        expected = sum(float(log_probs[i - 1, ids[0, i]]) for i in range(first, ids.shape[1]))
        assert result.value == pytest.approx(expected, rel=1e-5)
        assert not result.is_bound


def test_the_batch_of_a_likelihood_is_a_setting(teacher):
    small = dataclasses.replace(SETTINGS, likelihood=LikelihoodSettings(batch_tokens=1))
    calls = []
    hook = teacher.model.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    dataclasses.replace(teacher, settings=small).score(PAIRS)
    hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"\n *|.", "def f():\n", True),  # one token of a newline and the spaces after it
        (r"\n *|.", "def f():", False),
        (r"\n|.", "def f():\n", False),
        (r"\n *|.", "", False),
    ],
)
def test_a_prompt_that_ends_inside_a_token(student, pattern, text, expected):
    vocab = SimpleNamespace(encode=lambda given: re.findall(pattern, given))
    model = SimpleNamespace(vocab=vocab)
    assert dataclasses.replace(student, model=model).joins_end(text) is expected


def test_identity_holds_what_decides_answers(student, student_folder, tmp_path):
    """Not the weights alone: the same ones under another shift or architecture are another model."""
    copy = tmp_path / "copy"
    shutil.copytree(student_folder, copy)
    settings = ModelSettings()
    same = open_evaluated(str(copy), settings).identity
    assert same == {**student.identity, "dtype": settings.dtype}
    with_blocks(copy, "block")
    other = open_evaluated(str(copy), settings).identity
    assert other["weights"] == same["weights"]
    assert other["config"] != same["config"]


# --- models with blocks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block_folder(tmp_path_factory, student_folder):
    """The student's weights behind the attention of blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "model"
    shutil.copytree(student_folder, folder)
    with_blocks(folder, "block")
    return str(folder)


def with_blocks(folder, attention):
    """Change what the folder says about its model."""
    facts = json.loads((folder / "mdm.json").read_text())
    facts |= {"block_size": 4, "attention": attention}
    (folder / "mdm.json").write_text(json.dumps(facts))


def test_attention_is_part_of_the_identity(block_folder, tmp_path):
    shutil.copytree(block_folder, tmp_path / "other")
    with_blocks(tmp_path / "other", "context_causal")
    one, other = (
        open_evaluated(str(folder), SETTINGS) for folder in (block_folder, tmp_path / "other")
    )
    assert (one.model.attention, other.model.attention) == ("block", "context_causal")
    assert one.identity["weights"] == other.identity["weights"]
    assert one.identity["config"] != other.identity["config"]


def test_a_block_model_fills_and_scores_as_the_library_does(block_folder):
    evaluated = open_evaluated(block_folder, dataclasses.replace(SETTINGS, batch_size=2), "cpu")
    assert evaluated.kind == STUDENT
    wanted = [hole("a = ", 9, "\nb", key=1), hole("x", 2, key=2), hole("", 7, ")", key=3)]
    noisy = SamplerSettings(temperature=0.7)
    alone = [fill(evaluated.model, [one], noisy)[0] for one in wanted]
    found = evaluated.complete(wanted, temperature=0.7)
    assert [result.token_ids for result in found] == [result.token_ids for result in alone]
    pairs = [Pair((START, *b"de"), tuple(b"f f()"), "one"), Pair((START,), tuple(b"x"), "two")]
    exact = dataclasses.replace(SETTINGS, likelihood=LikelihoodSettings(mc_samples=15))
    found = dataclasses.replace(evaluated, settings=exact).score(pairs)
    assert [result.estimator for result in found] == ["exact", "exact"]
    assert found == likelihood.log_likelihood(evaluated.model, pairs, exact.likelihood)


def test_what_does_not_go_with_blocks_is_said_before_anything_is_asked(block_folder):
    for values, message in (
        ({"block_length": 3}, "divisor of 4"),
        ({"compat": "llada"}, "models without blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_evaluated(block_folder, model_settings(**values), "cpu")
    open_evaluated(block_folder, model_settings(block_length=2), "cpu")
