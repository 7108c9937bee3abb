"""Micro-batches of a step with rollouts: which rows, what the losses come to, and what must not matter.

The loss of a step is computed a second time token by token from definitions: a teacher that reads one
prefix at a time (`tiny.next_log_probs`), divergences in float64, ends of texts from the recorded steps.
Shapes: N masked positions, V vocabulary.
"""

import dataclasses
import json
import math

import pytest
import tiny
import tiny_run
import torch
import two_processes
from safetensors.torch import load_file
from test_sharding import assert_same
from test_trainer import assert_same_gradients, gradients_of_a_step, new
from transformers import AutoModelForCausalLM

from mdm.errors import ConfigError
from mdm.train import batches, processes
from mdm.train.batches import micro_batches, renew_rollouts, rows_of, step_rows
from mdm.train.on_policy import chosen
from mdm.train.rollouts import Rollout
from mdm.train.run import start
from mdm.train.states import GIVEN, NEVER
from mdm.train.trainer import train_step

END = 257  # of tiny.byte_tokenizer
BLOCKS = {"kind": "bd3lm", "block_size": 4}
FULL = {"kind": "mdlm"}
ON_POLICY = {"fraction": 1.0, "length": 8, "steps_per_batch": 2}


def ending_ar(folder, *, scale=1.0, end=3.0):
    """An AR model that ends most texts of a dozen tokens; logits are `scale` times those of others."""
    path = tiny_run.ar_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
        # The end token's row points where outputs lie on average.
        mean_D = model.model(torch.randint(256, (8, 24), generator=random))[0].mean((0, 1))
        model.lm_head.weight[END] = end * mean_D / mean_D.square().sum()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ar(tmp_path_factory):
    return ending_ar(tmp_path_factory.mktemp("ar"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.corpus_folder(tmp_path_factory.mktemp("corpus"))


def prompt_file(folder):
    """Prompts of 2 to 11 tokens with their start token: they end in every place of a block."""
    lines = [{"prompt": "abcdefghij"[: 1 + i % 10], "response": "x"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(folder / "prompts.jsonl")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompt_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def tree(ar, corpus, prompts):
    """`tree(on_policy={"fraction": 0.5}, train={…})`: a recipe with rollouts as nested dicts."""

    def make(student=BLOCKS, train=(), on_policy=(), target=(), **sections):
        changes = {"clip": 0.0, "warmup_steps": 0} | dict(train)
        return tiny_run.tree(
            ar,
            corpus,
            student=student,
            train=changes,
            on_policy=ON_POLICY | {"prompts": [prompts]} | dict(on_policy),
            target=dict(target),
            **sections,
        )

    return make


@pytest.fixture(scope="module")
def settings(tree):
    return lambda **sections: tiny_run.build(tiny_run.Recipe, tree(**sections))


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "rollout_seconds"}


def ids_of(run):
    """Tokens and steps of all rollouts at hand."""
    return {
        number: [(rollout.tokens_L.tolist(), rollout.step_L.tolist()) for rollout in rollouts]
        for number, rollouts in run.rollouts.items()
    }


# --- rows of the data ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(settings, tmp_path_factory):
    """`prepared(train={…}, on_policy={…})`: a run of which only the numbers are other."""
    run = new(settings(), tmp_path_factory.mktemp("prepared"))
    return lambda **sections: dataclasses.replace(run, recipe=settings(**sections))


@pytest.mark.parametrize("start_step", [0, 1, 5])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75])
def test_every_row_of_the_data_comes_once_in_an_epoch(prepared, fraction, start_step):
    run = prepared(on_policy={"fraction": fraction, "start_step": start_step})
    size = len(run.data.train)
    rows = []
    for step in range(5 + 3 * size):
        own = round(8 * fraction) if step >= start_step else 0
        assert rows_of(run.recipe, step) == (8 - own, own)
        assert len(step_rows(run, step)) == 8 - own
        rows += step_rows(run, step)
    for first in range(0, len(rows) - size, size):
        assert sorted(rows[first : first + size]) == list(range(size))
    assert len(rows) > 3 * size


def test_rollouts_alone_leave_the_data_where_it_was(prepared):
    plain, alone = prepared(on_policy={"fraction": 0.0}), prepared(on_policy={"start_step": 3})
    for step in range(3):
        assert step_rows(alone, step) == step_rows(plain, step)
    for step in range(3, 9):
        assert rows_of(alone.recipe, step) == (0, 8)
        assert step_rows(alone, step) == []


def test_rows_before_the_first_rollouts_do_not_know_of_them(prepared):
    plain, mixed = prepared(on_policy={"fraction": 0.0}), prepared(on_policy={"start_step": 3})
    for step in range(3):
        one, other = micro_batches(plain, step), micro_batches(mixed, step)
        assert [batch.rows for batch in one] == [batch.rows for batch in other]
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first.xt_BL, second.xt_BL)
            assert not second.own_text


