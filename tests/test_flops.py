"""Computing by formula against what torch's counter finds in a step, and hours."""

from dataclasses import replace

import pytest
from tiny_run import ar_folder, corpus_folder, recipe, tiny_denoiser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdm.checkpoint import save_denoiser
from mdm.errors import ConfigError
from mdm.schedule import SCHEDULES
from mdm.train.flops import (
    ASSUMED_ACCEPTED,
    accepted,
    describe_computing,
    duration,
    masked_share,
    masked_tokens,
    rollout_batches,
    states_of,
    step_flops,
    writing_of,
)
from mdm.train.lora import with_adapters
from mdm.train.objective import ObjectiveSettings
from mdm.train.on_policy import OnPolicySettings
from mdm.train.outlines import Outline, student_outline, teacher_outline
from mdm.train.rollouts import roll_out
from mdm.train.run import initial_student, new_run, start
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
    "two copies, read once": {"objective": {"complementary": True}},
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


# --- rollouts ------------------------------------------------------------------------------------

# A prompt of two blocks with its start token; four forwards a block of eight.
OWN = {
    "fraction": 1.0, "prompt_tokens": 15, "length": 32, "first_length": 32, "steps_per_batch": 1,
    "threshold": None, "tokens_per_step": 2,
}  # fmt: skip
WHOLE = {"top_k": 0}


def on_policy(folders, *, student=BLOCKS, train=None, objective=None, on_policy=None, **sections):
    return settings_of(
        folders,
        student=student,
        train={"batch_rows": 4, "micro_rows": 2, **(train or {})},
        objective={"masking": "rate", **(objective or {})},
        on_policy={**OWN, **(on_policy or {})},
        **sections,
    )


@pytest.fixture
def endless(monkeypatch):
    """Rollouts never end before their limit."""
    usual = OnPolicySettings.sampler
    monkeypatch.setattr(
        OnPolicySettings,
        "sampler",
        property(lambda own: replace(usual.fget(own), suppress_eos=True)),
    )


def split(parts):
    """(attention, the rest) of FLOPs by part."""
    attention = sum(value for name, value in parts.items() if name.endswith("attention"))
    return attention, sum(parts.values()) - attention


