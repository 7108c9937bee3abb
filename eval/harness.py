"""lm-eval's view of an mdm model: diffusion students and AR teachers answer its three requests.

`loglikelihood` of a student is (an estimate of) a lower bound on the log-likelihood, a teacher's is
exact: comparing the two favours the teacher. Random numbers of a request come from the seed, the
document and the number of the repeat, so neither order nor batch changes an answer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model

from mdm.config import to_tree
from mdm.errors import ConfigError, RequestError, unknown
from mdm.generate import Hole
from mdm.likelihood import Likelihood, Pair, pair_of_texts, rolling_pairs, total
from mdm.runs import last_finished

from .answers import Answers, Completion
from .models import ModelSettings, model_settings, open_evaluated
from .responses import Responses, key_of

DEFAULT_GEN_LENGTH = 256  # lm-eval's own, for tasks that name none
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens")
GENERATION_NAMES = (*LENGTH_NAMES, "until", "do_sample", "temperature", "top_p")


@register_model("mdm")
class MdmLM(LM):
    """A model behind lm-eval's interface.

    From the command line of lm-eval: `--model mdm --model_args model=runs/demo/final,steps=64,…`,
    with any setting of `mdm eval`, and `responses=FILE` to go on after an interruption.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        answers: Answers | None = None,
        responses: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if answers is None:
            given = str(batch_size or "auto")
            number = 8 if given.startswith("auto") else int(given)
            source = model or str(last_finished())
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                device = None  # lm-eval says "cuda:0" by default, also where there is no GPU
            if "cache" in settings:  # lm-eval reads "none" as None
                settings["cache"] = settings["cache"] or "none"
            evaluated = open_evaluated(
                source, model_settings(batch_size=number, **settings), device
            )
            answers = Answers(evaluated, Responses(Path(responses) if responses else None))
        self.answers = answers
        self.truncated: Counter[str] = Counter()
        self.joined: Counter[str] = Counter()
        self.likelihoods: dict[str, Likelihood] = {}
        self._templated: dict[str, tuple[int, ...]] = {}

    @property
    def settings(self) -> ModelSettings:
        return self.answers.evaluated.settings

    # --- likelihood ----------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context in nats, would greedy decoding give it).

        The second is known for teachers and for estimator `order`, otherwise False. Too long a
        context loses its beginning.
        """
        pairs = [self._pair(request) for request in requests]
        results = self.answers.score(pairs)
        for request, result in zip(requests, results, strict=True):
            self.likelihoods[likelihood_key(request.doc, request.args)] = result
        return [(result.value, bool(result.greedy)) for result in results]

    def _pair(self, request: Instance) -> Pair:
        context, continuation = request.args
        vocab = self.answers.evaluated.vocab
        key = document_key(request.doc)
        if context in self._templated:
            answer = tuple(vocab.encode(continuation))
            pair = Pair(self._templated[context], answer, key)
        else:
            opening = self.answers.evaluated.opening
            pair = pair_of_texts(vocab, context, continuation, key, opening=opening)
        room = self.answers.evaluated.max_length - len(pair.answer)
        if room < 1:
            raise RequestError(
                f"{_name(request)}: the continuation has {len(pair.answer)} tokens, but the model"
                f" was built for at most {self.answers.evaluated.max_length}, prompt included"
            )
        return dataclasses.replace(pair, prompt=self._fitting(pair.prompt, room, request))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each whole text, in windows of the model's length, every token once."""
        evaluated = self.answers.evaluated
        window = min(self.settings.window or evaluated.max_length, evaluated.max_length)
        windows = [
            rolling_pairs(evaluated.vocab, request.args[0], window, key=document_key(request.doc))
            for request in requests
        ]
        results = iter(self.answers.score([pair for pairs in windows for pair in pairs]))
        totals = [total([next(results) for _ in pairs]) for pairs in windows]
        for request, whole in zip(requests, totals, strict=True):
            self.likelihoods[likelihood_key(request.doc, request.args)] = whole
        return [whole.value for whole in totals]

    # --- generation ----------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text after each context, up to the first of its `until` strings or the end token."""
        seen: Counter[str] = Counter()
        completions = []
        for request in requests:
            context, arguments = request.args
            # Counted within the task: what other tasks ask must not change this one's texts.
            same = key_of(
                request.task_name, request.doc_id, document_key(request.doc), context, arguments
            )
            completions.append(self._completion(request, seen[same]))
            seen[same] += 1
        return [result.text for result in self.answers.complete(completions)]

    def _completion(self, request: Instance, repeat: int) -> Completion:
        context, arguments = request.args
        until, length, temperature, top_p = generation_arguments(arguments)
        length = self.settings.gen_length or length
        vocab = self.answers.evaluated.vocab
        if context in self._templated:
            before = self._templated[context]
        else:
            if self.settings.strip:
                context = context.rstrip()
            elif self.answers.evaluated.joins_end(context):
                self.joined[request.task_name or "?"] += 1
            before = (*self.answers.evaluated.opening, *vocab.encode(context))
            before = before or (vocab.start_id,)  # an empty context
        room = self.answers.evaluated.max_length - length
        if room < 1:
            raise ConfigError(
                f"{_name(request)} asks for {length} new tokens, but the model was built for at most"
                f" {self.answers.evaluated.max_length}, prompt included; set --gen-length"
            )
        hole = Hole(
            before=self._fitting(before, room, request),
            length=length,
            stop=until,
            key=("eval", self.settings.seed, document_key(request.doc), repeat),
        )
        return Completion(hole, temperature, top_p)

    def _fitting(self, ids: Sequence[int], room: int, request: Instance) -> tuple[int, ...]:
        """The end of the prompt that fits, behind the start token; what is cut off is counted."""
        ids = tuple(ids)
        if len(ids) <= room:
            return ids
        self.truncated[request.task_name or "?"] += 1
        start = self.answers.evaluated.opening if room > 1 else ()
        return (*start, *ids[len(ids) - room + len(start) :])

    # --- chat ----------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return str(self.answers.evaluated.identity["vocab"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm-eval's records."""
        template = self.answers.evaluated.vocab.tokenizer.chat_template
        return str(template) if chat_template and template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; its tokens are kept, so that text never becomes a special token."""
        vocab = self.answers.evaluated.vocab
        text, ids = vocab.chat(chat_history, open_last=not add_generation_prompt)
        opening = self.answers.evaluated.opening
        if opening and ids[:1] != [opening[0]]:  # a template may have put it there already
            ids = [*opening, *ids]
        self._templated[text] = tuple(ids)
        return text

    # --- records -------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Goes into lm-eval's results: what was evaluated, with every setting."""
        return {**self.answers.evaluated.identity, "mdm_settings": to_tree(self.settings)}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval's own cache (--use_cache) knows a request by its text alone; bind it to this model.

        Raises ConfigError if the cache holds answers of another model or other settings.
        """
        if cache_hook.dbdict is not None:
            ours = key_of(self.get_model_info())
            theirs = cache_hook.dbdict.get("mdm")
            if theirs is None and len(cache_hook.dbdict) == 0:
                cache_hook.dbdict["mdm"] = ours
            elif theirs != ours:
                raise ConfigError(
                    "the cache named by --use_cache holds answers of another model or of other"
                    " settings; name another file, or use model_args responses=FILE"
                )
        super().set_cache_hook(cache_hook)


def generation_arguments(
    arguments: Mapping[str, Any],
) -> tuple[tuple[str, ...], int, float, float]:
    """(stop strings, new tokens, temperature, top_p) of a generation request.

    `until` may be a string or a list. Greedy if `do_sample` is false, or if it is missing and no
    temperature is given. Raises ConfigError for an argument that would have no effect.
    """
    for name, value in arguments.items():
        if name not in GENERATION_NAMES:
            raise ConfigError(
                f"{unknown('generation argument', name, GENERATION_NAMES)}; its value was {value!r}"
            )
    until = arguments.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    lengths = [arguments[name] for name in LENGTH_NAMES if arguments.get(name) is not None]
    temperature = arguments.get("temperature")
    if arguments.get("do_sample", bool(temperature)):
        temperature = 1.0 if temperature is None else float(temperature)
    else:
        temperature = 0.0
    top_p = arguments.get("top_p")
    length = int(lengths[0]) if lengths else DEFAULT_GEN_LENGTH
    # An empty stop string would stop at once.
    return (
        tuple(string for string in stop if string),
        length,
        temperature,
        1.0 if top_p is None else float(top_p),
    )


def document_key(doc: Any) -> str:
    """Hash of a document: the choices of one question share it, and so their random numbers."""
    return key_of(doc)[:16]


def likelihood_key(doc: Any, arguments: Sequence[Any]) -> str:
    """Where the standard error of a likelihood request is found again."""
    return key_of(doc, list(arguments))


def _name(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"
