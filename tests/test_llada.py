"""compat="llada" equals the published sampler token for token; its traps and our way side by side.

Trap numbers T1 … T11 are those of oracles.py and DECISIONS.md.
"""

import itertools
from dataclasses import replace

import oracles
import pytest
import torch
from students import random_student

from mdm.canvas import Canvas, SamplerSettings
from mdm.diffusion import generator
from mdm.errors import ConfigError
from mdm.llada import published_commits
from mdm.sampler import denoise, make_canvas

G = 8
PROMPTS = ([12, 3, 1], [12], [12, 7, 7, 2, 5])
LLADA = SamplerSettings(compat="llada")
EOS, MASK = 13, 15


def model_fn_of(denoiser, bonus_V=None):
    """(x, attention mask) -> logits from the raw model, with a mask and positions made here."""

    @torch.no_grad()
    def model_fn(x_BL, attention_mask_BL):
        if attention_mask_BL is None:
            attention_mask_BL = torch.ones_like(x_BL)
        same_BLL = attention_mask_BL[:, :, None] == attention_mask_BL[:, None, :]
        hidden = torch.finfo(torch.float32).min
        mask_BLL = torch.zeros(same_BLL.shape).masked_fill(~same_BLL, hidden)
        positions_BL = (attention_mask_BL.cumsum(1) - 1).clamp(min=0)
        logits_BLV = denoiser.model(
            x_BL, attention_mask=mask_BLL[:, None], position_ids=positions_BL, use_cache=False
        ).logits
        if denoiser.shift:
            logits_BLV = torch.cat([torch.zeros_like(logits_BLV[:, :1]), logits_BLV[:, :-1]], dim=1)
        return logits_BLV if bonus_V is None else logits_BLV + bonus_V

    return model_fn


def left_padded(prompts):
    """(B, L) prompts padded left with a word, and the attention mask."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    attended = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(attended)


def published(denoiser, prompts, settings, *, seed=0, model_fn=None, **more):
    """The oracle with the same noise as `denoise` draws from the first canvas."""
    prompt_BL, attended_BL = left_padded(prompts)
    random = generator("sample", seed, 0)
    return oracles.llada_generate(
        model_fn or model_fn_of(denoiser),
        prompt_BL,
        attention_mask_BL=attended_BL if len(prompts) > 1 else None,
        steps=settings.steps,
        gen_length=G,
        block_length=settings.block_length,
        temperature=settings.temperature,
        cfg_scale=settings.cfg_scale,
        remasking=settings.remasking,
        mask_id=MASK,
        eos_id=EOS,
        eot_id=more.pop("eot_id", EOS),
        logits_eos_inf=settings.suppress_eos,
        confidence_eos_eot_inf=settings.eos_last,
        uniforms=more.pop("uniforms", lambda s, d: torch.rand(s, dtype=d, generator=random)),
    )


def canvases_of(denoiser, prompts, settings, *, seed=0):
    prompt_BL, attended_BL = left_padded(prompts)
    return [
        make_canvas(
            denoiser,
            row.tolist() + [MASK] * G,
            settings,
            key=(seed, i),
            padding=int((attended == 0).sum()),
        )
        for i, (row, attended) in enumerate(zip(prompt_BL, attended_BL, strict=True))
    ]


def ours(denoiser, prompts, settings, *, seed=0):
    canvases = canvases_of(denoiser, prompts, settings, seed=seed)
    num_steps = sum(1 for _ in denoise(denoiser, canvases))
    # T7: all steps are run, whatever happens; so a proposed mask cannot keep it going for ever.
    assert num_steps == settings.steps
    forwards = 2 if settings.cfg_scale > 0 else 1
    assert [canvas.nfe for canvas in canvases] == [forwards * num_steps] * len(canvases)
    return torch.stack([canvas.ids_L for canvas in canvases])


GRID = list(itertools.product([0.0, 0.7], [0.0, 1.0], ["low_confidence", "random"], [1, 3]))
LAYOUTS = [(G // n, steps) for n in (1, 2, 4) for steps in sorted({n, G // 2, G})]
FLAGS = [{"suppress_eos": a, "eos_last": b} for a, b in itertools.product([False, True], repeat=2)]


@pytest.mark.parametrize(("temperature", "cfg_scale", "remasking", "num_rows"), GRID)
def test_equals_the_published_sampler(temperature, cfg_scale, remasking, num_rows):
    denoiser = random_student()
    outcomes = set()
    for (block_length, steps), flags in itertools.product(LAYOUTS, FLAGS):
        settings = replace(
            LLADA,
            steps=steps,
            block_length=block_length,
            temperature=temperature,
            cfg_scale=cfg_scale,
            remasking=remasking,
            **flags,
        )
        expected_BL = published(denoiser, PROMPTS[:num_rows], settings)
        assert torch.equal(ours(denoiser, PROMPTS[:num_rows], settings), expected_BL), settings
        outcomes.add(tuple(expected_BL.flatten().tolist()))
    assert len(outcomes) > 10  # the grid is not one answer over and over


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_equals_the_published_sampler_with_a_shifted_model(family):
    denoiser = random_student(family, shift=True)
    for temperature, cfg_scale in itertools.product([0.0, 0.7], [0.0, 1.5]):
        settings = replace(
            LLADA, steps=4, block_length=4, temperature=temperature, cfg_scale=cfg_scale
        )
        expected_BL = published(denoiser, PROMPTS, settings)
        assert torch.equal(ours(denoiser, PROMPTS, settings), expected_BL)


def test_without_a_prompt_position_0_is_open():
    denoiser = random_student()
    settings = replace(LLADA, steps=4, block_length=4)
    expected_BL = published(denoiser, [[]], settings)
    assert torch.equal(ours(denoiser, [[]], settings), expected_BL)


# --- traps ---------------------------------------------------------------------------------------


def run_published(denoiser, canvases, **more):
    active = dict(enumerate(canvases))
    while not canvases[0].finished:
        for commit in published_commits(denoiser, active, **more):
            canvases[commit.row].commit(commit.positions_k, commit.tokens_k)
    return torch.stack([canvas.ids_L for canvas in canvases])


def biased_student(bonuses, *, seed=0):
    """A student that likes some tokens more than it should, and the oracle's view of it."""
    denoiser = random_student(seed=seed)
    bonus_V = torch.zeros(16)
    for token, bonus in bonuses.items():
        bonus_V[token] = bonus
    raw_head = denoiser.raw_head
    denoiser.raw_head = lambda rows_ND: raw_head(rows_ND) + bonus_V
    return denoiser, model_fn_of(denoiser, bonus_V)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_trap_3_end_of_turn_and_end_are_treated_differently(temperature):
    changed = 0
    settings = replace(LLADA, steps=G, block_length=G, temperature=temperature, eos_last=True)
    for seed in range(6):
        denoiser, model_fn = biased_student({EOS: 1.0, 4: 1.0}, seed=seed)
        outcomes = {}
        for turn_id in (EOS, 4):
            noise = [torch.Generator().manual_seed(seed) for _ in range(2)]
            drawn = [lambda s, d, g=g: torch.rand(s, dtype=d, generator=g) for g in noise]
            expected_BL = published(
                denoiser, PROMPTS, settings, model_fn=model_fn, eot_id=turn_id, uniforms=drawn[0]
            )
            canvases = canvases_of(denoiser, PROMPTS, settings)
            got_BL = run_published(denoiser, canvases, end_of_turn_id=turn_id, uniforms=drawn[1])
            assert torch.equal(got_BL, expected_BL)
            outcomes[turn_id] = got_BL
        changed += not torch.equal(outcomes[EOS], outcomes[4])
    assert changed >= 2


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 20.0])
def test_trap_4_the_mask_may_be_proposed(temperature, cfg_scale):
    denoiser, model_fn = biased_student({MASK: 50.0})
    settings = replace(LLADA, steps=4, block_length=4, temperature=temperature, cfg_scale=cfg_scale)
    expected_BL = published(denoiser, PROMPTS, settings, model_fn=model_fn)
    canvases = canvases_of(denoiser, PROMPTS, settings)
    for _ in denoise(denoiser, canvases):
        for canvas in canvases:
            # A "decision" for the mask decides nothing.
            assert torch.equal(canvas.open_L, canvas.ids_L == MASK)
            assert not (canvas.open_L & (canvas.decided_L >= 0)).any()
    got_BL = torch.stack([canvas.ids_L for canvas in canvases])
    assert torch.equal(got_BL, expected_BL)
    assert (got_BL == MASK).any()

    fixed = replace(settings, compat="default", stop_at_eos=False)
    canvases = canvases_of(denoiser, PROMPTS, fixed)
    for step in denoise(denoiser, canvases):
        assert all(commit.confidence_k.isfinite().all() for commit in step.commits)
    assert not any((canvas.ids_L == MASK).any() for canvas in canvases)