WRITTEN = {
    "two a forward": {},
    "one a forward": {"on_policy": {"tokens_per_step": 1}},
    "a block a forward": {"on_policy": {"tokens_per_step": 8}},
    "blocks in parts": {"on_policy": {"block_length": 4}},
    "full canvas": {"student": {}},
    "full canvas in parts": {"student": {}, "on_policy": {"block_length": 8}},
    "adapters": {"train": {"lora_rank": 24}},
    "a longer block of the prompt": {"on_policy": {"prompt_tokens": 23, "length": 16}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_writing_computes_what_the_formula_says(folders, endless, name):
    settings = on_policy(folders, **WRITTEN[name])
    own, prompt = settings.on_policy, settings.on_policy.prompt_tokens + 1
    student = with_adapters(initial_student(settings), settings.train)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rollouts = roll_out(
            student,
            [[256, *range(first, first + prompt - 1)] for first in range(4)],
            own.sampler,
            tokens_per_step=own.tokens_per_step,
            length=own.length,
            keys=[("rollout", number) for number in range(4)],
            decode_rows=4,
        )
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    parts = step_flops(settings, student_outline(settings), None)
    writing = {name: value for name, value in parts.items() if name.startswith("rollouts'")}
    work = writing_of(own, student_outline(settings), prompt, own.length)
    assert {work.forwards} == {rollout.nfe for rollout in rollouts}
    attention, rest = split(writing)
    assert attention == found.pop("aten.bmm")
    assert rest == pytest.approx(
        sum(found.values()), rel=1e-3
    )  # a mask is one more row of the head


LEARNT = {
    "round": {},
    "complement": {"on_policy": {"states": "complement"}},
    "all": {"on_policy": {"states": "all"}},
    "random": {
        "on_policy": {"states": "random"},
        "objective": {"masking": "exact", "noise": "block"},
    },
    "random, two copies": {
        "on_policy": {"states": "random"},
        "objective": {"complementary": True, "noise": "block"},
    },
    "whole distributions": {"target": WHOLE},
    "few are distilled": {"objective": {"kd_positions": 2}},
    "full canvas": {"student": {}, "target": WHOLE},
    "next tokens": {
        "student": {**BLOCKS, "attention": "context_causal"},
        "objective": {"ar_weight": 1.0},
    },
    "half": {"on_policy": {"fraction": 0.5}, "objective": {"masking": "exact", **CE}},
    "half, and the teacher asked about both": {
        "on_policy": {"fraction": 0.5},
        "objective": {"masking": "exact"},
        "target": WHOLE,
    },
    "denoised": {"teacher": "blocks", "target": DENOISED},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT)
def test_a_step_with_rollouts_computes_what_the_formula_says(folders, tmp_path, endless, name):
    """All of it: writing, training, the teacher."""
    changes = {"train": {"batch_rows": 8, "micro_rows": 4}, **LEARNT[name]}
    settings = on_policy(folders, **changes)
    parts = step_flops(settings, student_outline(settings), teacher_outline(settings))
    run = start(settings, new_run(settings, tmp_path))
    run.denoiser.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(run, 0)
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention, rest = split(parts)
    assert attention == found.pop("aten.bmm")
    assert rest == pytest.approx(sum(found.values()), rel=0.03)


def test_a_step_is_the_mean_over_the_run(folders):
    def parts(**changes):
        settings = on_policy(folders, **changes)
        return step_flops(settings, student_outline(settings), teacher_outline(settings))

    growing = {"start_step": 2, "steps_per_batch": 2, "growth_batches": 1, "first_length": 8}
    run = parts(train={"steps": 7}, on_policy=growing)
    short, long = (
        parts(train={"steps": 1}, on_policy={"length": length, "first_length": 8})
        for length in (8, 32)
    )
    data = parts(train={"steps": 1}, on_policy={"fraction": 0.0})
    for name in run:
        # Two steps of data, two of a short batch, three of long ones: the last is written for one step.
        learnt = 2 * data.get(name, 0) + 2 * short[name] + 3 * long[name]
        written = 2 * short[name] + 2 * 2 * long[name]
        total = written if name.startswith("rollouts'") else learnt
        assert 7 * run[name] == pytest.approx(total), name
    assert set(run) == set(short) > set(data)


def test_what_is_assumed_of_a_threshold(folders):
    def settings(**changes):
        return on_policy(folders, on_policy={"threshold": 0.9, "tokens_per_step": 1, **changes})

    own, student = settings().on_policy, student_outline(settings())
    assert (accepted(own, 8), accepted(own, 1)) == (ASSUMED_ACCEPTED, 1)
    work = writing_of(own, student, 16, 32)
    assert work.forwards == 32 / ASSUMED_ACCEPTED
    assert work.tokens == work.forwards * 8 + 48 - 8
    assert work.tokens / 32 == pytest.approx(8 / ASSUMED_ACCEPTED + 1, abs=0.3)
    assert states_of(settings(), student, 32) == (1, 32 * (1 + ASSUMED_ACCEPTED / 8) / 2)
    assert states_of(settings(states="all"), student, 32)[0] == 8
    one = Outline(None, 1, 1, 1, 1, 1, 1, 1, block_size=1)
    assert writing_of(own, one, 16, 32).forwards == 32


def test_batches_of_a_run(folders):
    def batches(**changes):
        settings = on_policy(folders, train={"steps": 11}, on_policy=changes)
        return [(b.count, b.limit, b.steps) for b in rollout_batches(settings)]

    assert batches(fraction=0.0) == []
    assert batches(start_step=11) == []
    assert batches(steps_per_batch=4, start_step=1) == [(16, 32, 4), (16, 32, 4), (16, 32, 2)]
    growing = {"first_length": 10, "growth_batches": 2}
    found = batches(steps_per_batch=4, replay=0.5, **growing)
    assert found == [(16, 10, 4), (8, 21, 4), (8, 32, 3)]


def test_a_mean_is_said_to_be_one(folders):
    settings = on_policy(folders)
    student, teacher = student_outline(settings), teacher_outline(settings)
    (line, *_) = describe_computing(settings, student, teacher, 1, None)
    assert "FLOPs a step on average, " in line


@pytest.mark.parametrize(("rows", "looked"), [(4, 1.0), (64, 256 / 1280), (128, 512 / 2560)])
def test_whole_distributions_of_rollouts_are_looked_at(folders, rows, looked):
    """Twice for the loss, and once more for the first ones of a micro-batch: do they agree?"""

    def head(**target):
        settings = on_policy(
            folders, target=target, train={"batch_rows": rows, "micro_rows": 64, "steps": 1}
        )
        return step_flops(settings, student_outline(settings), teacher_outline(settings))[
            "teacher's head"
        ]

    assert head(**WHOLE) == pytest.approx((2 + looked) * head())
