"""Linear layers in 8 bits: against their definition, in every kind of model, and what is refused.

Shapes: M tokens, K inputs, N outputs, L length, V vocabulary.
"""

import copy
import gc
import weakref

import pytest
import torch
from students import random_ar, random_student, word_vocab
from tiny import FAMILIES, tiny_model
from tiny_run import ar_folder, tiny_denoiser
from torch import nn
from transformers.pytorch_utils import Conv1D

from mdm import autoregressive, int8, likelihood
from mdm.autoregressive import Autoregressive, DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.checkpoint import save_denoiser
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.eval.models import ModelSettings, model_settings, open_evaluated
from mdm.generate import Hole, fill
from mdm.int8 import Int8Linear, check_quantization, is_quantised, num_weights, quantise
from mdm.likelihood import LikelihoodSettings, Pair
from mdm.serve.models import open_student, open_teacher

pytestmark = pytest.mark.skipif(
    int8.ENGINE not in torch.backends.quantized.supported_engines, reason="for x86 processors"
)


# --- a layer -------------------------------------------------------------------------------------


def slow_linear(x_K, weight_NK, bias_N=None, levels=255):
    """The definition, number by number, in float64."""
    x_K, weight_NK = x_K.double(), weight_NK.double()
    low, high = float(x_K.min()), float(x_K.max())
    step = (high - low) / levels
    whole_K = torch.tensor([round(float(x) / step) for x in x_K]).double()
    whole_K = whole_K.clamp(round(low / step), round(low / step) + 255)
    y = []
    for n, weight_K in enumerate(weight_NK):
        scale = float(weight_K.abs().max()) / 127
        whole = torch.tensor([round(float(w) / scale) for w in weight_K]).double()
        y.append(
            step * scale * float(whole @ whole_K) + (0 if bias_N is None else float(bias_N[n]))
        )
    return torch.tensor(y, dtype=torch.float64)


