"""Suffix-scored targets against enumeration: what they are exactly, and what they are not.

Shapes: B batch, L length, V vocabulary, N positions asked for, C candidates.
"""

import math

import oracles
import pytest
import tiny
import torch
from tiny_run import ar_teacher
from tiny_targets import (
    EXACT,
    V,
    cut_teacher,
    dense,
    places,
    question,
    random_proposals,
    random_question,
    total_variation,
)

from mdm.diffusion import generator
from mdm.train.targets import NOT_KEPT, Question, SoftTargets, TargetSettings
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.suffix import suffix_scored

HELD = "other masks as in the text"

L = 6
X0 = [0, 3, 1, 4, 2, 2]  # position 0 is given: nothing stands to its left
EVERYWHERE = range(1, L)


def at(*positions, length=L):
    return torch.tensor([[i in positions for i in range(length)]])


def chosen(**settings):
    """Every candidate and the whole right side."""
    return TargetSettings(**{"kind": "suffix", "candidates": V, "window": 0, **settings})


def answer_to(asked, model, *, temperature=1.0, **settings):
    teacher = model if isinstance(model, ARTeacher) else ar_teacher(model)
    return suffix_scored(teacher, asked, settings=chosen(**settings), temperature=temperature)


def ask(model, x0_BL, wanted_BL, ids_BL=None, *, temperature=1.0, masked=None, **settings):
    """The targets of positions that are asked for alone: only they are masked, each by itself.

    So what is asked together does not matter. `masked` are all masks of a single question instead.
    """
    if masked is not None:
        asked = question(x0_BL, masked, None if wanted_BL is None else wanted_BL, ids_BL)
        return answer_to(asked, model, temperature=temperature, **settings)
    x0_BL, places = torch.tensor(x0_BL), wanted_BL.nonzero()
    ids_BL = torch.zeros_like(x0_BL) if ids_BL is None else torch.tensor(ids_BL)
    row_N, position_N = places.T
    one_NL = torch.zeros(len(places), x0_BL.shape[1], dtype=torch.bool)
    one_NL[torch.arange(len(places)), position_N] = True
    keys = tuple((0, 0, n) for n in range(len(places)))
    asked = Question(x0_BL[row_N], one_NL, one_NL, ids_BL[row_N], keys)
    return answer_to(asked, model, temperature=temperature, **settings)


def posterior(model, masked, position, end=None):
    next_log_probs = tiny.next_log_probs(model)
    return oracles.posterior_marginal(next_log_probs, X0, masked, position, V, start=1, end=end)


# --- against enumeration -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("position", EVERYWHERE)
def test_one_masked_token_is_the_posterior(family, position):
    # Gemma's logits are capped after the head, so it goes the way without a plain head.
    overrides = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    model = tiny.tiny_model(family, V, layers=1, hidden=16, dtype=torch.float64, **overrides)
    assert ar_teacher(model).plain_head == (family != "gemma3")
    found = dense(ask(model, [X0], at(position)))[0]
    torch.testing.assert_close(found, posterior(model, [position], position), **EXACT)


@pytest.mark.parametrize("candidates", range(1, V + 1))
@pytest.mark.parametrize("seed", range(3))
def test_candidates_renormalise_the_posterior_and_err_by_what_they_miss(candidates, seed):
    model = tiny.toy_ar(V, seed)
    next_log_probs = tiny.next_log_probs(model)
    targets = ask(model, [X0], at(*EVERYWHERE), candidates=candidates)
    for row, i in enumerate(EVERYWHERE):
        ids = targets.token_ids_NK[row].tolist()
        likeliest = oracles.left_only(next_log_probs, X0, i).argsort(descending=True).tolist()
        assert len(set(ids)) == candidates
        # S: the likeliest by the prior; the true token takes the last place if it is not there.
        expected = likeliest[:candidates]
        if X0[i] not in expected:
            expected[-1] = X0[i]
        assert set(ids) == set(expected)

        q_V = posterior(model, [i], i)
        kept_mass = float(q_V[ids].sum())
        found = dense(targets)[row]
        torch.testing.assert_close(found[ids], q_V[ids] / kept_mass, **EXACT)
        assert total_variation(found, q_V) == pytest.approx(1 - kept_mass, abs=1e-5)
        looped = oracles.suffix_score_loop(next_log_probs, X0, i, ids)
        torch.testing.assert_close(targets.log_probs_NK[row].double(), looped, **EXACT)


