"""Rollouts: replayed by running the sampler by hand, and what becomes of them between writing and reading.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15. Shapes: B rows, L length, R rollouts.
"""

import copy
import dataclasses
import functools
import itertools
import math
import threading
from collections import Counter

import oracles
import pytest
import torch
from students import ScriptedStudent, random_student
from torch import nn

from mdm import sampler
from mdm.attention import BLOCK_ATTENTIONS
from mdm.errors import CheckpointError, ConfigError
from mdm.sampler import denoise, make_canvas
from mdm.train import processes, rollouts
from mdm.train.masking import by_block, by_row
from mdm.train.objective import ObjectiveSettings
from mdm.train.on_policy import OnPolicySettings, length_limit
from mdm.train.rollouts import (
    Rollout,
    gathered,
    load,
    numbers_of,
    path_of,
    roll_out,
    store,
)
from mdm.train.states import GIVEN, NEVER, masked_before, state_batch, steps_of

START, END, MASK = 12, 13, 15
B = 3
# Prompts of every place in a block: 0 … 2B + 1 tokens behind the start token.
PROMPTS = [[START, *((7 * i + n) % 12 for i in range(n))] for n in range(2 * B + 2)]
LENGTH = 7
SAMPLERS = {
    "threshold": {"threshold": 0.9, "remasking": "low_confidence"},
    "low threshold": {"threshold": 0.5, "remasking": "low_confidence"},
    "two a step": {"threshold": None, "tokens_per_step": 2, "remasking": "random"},
    "nucleus": {"threshold": 0.5, "top_p": 0.6, "temperature": 0.8, "remasking": "margin"},
}


def sure_student(**more):
    """A random student that is often sure of a token, so that thresholds decide several of them."""
    denoiser = random_student(**more)
    with torch.no_grad():
        denoiser.model.lm_head.weight *= 4
    return denoiser


def scripted(logits_fn):
    """A scripted student that has the modes of a module."""
    student = ScriptedStudent(logits_fn)
    student.training, student.eval, student.train = False, lambda: None, lambda mode: None
    return student


def settings(name="threshold", **more):
    return OnPolicySettings(fraction=1, **{**SAMPLERS[name], **more})


def keys_of(prompts, seed=0):
    return [("rollout", seed, number) for number in range(len(prompts))]


def written(denoiser, prompts=PROMPTS, chosen=None, *, seed=0, decode_rows=5, length=LENGTH):
    return roll_out(
        denoiser,
        prompts,
        (chosen or settings()).sampler,
        tokens_per_step=(chosen or settings()).tokens_per_step,
        length=length,
        keys=keys_of(prompts, seed),
        decode_rows=decode_rows,
    )


@dataclasses.dataclass
class Replay:
    """What the loop reports of one row: (L,) ids before every step, and the commits of each."""

    before: list
    commits: list
    ids_L: torch.Tensor
    nfe: int


def by_hand(denoiser, prompt, chosen, key, *, length=LENGTH):
    """One canvas by itself on a copy of the model, which is the sampler's definition of its text."""
    denoiser = copy.deepcopy(denoiser).eval()
    size = denoiser.block_size or 1
    total = math.ceil((len(prompt) + length) / size) * size
    canvas = make_canvas(
        denoiser,
        [*prompt, *[MASK] * (total - len(prompt))],
        chosen.sampler,
        key=key,
        tokens_per_step=chosen.tokens_per_step,
    )
    before, commits = [canvas.ids_L.clone()], []
    for step in denoise(denoiser, [canvas]):
        before.append(canvas.ids_L.clone())
        commits += step.commits
    return Replay(before[:-1], commits, canvas.ids_L, canvas.nfe)


