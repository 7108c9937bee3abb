"""`mdm convert` and `mdm generate`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

DTYPE_HELP = "float32, bfloat16 or float16."
QUANTIZATION_HELP = "int8_dynamic: linear layers in 8 bits, on a CPU.  [default: none]"
MODEL_HELP = "Model folder.  [default: the last finished run in runs/]"


@click.command(short_help="Make an initial student from another model.")
@click.argument("source")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--layers", type=int, help="Layers kept, evenly spread.  [default: all]")
@click.option(
    "--width", default=1.0, show_default=True, help="Fraction of channels and heads kept."
)
@click.option("--random", is_flag=True, help="Random weights; SOURCE needs a config only.")
@click.option(
    "--kind",
    help="mdlm (full canvas) or bd3lm (block diffusion).  [default: mdlm, or as published]",
)
@click.option("--block-size", type=int, help="bd3lm: tokens a block.  [default: SOURCE's, or 4]")
@click.option(
    "--attention", help="bd3lm: block, context_causal or reordered.  [default: SOURCE's, or block]"
)
@click.option("--no-shift", is_flag=True, help="Predict position i from output i, not i-1.")
@click.option("--tokenizer", help="Give it this tokenizer: a folder.  [default: SOURCE's]")
@click.option("--mask-token", help="Special token to reuse as mask.  [default: a new one]")
@click.option("--start-token", help="Token that opens a document.  [default: bos, or eos]")
@click.option("--end-token", help="Token that closes a document.  [default: eos]")
@click.option("--seed", default=0, show_default=True, help="Of --random weights.")
@click.option("--trust-remote-code", is_flag=True,
              help="Run the code that comes with a model that needs it.")  # fmt: skip
def convert(
    source: str,
    output: Path,
    layers: int | None,
    width: float,
    random: bool,
    kind: str | None,
    block_size: int | None,
    attention: str | None,
    no_shift: bool,
    tokenizer: str | None,
    mask_token: str | None,
    start_token: str | None,
    end_token: str | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Make an initial student from the model SOURCE.

    SOURCE is a model folder, a .gguf file, a hub name, or "embedded". The student has bidirectional
    attention and a mask token; it knows its AR ancestor's weights, but not yet how to fill masks.

    If SOURCE is a published diffusion model (LLaDA, Dream, SDAR, WeDLM …) it can fill masks already, and
    is written as published but for --kind, --block-size, --attention, --no-shift and the tokens. If it is
    a student of ours, --kind, --block-size and --attention change its blocks. Weights that are only copied
    keep their number type.

    \b
    mdm convert embedded --output students/full
    mdm convert path/to/model --layers 12 --output students/half
    mdm convert embedded --kind bd3lm --block-size 4 --output students/blocks
    mdm convert path/to/LLaDA-8B-Base --output students/llada
    """
    from .checkpoint import save_denoiser
    from .convert import StudentSettings
    from .convert import convert as run_conversion

    settings = StudentSettings(
        init=source,
        layers=layers,
        width=width,
        random=random,
        kind=kind,
        block_size=block_size,
        attention=attention,
        shift=not no_shift,
        mask_token=mask_token,
        tokenizer=tokenizer,
        start_token=start_token,
        end_token=end_token,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    student = run_conversion(settings, as_stored=True)
    save_denoiser(student, output)
    config = student.model.config
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    click.echo(
        f"{output}: {millions:.1f}M parameters, {config.num_hidden_layers} layers, width"
        f" {config.hidden_size}, {blocks_of(student)}, mask {student.vocab.token(student.mask_id)}"
        f" (id {student.mask_id}), shift {'on' if student.shift else 'off'}"
    )


def blocks_of(student: Any) -> str:
    """What a student sees, in words."""
    if student.block_size is None:
        return "full canvas"
    return f"blocks of {student.block_size} ({student.attention})"


@click.command(short_help="Continue a prompt or fill a hole.")
@click.argument("prompt", required=False)
@click.option("--prefix", help="Text before the hole.")
@click.option("--suffix", help="Text after the hole.")
@click.option("--span", type=int, help="Tokens in the hole between --prefix and --suffix.")
@click.option("--chat", is_flag=True, help="Put PROMPT into the chat template.")
@click.option("--model", type=click.Path(path_type=Path), help=MODEL_HELP)
@click.option("--gen-length", default=64, show_default=True, help="New tokens after PROMPT.")
@click.option("--steps", type=int, help="Denoising steps in total.  [default: one per token]")
@click.option("--block-length", type=int,
              help="Tokens decoded together.  [default: all, or a block of the model]")  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, help="Of proposals; 0 = greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus of --temperature; 1 = all.")
@click.option("--remasking", default="low_confidence", show_default=True,
              help="low_confidence, random, margin or entropy.")  # fmt: skip