def test_several_masks_give_the_full_conditional_and_not_the_posterior():
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    masked = [1, 2, 4]
    found = dense(ask(model, [X0], None, masked=masked))
    distances = []
    for row, i in enumerate(masked):
        conditional = oracles.full_conditional(next_log_probs, X0, i, V, start=1)
        torch.testing.assert_close(found[row], conditional, **EXACT)
        distances.append(total_variation(found[row], posterior(model, masked, i)))
    assert max(distances) > 0.1


def test_window_cuts_the_evidence():
    model = tiny.toy_ar(V)
    for window in (1, 2, 4):
        targets = ask(model, [X0], at(*EVERYWHERE), window=window)
        for row, i in enumerate(EVERYWHERE):
            expected = posterior(model, [i], i, end=min(L, i + 1 + window))
            torch.testing.assert_close(dense(targets)[row], expected, **EXACT)
    whole = dense(ask(model, [X0], at(*EVERYWHERE)))
    near = dense(ask(model, [X0], at(*EVERYWHERE), window=1))
    assert total_variation(whole[0], near[0]) > 0.01


def test_the_last_token_of_a_document_has_only_its_prior():
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    packed, ids = [[0, 3, 1, 0, 4, 2]], [[0, 0, 0, 1, 1, 1]]
    found = dense(ask(model, packed, at(2, 5), ids))
    for row, document in enumerate(([0, 3, 1], [0, 4, 2])):
        prior = oracles.left_only(next_log_probs, document, 2)
        torch.testing.assert_close(found[row], prior, **EXACT)


def test_temperature_divides_the_whole_score():
    model = tiny.toy_ar(V)
    targets = ask(model, [X0], at(2), temperature=2.0)
    expected = (posterior(model, [2], 2).log() / 2).softmax(-1)
    torch.testing.assert_close(dense(targets)[0], expected, **EXACT)
    assert targets.temperature == 2.0


