"""The memory of a model: what is known is not asked again, and nothing else is taken for it."""

import dataclasses
import math

import pytest

from mdm.canvas import SamplerSettings
from mdm.eval import sharing
from mdm.eval.answers import ROUND_BATCHES, Answers, Completion
from mdm.eval.models import STUDENT, TEACHER, ModelSettings
from mdm.eval.responses import Responses
from mdm.generate import Generation, Hole
from mdm.likelihood import Likelihood, LikelihoodSettings, Pair

IDENTITY = {"kind": STUDENT, "weights": "a", "vocab": "v", "dtype": "float32"}


@dataclasses.dataclass
class Recorder:
    """A model whose answers name the request, and which notes what it was asked."""

    settings: ModelSettings = ModelSettings()
    kind: str = STUDENT
    identity: dict = dataclasses.field(default_factory=lambda: dict(IDENTITY))
    confidence: float = -0.5
    fail_after: int | None = None
    completed: list = dataclasses.field(default_factory=list)
    scored: list = dataclasses.field(default_factory=list)

    def complete(self, holes, *, temperature, top_p, done):
        results = []
        self.completed.append(([hole.before for hole in holes], temperature, top_p))
        for i, hole in reversed(list(enumerate(holes))):  # no order is promised
            if self.fail_after is not None and len(results) >= self.fail_after:
                raise KeyboardInterrupt
            text = f"{hole.before} {hole.length} {hole.after} {hole.stop} {hole.key} {temperature}"
            results.append(Generation(text, [1], 1, "stop", 2, self.confidence))
            done(i, results[-1])
        return results[::-1]

    def score(self, pairs, *, done):
        self.scored.append([pair.prompt for pair in pairs])
        for place, pair in enumerate(pairs):
            value = -float(sum(pair.answer))
            done(place, Likelihood(value, math.nan, 1, "exact", 1, True, None))


def requests(*numbers, temperature=0.0):
    return [Completion(Hole((0, n), 3, (n,), ("\n",), ("k", n)), temperature) for n in numbers]


def pairs(*numbers):
    return [Pair((0, n), (n, n), f"p{n}") for n in numbers]


def asked(recorder):
    return [before for call, _, _ in recorder.completed for before in call]


# --- known or not --------------------------------------------------------------------------------


def test_known_answers_are_not_computed_again(tmp_path):
    first = Recorder()
    once = Answers(first, Responses(tmp_path / "r.jsonl")).complete(requests(1, 2))
    second = Recorder()
    answers = Answers(second, Responses(tmp_path / "r.jsonl"))
    assert answers.complete(requests(2, 3, 1)) == [
        once[1],
        answers.complete(requests(3))[0],
        once[0],
    ]
    assert asked(first) == [(0, 1), (0, 2)]
    assert asked(second) == [(0, 3)]


def test_known_likelihoods_too(tmp_path):
    first, second = Recorder(), Recorder()
    Answers(first, Responses(tmp_path / "r.jsonl")).score(pairs(1, 2))
    found = Answers(second, Responses(tmp_path / "r.jsonl")).score(pairs(2, 3))
    assert [result.value for result in found] == [-4.0, -6.0]
    assert second.scored == [[(0, 3)]]


def test_equal_requests_are_computed_once():
    recorder = Recorder()
    found = Answers(recorder, Responses(None)).complete(requests(1, 2, 1))
    assert sorted(asked(recorder)) == [(0, 1), (0, 2)]
    assert found[0] == found[2] != found[1]


def test_nothing_asked_nothing_done():
    recorder = Recorder()
    answers = Answers(recorder, Responses(None))
    assert answers.complete([]) == []
    assert answers.score([]) == []
    assert (recorder.completed, recorder.scored) == ([], [])


OTHER_HOLES = [
    Hole((0, 2), 3, (1,), ("\n",), ("k", 1)),
    Hole((0, 1), 4, (1,), ("\n",), ("k", 1)),
    Hole((0, 1), 3, (2,), ("\n",), ("k", 1)),
    Hole((0, 1), 3, (1,), (), ("k", 1)),
    Hole((0, 1), 3, (1,), ("\n",), ("k", 2)),
]


@pytest.mark.parametrize(
    "other",
    [
        *(Completion(hole) for hole in OTHER_HOLES),
        Completion(requests(1)[0].hole, 0.5),
        Completion(requests(1)[0].hole, 0.0, 0.9),
    ],
)
def test_another_request_is_not_known(other):
    recorder = Recorder()
    answers = Answers(recorder, Responses(None))
    answers.complete([*requests(1), other])
    assert len(answers.responses.known) == 2


def asks_again(change, name="complete", kind=STUDENT):
    """Is a request computed anew after this change of settings or identity?"""
    responses = Responses(None)
    wanted = {"complete": requests(1), "score": pairs(1)}[name]
    before, after = Recorder(kind=kind), Recorder(kind=kind)
    change(after)
    getattr(Answers(before, responses), name)(wanted)
    getattr(Answers(after, responses), name)(wanted)
    return bool(after.completed or after.scored)


@pytest.mark.parametrize("name", ["complete", "score"])
@pytest.mark.parametrize("part", IDENTITY)
def test_another_model_is_asked(part, name):
    assert asks_again(lambda recorder: recorder.identity.update({part: "other"}), name)


def with_settings(**values):
    return lambda recorder: setattr(recorder, "settings", ModelSettings(**values))


@pytest.mark.parametrize("values", [{"steps": 3}, {"cfg_scale": 1.0}, {"block_length": 4}])
def test_other_sampler_settings_ask_a_student_again(values):
    change = with_settings(sampler=SamplerSettings(**values))
    assert asks_again(change)
    assert not asks_again(change, "score")
    assert not asks_again(change, kind=TEACHER)  # it has no sampler