@click.option("--threshold", type=float, help="Keep all proposals this sure, instead of --steps.")
@click.option("--factor", type=float,
              help="Keep the n surest while (n+1)(1 - confidence) is below this, instead of"
              " --steps.")  # fmt: skip
@click.option("--entropy-bound", type=float,
              help="Keep the surest while all entropies but the last sum to this, in nats, instead of"
              " --steps; with --remasking entropy.")  # fmt: skip
@click.option("--cache", default="none", show_default=True,
              help="none, prefix or dual: approximate, of a model without blocks.")  # fmt: skip
@click.option("--refresh", type=int,
              help="Steps after which --cache is made anew.  [default: at each block]")  # fmt: skip
@click.option("--cfg-scale", default=0.0, show_default=True, help="Guidance strength; 0 = off.")
@click.option("--stop", multiple=True, help="Cut the text at this string; can be repeated.")
@click.option("--suppress-eos", is_flag=True, help="Never propose the end token.")
@click.option("--eos-last", is_flag=True, help="Keep an end token only when nothing else is left.")
@click.option("--stop-at-eos/--no-stop-at-eos", default=True, show_default=True,
              help="End a row once an end token is reached without a gap before it.")  # fmt: skip
@click.option("--compat", default="default", show_default=True,
              help='"llada" reproduces the published sampler with its oddities.')  # fmt: skip
@click.option("--num-samples", "-n", default=1, show_default=True, help="Texts to generate.")
@click.option("--seed", default=0, show_default=True, help="Of --temperature and random remasking.")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@click.option("--quantization", default="", help=QUANTIZATION_HELP)
@click.option("--show", is_flag=True, help="Show the denoising of the first text as it goes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all details.")
def generate(
    prompt: str | None,
    prefix: str | None,
    suffix: str | None,
    span: int | None,
    chat: bool,
    model: Path | None,
    gen_length: int,
    stop: tuple[str, ...],
    num_samples: int,
    seed: int,
    device: str | None,
    dtype: str,
    quantization: str,
    show: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT, or fill the hole between --prefix and --suffix.

    \b
    mdm generate "def fibonacci(n):" --gen-length 48 --block-length 16
    mdm generate --prefix "def add(a, b):" --suffix "    return total" --span 8 --show
    """
    from . import generate as text
    from .canvas import SamplerSettings
    from .record import to_json

    settings = SamplerSettings(**sampling)
    request = text.request_of(prompt, prefix, suffix, span, gen_length, chat=chat, stop=stop)
    if num_samples < 1:
        raise click.BadParameter("must be at least 1", param_hint="--num-samples")
    denoiser, path = open_model(model, device, dtype, quantization)
    began = time.monotonic()
    with watching(denoiser, show) as watch:
        results = text.generate(denoiser, [request] * num_samples, settings, seed=seed, watch=watch)
    seconds = time.monotonic() - began
    if as_json:
        report = {
            "model": str(path),
            "request": dataclasses.asdict(request),
            "settings": dataclasses.asdict(settings),
            "dtype": dtype,
            "quantization": quantization,
            "seed": seed,
            "generations": [dataclasses.asdict(result) for result in results],
            "seconds": seconds,
        }
        click.echo(to_json(report))
        return
    for result in results:
        click.echo(f"{request.prefix}{result.text}{request.suffix or ''}")
    tokens = sum(result.num_tokens for result in results)
    forwards = max(result.nfe for result in results)
    click.echo(f"{tokens} tokens, {forwards} forwards, {seconds:.1f} s", err=True)


def open_model(
    model: Path | None, device: str | None, dtype: str = "float32", quantization: str = ""
) -> tuple[Any, Path]:
    """The denoiser of --model, or of the last finished run (and say so), on the device.

    Raises ConfigError for a number type, device or quantization that does not work.
    """
    from .checkpoint import load_denoiser
    from .int8 import check_quantization, quantise
    from .loading import dtype_of
    from .runs import last_finished

    numbers = dtype_of(dtype)
    check_quantization(quantization, dtype)
    if model is None:
        model = last_finished()
        click.echo(f"model: {model} (the last finished run)", err=True)
    denoiser = load_denoiser(model, dtype=numbers)
    to_device(denoiser, device)
    return quantise(denoiser, quantization), model


def to_device(module: Any, device: str | None) -> None:
    """Move a module to --device, by default the GPU if there is one. Raises ConfigError."""
    import torch

    from .errors import ConfigError

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        module.to(name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"cannot use --device {name!r}: {error}") from error


def watching(denoiser: Any, show: bool) -> Any:
    """The terminal view if asked for, on stderr; otherwise nothing."""
    from contextlib import nullcontext

    if not show:
        return nullcontext()
    from rich.console import Console

    from .view import DenoisingView

    return DenoisingView(denoiser.vocab, Console(stderr=True, highlight=False))