def test_top_k_keeps_the_best_candidates_by_posterior():
    targets = ask(tiny.toy_ar(V), [X0], at(2), top_k=2)
    q_V = posterior(tiny.toy_ar(V), [2], 2)
    assert targets.token_ids_NK[0].tolist() == q_V.argsort(descending=True)[:2].tolist()
    assert float(targets.tail_mass_N) == pytest.approx(
        1 - float(q_V.topk(2).values.sum()), abs=1e-5
    )


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_a_block_ends_the_evidence(block):
    """Changing a token after the block changes nothing; one inside it, to the right, does."""
    model = tiny.toy_ar(V)
    targets = ask(model, [X0], at(*EVERYWHERE), block=block)
    for row, i in enumerate(EVERYWHERE):
        expected = posterior(model, [i], i, end=min(L, (i // block + 1) * block))
        torch.testing.assert_close(dense(targets)[row], expected, **EXACT)
    assert targets.conditioned_on == f"left+right(block {block}; {HELD})"
    both = ask(model, [X0], at(2), block=block, window=3).conditioned_on
    assert both == f"left+right(window 3, block {block}; {HELD})"


# --- which masks and which evidence ------------------------------------------------------------------


def test_masks_after_the_last_visible_token_are_no_evidence():
    """Masks 2, 4, 5 of 6: that of 4 sees nothing to its right, that of 2 sees position 3 only."""
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    found = dense(ask(model, [X0], None, masked=[2, 4, 5]))
    torch.testing.assert_close(found[0], posterior(model, [2], 2, end=4), **EXACT)
    for row, i in ((1, 4), (2, 5)):
        torch.testing.assert_close(found[row], oracles.left_only(next_log_probs, X0, i), **EXACT)
    other = [*X0[:4], (X0[4] + 1) % V, (X0[5] + 1) % V]
    again = dense(ask(model, [other], [2, 4], masked=[2, 4, 5]))
    torch.testing.assert_close(again, found[:2], **EXACT)
    # A mask that visible tokens follow holds its true token, and that is evidence.
    between = dense(ask(model, [X0], [2], masked=[2, 4]))[0]
    torch.testing.assert_close(between, posterior(model, [2], 2), **EXACT)
    assert total_variation(between, found[0]) > 0.01


def texts_of(model, masked):
    """Ways to fill the masks of X0, with their posterior probabilities."""
    fills = oracles.enumerate_fills(tiny.next_log_probs(model), X0, masked, V, start=1)
    log_joints = torch.tensor([fill.log_joint for fill in fills], dtype=torch.float64)
    return log_joints.softmax(0), [list(fill.tokens) for fill in fills]


@pytest.mark.parametrize("masked", [[1, 3], [2, 4, 5]], ids=str)
def test_over_teacher_texts_the_mean_is_the_posterior_with_less_variance_than_one_hot(masked):
    model = tiny.toy_ar(V)
    share_B, texts = texts_of(model, masked)
    p_BNV = dense(ask(model, texts, None, masked=masked)).view(len(texts), len(masked), V)
    for n, position in enumerate(masked):
        q_V = posterior(model, masked, position)
        torch.testing.assert_close((share_B[:, None] * p_BNV[:, n]).sum(0), q_V, **EXACT)
        soft = (share_B[:, None] * (p_BNV[:, n] - q_V) ** 2).sum()
        assert soft < 0.9 * (q_V * (1 - q_V)).sum()


# --- random states -----------------------------------------------------------------------------------


def slow_tail(asked, model, draws, **settings):
    """The definition at every wanted position: (V,) over the candidates, and the mass outside."""
    next_log_probs, options = tiny.next_log_probs(model), chosen(**settings)
    found = []
    for row, start, text, position, _holes, end in places(asked, options):
        random = generator("tail", *asked.keys[row], position + start)
        uniforms = torch.rand(draws, dtype=torch.float64, generator=random).tolist()
        best = oracles.suffix_candidates(next_log_probs, text, position, options.candidates)
        own = student_candidates(asked, row, position + start, options.student_candidates)
        candidates = list(dict.fromkeys([*best, *own]))
        choose = oracles.chosen_by(lambda name, uniforms=uniforms: uniforms[name[2]])
        q_C, outside = oracles.tail_estimate(
            next_log_probs, text, position, candidates, end, draws, choose
        )
        found.append((torch.zeros(V, dtype=torch.float64).index_add(
            0, torch.tensor(candidates), q_C), outside))  # fmt: skip
    return found


def student_candidates(asked, row, position, count):
    if not count:
        return []
    place = asked.masked_BL.nonzero().tolist().index([row, position])
    ids = asked.proposals.token_ids_NK[place, :count].tolist()
    log_r = asked.proposals.log_probs_NK[place, :count].tolist()
    return [v for v, value in zip(ids, log_r, strict=True) if value > NOT_KEPT and v < V]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"candidates": 2, "block": 4},
        {"candidates": 1, "student_candidates": 2, "window": 3},
        {"candidates": 2, "student_candidates": 1, "tail_draws": 3},
        {"candidates": 4, "tail_draws": 1, "branch_tokens": 9},
    ],
    ids=str,
)
def test_equals_the_slow_definition(family, settings):
    capped = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    model = tiny.tiny_model(family, V, layers=1, hidden=16, dtype=torch.float64, **capped)
    for seed in range(3 if family == "llama" else 1):
        asked = random_question(seed, proposals=True)
        targets = answer_to(asked, model, **settings)
        slow = slow_tail(asked, model, settings.get("tail_draws", 0), **settings)
        torch.testing.assert_close(dense(targets), torch.stack([q_V for q_V, _ in slow]), **EXACT)
        outside_N = torch.tensor([outside for _, outside in slow])
        torch.testing.assert_close(targets.tail_mass_N, outside_N, **EXACT)
        if "tail_draws" in settings:
            torch.testing.assert_close(targets.measures["outside"], outside_N, **EXACT)
        else:
            assert "outside" not in targets.measures