def replayed(denoiser, chosen, prompts=PROMPTS, seed=0, length=LENGTH):
    """Pairs of rollout and replay."""
    found = written(denoiser, prompts, chosen, seed=seed, length=length)
    keys = keys_of(prompts, seed)
    hands = [
        by_hand(denoiser, prompt, chosen, key, length=length)
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    return list(zip(found, hands, strict=True))


def groups_of(rollout, block_size):
    ids_BL = torch.zeros(1, len(rollout.tokens_L), dtype=torch.long)
    return by_block(ids_BL, block_size) if block_size else by_row(ids_BL)


def check_replay(rollout, hand, prompt, block_size):
    """Every state that the sampler saw is what the steps say, for the row and for each of its blocks."""
    length = len(rollout.tokens_L)
    step_BL, groups = rollout.step_L[None], groups_of(rollout, block_size)
    seen = {}
    for step, (ids_L, commit) in enumerate(zip(hand.before, hand.commits, strict=True)):
        at_G = torch.full((len(groups.row_G),), step)
        masked_L = masked_before(groups, step_BL, at_G)[0]
        # What was cut off was never begun.
        assert torch.where(masked_L, MASK, rollout.tokens_L).equal(ids_L[:length])
        assert (ids_L[length:] == MASK).all()
        assert rollout.step_L[commit.positions_k].eq(step).all()
        assert rollout.tokens_L[commit.positions_k].equal(commit.tokens_k)
        (block,) = {int(i) // (block_size or length) for i in commit.positions_k}
        seen.setdefault(block, []).append((step, ids_L))
    # The states of a block by itself: those before its own steps, whatever others were in then.
    steps_GS, count_G = steps_of(groups, step_BL)
    blocks = oracles.row_blocks(length, block_size)
    for number, block in enumerate(blocks):
        own = seen.get(number, [])
        assert steps_GS[number, : count_G[number]].tolist() == [step for step, _ in own]
        states = oracles.block_states(rollout.step_L.tolist(), block, GIVEN, NEVER)
        masks = [frozenset(i for i in block if ids_L[i] == MASK) for _, ids_L in own]
        assert masks == states
        for step, ids_L in own:
            at_G = torch.full((len(groups.row_G),), NEVER)
            at_G[number] = step
            masked_L = masked_before(groups, step_BL, at_G)[0][block]
            assert torch.where(masked_L, MASK, rollout.tokens_L[block]).equal(ids_L[block])
    assert rollout.tokens_L[: len(prompt)].tolist() == prompt
    assert rollout.prompt_length == len(prompt)
    assert (rollout.step_L == GIVEN).tolist() == [i < len(prompt) for i in range(length)]
    # nfe, decided and log_prob are what the loop reports.
    assert rollout.nfe == hand.nfe == len(hand.commits)
    assert rollout.decided == sum(len(commit.positions_k) for commit in hand.commits)
    log_prob_k = torch.cat([commit.log_prob_k for commit in hand.commits]).double()
    assert rollout.log_prob == pytest.approx(float(log_prob_k.sum()), rel=1e-5)
    assert rollout.decided == len(log_prob_k)
    # The end, and where it is cut.
    decided = sorted(int(i) for commit in hand.commits for i in commit.positions_k)
    ends = [i for i in decided if hand.ids_L[i] == END]
    assert rollout.ended == bool(ends)
    stop = len(hand.ids_L)
    if ends and block_size:
        stop = min(stop, (ends[0] // block_size + 1) * block_size)
    assert rollout.tokens_L.equal(hand.ids_L[:stop])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_rollouts_replay_exactly(attention, shift, name):
    denoiser = sure_student(block_size=B, shift=shift, attention=attention)
    pairs = replayed(denoiser, settings(name), seed=3)
    for (rollout, hand), prompt in zip(pairs, PROMPTS, strict=True):
        check_replay(rollout, hand, prompt, B)
    several = any(len(commit.positions_k) > 1 for _, hand in pairs for commit in hand.commits)
    assert several


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ["threshold", "low threshold"])
def test_rollouts_of_students_without_blocks_replay_exactly(name, shift, block_length):
    denoiser = sure_student(shift=shift)
    pairs = replayed(denoiser, settings(name, block_length=block_length), seed=5)
    for (rollout, hand), prompt in zip(pairs, PROMPTS, strict=True):
        assert len(rollout.tokens_L) == len(prompt) + LENGTH
        check_replay(rollout, hand, prompt, 0)
    assert len({rollout.ended for rollout, _ in pairs}) == 2


def test_blocks_can_be_decoded_in_parts():
    denoiser = random_student(block_size=4)
    chosen = settings("low threshold", block_length=2)
    for (rollout, hand), prompt in zip(replayed(denoiser, chosen), PROMPTS, strict=True):
        check_replay(rollout, hand, prompt, 4)
        parts = [{int(i) // 2 for i in commit.positions_k} for commit in hand.commits]
        assert all(len(part) == 1 for part in parts)


def test_ends_of_all_kinds_were_replayed():
    """Or the tests above say nothing about them: in the middle of a block, cut, at the limit, none."""
    kinds = Counter()
    for seed in range(4):
        for rollout, hand in replayed(
            random_student(block_size=B), settings("low threshold"), seed=seed
        ):
            kinds["ended" if rollout.ended else "not ended"] += 1
            kinds["cut"] += len(rollout.tokens_L) < len(hand.ids_L)
            kinds["never"] += NEVER in rollout.step_L
            own = rollout.tokens_L[rollout.prompt_length :].tolist()
            behind = (
                rollout.step_L[rollout.prompt_length :][own.index(END) + 1 :] if END in own else []
            )
            kinds["behind the end"] += any(step != NEVER for step in behind)
    assert all(kinds[kind] for kind in ("ended", "not ended", "cut", "never", "behind the end"))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", [*BLOCK_ATTENTIONS, None])
@torch.no_grad()
def test_training_sees_what_the_sampler_saw(attention, shift):
    """In every state the forward of training gives the tokens decided next the probability they had."""
    block_size = None if attention is None else B
    denoiser = sure_student(block_size=block_size, shift=shift, attention=attention)
    for rollout in written(denoiser, chosen=settings("low threshold"), seed=3):
        batch = state_batch(
            settings(states="all"),
            ObjectiveSettings(),
            [rollout],
            mask_id=MASK,
            eos_id=END,
            pad_id=14,
            seed=0,
            step=0,
            samples=[0],
            samples_per_step=1,
            block_size=block_size or 0,
        )
        logits_NV = denoiser(
            batch.xt_BL,
            batch.masked_BL,
            document_ids_BL=batch.document_ids_BL,
            **batch.clean,
        )
        log_p_BL = torch.zeros(batch.masked_BL.shape)
        tokens_BL = rollout.tokens_L.expand_as(batch.xt_BL)
        token_N1 = tokens_BL[batch.masked_BL][:, None]
        log_p_BL[batch.masked_BL] = logits_NV.log_softmax(-1).gather(1, token_N1)[:, 0]
        total, decided = 0.0, 0
        for block in oracles.row_blocks(len(rollout.tokens_L), block_size or 0):
            steps_n = rollout.step_L[block]
            for copy_number, step in enumerate(sorted(set(steps_n.tolist()) - {GIVEN, NEVER})):
                total += float(log_p_BL[copy_number, block][steps_n == step].sum())
                decided += int((steps_n == step).sum())
        assert decided == rollout.decided
        assert total == pytest.approx(rollout.log_prob, rel=1e-4, abs=1e-4)


# --- what the loop decides -------------------------------------------------------------------------


def test_a_threshold_of_one_decides_a_token_at_a_time():
    for rollout in written(random_student(block_size=B), chosen=settings(threshold=1.0)):
        steps = [step for step in rollout.step_L.tolist() if step not in (GIVEN, NEVER)]
        assert sorted(steps) == list(range(len(steps)))
        assert rollout.nfe == rollout.decided == len(steps)


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_a_static_number_of_tokens_a_step(per_step):
    """Never more; fewer where a block has fewer left."""
    chosen = settings(threshold=None, tokens_per_step=per_step, temperature=1.0)
    plain = random_student()
    for rollout in written(plain, chosen=chosen):
        counts = Counter(step for step in rollout.step_L.tolist() if step not in (GIVEN, NEVER))
        assert max(counts.values()) <= per_step
        if not rollout.ended:
            assert rollout.nfe == math.ceil(LENGTH / per_step)
    blocks = random_student(block_size=B)
    for rollout, prompt in zip(written(blocks, chosen=chosen), PROMPTS, strict=True):
        counts = Counter(step for step in rollout.step_L.tolist() if step not in (GIVEN, NEVER))
        assert max(counts.values()) <= per_step
        if not rollout.ended:
            written_tokens = len(rollout.tokens_L) - len(prompt)
            assert rollout.decided == written_tokens
            of_block = Counter(i // B for i in range(len(prompt), len(rollout.tokens_L)))
            assert rollout.nfe == sum(math.ceil(n / per_step) for n in of_block.values())


def test_static_steps_go_with_blocks_at_every_length():
    """Of a student without blocks, whose steps have to be shared out over what it decodes in turn."""
    denoiser = random_student()
    chosen = settings(
        threshold=None,
        tokens_per_step=2,
        block_length=4,
        length=16,
        first_length=4,
        growth_batches=5,
    )
    for batch in range(6):
        limit = length_limit(chosen, batch)
        for rollout in written(denoiser, PROMPTS[:2], chosen, length=limit):
            assert len(rollout.tokens_L) - rollout.prompt_length == limit


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_grid_is_that_of_the_row_for_every_prompt(size):
    """The first block mixes the end of the prompt and masks; training masks in the same blocks."""
    denoiser = random_student(block_size=size)
    prompts = [[START, *[4] * n] for n in range(2 * size + 2)]
    for rollout, prompt in zip(
        written(denoiser, prompts, settings("low threshold")), prompts, strict=True
    ):
        assert len(rollout.tokens_L) % size == 0
        groups = groups_of(rollout, size)
        # A block is finished before the next is begun.
        steps_GS, count_G = steps_of(groups, rollout.step_L[None])
        begun = [
            own[:count] for own, count in zip(steps_GS.tolist(), count_G.tolist(), strict=True)
        ]
        order = [step for own in begun for step in own]
        assert order == list(range(rollout.nfe))
        first = len(prompt) // size
        assert [bool(own) for own in begun] == [number >= first for number in range(len(begun))]
        masked_L = masked_before(groups, rollout.step_L[None], steps_GS[:, 0])[0]
        assert masked_L.tolist() == [i >= len(prompt) for i in range(len(masked_L))]


def test_at_most_length_tokens_and_to_the_end_of_a_block():
    denoiser = random_student(block_size=4)
    for length, prompt in itertools.product((1, 4, 6), PROMPTS):
        (rollout,) = written(denoiser, [prompt], length=length)
        whole = math.ceil((len(prompt) + length) / 4) * 4
        assert len(rollout.tokens_L) <= whole
        assert rollout.ended or len(rollout.tokens_L) == whole


def test_end_tokens_of_the_prompt_are_no_end():
    """Chat templates put them there."""
    prompts = [[START, END, 3, END, *[2] * n] for n in range(4)]
    denoiser = random_student(block_size=4)
    for seed in range(3):
        found = replayed(denoiser, settings(), prompts, seed=seed)
        for (rollout, hand), prompt in zip(found, prompts, strict=True):
            check_replay(rollout, hand, prompt, 4)
            assert rollout.decided > 0


# --- random numbers and batches --------------------------------------------------------------------


def same(one, other):
    assert one.tokens_L.equal(other.tokens_L)
    assert one.step_L.equal(other.step_L)
    assert (one.ended, one.nfe, one.decided) == (other.ended, other.nfe, other.decided)
    assert one.log_prob == pytest.approx(other.log_prob, rel=1e-5)


@pytest.mark.parametrize("block_size", [None, B])
def test_a_rollout_depends_on_its_key_and_not_on_the_batch(block_size):
    denoiser = random_student(block_size=block_size)
    found = written(denoiser, decode_rows=100)
    for decode_rows in (1, 3):
        for one, other in zip(written(denoiser, decode_rows=decode_rows), found, strict=True):
            same(one, other)
    keys = keys_of(PROMPTS)
    for order in ([5, 2], [7]):
        again = roll_out(
            denoiser,
            [PROMPTS[i] for i in order],
            settings().sampler,
            length=LENGTH,
            keys=[keys[i] for i in order],
            decode_rows=2,
        )
        for one, i in zip(again, order, strict=True):
            same(one, found[i])
    others = written(denoiser, seed=1)
    assert any(
        one.tokens_L.tolist() != o.tokens_L.tolist() for one, o in zip(found, others, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("block_size", [None, B])
def test_a_token_is_drawn_from_the_softmax(block_size, temperature):
    denoiser, count = random_student(block_size=block_size), 1200
    prompt = [START, 3, 7, 1, 5]  # of two blocks, one token is open
    found = written(
        denoiser, [prompt] * count, settings(temperature=temperature), decode_rows=1000, length=1
    )
    log_probs_of = oracles.denoiser_log_probs(
        denoiser.model, shift=False, forbidden=[MASK], mask_id=MASK, block_size=block_size
    )
    log_p_V = log_probs_of([*prompt, MASK])[-1]
    p_V = (log_p_V / temperature).softmax(-1)
    counts = Counter(int(rollout.tokens_L[-1]) for rollout in found)
    assert MASK not in counts
    likely = [token for token in range(MASK) if float(p_V[token]) * count >= 5]
    rare = 1 - sum(float(p_V[token]) for token in likely)
    bins = [(counts[token], count * float(p_V[token])) for token in likely]
    if rare * count > 1:
        bins.append((count - sum(own for own, _ in bins), rare * count))
    chi2 = sum((own - expected) ** 2 / expected for own, expected in bins)
    assert len(bins) > 4
    assert chi2 < len(bins) - 1 + 4 * math.sqrt(2 * len(bins))
    # Confidence is that of the model, whatever the temperature.
    for rollout in found[:20]:
        assert rollout.log_prob == pytest.approx(float(log_p_V[rollout.tokens_L[-1]]), rel=1e-4)
        assert (rollout.decided, rollout.nfe) == (1, 1)
        assert rollout.ended is (int(rollout.tokens_L[-1]) == END)


# --- the model stays as it is ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_in_eval_mode_meanwhile_and_as_it_was_after(training, monkeypatch):
    denoiser = random_student(block_size=B).train(training)
    denoiser.model.extra = nn.Dropout(0.5).train(training)
    denoiser.model.get_input_embeddings().weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    modes = []
    denoiser.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    denoiser.model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    before = copy.deepcopy(denoiser.state_dict())
    found = written(denoiser)
    assert modes
    assert not any(modes)
    assert {module.training for module in denoiser.modules()} == {training}
    assert {name: p.requires_grad for name, p in denoiser.named_parameters()} == flags
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in denoiser.parameters())
    assert all(not r.tokens_L.requires_grad and not r.step_L.requires_grad for r in found)
    assert all(value.equal(before[name]) for name, value in denoiser.state_dict().items())
    assert not any(tensor.is_inference() for r in found for tensor in (r.tokens_L, r.step_L))

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setitem(sampler.STEPS, "default", fails)
    with pytest.raises(MemoryError):
        written(denoiser)
    assert {module.training for module in denoiser.modules()} == {training}


def test_what_does_not_fit_is_refused_before_anything_is_written():
    denoiser = random_student(block_size=4)
    with pytest.raises(ConfigError, match=r"the canvas has 1028 tokens.*at most 1024"):
        written(denoiser, [PROMPTS[0], [START, *[1] * 1020]], length=5)
    student = scripted(lambda xt_BL: torch.zeros(*xt_BL.shape, 16))
    with pytest.raises(ConfigError, match="1025 tokens"):
        written(student, [PROMPTS[0], [START, *[1] * 1023]], length=1)
    assert student.forwards == 0


# --- what they tell --------------------------------------------------------------------------------


def made(tokens, steps, *, ended=False, nfe=1, decided=1, log_prob=-1.0):
    return Rollout(torch.tensor(tokens), torch.tensor(steps), ended, nfe, decided, log_prob)


SOME = [
    made([START, 3, 4, END], [GIVEN, 0, 1, 1], ended=True, nfe=2, decided=3, log_prob=-1.25),
    made([START, 3], [GIVEN, 0], nfe=1, decided=1, log_prob=-0.1234567890123),
    made([START, 1, 2, END, 5, END], [GIVEN, GIVEN, 1, 0, 0, NEVER], ended=True, nfe=2, decided=3),
    made([START, 9, 9], [GIVEN, 1, 0], nfe=2, decided=2, log_prob=-7.5),
]


def test_numbers_of_rollouts():
    found = numbers_of(SOME)
    assert found == {
        "rollout_tokens_per_forward": 9 / 7,
        "rollout_length": 9 / 4,
        "rollout_ended": 2 / 4,
        "rollout_entropy": pytest.approx((1.25 + 0.1234567890123 + 1 + 7.5) / 9),
    }


def test_the_entropy_is_that_of_the_model():
    """At temperature 1, where all is decided at once from one distribution, on average."""
    p_V = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625] + [0.0] * 11, dtype=torch.float64)
    student = scripted(lambda xt_BL: p_V.log().float().expand(*xt_BL.shape, 16))
    chosen = settings(threshold=None, tokens_per_step=4)
    found = written(student, [[START]] * 500, chosen, decode_rows=500, length=4)
    entropy = -float(torch.special.xlogy(p_V, p_V).sum())
    numbers = numbers_of(found)
    assert abs(numbers["rollout_entropy"] - entropy) < 4 * 0.9 / math.sqrt(2000)
    assert numbers["rollout_tokens_per_forward"] == numbers["rollout_length"] == 4
    assert student.forwards == 1


def test_responses_end_before_the_first_end_token():
    assert SOME[0].response(END) == [3, 4]
    assert SOME[1].response(END) == [3]
    assert SOME[2].response(END) == [2]
    assert [rollout.prompt_length for rollout in SOME] == [1, 1, 2, 1]
    assert made([START, END, 3], [GIVEN, GIVEN, 0]).response(END) == [3]


# --- on disk ---------------------------------------------------------------------------------------


def equal(one, other):
    assert one.tokens_L.equal(other.tokens_L)
    assert one.step_L.equal(other.step_L)
    assert one.tokens_L.dtype == one.step_L.dtype == torch.long
    numbers = ("ended", "nfe", "decided", "log_prob")
    assert [getattr(one, name) for name in numbers] == [getattr(other, name) for name in numbers]
    assert [type(getattr(one, name)) for name in numbers] == [bool, int, int, float]


def test_what_is_stored_is_read_back(tmp_path):
    folder = tmp_path / "deep" / "rollouts"
    store(folder, 0, SOME[:1])
    store(folder, 12, SOME)
    for batch, expected in ((0, SOME[:1]), (12, SOME)):
        for one, other in zip(load(folder, batch), expected, strict=True):
            equal(one, other)
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch-000000.safetensors",
        "batch-000012.safetensors",
    ]
    store(folder, 12, SOME[1:3])  # written anew by a run that was resumed before it
    assert len(load(folder, 12)) == 2


def test_rollouts_of_a_model_are_read_back(tmp_path):
    found = written(random_student(block_size=B))
    store(tmp_path, 3, found)
    for one, other in zip(load(tmp_path, 3), found, strict=True):
        equal(one, other)


def damages(path):
    whole = path.read_bytes()
    yield "missing", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    for size in (7, 100, len(whole) // 2, len(whole) - 1):
        yield f"cut to {size}", lambda size=size: path.write_bytes(whole[:size])
    yield "text", lambda: path.write_text("not what it was\n" * 50)


def test_damaged_rollouts_name_their_file(tmp_path):
    from safetensors.torch import load_file, save_file

    store(tmp_path, 4, SOME)
    path = path_of(tmp_path, 4)
    tensors = load_file(path)
    for _, damage in damages(path):
        damage()
        with pytest.raises(CheckpointError, match=r"batch-000004\.safetensors.*start a new run"):
            load(tmp_path, 4)
    for name, value in (
        ("tokens", None),
        ("numbers", None),
        ("tokens", tensors["tokens"][1:]),
        ("steps", tensors["steps"][:-1]),
        ("lengths", tensors["lengths"][1:]),
        ("numbers", tensors["numbers"][1:]),
        ("numbers", tensors["numbers"][:, 1:].contiguous()),
    ):
        changed = {**tensors, name: value}
        save_file({key: own for key, own in changed.items() if own is not None}, path)
        with pytest.raises(CheckpointError, match=r"batch-000004\.safetensors"):
            load(tmp_path, 4)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"batch-000004\.safetensors"):
        load(tmp_path, 4)


@pytest.mark.parametrize("failing", ["save_file", "replace"])
@pytest.mark.parametrize("there", [False, True])
def test_a_crash_leaves_no_half_file(tmp_path, monkeypatch, failing, there):
    if there:
        store(tmp_path, 1, SOME[:2])

    def half(tensors, draft):
        draft.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    def refused(*_):
        raise OSError(28, "No space left on device")

    if failing == "save_file":
        monkeypatch.setattr(rollouts, "save_file", half)
    else:
        monkeypatch.setattr(rollouts.os, "replace", refused)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*batch-000001\.safetensors.*No space"
    ):
        store(tmp_path, 1, SOME)
    monkeypatch.undo()
    if there:
        assert len(load(tmp_path, 1)) == 2
    else:
        assert not path_of(tmp_path, 1).exists()
    store(tmp_path, 1, SOME)
    assert [path.name for path in tmp_path.iterdir()] == ["batch-000001.safetensors"]
    assert len(load(tmp_path, 1)) == 4


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "rollouts").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write"):
        store(tmp_path / "rollouts", 0, SOME)


# --- several processes -----------------------------------------------------------------------------


def in_processes(monkeypatch, shares, count):
    """What each of several processes gets, run as threads whose sums wait for one another."""
    ready, left = (threading.Barrier(len(shares)) for _ in range(2))
    asked: dict[int, torch.Tensor] = {}
    answers: dict[int, list[Rollout]] = {}

    def total(tensor):
        me = int(threading.current_thread().name)
        asked[me] = tensor.clone()
        ready.wait(timeout=60)
        found = functools.reduce(torch.add, [asked[other] for other in range(len(shares))])
        left.wait(timeout=60)
        return tensor.copy_(found)

    def run(me):
        answers[me] = gathered(shares[me], count)

    monkeypatch.setattr(processes, "total", total)
    threads = [threading.Thread(target=run, args=(me,), name=str(me)) for me in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[me] for me in range(len(shares))]


@pytest.mark.parametrize("split", [[{0, 2}, {1, 3}], [{0, 1, 2, 3}, set()], [{1}, {3}, {0, 2}]])
def test_all_processes_have_all_rollouts(monkeypatch, split):
    shares = [{number: SOME[number] for number in own} for own in split]
    for found in in_processes(monkeypatch, shares, 4):
        for one, other in zip(found, SOME, strict=True):
            equal(one, other)


def test_one_process_has_its_own():
    for one, other in zip(gathered(dict(enumerate(SOME)), 4), SOME, strict=True):
        equal(one, other)
    (first,) = gathered({0: SOME[0]}, 1)
    first.tokens_L[0] = 5  # its own memory, not the others'
    assert SOME[0].tokens_L[0] == START
