"""The enumerable language: its tables against definitions word by word, and a study that fits together."""

import functools
import itertools
import json
import math
from dataclasses import replace

import oracles
import pytest
import torch

from mdm.benchmarks import study_report as report
from mdm.benchmarks import synthetic as bench
from mdm.benchmarks import synthetic_language as language
from mdm.errors import ConfigError, MdmError
from mdm.train.loss_sums import loss_sums

WORDS, LENGTH = 3, 4
SMALL = bench.SyntheticBench(
    seeds=(0, 1), steps=8, rows=4, fills=2, words=WORDS, length=LENGTH, language=3
)


@pytest.fixture(scope="module")
def world():
    return language.make_world(WORDS, LENGTH, 3)


def next_log_probs(world):
    """The teacher as the oracles take it, one full forward a prefix."""

    @functools.cache
    def answer(*prefix):
        ids = torch.tensor([[world.vocab.start_id, *prefix]])
        logits_V = world.teacher.model(ids).logits[0, -1, :WORDS]
        return logits_V.double().log_softmax(-1)

    return lambda prefix: answer(*prefix)


def at(values_XV, x_L, masked):
    """The distribution for the visible words of x."""
    return values_XV[tuple(0 if k in masked else x_L[k] for k in range(LENGTH))]


def test_the_law_is_the_teachers(world):
    texts_NL, log_joint_N = oracles.ar_log_joint(next_log_probs(world), LENGTH, WORDS)
    torch.testing.assert_close(texts_NL, language.all_texts(WORDS, LENGTH))
    torch.testing.assert_close(
        world.laws["teacher"].flatten(), log_joint_N.exp(), rtol=1e-5, atol=1e-9
    )
    for law_X in world.laws.values():
        assert float(law_X.sum()) == pytest.approx(1, abs=1e-12)
    assert language.total_variation(world.laws["teacher"], world.laws["corpus"]) > 0.1
    own = [language.next_word_probs(language.random_teacher(world.vocab, WORDS, seed),
           world.vocab.start_id, LENGTH).prod(0) for seed in (3, 4)]  # fmt: skip
    torch.testing.assert_close(world.laws["corpus"], (own[0] + own[1]) / 2)


def test_words_depend_on_what_follows(world):
    """Otherwise no target would differ from the left-only one."""
    gap = language.excess(
        world.laws["teacher"], world.truths["teacher"], language.limit(world, "teacher", "left")
    )
    assert gap > 0.05