def test_the_students_tokens_are_candidates_too():
    """In its order of likelihood; none twice, none that the teacher has not, no unused slot."""
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    likeliest = oracles.left_only(next_log_probs, X0, 2).argsort(descending=True).tolist()
    least, true = likeliest[-1], X0[2]
    for ids, log_r, more in (
        ([least, 0], [-0.1, -3.0], {least}),
        ([likeliest[0], least], [-0.1, -3.0], {least}),
        ([V + 3, least], [-0.1, -3.0], {least}),
        ([least, likeliest[-2]], [0.0, NOT_KEPT], {least}),
        ([true, V], [-0.1, -3.0], set()),
    ):
        proposals = SoftTargets(
            torch.tensor([ids]), torch.tensor([log_r]), torch.zeros(1), 1.0, "visible"
        )
        asked = question([X0], [2], proposals=proposals)
        targets = answer_to(asked, model, candidates=2, student_candidates=2)
        used = targets.token_ids_NK[0][targets.log_probs_NK[0] > NOT_KEPT].tolist()
        want = {likeliest[0], true if true != likeliest[0] else likeliest[1], *more}
        want |= {v for v in ids if v < V and log_r[ids.index(v)] > NOT_KEPT}
        assert sorted(used) == sorted(want)


def test_which_row_of_the_student_belongs_to_a_position():
    """Proposals are for all masks, answers for the wanted ones."""
    model = tiny.toy_ar(V)
    proposals = random_proposals(6, torch.Generator().manual_seed(1))
    asked = question([X0, X0], [[1, 2, 4], [2, 3, 4]], [[2], [3, 4]], proposals=proposals)
    targets = answer_to(asked, model, candidates=1, student_candidates=1)
    for row, (place, position) in enumerate(((1, 2), (4, 3), (5, 4))):
        used = targets.token_ids_NK[row][targets.log_probs_NK[row] > NOT_KEPT].tolist()
        assert set(used) == {X0[position], int(proposals.token_ids_NK[place, 0])}