@pytest.mark.parametrize("micro_rows", [1, 3, 8])
def test_micro_batches_share_out_rows_and_rollouts(settings, tmp_path, monkeypatch, micro_rows):
    """Data first, then rollouts; every sample once, whatever the number of processes."""
    recipe = settings(train={"micro_rows": micro_rows}, on_policy={"fraction": 0.5})
    run = new(recipe, tmp_path)
    renew_rollouts(run, 0)
    for world in (1, 2, 4):
        monkeypatch.setattr(processes, "world_size", lambda world=world: world)
        samples: dict[bool, list[int]] = {False: [], True: []}
        for rank in range(world):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            found = micro_batches(run, 0)
            assert [b.own_text for b in found] == sorted(b.own_text for b in found)
            assert len(found) == 2 * math.ceil(4 / world / micro_rows)
            for batch in found:
                assert len(batch.keys) <= micro_rows
                samples[batch.own_text] += [key[2] for key in batch.keys]
                # No random number of a rollout is one of a row of data.
                assert {key[1] for key in batch.keys} == {-1 if batch.own_text else 0}
        assert sorted(samples[False]) == sorted(samples[True]) == [0, 1, 2, 3]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_every_rollout_is_learnt_from_once(settings, tmp_path, fraction):
    """By the steps of its batch, unless it is replayed later; end tokens stand behind its end."""
    run = new(settings(on_policy={"fraction": fraction, "steps_per_batch": 3}), tmp_path)
    renew_rollouts(run, 0)
    expected = []
    for rollout in run.rollouts[0]:
        response = rollout.response(END)
        ids = rollout.tokens_L.tolist()[: rollout.prompt_length] + response
        expected.append(ids + [END] * (len(rollout.tokens_L) - len(ids)))
    found = [
        row_L[ids_L >= 0].tolist()
        for step in range(3)
        for batch in micro_batches(run, step)
        for row_L, ids_L in zip(batch.x0_bL, batch.document_ids_BL, strict=True)
        if batch.own_text
    ]
    assert sorted(found) == sorted(expected)
    assert len(found) == 24 * fraction


# --- the loss of a step by hand --------------------------------------------------------------------


def kl(log_p_K, log_q_K):
    return float((log_p_K.exp() * (log_p_K - log_q_K)).sum())


def jsd(log_p_K, log_q_K, beta=0.3):
    log_m_K = (beta * log_p_K.exp() + (1 - beta) * log_q_K.exp()).log()
    return beta * kl(log_p_K, log_m_K) + (1 - beta) * kl(log_q_K, log_m_K)


DIVERGENCES = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p_K, log_q_K: kl(log_q_K, log_p_K),
    "jsd": jsd,
}


def apart(recipe, log_p_V, log_q_V):
    """The divergence of the recipe between whole distributions, by its definition."""
    objective, kept = recipe.objective, recipe.target.top_k
    temperature = objective.kd_temperature
    log_p_V = (log_p_V / temperature).log_softmax(-1)
    log_q_V = (log_q_V / temperature).log_softmax(-1)
    if 0 < kept < len(log_p_V):
        order_V = log_p_V.argsort(descending=True)
        log_p_K, log_q_K = log_p_V[order_V[:kept]], log_q_V[order_V[:kept]]
        if objective.tail == "renormalise":
            log_p_V, log_q_V = log_p_K.log_softmax(-1), log_q_K.log_softmax(-1)
        else:
            rest = [log_V.exp()[order_V[kept:]].sum().log()[None] for log_V in (log_p_V, log_q_V)]
            log_p_V, log_q_V = torch.cat([log_p_K, rest[0]]), torch.cat([log_q_K, rest[1]])
    return temperature**2 * DIVERGENCES[objective.divergence](log_p_V, log_q_V)