def layer_of(outputs=24, inputs=40, *, bias=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return linear, Int8Linear(linear.weight.detach(), linear.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [0.0, 3.0, -50.0])
def test_a_layer_is_its_definition(bias, shift):
    linear, quantised = layer_of(bias=bias)
    x_MK = torch.randn(6, 40) + shift
    x_MK[1, 3] = 200.0  # leaves the others few steps
    found_MN = quantised(x_MK)
    bias_N = None if linear.bias is None else linear.bias.detach()
    for x_K, found_N in zip(x_MK, found_MN, strict=True):
        expected_N = slow_linear(x_K, linear.weight.detach(), bias_N)
        # One rounding may fall to the other side.
        step = float(x_K.max() - x_K.min()) / 255
        near = 1.01 * step * float(linear.weight.detach().abs().max()) + 1e-4 * abs(shift)
        assert (found_N.double() - expected_N).abs().max() < near
        assert (found_N.double() - expected_N).abs().median() < 1e-4 + 1e-5 * abs(shift)
    exact_MN = linear(x_MK).detach()
    error = (found_MN - exact_MN).std(dim=1) / exact_MN.std(dim=1)
    assert error[0] < 0.05


@pytest.mark.parametrize("value", [0.0, 2.5, -1e4])
def test_a_token_that_is_all_the_same(value):
    linear, quantised = layer_of()
    x_MK = torch.full((2, 40), value)
    found_MN = quantised(x_MK)
    assert torch.allclose(found_MN, linear(x_MK), atol=0.02 * abs(value) + 1e-12)
    assert value != 0 or not found_MN.any()


def test_zero_inputs_stay_zero():
    """Most of a token that has one huge number is close to zero, and must not err all in one direction."""
    _, quantised = layer_of(outputs=4, inputs=64)
    x_MK = torch.zeros(1, 64)
    x_MK[0, 0], x_MK[0, 1] = 100.0, -37.0
    only_NK = torch.zeros(4, 64)
    only_NK[:, 2:] = 1.0
    blind = Int8Linear(only_NK, None)
    assert blind(x_MK).abs().max() < 1e-3
    assert quantised(x_MK).abs().max() > 1


def test_any_number_of_dimensions_and_no_rows():
    _, quantised = layer_of()
    x = torch.randn(2, 3, 40)
    assert quantised(x).shape == (2, 3, 24)
    assert torch.equal(quantised(x)[1, 2], quantised(x[1, 2:])[0])
    assert quantised(x[:, :0]).shape == (2, 0, 24)


def test_a_token_does_not_depend_on_its_neighbours():
    _, quantised = layer_of()
    x_MK = torch.randn(5, 40)
    alone = quantised(x_MK[:1])
    x_MK[1:] *= 1000
    assert torch.equal(quantised(x_MK)[:1], alone)


def test_what_is_no_number_stays_none():
    _, quantised = layer_of()
    x_MK = torch.randn(2, 40)
    x_MK[0, 3] = float("nan")
    found_MN = quantised(x_MK)
    assert found_MN[0].isnan().all()
    assert found_MN[1].isfinite().all()


def test_an_output_without_weights():
    weight_NK = torch.randn(3, 8)
    weight_NK[1] = 0
    found_MN = Int8Linear(weight_NK, None)(torch.randn(4, 8))
    assert not found_MN[:, 1].any()
    assert found_MN.isfinite().all()


def test_where_sums_of_255_overflow_there_are_127_steps(monkeypatch):
    """A processor without VNNI, played by a product whose pairs stop at 16 bits."""

    def saturating(q, packed):
        pairs = 127 * (q.round()[..., ::2] + q.round()[..., 1::2])  # all weights are 127
        return pairs.clamp(max=2**15 - 1).sum(-1, keepdim=True).div(127).expand(-1, 8)

    int8._levels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(int8, "_product", saturating)
        assert int8._levels() == 127
        linear, quantised = layer_of()
    int8._levels.cache_clear()
    assert quantised.levels == 127
    x_MK = torch.randn(3, 40)
    for x_K, found_N in zip(x_MK, quantised(x_MK), strict=True):
        expected_N = slow_linear(x_K, linear.weight.detach(), levels=127)
        assert torch.allclose(found_N.double(), expected_N, atol=1e-4)
    assert int8._levels() in (255, 127)


def test_the_engine_of_torch_is_as_it_was():
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "onednn"
        layer_of()
        assert torch.backends.quantized.engine == "onednn"
    finally:
        torch.backends.quantized.engine = before


def test_a_copy_is_a_layer_of_its_own():
    _, quantised = layer_of(bias=True)
    x_MK = torch.randn(2, 40)
    assert torch.equal(copy.deepcopy(quantised)(x_MK), quantised(x_MK))


def test_there_is_no_weight_to_take_by_mistake():
    _, quantised = layer_of()
    with pytest.raises(AttributeError, match="weight"):
        _ = quantised.weight


# --- a network -----------------------------------------------------------------------------------


def kinds_of(network):
    return {type(layer) for layer in network.modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    student = random_student(family, shift=True)
    float_student = copy.deepcopy(student)
    assert quantise(student) is student
    assert not {nn.Linear, Conv1D} & kinds_of(student.model)
    assert is_quantised(student.model)
    assert not is_quantised(float_student.model)
    x_BL = torch.tensor([[1, 2, 3, 4, student.mask_id, 5]])
    with torch.no_grad():
        ours, exact = (
            one(x_BL, x_BL == one.mask_id).log_softmax(-1) for one in (student, float_student)
        )
    known = exact.isfinite()
    assert torch.equal(ours.isfinite(), known)
    change = (ours - exact)[known].abs().max()
    assert 0 < change < 0.35


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_heads_that_are_more_than_a_layer(family):
    student = quantise(random_student(family))
    assert not student.plain_head
    (done,) = fill(student, [Hole((1, 2), 4, (3,))], SamplerSettings())
    assert len(done.token_ids) == 4


def test_weights_are_freed_and_the_embedding_is_kept():
    ar = random_ar(tie_word_embeddings=True)
    network = ar.model
    count, embedding = num_weights(network), network.get_input_embeddings().weight.detach().clone()
    layers = [weakref.ref(layer) for layer in network.modules() if type(layer) is nn.Linear]
    weights = [weakref.ref(layer().weight) for layer in layers if layer() is not network.lm_head]
    before = int8.weight_bytes(network)
    quantise(ar)
    gc.collect()
    assert not any(layer() for layer in layers)
    assert all(weight() is None for weight in weights)
    assert torch.equal(network.get_input_embeddings().weight, embedding)
    assert network.dtype == torch.float32
    assert num_weights(network) == count
    assert network.lm_head.tied
    assert int8.weight_bytes(network) < 0.7 * before


def test_a_head_of_its_own_is_counted():
    ar = random_ar(tie_word_embeddings=False)
    count = num_weights(ar.model)
    assert count == sum(parameter.numel() for parameter in ar.model.parameters())
    quantise(ar)
    assert not ar.model.lm_head.tied
    assert num_weights(ar.model) == count


def test_bytes():
    ar = random_ar(tie_word_embeddings=False)
    network = ar.model
    assert int8.weight_bytes(network) == 4 * num_weights(network) + sum(
        buffer.nbytes for buffer in network.buffers()
    )
    linear = [layer for layer in network.modules() if type(layer) is nn.Linear]
    matrices = sum(layer.weight.numel() for layer in linear)
    before = int8.weight_bytes(network)
    quantise(ar)
    # A byte each, and a scale and two sums (one is a buffer) for each output.
    outputs = sum(layer.out_features for layer in linear)
    assert int8.weight_bytes(network) == before - 3 * matrices + 12 * outputs


def test_weights_of_a_file_let_it_go(tmp_path):
    """What is not replaced has memory of its own, or the whole file would stay mapped."""
    from mdm.checkpoint import load_ar

    network, _ = load_ar(ar_folder(tmp_path))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in network.named_parameters()}
    ar = Autoregressive(network, word_vocab())
    quantise(ar)
    left = dict(network.named_parameters())
    assert left
    for name, parameter in left.items():
        assert parameter.data_ptr() != before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert not parameter.requires_grad


def test_it_cannot_be_saved(tmp_path):
    student = tiny_denoiser(ar_folder(tmp_path / "ar"))
    quantise(student)
    with pytest.raises(ConfigError, match="cannot be saved"):
        save_denoiser(student, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_layers_that_compute_something_else_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ar = random_ar()
    layer = ar.model.model.layers[0].mlp
    doubled = Doubled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    layer.up_proj = doubled
    quantise(ar)
    assert layer.up_proj is doubled
    assert isinstance(layer.down_proj, Int8Linear)


# --- everything after ----------------------------------------------------------------------------

HOLES = [
    Hole((1, 2, 3), 6, key=("a",)),
    Hole((4,), 3, key=("b",)),
    Hole((1, 5, 6, 2), 9, key=("c",)),
]


@pytest.mark.parametrize(
    ("block_size", "settings"),
    [
        (None, SamplerSettings()),
        (None, SamplerSettings(steps=3, temperature=0.8)),
        (None, SamplerSettings(cfg_scale=1.0)),
        (4, SamplerSettings()),
        (4, SamplerSettings(temperature=1.0, top_p=0.9)),
        (4, SamplerSettings(threshold=0.3)),
    ],
)
def test_sampling_in_a_batch_is_sampling_alone(block_size, settings):
    student = quantise(random_student(block_size=block_size, shift=True, layers=2, hidden=32))
    together = fill(student, HOLES, settings, batch_size=3)
    alone = [fill(student, [hole], settings)[0] for hole in HOLES]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    assert [len(done.token_ids) for done in together] == [6, 3, 9]


@pytest.mark.parametrize("block_size", [None, 4])
def test_likelihoods_are_near(block_size):
    student = random_student(block_size=block_size, shift=True)
    pairs = [Pair((1, 2), (3, 4, 5), "a"), Pair((6,), (7, 2, 1, 4, 3), "b")]
    settings = LikelihoodSettings(mc_samples=40)
    exact = likelihood.log_likelihood(student, pairs, settings)
    found = likelihood.log_likelihood(quantise(student), pairs, settings)
    for one, other in zip(found, exact, strict=True):
        assert one.value == pytest.approx(other.value, abs=0.15)
        assert one.value != other.value
    alone = [likelihood.log_likelihood(student, [pair], settings)[0].value for pair in pairs]
    assert [one.value for one in found] == pytest.approx(alone, abs=1e-3)


def test_an_ar_model_writes_and_scores():
    ar = random_ar(layers=2)
    pairs = [Pair((1, 2), (3, 4, 5)), Pair((6,), (7, 2, 1, 4))]
    exact = autoregressive.log_likelihood(ar, pairs)
    quantise(ar)
    found = autoregressive.log_likelihood(ar, pairs)
    for one, other in zip(found, exact, strict=True):
        assert one.value == pytest.approx(other.value, abs=0.15)
        assert one.value != other.value
    settings = DecodingSettings(temperature=0.7, suppress_eos=True)
    together = autoregressive.write(ar, HOLES, settings)
    alone = [autoregressive.write(ar, [hole], settings)[0] for hole in HOLES]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]


# --- what is refused -----------------------------------------------------------------------------


def test_nothing_is_asked_for():
    student = random_student()
    assert quantise(student, "") is student
    assert not is_quantised(student.model)
    check_quantization("", "bfloat16")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("int8", "float32", "unknown quantization 'int8'; did you mean 'int8_dynamic'"),
        ("nf4", "float32", r"unknown quantization 'nf4'.*known: int8_dynamic"),
        ("int8_dynamic", "bfloat16", "computes in float32 between its layers; got dtype=bfloat16"),
    ],
)
def test_settings_that_cannot_be(name, dtype, message):
    with pytest.raises(ConfigError, match=message):
        check_quantization(name, dtype)
    with pytest.raises(ConfigError, match=message):
        ModelSettings(quantization=name, dtype=dtype)


