"""Tiny models under evaluation and rows of benchmarks, made on the spot.

Every row is our own; only its fields are those of the published data set.
"""

import dataclasses
import functools
import json
from pathlib import Path

import tiny
from lm_eval.api.instance import Instance

from mdm.autoregressive import Autoregressive
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.eval.answers import Answers, Completion
from mdm.eval.models import STUDENT, TEACHER, Evaluated, ModelSettings, model_settings
from mdm.eval.responses import Responses
from mdm.generate import Generation, Hole
from mdm.likelihood import Pair
from mdm.vocab import read_vocab

START, END = 256, 257


@functools.cache
def student(positions=192, seed=0, block_size=None):
    """A random byte-level denoiser; its tokenizer has a chat template."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    vocab = read_vocab(tokenizer).with_mask(None)
    model = network(len(vocab), positions, seed)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=False, block_size=block_size).eval()


@functools.cache
def teacher(positions=192, seed=0):
    """A random byte-level causal model."""
    vocab = read_vocab(tiny.byte_tokenizer())
    return Autoregressive(network(len(vocab), positions, seed), vocab)


def network(rows, positions, seed):
    sizes = {"layers": 1, "hidden": 16, "max_position_embeddings": positions}
    return tiny.tiny_model("llama", rows, seed=seed, **sizes)


def evaluated(model=None, settings=None, **values):
    """The model with settings, few masks a likelihood unless told otherwise."""
    model = model or student()
    settings = settings or model_settings(**{"mc_samples": 3, **values})
    kind = STUDENT if isinstance(model, Denoiser) else TEACHER
    identity = {"kind": kind, "weights": "tiny", "vocab": "bytes", "dtype": "float32"}
    return Evaluated(model, settings, "tiny", identity)


def answers(model=None, folder=None, **values):
    """A model with an empty memory, or that of a folder of results."""
    path = None if folder is None else Path(folder) / "responses.jsonl"
    return Answers(evaluated(model, **values), Responses(path))


@dataclasses.dataclass
class Scripted:
    """A model whose answers are texts from a function of (prompt, number of the call)."""

    write: object
    settings: ModelSettings = dataclasses.field(
        default_factory=lambda: model_settings(gen_length=8)
    )
    max_length: int = 1_000_000
    kind: str = STUDENT
    source: str = "scripted"
    opening: tuple[int, ...] = (START,)
    identity: dict = dataclasses.field(
        default_factory=lambda: {"kind": STUDENT, "weights": "script", "vocab": "bytes"}
    )
    joins: bool = False
    asked: int = 0
    fail_after: int | None = None

    @property
    def vocab(self):
        return student().vocab

    def joins_end(self, text):
        return self.joins and text != text.rstrip()

    def complete(self, holes, *, temperature, top_p, done):
        results = []
        for i, hole in enumerate(holes):
            if self.fail_after is not None and self.asked >= self.fail_after:
                raise KeyboardInterrupt
            text = self.write(self.vocab.decode(hole.before), hole)
            for stop in hole.stop:
                text = text.partition(stop)[0]
            results.append(Generation(text, [1], 1, "stop", 1))
            self.asked += 1
            done(i, results[-1])
        return results

    def remembering(self, folder=None):
        path = None if folder is None else Path(folder) / "responses.jsonl"
        return Answers(self, Responses(path))


def request(kind, arguments, doc=None, doc_id=0, task="a_task"):
    """One of lm-eval's requests."""
    doc = {"number": doc_id} if doc is None else doc
    return Instance(kind, doc, arguments, 0, metadata=(task, doc_id, 1))


def write_rows(path, rows):
    """A JSONL file; its path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- rows ------------------------------------------------------------------------------------------

HUMAN = [
    {
        "task_id": f"Own/{i}",
        "prompt": f'def add{i}(x):\n    """Add {i}."""\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}\n",
        "entry_point": f"add{i}",
    }
    for i in range(3)
]


def mbpp_row(number):
    return {
        "task_id": number,
        "text": f"Write a function that multiplies by {number}.",
        "prompt": f"Write a function that multiplies by {number}.",
        "code": f"def times{number}(x):\n    return {number} * x",
        "test_list": [f"assert times{number}({x}) == {number * x}" for x in (1, 2, 3)],
        "test_setup_code": "",
    }


MBPP = [mbpp_row(number) for number in (11, 12, 13)]
ROWS = {
    "gsm8k": [{"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(3)],
    "minerva_math_algebra": [
        {"problem": f"${i} + 1$?", "solution": rf"It is $\boxed{{{i + 1}}}$.", "level": "1"}
        for i in range(2)
    ],
    "bbh_zeroshot_navigate": [{"input": f"Turn {i} times. Back?", "target": "No"} for i in "12"],
    "mmlu_pro_biology": [
        {
            "question": f"Which is {i}?",
            "options": ["zero", "one", "two"],
            "answer": "ABC"[i],
            "cot_content": f"A: Let's think step by step. The answer is ({'ABC'[i]}).",
            "category": "biology",
        }
        for i in range(3)
    ],
    "hellaswag": [
        {
            "ctx_a": f"A dog {i}",
            "ctx_b": "it",
            "activity_label": "Pets",
            "endings": ["runs.", "sits.", "flies away.", "sings."],
            "label": str(i),
        }
        for i in range(3)
    ],
    "mmlu_anatomy": [
        {"question": f"Bone {i}?", "choices": ["a", "b", "c", "d"], "answer": i} for i in range(3)
    ],
    "humaneval": HUMAN,
    "humaneval_instruct": HUMAN,
    "humaneval_plus": HUMAN,
    "humaneval_64": HUMAN,
    "mbpp": MBPP,
    "mbpp_instruct": MBPP,
    "mbpp_plus": MBPP,
    "mbpp_plus_instruct": MBPP,
}
# Of tasks that show examples from another split than the one evaluated on.
EXAMPLES = {"gsm8k": ("train", 5), "mmlu_pro_biology": ("validation", 5)}


def some_answers(answers):
    """Sampled texts and likelihoods of requests of many lengths."""
    holes = [Hole((START, *range(97, 98 + i)), 6, (), (), ("k", i)) for i in range(11)]
    texts = answers.complete([Completion(hole, 1.0) for hole in holes])
    pairs = [Pair((START, 97), tuple(range(98, 99 + i)), str(i)) for i in range(5)]
    return [text.text for text in texts], [found.value for found in answers.score(pairs)]


# --- surroundings ----------------------------------------------------------------------------------


def no_network(monkeypatch):
    """Nothing is asked of the network, and lm-eval does not describe the machine (1.5 s each time)."""
    import lm_eval.evaluator

    def unreachable(*arguments, **options):
        raise OSError("there is no network in tests")

    monkeypatch.setattr("mdm.eval.tasks.socket.create_connection", unreachable)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def data_of(task, folder):
    """`--data` of a task with its rows, and examples where it shows some."""
    from mdm.eval.tasks import parse_data

    found = [parse_data(f"{task}={write_rows(Path(folder) / f'{task}.jsonl', ROWS[task])}")]
    if task in EXAMPLES:
        split, count = EXAMPLES[task]
        rows = (ROWS[task] * count)[:count]
        found.append(parse_data(f"{task}:{split}={write_rows(Path(folder) / 'shots.jsonl', rows)}"))
    return found