def token_terms(recipe, rollout, place, log_q_V, next_log_probs):
    """(weight, loss) of a masked token of a rollout; None if it is not learnt."""
    ids, steps = rollout.tokens_L.tolist(), rollout.step_L.tolist()
    assert steps[place] != GIVEN
    ends = [i for i, token in enumerate(ids) if token == END and steps[i] != GIVEN]
    end = ends[0] if ends else len(ids)
    learnt = {"padded": True, "learnt": place <= end, "published": place < end}
    if not learnt[recipe.on_policy.eos]:
        return None
    weight = 1.0
    if recipe.on_policy.states == "all":
        size = recipe.student.block_size or len(ids)
        first = place // size * size
        weight /= len({s for s in steps[first : first + size] if s not in (GIVEN, NEVER)})
    if place > end:
        return weight, -float(log_q_V[END])
    return weight, apart(recipe, next_log_probs(ids[:place]), log_q_V[: tiny_run.VOCAB])


def by_hand(run, step, model):
    """What a step's terms should come to, and how many tokens behind an end are in them."""
    recipe, settings = run.recipe, run.recipe.on_policy
    next_log_probs, behind = tiny.next_log_probs(model), 0
    data, over, own = 0.0, 0, {}
    for batch in micro_batches(run, step):
        with torch.no_grad():
            options = {"document_ids_BL": batch.document_ids_BL, **batch.clean}
            logits_NV = run.denoiser(batch.xt_BL, batch.masked_BL, **options).double()
        log_q_NV = logits_NV.log_softmax(-1)
        if not batch.own_text:
            over += int(batch.maskable_BL.sum())
        for n, (row, place) in enumerate(batch.masked_BL.nonzero().tolist()):
            if not batch.own_text:
                token = int(batch.x0_BL[row, place])
                data -= float(log_q_NV[n, token] / batch.level_BL[row, place])
                continue
            sample, rows = batch.keys[row][2], rows_of(recipe, step)[1]
            number, index = chosen(settings, rows, recipe.train.seed, step, sample)
            rollout = run.rollouts[number][index]
            found = token_terms(recipe, rollout, place, log_q_NV[n], next_log_probs)
            if found is not None:
                own.setdefault(sample, []).append(found)
                behind += END in rollout.tokens_L[:place][rollout.step_L[:place] != GIVEN]
    if settings.reduce == "rollout":
        means = [sum(w * v for w, v in terms) / sum(w for w, _ in terms) for terms in own.values()]
        on_policy = sum(means) / len(means)
    else:
        terms = [term for found in own.values() for term in found]
        on_policy = sum(w * v for w, v in terms) / sum(w for w, _ in terms)
    return {"on_policy": on_policy, "ce": data / over if over else 0.0}, behind


WHOLE = {"top_k": 0}
LOSSES = {
    "whole": ({}, WHOLE, {}),
    "bucket": ({}, {"top_k": 7}, {}),
    "every token": ({}, {"top_k": tiny_run.VOCAB}, {}),
    "reverse": ({"divergence": "reverse_kl"}, WHOLE, {}),
    "reverse renormalised": (
        {"divergence": "reverse_kl", "tail": "renormalise"},
        {"top_k": 7},
        {"eos": "learnt"},
    ),
    "jsd": ({"divergence": "jsd", "jsd_beta": 0.3}, WHOLE, {"eos": "published"}),
    "jsd of some": ({"divergence": "jsd", "jsd_beta": 0.3}, {"top_k": 9}, {"states": "all"}),
    "temperature": ({"kd_temperature": 2.0}, WHOLE, {"eos": "learnt"}),
    "rollouts": ({}, WHOLE, {"reduce": "rollout"}),
    "rollouts in all states": ({}, WHOLE, {"reduce": "rollout", "states": "all"}),
    "complement": ({}, {"top_k": 7}, {"states": "complement"}),
}


