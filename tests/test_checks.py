"""Settings that are each right and do not fit together: every one is refused with its way out."""

from types import SimpleNamespace

import pytest

from mdm.attention import BLOCK_ATTENTIONS
from mdm.errors import ConfigError
from mdm.train.checks import check_blocks, check_objective
from mdm.train.dataset import DataSettings
from mdm.train.lambdas import MixSettings
from mdm.train.masking import MASKINGS
from mdm.train.objective import ObjectiveSettings, loss_meaning
from mdm.train.on_policy import OnPolicySettings
from mdm.train.placement import BY_CHUNK, PLACES, MaskSettings
from mdm.train.recipe import Recipe, TeacherSettings
from mdm.train.targets import TargetSettings
from mdm.train.teachers.denoised import SEES_MASKS
from mdm.train.teachers.foreign import FOREIGN
from mdm.train.teachers.kinds import SAMPLED, TARGETS

TIDAL = MixSettings(first=0.1, last=0.9, by_noise=True, weight="midrange")
CHUNKS = {"target": TargetSettings(kind="chunks"), "masks": MaskSettings(where="chunks")}


def check(objective=None, target=None, masks=None, mix=None):
    check_objective(
        ObjectiveSettings(**(objective or {})),
        target if isinstance(target, TargetSettings) else TargetSettings(**(target or {})),
        masks if isinstance(masks, MaskSettings) else MaskSettings(**(masks or {})),
        mix or MixSettings(),
    )


def blocks(objective=None, eos_block=32, *, block_size=4, attention="block", shift=True, **data):
    check_blocks(
        ObjectiveSettings(**(objective or {})),
        DataSettings(eos_block=eos_block, **{"eos_padding": "document", **data}),
        SimpleNamespace(block_size=block_size, attention=attention, shift=shift),
    )


# --- what fits -------------------------------------------------------------------------------------


def test_what_fits_together():
    for kind in (*TARGETS, *FOREIGN, "denoised"):
        check(target={"kind": kind})
    for where in BY_CHUNK:
        check(target={"kind": "chunks"}, masks={"where": where})
    for kind in SEES_MASKS:
        for comp_demo in ("", "bernoulli", "exact"):
            masks = {"where": "chunks"} if kind == "chunks" else {}
            for mix in (MixSettings(), TIDAL):
                check(target={"kind": kind, "comp_demo": comp_demo}, masks=masks, mix=mix)
    check({"divergence": "reverse_kl"}, {"kind": "denoised"})
    check({"divergence": "jsd", "kd_temperature": 2.0, "kd_weight": 1.0}, {"kind": "denoised"})
    check({"kd_temperature": 5.0, "temperature_squared": False, "chunk_loss": "reverse_calm",
           "kd_reduce": "mean_masked"}, **CHUNKS)  # fmt: skip
    check({"masking": "clipped", "noise": "block"})
    check({"masking": "exact", "complementary": True, "kd_positions": 2})
    check(mix=TIDAL)
    # Without a teacher nothing of it has to fit.
    check(
        {"kd_lambda": 0.0, "distance": "l2", "chunk_loss": "reverse_calm"},
        {"kind": "chunks"},
        mix=TIDAL,
    )
    check({"kd_weight": 0.0}, {"kind": "left", "comp_demo": "exact"})


def test_what_fits_a_student():
    blocks(block_size=None, attention="full")
    blocks(block_size=None, attention="full", eos_block=7)
    for padding in ("none", "block", "row"):  # which do not fill the grid, and need not
        blocks(eos_block=6, eos_padding=padding)
    for attention in BLOCK_ATTENTIONS:
        blocks(attention=attention)
        blocks({"noise": "block", "grow_from": 1, "grow_steps": 9}, attention=attention)
    for attention in ("context_causal", "reordered"):
        blocks({"ar_weight": 0.1}, attention=attention)
    for grow_from, block_size in ((1, 2), (3, 6), (4, 32), (2, 2048)):
        growing = {"grow_from": grow_from, "grow_steps": 9}
        blocks(growing, eos_block=block_size, block_size=block_size)