# --- the tail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_a_tail_draw_stands_for_the_mass_outside_on_average(candidates):
    """E over draws of outside / (1 - outside) is the odds of the mass outside, exactly."""
    model = tiny.toy_ar(V)
    next_log_probs = tiny.next_log_probs(model)
    ids = oracles.suffix_candidates(next_log_probs, X0, 2, candidates)
    outside = 1 - float(posterior(model, [2], 2)[ids].sum())
    for draws in (1, 2):
        runs = oracles.outcomes(
            lambda choose, draws=draws: oracles.tail_estimate(
                next_log_probs, X0, 2, ids, L, draws, choose
            )
        )
        odds = math.fsum(p * tail / (1 - tail) for p, (_, tail) in runs)
        assert odds == pytest.approx(outside / (1 - outside), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_many_tail_draws_give_the_mass_outside(temperature):
    """At any temperature: the tail of q^(1/T), while the measure stays that of q."""
    model = tiny.toy_ar(V)
    q_V = posterior(model, [2], 2)
    tempered_V = (q_V.log() / temperature).softmax(-1)
    targets = ask(
        model, [X0], at(2), candidates=2, tail_draws=600, temperature=temperature,
        branch_tokens=2**14,
    )  # fmt: skip
    used = targets.log_probs_NK[0] > NOT_KEPT
    ids = targets.token_ids_NK[0][used]
    assert len(ids) == 2  # drawn tokens are not kept
    assert float(targets.tail_mass_N) == pytest.approx(1 - float(tempered_V[ids].sum()), abs=0.03)
    assert float(targets.measures["outside"]) == pytest.approx(1 - float(q_V[ids].sum()), abs=0.03)
    torch.testing.assert_close(dense(targets)[0, ids], tempered_V[ids], atol=0.03, rtol=0)
    assert float(targets.tail_mass_N + dense(targets).sum()) == pytest.approx(1, abs=1e-5)


def test_when_everything_is_a_candidate_nothing_is_outside():
    model = tiny.toy_ar(V)
    plain = ask(model, [X0], at(*EVERYWHERE))
    drawn = ask(model, [X0], at(*EVERYWHERE), tail_draws=2)
    torch.testing.assert_close(dense(drawn), dense(plain), **EXACT)
    assert drawn.measures["outside"].tolist() == [0] * 5


def test_where_nothing_stands_to_the_right_a_single_draw_tells_the_tail_exactly():
    """The likelihood is 1, so every draw stands for the same mass."""
    model = tiny.toy_ar(V)
    prior_V = oracles.left_only(tiny.next_log_probs(model), X0, 5)
    targets = ask(model, [X0], at(5), candidates=2, tail_draws=1)
    ids = targets.token_ids_NK[0][:2].tolist()
    outside = 1 - float(prior_V[ids].sum())
    assert float(targets.measures["outside"]) == pytest.approx(outside, abs=1e-5)


# --- pruning -------------------------------------------------------------------------------------------

LONG = [0, 3, 1, 4, 2, 2, 0, 1, 3, 3, 4, 2]


@pytest.fixture(scope="module")
def sharp():
    """A teacher whose right side tells a lot."""
    return tiny.tiny_model("llama", V, layers=1, hidden=32, seed=3, dtype=torch.float64)


def kept_ids(targets, row=0):
    return sorted(targets.token_ids_NK[row][targets.log_probs_NK[row] > NOT_KEPT].tolist())


@pytest.mark.parametrize("prune", [0.01, 0.1, 0.5, 0.99])
def test_pruning_is_the_slow_definition(prune, sharp):
    """Which candidates go in which round, what mass they had, and what is left."""
    next_log_probs = tiny.next_log_probs(sharp)
    dropped_any = False
    for positions in (range(1, 12), range(1, 12, 4)):  # all alone, or three at once
        wanted = at(*positions, length=12)
        targets = ask(sharp, [LONG], wanted, prune=prune, branch_tokens=11)
        for row, i in enumerate(positions):
            alive, dropped = oracles.pruned(next_log_probs, LONG, i, range(V), 12, prune)
            if i == 11:
                alive, dropped = list(range(V)), 0.0  # nothing is scored, so nothing is saved
            assert kept_ids(targets, row) == sorted(alive)
            assert LONG[i] in alive
            assert float(targets.measures["dropped"][row]) == pytest.approx(dropped, abs=1e-5)
            assert dropped < prune
            q_V = oracles.full_conditional(next_log_probs, LONG, i, V, start=1)
            found_V = dense(targets)[row]
            torch.testing.assert_close(found_V[alive], q_V[alive] / q_V[alive].sum(), **EXACT)
            # The error is the mass that the dropped ones would have had in the end.
            lost = 1 - float(q_V[alive].sum())
            assert total_variation(found_V, q_V) == pytest.approx(lost, abs=1e-5)
            dropped_any |= len(alive) < V
    assert dropped_any


def test_several_masks_are_pruned_together_as_alone(sharp):
    asked = random_question(5, rows=4, length=14)
    together = answer_to(asked, sharp, prune=0.2, branch_tokens=30)
    exact = dense(answer_to(asked, sharp))
    for row, (b, _start, text, position, _holes, end) in enumerate(places(asked, chosen())):
        alive, _ = oracles.pruned(tiny.next_log_probs(sharp), text, position, range(V), end, 0.2)
        if end == position + 1:
            alive = list(range(V))
        assert kept_ids(together, row) == sorted(alive), (b, position)
        want_V = exact[row, alive] / exact[row, alive].sum()
        torch.testing.assert_close(dense(together)[row, alive], want_V, **EXACT)


def test_hardly_any_pruning_is_the_exact_target(sharp):
    exact = ask(sharp, [LONG], at(*range(1, 12), length=12))
    pruned = ask(sharp, [LONG], at(*range(1, 12), length=12), prune=1e-12)
    torch.testing.assert_close(dense(pruned), dense(exact), **EXACT)
    assert pruned.measures["dropped"].max() < 1e-12


def test_the_true_token_is_never_dropped(sharp):
    """Not even where the right side speaks against it; then it gets all the mass."""
    next_log_probs = tiny.next_log_probs(sharp)
    for i in (1, 4, 7):
        q_V = oracles.full_conditional(next_log_probs, LONG, i, V, start=1)
        text = [*LONG[:i], int(q_V.argmin()), *LONG[i + 1 :]]
        targets = ask(sharp, [text], at(i, length=12), prune=0.999)
        assert text[i] in kept_ids(targets)


def test_drawn_tokens_can_be_dropped_too(sharp):
    targets = ask(sharp, [LONG], at(1, 4, length=12), candidates=2, tail_draws=2, prune=0.9)
    assert targets.measures["dropped"].min() > 0
    assert (targets.measures["outside"] >= 0).all()
    assert not dense(targets).isnan().any()


def test_the_mass_of_a_dropped_candidate_is_what_it_costs_on_average():
    """Over all teacher texts: the mean final mass is at most the mean mass when dropped.

    For a rule that does not look at the true token the two are equal (the mass is a martingale); that
    the true token stays can only help.
    """
    model = tiny.tiny_model("llama", 3, layers=1, hidden=16, seed=1, dtype=torch.float64)
    next_log_probs = tiny.next_log_probs(model)
    texts_NL, log_joint_N = oracles.ar_log_joint(next_log_probs, 6, 3, [0])
    share_N = log_joint_N.exp()
    texts = [[0, *text] for text in texts_NL.tolist()]
    asked = question(texts, [1])
    options = {"candidates": 3, "branch_tokens": 2**14}
    exact = dense(answer_to(asked, model, **options))
    targets = answer_to(asked, model, prune=0.5, **options)
    lost_N = (exact - dense(targets)).clamp(min=0).sum(1)  # = total variation
    cost, promised = (share_N * lost_N).sum(), (share_N * targets.measures["dropped"]).sum()
    assert 0.005 < cost <= promised < 0.5
    # The martingale itself: mass after two tokens of the right side, and at the end.
    middle = dense(answer_to(asked, model, window=2, **options))
    alike = middle[:, 0] < middle.amax(1)  # depends on the two tokens alone
    torch.testing.assert_close(
        (share_N * middle[:, 0])[alike].sum(), (share_N * exact[:, 0])[alike].sum(), **EXACT
    )


# --- what it costs -------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch):
    """The tokens of each forward that are not padding."""
    texts, call = [], ARTeacher.call

    def spied(self, x_BL, outputs_BL, cache, **layout):
        texts.append(x_BL if layout.get("position_ids") is None else x_BL[outputs_BL])
        return call(self, x_BL, outputs_BL, cache, **layout)

    monkeypatch.setattr(ARTeacher, "call", spied)
    return texts


@pytest.mark.parametrize("candidates", [1, 3, V])
def test_a_branch_is_the_candidate_and_what_follows_but_the_last(candidates, fed):
    """E - i tokens for a position i of evidence up to E; the true token's branch is the text itself."""
    ask(tiny.toy_ar(V), [X0], None, masked=[2], candidates=candidates)
    trunk, *branches = fed
    assert trunk.tolist() == [X0]
    (branches,) = branches or [torch.empty(0).long()]
    rows = branches.view(-1, L - 1 - 2).tolist()
    assert len(rows) == candidates - 1
    assert all(row[1:] == X0[3:-1] for row in rows)
    assert X0[2] not in {row[0] for row in rows}
    assert len({row[0] for row in rows}) == candidates - 1


def test_nothing_is_fed_where_nothing_stands_to_the_right(fed):
    ask(tiny.toy_ar(V), [X0], None, masked=[4, 5])
    assert len(fed) == 1


def test_pruning_saves_tokens(fed, sharp):
    ask(sharp, [LONG], None, masked=[1])
    exact = sum(tokens.numel() for tokens in fed[1:])
    fed.clear()
    ask(sharp, [LONG], None, masked=[1], prune=0.5)
    assert exact == (V - 1) * 10
    assert sum(tokens.numel() for tokens in fed[1:]) < 0.6 * exact


# --- the same, however it is computed ------------------------------------------------------------


@pytest.mark.parametrize("prune", [0.0, 0.3])
@pytest.mark.parametrize("branch_tokens", [1, 7, 12])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_splitting_changes_nothing(branch_tokens, chunk_bytes, prune, monkeypatch):
    model = tiny.toy_ar(V)
    x0, masked = [X0, [0, 1, 1, 3, 0, 4]], [[1, 2, 4], [1, 3]]
    whole = ask(model, x0, None, masked=masked, branch_tokens=10**6, prune=prune)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", chunk_bytes)
    split = ask(model, x0, None, masked=masked, branch_tokens=branch_tokens, prune=prune)
    torch.testing.assert_close(dense(split), dense(whole), atol=1e-6, rtol=0)


def test_a_batch_is_its_rows():
    model = tiny.toy_ar(V)
    rows = [X0, [0, 1, 1, 3, 0, 4], [0, 2, 2, 2, 1, 0], [0, 4, 3, 2, 1, 0]]
    masked = [[2, 5], [], [1, 2, 3, 4, 5], [1]]  # one row asks for nothing
    together = dense(ask(model, rows, None, masked=masked))
    alone = [dense(ask(model, [row], None, masked=m)) for row, m in zip(rows, masked, strict=True)]
    assert [len(part) for part in alone] == [2, 0, 5, 1]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [0, 2])