def test_another_number_type_is_named():
    student = random_student(dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="got dtype=bfloat16"):
        quantise(student)
    assert not is_quantised(student.model)


def test_another_device_is_named():
    student = random_student().to("meta")
    with pytest.raises(ConfigError, match="is for the CPU, but the model is on meta; set device"):
        quantise(student)


def test_a_processor_without_such_layers(monkeypatch):
    monkeypatch.setattr(int8, "ENGINE", "another")
    with pytest.raises(ConfigError, match=r"needs torch's another.*try dtype=bfloat16"):
        quantise(random_student())


def test_twice_is_once_too_often():
    student = quantise(random_student())
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no linear layers left"):
        quantise(student)


def test_a_network_that_reads_weights_itself(monkeypatch):
    ar = random_ar()
    real = ar.model.forward

    def forward(*arguments, **options):
        _ = ar.model.lm_head.weight
        return real(*arguments, **options)

    monkeypatch.setattr(ar.model, "forward", forward)
    with pytest.raises(ConfigError, match=r"reads the weights of its layers itself .*'weight'"):
        quantise(ar)


def test_a_network_that_breaks():
    ar = random_ar()
    with torch.no_grad():
        ar.model.model.norm.weight[0] = float("inf")
    with pytest.raises(ConfigError, match="gives no finite numbers"):
        quantise(ar)