def test_trap_5_a_mask_in_the_prompt_takes_budget_and_masks_are_left():
    left_over = 0
    for seed in range(5):
        denoiser = random_student(seed=seed)
        prompt = [12, 3, MASK, 1]
        settings = replace(LLADA, steps=4, block_length=4)
        expected_BL = published(denoiser, [prompt], settings)
        ids_L = torch.tensor(prompt + [MASK] * G)
        open_L = ids_L == MASK
        canvas = Canvas(
            ids_L=ids_L,
            valid_L=torch.ones_like(open_L),
            given_L=~open_L,
            open_L=open_L,
            mask_id=MASK,
            settings=settings,
            random=torch.Generator(),
            blocks=[slice(4, 8), slice(8, 12)],  # the prompt belongs to no block
            block_steps=[2, 2],
        )
        assert torch.equal(run_published(denoiser, [canvas]), expected_BL)
        left_over += bool((expected_BL == MASK).any())

        # Our way: an open position is an open position, wherever it stands.
        fixed = make_canvas(denoiser, ids_L.tolist(), SamplerSettings(stop_at_eos=False))
        for _ in denoise(denoiser, [fixed]):
            pass
        assert not (fixed.ids_L == MASK).any()
    assert left_over == 5


@pytest.mark.parametrize("compat", ["default", "llada"])
def test_trap_7_more_steps_than_tokens(compat):
    denoiser = random_student()
    settings = replace(LLADA, steps=3 * G, block_length=4, compat=compat, stop_at_eos=False)
    (canvas,) = canvases_of(denoiser, PROMPTS[:1], settings)
    for _ in denoise(denoiser, [canvas]):
        pass
    assert canvas.nfe == (G if compat == "default" else 3 * G)


# --- what it cannot do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "prompts", "text"),
    [
        ({"remasking": "margin"}, PROMPTS[:1], "knows no remasking='margin'; use low_confidence"),
        ({}, PROMPTS[:2], "needs canvases of one length with one set of settings"),
    ],
)
def test_what_the_published_sampler_cannot_do(settings, prompts, text):
    denoiser = random_student()
    canvases = [
        make_canvas(denoiser, [*prompt, *[MASK] * G], replace(LLADA, **settings))
        for prompt in prompts
    ]
    with pytest.raises(ConfigError, match=text):
        list(denoise(denoiser, canvases))
