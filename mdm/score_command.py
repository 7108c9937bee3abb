"""`mdm score`: how likely a text is to a model, with its standard error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from .commands import DTYPE_HELP, MODEL_HELP, QUANTIZATION_HELP


@click.command(short_help="How likely a continuation or a file is.")
@click.argument("context", required=False)
@click.argument("continuation", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Score a whole file instead.")
@click.option("--window", default=512, show_default=True, help="Tokens a window of --file.")
@click.option("--overlap", default=0, show_default=True, help="Earlier tokens a later window sees.")
@click.option("--model", help=f"{MODEL_HELP[:-1]}; an AR model or `embedded` works too.")
@click.option(
    "--estimator",
    default="auto",
    show_default=True,
    help="auto, exact, stratified, independent, llada or order.",
)
@click.option("--mc-samples", default=128, show_default=True, help="Masks of one answer.")
@click.option("--cfg-scale", default=0.0, show_default=True, help="Guidance strength; 0 = off.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens of one forward.")
@click.option("--seed", default=0, show_default=True, help="Of the masks.")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@click.option("--quantization", default="", help=QUANTIZATION_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all details.")
def score(
    context: str | None,
    continuation: str | None,
    file: Path | None,
    window: int,
    overlap: int,
    model: str | None,
    device: str | None,
    dtype: str,
    quantization: str,
    as_json: bool,
    **estimation: Any,
) -> None:
    """Log-likelihood of CONTINUATION after CONTEXT, or of a whole --file, in nats.

    A diffusion student has a lower bound on it, estimated with a standard error; with
    `--estimator order` the exact likelihood of decoding the surest position first. An
    autoregressive model has the exact value: comparing it with a bound favours the AR model.

    \b
    mdm score "def add(a, b):" "  return a + b"
    mdm score --file README.md --window 128 --mc-samples 32
    mdm score "def add(a, b):" "  return a + b" --model embedded
    """
    from .errors import ConfigError, DataError, RequestError
    from .likelihood import (
        LikelihoodSettings,
        bits_per_byte,
        pair_of_texts,
        perplexity,
        rolling_pairs,
        total,
    )
    from .record import to_json

    settings = LikelihoodSettings(**estimation)
    if (file is None) == (context is None or continuation is None):
        raise ConfigError("give either CONTEXT and CONTINUATION, or --file")
    opened = open_scored(model, device, dtype, quantization)
    if file is None:
        assert context is not None
        assert continuation is not None
        if not continuation:
            raise RequestError("CONTINUATION is empty; there is nothing to score")
        # Spaces at the end of the context are scored with the continuation.
        text = context[len(context.rstrip()) :] + continuation
        pairs = [pair_of_texts(opened.vocab, context, continuation, opening=opened.opening)]
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: {error}") from error
        window = min(window, opened.max_length)
        pairs = rolling_pairs(opened.vocab, text, window, overlap=overlap)
    found = total(opened.score(pairs, settings))
    details = {
        **dataclasses.asdict(found),
        "nats_per_token": -found.value / found.num_tokens,
        "perplexity": perplexity(found),
        "bits_per_byte": bits_per_byte(found, text),
        "model": opened.name,
        "settings": dataclasses.asdict(settings),
        "dtype": dtype,
        "quantization": quantization,
        "window": window if file is not None else None,
        "overlap": overlap if file is not None else None,
    }
    if as_json:
        click.echo(to_json(details))
        return
    kind = "lower bound" if found.is_bound else "exact"
    click.echo(
        f"log p = {found.value:.3f} ± {found.std_err:.3f} nats ({kind}, {found.estimator},"
        f" {found.nfe} forwards), {found.num_tokens} tokens: perplexity"
        f" {details['perplexity']:.2f} a token, {details['bits_per_byte']:.3f} bits a byte"
    )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A student or AR model that can score."""

    name: str
    vocab: Any
    max_length: int
    opening: tuple[int, ...]
    score: Any


def open_scored(
    model: str | None, device: str | None, dtype: str = "float32", quantization: str = ""
) -> _Opened:
    """The student of --model (or of the last finished run), or an AR model."""
    from . import autoregressive, likelihood
    from .checkpoint import load_ar, opens_as_denoiser
    from .commands import open_model, to_device
    from .int8 import check_quantization, quantise
    from .loading import dtype_of
    from .vocab import read_vocab

    if model is None or opens_as_denoiser(model):
        place = Path(model) if model else None
        denoiser, path = open_model(place, device, dtype, quantization)

        def score_student(pairs: Any, settings: Any) -> Any:
            return likelihood.log_likelihood(denoiser, pairs, settings)

        vocab = denoiser.vocab
        return _Opened(str(path), vocab, denoiser.max_length, (vocab.start_id,), score_student)
    numbers = dtype_of(dtype)
    check_quantization(quantization, dtype)
    network, tokenizer = load_ar(model, dtype=numbers)
    to_device(network, device)
    ar = quantise(autoregressive.Autoregressive(network, read_vocab(tokenizer)), quantization)

    def score_ar(pairs: Any, settings: Any) -> Any:
        return autoregressive.log_likelihood(ar, pairs, batch_tokens=settings.batch_tokens)

    return _Opened(model, ar.vocab, ar.max_length, ar.opening, score_ar)
