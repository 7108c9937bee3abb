"""A language that can be enumerated: every posterior, what each soft target converges to, distances.

The teacher is a small random transformer over a few words; all texts have one length, so the law of
texts is a table with one axis a position, and every conditional is a ratio of its sums. float64.

    excess  mean over numbers l of masks, sets of l masks, masked positions, and visible tokens as they
            come in the texts, of KL(q ‖ student), in nats: exactly how much the student's likelihood
            bound per token lies above the best one
    tv      total variation between a law and that of the student's texts when it decodes one word a
            step in random order
    limit   what a student knows that has learnt its targets perfectly: the mean of the target given
            what is visible, where that has a simple form. No training goes below its excess

Shapes: L words of a text, V words, N texts, X = V … V one axis a position (1 where it is masked).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser, has_plain_head
from mdm.diffusion import generator
from mdm.train.teachers.ar import ARTeacher
from mdm.vocab import Vocab, read_vocab

Pattern = tuple[int, ...]  # masked positions, ascending
# (pattern, masked position) -> (X, V) distribution there, for all visible words.
Table = dict[tuple[Pattern, int], torch.Tensor]


# --- a language and its tables ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """A teacher, what it says about every prefix, and the laws of texts."""

    vocab: Vocab
    teacher: ARTeacher
    steps_LX: torch.Tensor  # p(x_k | what stands to its left), float64
    laws: dict[str, torch.Tensor]  # "teacher" and "corpus": (X) probabilities of all texts
    truths: dict[str, Table]  # their posteriors


def make_world(words: int, length: int, seed: int) -> World:
    """The language with this seed; the corpus is half its, half that of the next seed."""
    vocab = make_vocab(words)
    teacher, other = (random_teacher(vocab, words, seed + i) for i in (0, 1))
    steps_LX = next_word_probs(teacher, vocab.start_id, length)
    law_X = steps_LX.prod(0)
    corpus_X = (law_X + next_word_probs(other, vocab.start_id, length).prod(0)) / 2
    laws = {"teacher": law_X, "corpus": corpus_X}
    truths = {name: posteriors(law) for name, law in laws.items()}
    return World(vocab, teacher, steps_LX, laws, truths)


def make_vocab(words: int) -> Vocab:
    """Words 0 … words - 1, a token for both edges of a text, a mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    edge = "<|edge|>"
    tokens = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([edge])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=edge)
    return read_vocab(fast).with_mask(None)