def test_packed_documents_are_separate_documents_and_padding_is_nothing(family, window):
    model = tiny.toy_ar(V, family=family)
    documents = [[0, 3, 1, 4], [0, 4, 2], [0, 1]]
    packed = [[*documents[0], *documents[1], *documents[2], 3, 3, 3]]
    ids = [[0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, -1]]
    together = dense(ask(model, packed, None, ids, masked=[1, 2, 5, 8], window=window))
    alone = [
        dense(ask(model, [d], None, masked=masked, window=window))
        for d, masked in zip(documents, ([1, 2], [1], [1]), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


def test_nothing_asked_for():
    for settings in ({}, {"prune": 0.1}, {"tail_draws": 1, "candidates": 2}):
        targets = ask(tiny.toy_ar(V), [X0], None, masked=[], **settings)
        assert len(targets) == 0
        assert all(len(values) == 0 for values in targets.measures.values())


def test_says_what_it_conditioned_on():
    model = tiny.toy_ar(V)
    assert ask(model, [X0], at(2)).conditioned_on == f"left+right(document; {HELD})"
    assert ask(model, [X0], at(2), window=3).conditioned_on == f"left+right(window 3; {HELD})"


def test_a_reused_mask_token_is_no_candidate():
    """With every token a candidate, and drawn tokens: it has no mass and is never read."""
    model, text = tiny.toy_ar(V), [0, 3, 1, 1, 2, 2]
    cut = cut_teacher(tiny.next_log_probs(model), V, mask_id=4)
    for settings in ({}, {"candidates": 2, "tail_draws": 40}):
        targets = ask(ar_teacher(model, mask_id=4), [text], None, masked=[2], **settings)
        assert not dense(targets)[0, 4]
        assert not targets.tail_mass_N.isnan().any()
    q_V = oracles.full_conditional(cut, text, 2, V, start=1)
    whole = ask(ar_teacher(model, mask_id=4), [text], None, masked=[2])
    torch.testing.assert_close(dense(whole)[0], q_V.nan_to_num(0), **EXACT)