# --- evaluation and server -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("int8")
    teacher = ar_folder(place / "ar")
    save_denoiser(tiny_denoiser(teacher), place / "student")
    return {"student": str(place / "student"), "teacher": teacher}


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_it_is_part_of_an_identity(folders, kind):
    plain = open_evaluated(folders[kind], ModelSettings(), "cpu")
    found = open_evaluated(folders[kind], model_settings(quantization="int8_dynamic"), "cpu")
    assert is_quantised(found.model.model)
    assert not is_quantised(plain.model.model)
    assert found.identity == {**plain.identity, "quantization": "int8_dynamic"}
    hole = Hole((256, *b"a = "), 4, key=("x",))
    assert len(found.complete([hole])[0].token_ids) == 4
    pair = Pair((256,), tuple(b"a = 1"), "x")
    ours, exact = (one.score([pair])[0].value for one in (found, plain))
    assert ours == pytest.approx(exact, abs=0.2)
    assert ours != exact


OPEN = {"student": open_student, "teacher": open_teacher}


@pytest.mark.parametrize("kind", OPEN)
def test_a_server_opens_it(folders, kind):
    common = {"name": None, "dtype": "float32", "device": "cpu"}
    plain = OPEN[kind](folders[kind], **common)
    assert plain.quantization == ""
    served = OPEN[kind](folders[kind], **common, quantization="int8_dynamic")
    assert is_quantised(served.model.model)
    assert served.quantization == "int8_dynamic"
    assert served.parameters == plain.parameters
    assert served.footprint == plain.footprint
    with pytest.raises(ConfigError, match="did you mean 'int8_dynamic'"):
        OPEN[kind]("nowhere", **common, quantization="int8_dynami")
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        OPEN[kind]("nowhere", **{**common, "dtype": "float23"})


def test_bidirectional_stays_bidirectional():
    """The probes of a Denoiser ran before; attention is no linear layer and must not have changed."""
    model = tiny_model("llama", 20)
    make_bidirectional(model)
    student = quantise(Denoiser(model, word_vocab(), shift=False).eval())
    x_BL = torch.tensor([[student.mask_id, 1, 2], [student.mask_id, 1, 3]])
    first = torch.tensor([[True, False, False]] * 2)
    one, other = student(x_BL, first)
    assert not torch.equal(one, other)