# --- what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"target": {"kind": "denoise"}}, "did you mean 'denoised'"),
        ({"objective": {"complementary": True}, "masks": {"where": "tilted"}},
         r"objective\.complementary with masks\.where=tilted"),
        ({"objective": {"masking": "clipped", "noise": "block"}, "masks": {"where": "spans"}},
         r"objective\.masking=clipped with masks\.where=spans.*where=uniform"),
        ({"masks": {"where": "chunks"}}, r"masks\.where=chunks with target\.kind=left"),
        ({"masks": {"where": "chunks"}, "target": {"kind": "denoised"}}, "only there"),
        ({"masks": {"where": "chunks"}, "target": {"kind": "chunks"}, "objective": {"kd_lambda": 0.0}},
         "only there"),
        ({"target": {"kind": "chunks"}},
         r"masks\.where=uniform with target\.kind=chunks.*\(chunks, chunks_published, chunks_corrected\)"),
        ({"target": {"kind": "suffix", "comp_demo": "exact"}},
         r"target\.comp_demo=exact with target\.kind=suffix.*one of denoised, chunks"),
        ({"target": {"kind": "mapped", "comp_demo": "bernoulli"}}, "does not see masks"),
        ({"target": {"kind": "denoised", "infill": "psm"}}, r"target\.infill=psm means nothing"),
        ({"target": {"kind": "denoised", "top_p": 0.9}}, r"target\.top_p=0\.9 means nothing"),
        ({"target": {"kind": "denoised", "top_k": 8}}, r"target\.top_k=8 means nothing"),
        ({"target": {"kind": "chunks", "window": 3}, "masks": {"where": "chunks"}},
         "window=3 means nothing"),
        ({"target": {"kind": "denoised"}, "objective": {"tail": "partial"}},
         r"objective\.tail=partial means nothing .* compares whole distributions"),
        ({"target": {"kind": "denoised"}, "objective": {"chunk_loss": "reverse_calm"}}, "means nothing"),
        ({"target": {"kind": "left"}, "objective": {"chunk_loss": "reverse_calm"}}, "means nothing"),
        ({"target": {"kind": "left"}, "objective": {"distance": "l2"}}, "compares distributions"),
        ({"target": {"kind": "embedding"}, "objective": {"temperature_squared": False}},
         r"temperature_squared=False means nothing"),
        ({"target": {"kind": "embedding"}, "mix": TIDAL}, r"mix\.first=0\.1, .* leave mix out"),
        ({"mix": TIDAL, "objective": {"tail": "partial"}}, r"objective\.tail=partial .* cannot be mixed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(sections, message):
    with pytest.raises(ConfigError, match=message):
        check(**sections)


@pytest.mark.parametrize("kind", SAMPLED)
def test_random_targets_are_not_mixed(kind):
    with pytest.raises(ConfigError, match=f"target.kind={kind} does not give exactly"):
        check(target={"kind": kind}, mix=MixSettings(last=0.5))
    check(target={"kind": kind}, mix=MixSettings(weight="midrange"))  # weighs, and mixes nothing


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"noise": "block"}, "noise=row"),
        ({"kd_positions": 2}, "kd_positions=0"),
        ({"divergence": "jsd"}, r"objective\.divergence=jsd means nothing .*chunk_loss"),
        ({"kd_lambda": 1.0}, r"leaves nothing for tokens .* use objective\.kd_weight"),
        ({"jsd_beta": 0.1}, "jsd_beta"),
        ({"tail": "renormalise"}, "tail"),
        ({"distance": "l2"}, "distance"),
    ],
)
def test_what_does_not_fit_chunks(objective, message):
    with pytest.raises(ConfigError, match=message):
        check(objective, **CHUNKS)
    with pytest.raises(ConfigError, match="complementary"):
        check({"complementary": True}, **CHUNKS)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"noise": "block"}, r"objective\.noise is for block diffusion.*student\.kind=bd3lm"),
        ({"ar_weight": 0.1}, r"objective\.ar_weight is for block"),
        ({"grow_from": 1, "grow_steps": 2}, r"objective\.grow_from is for block"),
    ],
)
def test_what_needs_a_student_with_blocks(objective, message):
    with pytest.raises(ConfigError, match=message):
        blocks(objective, block_size=None, attention="full")
    blocks(objective, attention="context_causal")