@pytest.mark.parametrize(
    ("name", "fraction"), [(name, 0.5) for name in LOSSES] + [("whole", 1.0), ("complement", 1.0)]
)
def test_the_loss_by_hand(settings, ar, tmp_path, name, fraction):
    objective, target, on_policy = LOSSES[name]
    recipe = settings(
        student=FULL if name in ("whole", "reverse", "jsd of some") else BLOCKS,
        objective={"kd_lambda": 0.0} | objective,
        target=target,
        on_policy={"fraction": fraction, "threshold": 0.3} | on_policy,
        train={"micro_rows": 3},
    )
    run = new(recipe, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(ar)
    renew_rollouts(run, 0)
    expected, behind = by_hand(run, 0, model)
    assert (behind > 0) == (recipe.on_policy.eos == "padded")
    metrics = train_step(run, 0)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    loss = (1 - fraction) * expected["ce"] + fraction * expected["on_policy"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["kd"] == metrics["kd_lambda"] == 0
    rollouts = run.rollouts[0][: round(8 * fraction)]
    rows = run.data.train.batch(step_rows(run, 0)) if fraction < 1 else None
    tokens = 0 if rows is None else int((rows.document_ids_BL >= 0).sum())
    assert metrics["tokens"] == tokens + sum(len(rollout.tokens_L) for rollout in rollouts)


def test_data_and_rollouts_with_a_teacher_for_both(settings, tmp_path):
    """(1-f) ((1-λ) CE + λ KL) + f on-policy, where λ grows and f does not."""
    recipe = settings(
        objective={"kd_lambda": 0.4, "kd_ramp_steps": 2, "ar_weight": 0.25},
        student=BLOCKS | {"attention": "context_causal"},
        on_policy={"fraction": 0.75, "start_step": 1},
    )
    run = new(recipe, tmp_path)
    first, second = (train_step(run, step) for step in range(2))
    assert "on_policy" not in first
    terms = 0.8 * first["ce"] + 0.2 * first["kd"] + 0.25 * first["next_token"]
    assert first["loss"] == pytest.approx(terms, rel=1e-5)
    terms = 0.6 * second["ce"] + 0.4 * second["kd"] + 0.25 * second["next_token"]
    expected = 0.25 * terms + 0.75 * second["on_policy"]
    assert second["loss"] == pytest.approx(expected, rel=1e-5)
    assert min(second["kd"], second["on_policy"], second["next_token"]) > 0


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_the_whole_distribution_is_that_of_all_tokens(settings, tmp_path, tail):
    results = [
        gradients_of_a_step(
            settings(target={"top_k": top_k}, objective={"tail": tail}), tmp_path / str(top_k)
        )
        for top_k in (0, tiny_run.VOCAB)
    ]
    (metrics, one), (others, other) = results
    assert_same_gradients(one, other, 1e-4)
    assert without_seconds(others) == pytest.approx(without_seconds(metrics), rel=1e-4)


# --- what must not matter --------------------------------------------------------------------------

KINDS = {
    "round": {},
    "complement": {"fraction": 0.5, "states": "complement", "reduce": "rollout"},
    "all": {"fraction": 0.5, "states": "all"},
    "random": {"states": "random", "eos": "learnt"},
}


@pytest.mark.parametrize("student", [BLOCKS, FULL], ids=["blocks", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_change_nothing(settings, tmp_path, name, student):
    """A rollout is padded to the longest of its micro-batch, and is in the same state beside any other."""
    results = []
    for rows in (8, 4, 1) if name == "round" else (8, 1):
        recipe = settings(
            student=student,
            train={"micro_rows": rows},
            on_policy={"decode_rows": rows} | KINDS[name],
        )
        results.append(gradients_of_a_step(recipe, tmp_path / str(rows)))
    metrics, one = results[0]
    assert metrics["on_policy"] > 0
    assert metrics["rollout_ended"] > 0
    for others, other in results[1:]:
        assert_same_gradients(one, other, 1e-5)
        assert without_seconds(others) == pytest.approx(without_seconds(metrics), rel=1e-5)


@pytest.fixture(scope="module")
def cases(tree):
    """Arguments of `two_processes.play`. `some` writes a rollout at a time: the second process has none."""
    some = {"fraction": 0.5, "start_step": 1, "steps_per_batch": 1, "replay": 0.5, "length": 8}
    train = {"batch_rows": 4, "micro_rows": 1, "ema_decay": 0.5}
    all_of_them = {"start_step": 1, "decode_rows": 3, "replay": 0.25, "states": "complement"}
    return [
        {"name": "some", "tree": tree(train=train, on_policy=some), "steps": 4},
        {
            "name": "all of them",
            "tree": tree(
                student=FULL, on_policy=all_of_them, target=WHOLE, train={"micro_rows": 2}
            ),
            "steps": 4,
        },
    ]


@pytest.mark.slow
def test_two_processes_write_and_learn_like_one(cases, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    (two / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = two_processes.launch(two_processes.__file__, two / "cases.json", two)
    assert done.returncode == 0, done.stderr
    for case in cases:
        numbers, tensors = two_processes.play(one, **case)
        theirs = json.loads((two / case["name"]).with_suffix(".json").read_text(encoding="utf-8"))
        assert theirs[0]["rollouts"] == theirs[1]["rollouts"] == numbers["rollouts"] != []
        for played in (numbers, *theirs):
            played["metrics"] = [without_seconds(metrics) for metrics in played["metrics"]]
        assert all("on_policy" in metrics for metrics in numbers["metrics"][1:])
        for its in theirs:
            assert_same((numbers, tensors), (its, load_file(two / f"{case['name']}.safetensors")))
        for batch in range(3 if case["name"] == "some" else 2):
            file = f"{case['name']}/rollouts/batch-{batch:06d}.safetensors"
            written, its = load_file(one / file), load_file(two / file)
            assert torch.equal(written["tokens"], its["tokens"])
            assert torch.equal(written["steps"], its["steps"])
        lines = [(f / case["name"] / "samples.jsonl").read_text("utf-8") for f in (one, two)]
        assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("fraction", "rows", "world", "message"),
    [
        (0.25, 8, 4, "on_policy.fraction=0.25: 2 rollouts .* evenly among 4 processes"),
        (0.5, 6, 2, "train.batch_rows=6 .*: 3 rollouts a step cannot be shared out evenly"),
    ],
)
def test_rollouts_that_cannot_be_shared_out_evenly(
    settings, tmp_path, monkeypatch, fraction, rows, world, message
):
    monkeypatch.setattr(processes, "world_size", lambda: world)
    recipe = settings(on_policy={"fraction": fraction}, train={"batch_rows": rows})
    with pytest.raises(ConfigError, match=message):
        start(recipe, tmp_path)


# --- rollouts at hand --------------------------------------------------------------------------------


def test_rollouts_are_written_when_due_and_forgotten_when_too_old(settings, tmp_path):
    on_policy = {"start_step": 1, "replay": 0.5, "max_staleness": 2, "length": 4}
    run = new(settings(on_policy=on_policy), tmp_path)
    run.denoiser.train()
    seen = []
    for step in range(10):
        found = renew_rollouts(run, step)
        assert bool(found) == (step % 2 == 1)
        assert run.denoiser.training
        seen.append(sorted(run.rollouts))
    assert seen == [[], [0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3],
                    [2, 3, 4]]  # fmt: skip
    sizes = [len(batches.load(run.folder / "rollouts", number)) for number in range(5)]
    assert sizes == [16, 8, 8, 8, 8]  # the first batch has nothing to replay


def test_weights_of_the_present_write(settings, tmp_path):
    """A batch is a function of the weights, the seed and its number, and of nothing else."""
    run = new(settings(on_policy={"length": 8}), tmp_path / "1")
    renew_rollouts(run, 0)
    first = ids_of(run)
    torch.rand(7)  # not the global generator either
    renew_rollouts(run, 0)
    assert ids_of(run) == first
    seeded = new(settings(on_policy={"length": 8}, train={"seed": 1}), tmp_path / "2")
    renew_rollouts(seeded, 0)
    assert ids_of(seeded) != first
    with torch.no_grad():
        run.denoiser.model.lm_head.weight.neg_()
    renew_rollouts(run, 0)
    assert ids_of(run) != first


def test_no_two_rollouts_have_the_same_random_numbers(settings, tmp_path):
    """One prompt and the same weights: another text every time, also in the next batch."""
    run = new(settings(on_policy={"max_prompts": 1, "replay": 0.5}), tmp_path)
    with torch.no_grad():
        run.denoiser.model.lm_head.weight[END] = 0  # texts that end at once are all alike
    for step in (0, 2):
        renew_rollouts(run, step)
    texts = [
        tuple(rollout.tokens_L.tolist()) for batch in (0, 1) for rollout in run.rollouts[batch]
    ]
    assert len(set(texts)) == len(texts) == 24
    assert len({text[:2] for text in texts}) == 1


def test_a_denominator_may_be_below_one(settings, tmp_path, monkeypatch):
    """One token, learnt in one of four states: counted by token or by rollout, the mean is the same."""
    losses = []
    for reduce in ("token", "rollout"):
        on_policy = {"states": "all", "eos": "published", "reduce": reduce, "steps_per_batch": 1}
        train = {"batch_rows": 1, "micro_rows": 1}
        run = new(settings(on_policy=on_policy, train=train), tmp_path / reduce)
        tokens_L = torch.tensor([256, 65, 66, 67, 68, END, 69, 70])
        steps_L = torch.tensor([GIVEN, GIVEN, GIVEN, GIVEN, 0, 1, 2, 3])
        written = [Rollout(tokens_L, steps_L, True, 4, 4, -1.0)]
        monkeypatch.setattr(batches, "write_batch", lambda *_, written=written: written)
        renew_rollouts(run, 0)
        (batch,) = micro_batches(run, 0)
        assert batch.kd_denominator == (0.25 if reduce == "token" else 1.0)
        losses.append(train_step(run, 0)["on_policy"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0
