"""Computing by formula against what torch's counter finds in a step, and hours."""

import pytest
from tiny_run import ar_folder, corpus_folder, recipe, tiny_denoiser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdm.checkpoint import save_denoiser
from mdm.errors import ConfigError
from mdm.schedule import SCHEDULES
from mdm.train.flops import describe_computing, duration, masked_share, masked_tokens, step_flops
from mdm.train.objective import ObjectiveSettings
from mdm.train.outlines import Outline, student_outline, teacher_outline
from mdm.train.run import new_run, start
from mdm.train.trainer import train_step

BLOCKS = {"kind": "bd3lm", "block_size": 8}
CE = {"kd_lambda": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A corpus, and models whose layers, attention and head are of the same order."""
    place = tmp_path_factory.mktemp("flops")
    more = tuple(f"<|{i}|>" for i in range(600))
    ar = ar_folder(place / "ar", hidden=48, layers=3, extra_special=more)
    save_denoiser(tiny_denoiser(ar, layers=2, **BLOCKS), place / "blocks")
    save_denoiser(tiny_denoiser(ar, layers=2), place / "full")
    return place, ar, corpus_folder(place / "corpus", files=60)


def settings_of(folders, *, teacher=None, train=None, **sections):
    place, ar, corpus = folders
    if teacher:
        sections["teacher"] = {"model": str(place / teacher)}
    sections["objective"] = {"masking": "exact", **sections.get("objective", {})}
    return recipe(
        ar,
        corpus,
        data={"length": 96, "eos_padding": "none"},
        train={"steps": 1, "batch_rows": 16, "micro_rows": 8, **(train or {})},
        **sections,
    )


def counted(settings, runs):
    """FLOPs of a step: (attention, the rest). Attention is products of batches of matrices."""
    run = start(settings, new_run(settings, runs))
    run.denoiser.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(run, 0)
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    return attention, sum(found.values())


DENOISED = {"kind": "denoised"}
CHUNKS = {
    "target": {"kind": "chunks"},
    "masks": {"where": "chunks"},
    "objective": {"masking": "rate"},
}
RUNS = {
    "full canvas": {"objective": CE},
    "left": {},
    "embedding": {"target": {"kind": "embedding"}},
    "few are distilled": {"objective": {"kd_positions": 2}},
    "cosine": {"objective": {**CE, "masking": "rate", "schedule": "cosine"}},
    "two copies": {"objective": {**CE, "complementary": True}},
    "layers twice": {"objective": CE, "train": {"gradient_checkpointing": True}},
    "adapters": {"objective": CE, "train": {"lora_rank": 24}},
    "blocks": {"student": BLOCKS, "objective": {**CE, "noise": "block"}},
    "blocks, two copies": {"student": BLOCKS, "objective": {**CE, "complementary": True}},
    "blocks, next tokens": {
        "student": {**BLOCKS, "attention": "context_causal"},
        "objective": {**CE, "ar_weight": 1.0},
    },
    "denoised": {"student": BLOCKS, "teacher": "blocks", "target": DENOISED},
    "denoised by a full canvas": {"student": BLOCKS, "teacher": "full", "target": DENOISED},
    "blocks teach a full canvas": {"teacher": "blocks", "target": DENOISED},
    "complementary demasking": {
        "student": BLOCKS,
        "teacher": "blocks",
        "target": {**DENOISED, "comp_demo": "exact"},
    },
    "chunks": {"student": BLOCKS, "teacher": "blocks", **CHUNKS},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_computes_what_the_formula_says(folders, tmp_path, name):
    settings = settings_of(folders, **RUNS[name])
    student = student_outline(settings)
    teacher = teacher_outline(settings) if settings.objective.distils else None
    parts = step_flops(settings, student, teacher)
    attention = sum(value for name, value in parts.items() if name.endswith("attention"))
    rest = sum(parts.values()) - attention
    found_attention, found_rest = counted(settings, tmp_path)
    assert attention == found_attention
    # Rows hold some tokens that are never masked. The last product of a layer is not computed twice.
    close = {"layers twice": 0.06, "adapters": 0.04}.get(name, 0.015)
    assert rest == pytest.approx(found_rest, rel=close)


def test_the_teachers_head_is_for_what_it_is_asked(folders):
    def head(**objective):
        settings = settings_of(folders, objective=objective)
        return step_flops(settings, student_outline(settings), teacher_outline(settings))[
            "teacher's head"
        ]

    assert head(kd_positions=2) == 16 * 2 * 2 * (259 + 600) * 48
    assert head(kd_positions=2, complementary=True) == 2 * head(kd_positions=2)
    assert head(kd_positions=10**6) == head()


def test_masked_tokens(folders):
    def share(group=4, **settings):
        return masked_share(ObjectiveSettings(**settings), group)

    assert share() == pytest.approx(0.5)
    assert share(schedule="cosine") == pytest.approx(0.6366, abs=1e-3)
    assert share(masking="exact") == (1 + 2 + 3 + 4) / 4 / 4
    assert share(masking="clipped", noise="block") == (0.25 + 1) / 2
    assert share(masking="exact", complementary=True) == 0.5
    assert set(SCHEDULES) == {"linear", "cosine"}
    row = settings_of(folders, student=BLOCKS)
    block = settings_of(folders, student=BLOCKS, objective={"noise": "block"})
    outline = student_outline(row)
    assert masked_tokens(row, outline) == pytest.approx(16 * 97 / 2)
    assert masked_tokens(block, outline) == pytest.approx(16 * 96 * (1 + 1 / 8) / 2)


def test_hours():
    assert duration(3600 * 5e12, 1, 1) == "5 hours"
    assert duration(3600 * 5e12, 10, 1) == "30 minutes"
    assert duration(3600 * 5e12, 1, 2) == "2.5 hours"


def test_what_is_said(folders):
    settings = settings_of(folders, train={"steps": 1000})
    student, teacher = student_outline(settings), teacher_outline(settings)
    step = sum(step_flops(settings, student, teacher).values())

    def said(changed=settings, processes=1, tflops=None):
        return "\n".join(describe_computing(changed, student, teacher, processes, tflops))

    assert f"{step:.3g} FLOPs a step, {1000 * step:.3g} in 1000 steps" in said()
    assert said().count("FLOPs a step") == 7
    assert "for example" in said()
    assert f"{duration(1000 * step, 100, 1)} at 100 TFLOP/s a process (your rate" in said()
    given = said(processes=4, tflops=1e-6)
    assert "example" not in given
    assert given.endswith(
        f"about {duration(1000 * step, 1e-6, 4)} at 1e-06 TFLOP/s a process, of 4"
    )
    assert "not counted" not in said()
    branches = settings_of(folders, target={"kind": "suffix"})
    assert "not counted: the branches of target.kind=suffix" in said(branches)


def test_what_is_not_known(folders):
    unknown = Outline(None, 1, 1, 1, 1, 1, 1, 1)
    settings = settings_of(folders)
    (line,) = describe_computing(settings, student_outline(settings), unknown, 1, 1.0)
    assert "not known, as the size of the teacher is not" in line


def test_the_option_is_for_dry_runs():
    from click.testing import CliRunner

    from mdm.train.command import train

    refused = CliRunner().invoke(train, ["--tflops", "3"]).exception
    assert isinstance(refused, ConfigError)
    assert "--dry-run" in str(refused)
    assert CliRunner().invoke(train, ["--dry-run", "--tflops", "0"]).exit_code == 2