@pytest.mark.parametrize("masked", [(0,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_posteriors_by_enumeration(world, masked):
    log_probs = next_log_probs(world)
    for x_L in [(0, 1, 2, 0), (2, 2, 1, 1)]:
        for i in masked:
            q_V = oracles.posterior_marginal(log_probs, x_L, masked, i, WORDS)
            found_V = at(world.truths["teacher"][masked, i], x_L, masked)
            torch.testing.assert_close(found_V, q_V, rtol=1e-4, atol=1e-7)


def test_limits_are_means_over_what_is_under_the_masks(world):
    """E[target | visible], by a sum over the texts that agree with the visible words."""
    log_probs, masked, x_L, i = next_log_probs(world), (1, 3), (2, 0, 1, 0), 1
    fills = [(2, a, 1, b) for a, b in itertools.product(range(WORDS), repeat=2)]

    def mean(texts, target):
        weight_N = torch.stack([world.laws[texts][fill] for fill in fills])
        rows_NV = torch.stack([target(fill) for fill in fills])
        return (weight_N[:, None] * rows_NV).sum(0) / weight_N.sum()

    one_hot = torch.eye(WORDS, dtype=torch.float64)
    targets = {
        "ce": lambda fill: one_hot[fill[i]],
        "left": lambda fill: oracles.left_only(log_probs, fill, i),
        "suffix": lambda fill: oracles.full_conditional(log_probs, fill, i, WORDS),
        "exact": lambda fill: oracles.posterior_marginal(log_probs, x_L, masked, i, WORDS),
    }
    for texts, (arm, target) in itertools.product(world.laws, targets.items()):
        found_V = at(language.limit(world, texts, arm)[masked, i], x_L, masked)
        torch.testing.assert_close(found_V, mean(texts, target), rtol=1e-4, atol=1e-7)
    forced = oracles.enumerate_fills(log_probs, x_L, masked, WORDS)
    literal_V = oracles.marginal_of_fills(forced, [f.log_proposal for f in forced], i, WORDS)
    found_V = at(language.limit(world, "corpus", "mc_literal")[masked, i], x_L, masked)
    torch.testing.assert_close(found_V, literal_V, rtol=1e-4, atol=1e-7)


def test_what_is_unbiased_and_what_is_not(world):
    def floor(texts, arm):
        bound = language.limit(world, texts, arm)
        return bound and language.excess(world.laws[texts], world.truths["teacher"], bound)

    for arm in ("ce", "suffix", "i_sir", "csmc", "student", "exact"):
        assert floor("teacher", arm) == pytest.approx(0, abs=1e-9)
    for arm in ("left", "mc_literal"):
        assert floor("teacher", arm) > 0.05
    assert floor("corpus", "ce") > floor("corpus", "suffix") > 0.02
    assert floor("corpus", "exact") == pytest.approx(0, abs=1e-9)
    assert floor("corpus", "i_sir") is None
    assert floor("teacher", "importance") is None
    own = language.limit(world, "corpus", "ce")
    assert language.excess(world.laws["corpus"], world.truths["corpus"], own) == pytest.approx(0)


def test_excess_by_its_definition(world):
    """Every number of masks counts alike, then every set, position and visible context."""
    truth, guess = world.truths["teacher"], language.limit(world, "corpus", "left")
    texts = [(tuple(x_L), float(p)) for x_L, p in zip(
        language.all_texts(WORDS, LENGTH).tolist(), world.laws["corpus"].flatten(), strict=True
    )]  # fmt: skip
    means = []
    for count in range(1, LENGTH + 1):
        values = []
        for masked in itertools.combinations(range(LENGTH), count):
            for i in masked:
                rows = [
                    (at(truth[masked, i], x_L, masked), at(guess[masked, i], x_L, masked))
                    for x_L, _ in texts
                ]
                gap_N = oracles.forward_kl(*map(torch.stack, zip(*rows, strict=True))).tolist()
                values.append(sum(p * gap for (_, p), gap in zip(texts, gap_N, strict=True)))
        means.append(sum(values) / len(values))
    found = language.excess(world.laws["corpus"], truth, guess)
    assert found == pytest.approx(sum(means) / LENGTH)
    never = {key: torch.zeros_like(q_XV) for key, q_XV in truth.items()}
    assert language.excess(world.laws["corpus"], truth, never) == math.inf


def test_decoding_by_every_order(world):
    """A student that is no law's posterior: the mean over all orders, text by text."""
    left = language.limit(world, "corpus", "left")
    found_X = language.decoded(left, LENGTH)
    for x_L in [(0, 0, 0, 0), (2, 1, 0, 2), (1, 2, 2, 0)]:
        total = 0.0
        for order in itertools.permutations(range(LENGTH)):
            prob = 1.0
            for step, i in enumerate(order):
                masked = tuple(sorted(order[step:]))
                prob *= float(at(left[masked, i], x_L, masked)[x_L[i]])
            total += prob / math.factorial(LENGTH)
        assert float(found_X[x_L]) == pytest.approx(total)
    truth_X = language.decoded(world.truths["corpus"], LENGTH)
    torch.testing.assert_close(truth_X, world.laws["corpus"])
    assert language.total_variation(world.laws["teacher"], found_X * 0) == pytest.approx(1)
    assert language.total_variation(truth_X, truth_X / 2) == pytest.approx(0.5)


def test_the_students_table_is_what_it_says(world):
    student = language.random_student(world.vocab, 3)
    table = language.student_table(student, WORDS, LENGTH)
    assert table.keys() == world.truths["teacher"].keys()
    start, mask, x_L = world.vocab.start_id, world.vocab.mask_id, (2, 0, 1, 1)
    for masked in [(1,), (0, 3), (0, 1, 2, 3)]:
        x_BL = torch.tensor([[start, *(mask if k in masked else x_L[k] for k in range(LENGTH))]])
        logits_NV = student(x_BL, x_BL == mask).detach()
        for place, i in enumerate(masked):
            own_V = logits_NV[place].softmax(-1)[:WORDS].double()
            torch.testing.assert_close(at(table[masked, i], x_L, masked), own_V)
    assert 0.3 < float(table[(1,), 1].sum(-1).mean()) < 1  # an edge is no word


def test_arms_see_the_same_texts_and_masks(world):
    first = bench.masked_texts(SMALL, world, "corpus", "ce", 5, 2)
    for arm in ("left", "exact"):
        other = bench.masked_texts(SMALL, world, "corpus", arm, 5, 2)
        assert torch.equal(first.xt_BL, other.xt_BL)
        assert torch.equal(first.ce_weight_BL, other.ce_weight_BL)
    for changed in [("teacher", "ce", 5, 2), ("corpus", "ce", 6, 2), ("corpus", "ce", 5, 3)]:
        assert not torch.equal(first.x0_BL, bench.masked_texts(SMALL, world, *changed).x0_BL)
    # Every step has few and many masks.
    counts = first.masked_BL.sum(1).view(bench.BLOCK, SMALL.rows)
    assert bool((counts.amax(1) - counts.amin(1) >= LENGTH - 2).all())
    assert not bool(first.masked_BL[:, 0].any())
    torch.testing.assert_close(
        first.ce_weight_BL[first.masked_BL],
        (LENGTH / first.masked_BL.sum(1, keepdim=True)).expand(-1, LENGTH + 1)[first.masked_BL],
    )


def test_texts_follow_their_law(world):
    settings = bench.SyntheticBench(words=WORDS, length=LENGTH, rows=500)
    batch = bench.masked_texts(settings, world, "corpus", "ce", 0, 0)
    found_X = torch.zeros_like(world.laws["corpus"])
    for x_L in batch.x0_BL[:, 1:].tolist():
        found_X[tuple(x_L)] += 1 / len(batch.x0_BL)
    assert language.total_variation(world.laws["corpus"], found_X) < 0.05


@pytest.mark.parametrize("arm", ["ce", "exact", "i_sir", "suffix"])
def test_parts_of_a_block_add_up(world, arm):
    """Loss and denominator of a block are the sums of its steps'."""
    student = language.random_student(world.vocab, 0)
    whole = bench.masked_texts(SMALL, world, "teacher", arm, 0, 0)
    targets = bench.targets_of(arm, world, whole, student, SMALL.fills)
    assert (targets is None) == (arm == "ce")
    objective = bench.objective_of(arm)
    expected_3 = loss_sums(student, whole, targets, objective)
    found_3, denominator = torch.zeros(3), 0.0
    for first in range(0, len(whole.x0_BL), SMALL.rows):
        own = bench.part(whole, targets, slice(first, first + SMALL.rows))
        found_3 += loss_sums(student, *own, objective).detach()
        denominator += own[0].denominator
    torch.testing.assert_close(found_3, expected_3.detach(), rtol=1e-4, atol=1e-4)
    assert denominator == pytest.approx(whole.denominator)


def test_the_exact_target_is_the_posterior_of_its_own_mask(world):
    batch = bench.masked_texts(SMALL, world, "teacher", "exact", 1, 0)
    targets = bench.targets_of("exact", world, batch, None, 1)
    log_probs = next_log_probs(world)
    places = batch.masked_BL.nonzero().tolist()
    assert len(targets) == len(places)
    for n in (0, 5, len(places) - 1):
        row, position = places[n]
        x_L = batch.x0_BL[row, 1:].tolist()
        masked = (batch.masked_BL[row, 1:].nonzero()[:, 0]).tolist()
        q_V = oracles.posterior_marginal(log_probs, x_L, masked, position - 1, WORDS)
        torch.testing.assert_close(
            targets.log_probs_NK[n].exp().double(), q_V, rtol=1e-4, atol=1e-6
        )
    assert float(targets.tail_mass_N.abs().max()) == 0


def test_training_learns_and_repeats(world, monkeypatch):
    settings = bench.SyntheticBench(
        seeds=(0,), steps=48, rows=12, words=WORDS, length=LENGTH, language=3
    )
    curve = bench.train_arm(settings, world, "teacher", "exact", 0)
    assert [line["steps"] for line in curve] == [12, 24, 48]
    excesses = [line["excess"] for line in curve]
    assert excesses[0] > excesses[1] > excesses[2] > 0
    assert curve[0]["tv"] > curve[2]["tv"]
    assert curve[2]["excess"] == curve[2]["excess_texts"]  # teacher texts have the teacher's law
    assert 0 < curve[2]["target_seconds"] < curve[2]["seconds"]
    again = bench.train_arm(settings, world, "teacher", "exact", 0)
    assert [line["excess"] for line in again] == excesses
    monkeypatch.setattr(bench, "budgets", lambda steps: (steps,))
    (last,) = bench.train_arm(settings, world, "teacher", "exact", 0)
    assert last["excess"] == excesses[2]  # measuring changes nothing
    (other,) = bench.train_arm(settings, world, "teacher", "exact", 1)
    assert other["excess"] != excesses[2]


def test_a_record_and_its_tables(tmp_path):
    said = []
    some = replace(SMALL, arms=("ce", "smc", "i_sir", "csmc"))
    record = bench.run(some, tmp_path / "records.jsonl", said.append)
    assert len(said) == 4 + 3
    lines = record["results"]["lines"]
    assert len(lines) == 3 * len(said)
    by_key = {(line["texts"], line["arm"], line["steps"]): line for line in lines}
    own, hard = by_key["corpus", "smc", 8], by_key["corpus", "ce", 8]
    gaps = [a - b for a, b in zip(own["excess"]["values"], hard["excess"]["values"], strict=True)]
    assert own["minus_ce"]["values"] == gaps
    assert own["minus_ce"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert own["minus_ce"]["std_err"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    assert hard["minus_ce"]["mean"] == 0
    assert own["limit"] is None
    assert hard["limit"]["excess_texts"] == pytest.approx(0, abs=1e-12)
    assert own["excess"]["mean"] != own["excess_texts"]["mean"]
    text = report.describe_synthetic(record)
    assert json.loads(text.splitlines()[-1])["kind"] == "bench study synthetic"
    assert (
        json.loads((tmp_path / "records.jsonl").read_text())["results"]
        == json.loads(text.splitlines()[-1])["results"]
    )
    assert text.count("\n| csmc |") == 1  # on teacher texts alone
    assert text.count("\n| i_sir |") == 2
    report.plot_synthetic(record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_some_arms_only(tmp_path):
    some = replace(SMALL, arms=("left", "csmc"), seeds=(3,), steps=4)
    record = bench.run(some, tmp_path / "records.jsonl", lambda text: None)
    found = [(line["texts"], line["arm"], line["steps"]) for line in record["results"]["lines"]]
    assert found == [
        *(("teacher", "left", n) for n in (1, 2, 4)),
        *(("teacher", "csmc", n) for n in (1, 2, 4)),
        *(("corpus", "left", n) for n in (1, 2, 4)),
    ]
    assert record["results"]["lines"][0]["minus_ce"] is None  # no ce among them
    assert "±" not in report.describe_synthetic(record).splitlines()[5]  # one seed has no error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arms": ("isir",)}, "i_sir"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "differ"),
        ({"steps": 3}, "steps"),
        ({"fills": 0}, "fills"),
        ({"rows": 0}, "rows"),
        ({"words": 9}, "words"),
        ({"words": 8, "length": 6}, "enumerate"),
        ({"length": 1}, "length"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(MdmError if "arms" in change else ConfigError, match=named):
        bench.SyntheticBench(**{**vars(SMALL), **change})