@pytest.mark.parametrize("values", [{"mc_samples": 3}, {"seed": 1}, {"estimator": "order"}])
def test_other_likelihood_settings_score_a_student_again(values):
    change = with_settings(likelihood=LikelihoodSettings(**values))
    assert asks_again(change, "score")
    assert not asks_again(change, "complete")
    assert not asks_again(change, "score", kind=TEACHER)  # its likelihood is exact


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 3},
        {"likelihood": LikelihoodSettings(batch_tokens=7)},
        # Every request has its own.
        {"sampler": SamplerSettings(temperature=0.7, top_p=0.5)},
        {"gen_length": 9},
        {"seed": 5},
    ],
)
@pytest.mark.parametrize("name", ["complete", "score"])
def test_what_changes_only_the_time_is_no_other_request(values, name):
    assert not asks_again(with_settings(**values), name)


def test_the_request_decides_temperature_and_nucleus():
    recorder = Recorder(ModelSettings(sampler=SamplerSettings(temperature=0.7, top_p=0.5)))
    Answers(recorder, Responses(None)).complete([Completion(Hole((0,), 1), 0.2, 0.8)])
    assert recorder.completed == [([(0,)], 0.2, 0.8)]


# --- order, groups and rounds --------------------------------------------------------------------


def test_short_ones_first_and_results_in_the_order_asked():
    recorder = Recorder()
    wanted = [Completion(Hole(tuple(range(n)), 2)) for n in (5, 1, 3)]
    found = Answers(recorder, Responses(None)).complete(wanted)
    assert [len(before) for before in asked(recorder)] == [1, 3, 5]
    expected = [str(request.hole.before) for request in wanted]
    assert all(r.text.startswith(text) for r, text in zip(found, expected, strict=True))


def test_each_temperature_is_a_group():
    recorder = Recorder()
    mixed = [*requests(1, 2), *requests(3, temperature=0.5), *requests(4)]
    found = Answers(recorder, Responses(None)).complete(mixed)
    assert [(len(call), t) for call, t, _ in recorder.completed] == [(3, 0.0), (1, 0.5)]
    assert [result.text.split(" ")[-1] for result in found] == ["0.0", "0.0", "0.5", "0.0"]
    assert [result.text[result.text.index("('k'") :].rpartition(" ")[0] for result in found] == [
        "('k', 1)",
        "('k', 2)",
        "('k', 3)",
        "('k', 4)",
    ]


def test_alone_everything_is_asked_in_one_go():
    """Each answer is stored as it is ready; rounds would leave batches half empty at their ends."""
    recorder = Recorder(ModelSettings(batch_size=1))
    answers = Answers(recorder, Responses(None))
    answers.complete(requests(*range(20)))
    assert len(recorder.completed) == 1
    found = answers.score(pairs(*range(1, 20)))
    assert len(recorder.scored) == 1
    assert [result.value for result in found] == [-2.0 * n for n in range(1, 20)]


def test_with_company_texts_are_written_in_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "world_size", lambda: 2)
    monkeypatch.setattr(sharing, "lead", lambda name, items, compute: compute(list(items)))
    recorder = Recorder(ModelSettings(batch_size=1))
    responses = Responses(tmp_path / "r.jsonl")
    found = Answers(recorder, responses).complete(requests(*range(10)))
    assert [len(call) for call, _, _ in recorder.completed] == [2 * ROUND_BATCHES, 2]
    assert [result.text[:6] for result in found] == [f"(0, {n})" for n in range(10)]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 10  # each once


def test_an_interrupted_evaluation_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Answers(Recorder(fail_after=2), Responses(path)).complete(requests(1, 2, 3))
    second = Recorder()
    found = Answers(second, Responses(path)).complete(requests(1, 2, 3))
    assert asked(second) == [(0, 1)]  # the recorder began with the last one
    assert found == Answers(Recorder(), Responses(None)).complete(requests(1, 2, 3))


# --- what comes back is what was computed --------------------------------------------------------


@pytest.mark.parametrize("confidence", [-0.25, math.nan])
def test_a_generation_from_the_file_is_the_one_computed(tmp_path, confidence):
    path = tmp_path / "r.jsonl"
    (computed,) = Answers(Recorder(confidence=confidence), Responses(path)).complete(requests(1))
    (stored,) = Answers(Recorder(), Responses(path)).complete(requests(1))
    for result in (computed, stored):
        assert result.token_ids == [1]
        assert (result.num_tokens, result.finish_reason, result.nfe) == (1, "stop", 2)
        assert result.confidence == pytest.approx(confidence, nan_ok=True)
    assert computed.text == stored.text == "(0, 1) 3 (1,) ('\\n',) ('k', 1) 0.0"


def test_an_unknown_standard_error_stays_unknown(tmp_path):
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        (found,) = Answers(Recorder(), Responses(path)).score(pairs(1))
        assert math.isnan(found.std_err)
        assert found == dataclasses.replace(found, value=-2.0, estimator="exact", greedy=None)


def test_pairs_arrive_whole():
    class Strict(Recorder):
        def score(self, pairs, *, done):
            assert pairs == [Pair((0, 7), (7, 7), "p7")]
            return super().score(pairs, done=done)

    Answers(Strict(), Responses(None)).score(pairs(7))


def test_progress_names_what_was_known(capsys):
    answers = Answers(Recorder(), Responses(None))
    answers.complete(requests(1))
    answers.complete(requests(1, 2, 3))
    assert "complete: 1 of 3 known from an earlier run" in capsys.readouterr().err