@pytest.mark.parametrize(
    ("objective", "student", "message"),
    [
        ({}, {"eos_block": 6}, r"data\.eos_block=6 ends documents inside a block of 4 tokens"),
        ({}, {"eos_block": 2}, r"multiple of student\.block_size"),
        ({"grow_from": 3, "grow_steps": 2}, {}, "grow_from=3 does not become the block size 4"),
        ({"grow_from": 4, "grow_steps": 2}, {}, "grow_from=4 does not become"),
        ({"grow_from": 8, "grow_steps": 2}, {}, "grow_from=8 does not become"),
        ({"grow_from": 2, "grow_steps": 2}, {"block_size": 6, "eos_block": 6}, "by doubling"),
        ({"ar_weight": 0.1}, {}, r"needs student\.shift=true .*attention=block"),
        ({"ar_weight": 0.1}, {"attention": "context_causal", "shift": False}, "shift=False"),
    ],
)
def test_what_does_not_fit_the_blocks(objective, student, message):
    with pytest.raises(ConfigError, match=message):
        blocks(objective, **student)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "blocks"}, "did you mean 'block'"),
        ({"kd_reduce": "mean"}, "mean_masked"),
        ({"chunk_loss": "calm"}, "forward_calm"),
        ({"kd_weight": -1.0}, r"objective\.kd_weight must be >= 0; got -1"),
        ({"ar_weight": -0.1}, "ar_weight"),
        ({"grow_from": -1, "grow_steps": 2}, "grow_from"),
        ({"kd_weight": 1.0, "kd_lambda": 0.3}, r"takes the place of kd_lambda=0\.3"),
        ({"grow_from": 2}, "grow_from=2 and grow_steps=0 go together"),
        ({"grow_steps": 5}, "go together"),
        ({"masking": "clipped"}, r"masking=clipped is for blocks.*noise=block"),
        ({"masking": "clipped", "noise": "block", "complementary": True}, "leave complementary off"),
        ({"masking": "clipped", "noise": "block", "schedule": "cosine"}, "schedule=linear"),
        ({"complementary": True, "schedule": "cosine"}, "needs schedule=linear.*cosine"),
        ({"complementary": True, "min_t": 0.5}, "min_t below 0.5"),
    ],
)  # fmt: skip
def test_objectives_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveSettings(**settings)


@pytest.mark.parametrize("name", ["quantization", "offload"])
def test_a_diffusion_teacher_is_held_whole(name):
    teacher = TeacherSettings(**{name: "int8" if name == "quantization" else True})
    denoised = TargetSettings(kind="denoised")
    with pytest.raises(ConfigError, match=f"teacher.{name}=.*is held in teacher.dtype"):
        Recipe(teacher=teacher, target=denoised)
    Recipe(teacher=teacher)
    Recipe(teacher=teacher, target=denoised, objective=ObjectiveSettings(kd_lambda=0.0))


def test_is_there_a_teacher():
    assert ObjectiveSettings().distils
    assert not ObjectiveSettings(kd_lambda=0.0).distils
    assert not ObjectiveSettings(kd_weight=0.0).distils
    assert ObjectiveSettings(kd_weight=0.1).distils


def test_what_every_loss_means_is_said():
    """Only what really is one may be called the bound."""
    for masking in MASKINGS:
        for where in PLACES:
            block = {"noise": "block"} if masking == "clipped" else {}
            found = loss_meaning(
                ObjectiveSettings(masking=masking, **block), MaskSettings(where=where)
            )
            exact = masking != "clipped" and where not in ("weighted", "chunks_published")
            assert found.startswith("the likelihood bound") is exact


def test_targets_of_rollouts_are_checked_if_the_data_have_none():
    objective = ObjectiveSettings(kd_lambda=0.0, divergence="reverse_kl")
    target = TargetSettings(kind="suffix")
    check_objective(objective, target)
    with pytest.raises(ConfigError, match="reverse_kl means nothing"):
        check_objective(objective, target, on_policy=OnPolicySettings(fraction=1))