def random_model(
    rows: int, *key: int | str, hidden: int, layers: int, std: float, head_std: float
) -> Any:
    """A tiny causal transformer with normal weights, a function of `key`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    random = generator(*key)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                size = head_std if "lm_head" in name else std
                parameter.copy_(size * torch.randn(parameter.shape, generator=random))
    return model.eval()


def random_teacher(vocab: Vocab, words: int, seed: int) -> ARTeacher:
    """Large weights, so that words depend on one another; only words are ever predicted."""
    rows = words + 1  # the mask is not the teacher's
    model = random_model(rows, "teacher", seed, hidden=32, layers=1, std=0.5, head_std=0.35)
    return ARTeacher(model.requires_grad_(False), words, has_plain_head(model))


def random_student(vocab: Vocab, seed: int) -> Denoiser:
    """A bidirectional transformer with weights of the usual size."""
    model = random_model(len(vocab), "student", seed, hidden=48, layers=2, std=0.1, head_std=0.1)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=True)


def all_texts(words: int, length: int) -> torch.Tensor:
    """(V^L, L) in the order of a flattened X."""
    texts = itertools.product(range(words), repeat=length)
    return torch.tensor(list(texts), dtype=torch.long).reshape(words**length, length)


@torch.no_grad()
def next_word_probs(teacher: ARTeacher, start_id: int, length: int) -> torch.Tensor:
    """(L, X) p(x_k | x_<k) for every text, by one forward over all of them."""
    texts_NL = all_texts(teacher.num_tokens, length)
    x_NL = nn.functional.pad(texts_NL, (1, 0), value=start_id)
    logits_NLV = teacher.model(x_NL, use_cache=False).logits[:, :-1, : teacher.num_tokens]
    probs_NLV = logits_NLV.double().softmax(-1)
    steps_LN = probs_NLV.gather(-1, texts_NL[..., None])[..., 0].T
    return steps_LN.reshape(length, *[teacher.num_tokens] * length)


def patterns(length: int) -> Iterator[Pattern]:
    """Every set of one or more masked positions."""
    for count in range(1, length + 1):
        yield from itertools.combinations(range(length), count)


def summed(values_X: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """The sum over these axes, which stay with size 1; torch reads no axes as all of them."""
    return values_X.sum(list(axes), keepdim=True) if axes else values_X


def words_last(values_X: torch.Tensor, position: int) -> torch.Tensor:
    """(X, V) with the word at `position` as last axis instead."""
    return values_X.movedim(position, -1).unsqueeze(position)


def words_in_place(values_XV: torch.Tensor, position: int) -> torch.Tensor:
    """(X) the inverse of `words_last`."""
    return values_XV.squeeze(position).movedim(-1, position)


def posterior(law_X: torch.Tensor, masked: Pattern, position: int) -> torch.Tensor:
    """(X, V) P(x_i = v | visible) under a law."""
    joint_X = summed(law_X, [k for k in masked if k != position])
    return words_last(joint_X / summed(joint_X, [position]), position)


def posteriors(law_X: torch.Tensor) -> Table:
    """The posterior under every mask pattern."""
    return {
        (masked, i): posterior(law_X, masked, i) for masked in patterns(law_X.ndim) for i in masked
    }


# --- what each target converges to -------------------------------------------------------------------


def expected(law_X: torch.Tensor, values_XV: torch.Tensor, masked: Pattern) -> torch.Tensor:
    """(X, V) the mean of `values` over the masked words, given the visible ones."""
    # A value that does not depend on a word has size 1 there; the product has them all.
    total_XV = summed(law_X[..., None] * values_XV, masked)
    return total_XV / summed(law_X, masked)[..., None]


def _limit_ce(world: World, law_X: torch.Tensor, masked: Pattern, i: int) -> torch.Tensor:
    return posterior(law_X, masked, i)


def _limit_left(world: World, law_X: torch.Tensor, masked: Pattern, i: int) -> torch.Tensor:
    return expected(law_X, words_last(world.steps_LX[i], i), masked)


def _limit_suffix(world: World, law_X: torch.Tensor, masked: Pattern, i: int) -> torch.Tensor:
    return expected(law_X, posterior(world.laws["teacher"], (i,), i), masked)


def _limit_literal(world: World, law_X: torch.Tensor, masked: Pattern, i: int) -> torch.Tensor:
    """The word at i in forced decoding: blind to the text under the masks and to the right."""
    forced_X = world.steps_LX[list(masked)].prod(0)
    return words_last(summed(forced_X, [k for k in masked if k != i]), i)


def _limit_exact(world: World, law_X: torch.Tensor, masked: Pattern, i: int) -> torch.Tensor:
    return world.truths["teacher"][masked, i]


LIMITS: dict[str, Callable[[World, torch.Tensor, Pattern, int], torch.Tensor]] = {
    "ce": _limit_ce,
    "left": _limit_left,
    "suffix": _limit_suffix,
    "mc_literal": _limit_literal,
    "exact": _limit_exact,
}
# Exactly unbiased on teacher texts, whatever the number of fills.
UNBIASED = ("i_sir", "csmc", "student")


def limit(world: World, texts: str, arm: str) -> Table | None:
    """What the student is taught on average; None where that is not known in closed form."""
    if arm in UNBIASED and texts == "teacher":
        return world.truths["teacher"]
    if arm not in LIMITS:
        return None
    law_X = world.laws[texts]
    return {key: LIMITS[arm](world, law_X, *key) for key in world.truths["teacher"]}


# --- measures ----------------------------------------------------------------------------------------


def excess(law_X: torch.Tensor, truth: Table, guess: Table) -> float:
    """Mean KL(truth ‖ guess), nats: over the number of masks, their places, positions, and visible
    tokens as they come in `law_X`. Infinite if the guess excludes what happens."""
    by_count: list[list[float]] = [[] for _ in range(law_X.ndim)]
    for (masked, i), q_XV in truth.items():
        ratio_XV = torch.xlogy(q_XV, q_XV) - torch.xlogy(q_XV, guess[masked, i])
        value = (summed(law_X, masked) * ratio_XV.sum(-1)).sum()
        by_count[len(masked) - 1].append(float(value))
    return math.fsum(math.fsum(values) / len(values) for values in by_count) / law_X.ndim


def decoded(guess: Table, length: int) -> torch.Tensor:
    """(X) law of the texts that are decoded one word a step, in uniformly random order.

    The last of the words S that stand so far was each of them with probability 1 / |S|. Sums to less
    than 1 if the student also predicts tokens that are no words.
    """
    everywhere = range(length)
    laws: dict[Pattern, torch.Tensor] = {(): torch.ones([1] * length, dtype=torch.float64)}
    for seen in patterns(length):
        total_X = torch.zeros(1, dtype=torch.float64)
        for i in seen:
            before = tuple(k for k in seen if k != i)
            masked = tuple(k for k in everywhere if k not in before)
            total_X = total_X + laws[before] * words_in_place(guess[masked, i], i)
        laws[seen] = total_X / len(seen)
    return laws[tuple(everywhere)]


def total_variation(law_X: torch.Tensor, other_X: torch.Tensor) -> float:
    """Half the L1 distance; what `other` lacks to 1 counts as a text that `law` never has."""
    return float(((law_X - other_X).abs().sum() + 1 - other_X.sum()) / 2)


@torch.no_grad()
def student_table(denoiser: Denoiser, words: int, length: int) -> Table:
    """What the student says in every context."""
    table: Table = {}
    was_training = denoiser.training
    denoiser.eval()
    for masked in patterns(length):
        visible = [k for k in range(length) if k not in masked]
        x_BL = torch.full((words ** len(visible), length + 1), denoiser.mask_id)
        x_BL[:, 0] = denoiser.vocab.start_id
        x_BL[:, [k + 1 for k in visible]] = all_texts(words, len(visible))
        log_probs_NV = denoiser(x_BL, x_BL == denoiser.mask_id, score=_log_probs)[:, :words]
        probs_BMV = log_probs_NV.double().exp().reshape(len(x_BL), len(masked), words)
        shape = [1 if k in masked else words for k in range(length)]
        for place, i in enumerate(masked):
            table[masked, i] = probs_BMV[:, place].reshape(*shape, words)
    denoiser.train(was_training)
    return table


def _log_probs(logits_nV: torch.Tensor) -> torch.Tensor:
    return logits_nV.log_softmax(-1)
