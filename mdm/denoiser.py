"""Any `transformers` decoder LM as a denoiser: tokens in, logits for the positions asked for out.

The AR shift lives here and nowhere else: callers always ask for the position they mean. A shifted
model reads the distribution of position i from the output at position i - 1, as its AR ancestor did;
for the first position of a block that is the clean output of the block before.
The head runs only on the rows asked for, in chunks when a score is wanted.
A block diffusion model is given the clean tokens, too: it reads [x_t ; x_0] (attention.py).
Shapes: B batch, L length, N rows asked for (row-major order of `wanted_BL`), D width, V vocabulary;
b rows of clean tokens, of each of which B / b rows are noisy copies; S tokens of a row of [x_t ; x_0],
M outputs that are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import attention
from .attention import FULL
from .buffers import EAGER, Runner
from .errors import CheckpointError, ConfigError, check_known
from .vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A chunk of float32 logits stays near this size.
CHUNK_BYTES = 64 * 2**20

Score = Callable[..., torch.Tensor]


class Denoiser(nn.Module):
    """A language model that predicts masked positions from everything visible.

    model       a `transformers` causal-LM module; its config says `is_causal: false`
    vocab       its vocabulary, with a mask id
    shift       read position i from output i - 1 (models initialised from an AR checkpoint)
    block_size  tokens a block of a block diffusion model; None = full canvas
    attention   what its blocks see (attention.BLOCK_ATTENTIONS); None = "block", or "full" without blocks
    lineage     where the weights came from, one entry a step (conversion, training)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab: Vocab,
        *,
        shift: bool,
        block_size: int | None = None,
        attention: str | None = None,
        lineage: tuple[dict[str, Any], ...] = (),
    ) -> None:
        super().__init__()
        assert vocab.mask_id is not None, "a denoiser needs a vocabulary with a mask token"
        self.model = model
        self.vocab = vocab
        self.shift = shift
        self.block_size = block_size
        self.attention = attention or (FULL if block_size is None else "block")
        check_attention(self.attention, block_size)
        self.lineage = lineage
        self.mask_id: int = vocab.mask_id
        self.runner: Runner = EAGER  # how forwards with a cache are run (acceleration.py)
        # From our states to a teacher's. Only training sets and uses it; it is not saved with the model.
        self.projection: nn.Module | None = None
        # A model with sliding windows would keep its window; an explicit mask lifts it on every layer.
        self.always_mask = has_sliding_window(model.config)
        probe_attention(model, causal=False)
        self.plain_head = has_plain_head(model)
        rows = model.get_output_embeddings().weight.shape[0]
        never = [self.mask_id, *range(len(vocab), rows)]
        self.never_sampled: torch.Tensor
        self.register_buffer("never_sampled", torch.tensor(never), persistent=False)

    @property
    def max_length(self) -> int:
        """Longest canvas the model was built for, in tokens."""
        return max_length(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.never_sampled.device

    def forward(
        self,
        xt_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        *,
        x0_bL: torch.Tensor | None = None,
        document_ids_BL: torch.Tensor | None = None,
        block_size: int | None = None,
        next_bL: torch.Tensor | None = None,
        score: Score | None = None,
        score_inputs: tuple[torch.Tensor, ...] = (),
        with_states: bool = False,
    ) -> torch.Tensor:
        """Logits (N, V), float32, of the wanted positions; or `score(logits_nV, *inputs_n)` per row.

        With `score`, logits exist only for a chunk of rows at a time and are recomputed in the
        backward pass; each of `score_inputs` has N rows, the result is the scores of all N rows.
        `with_states` gives it the states (n, D) that the logits are made of as second argument.
        The logits of the mask token and of unused rows of the head are -inf.

        A model with blocks, and no other, needs the clean tokens `x0_bL` of its b rows, each of which may
        have several noisy copies: B is a multiple of b, and the first b rows are the first copies. It takes
        `block_size` in place of its own if that is given. After the N rows come those of the clean tokens
        marked in `next_bL`, whose logits are of the token after them.
        """
        rows_ND = self.rows(
            xt_BL,
            wanted_BL,
            x0_bL=x0_bL,
            document_ids_BL=document_ids_BL,
            block_size=block_size,
            next_bL=next_bL,
        )
        if score is None:
            return self.head(rows_ND)

        def scored(rows_nD: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
            states = (rows_nD,) if with_states else ()
            return score(self.head(rows_nD), *states, *inputs)

        parts = []
        for chunk in self.chunks(len(rows_ND)):
            inputs = (rows_ND[chunk], *(tensor[chunk] for tensor in score_inputs))
            if torch.is_grad_enabled():
                parts.append(checkpoint(scored, *inputs, use_reentrant=False))
            else:
                parts.append(scored(*inputs))
        return torch.cat(parts)

    def rows(
        self,
        xt_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        *,
        x0_bL: torch.Tensor | None = None,
        document_ids_BL: torch.Tensor | None = None,
        block_size: int | None = None,
        next_bL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, D) inputs of the head for the wanted positions, then those for `next_bL`.

        Without blocks the tensors may be on the host: then nothing waits for the device.
        """
        assert (x0_bL is None) == (self.block_size is None), "blocks need the clean tokens"
        if x0_bL is not None:
            if document_ids_BL is None:
                document_ids_BL = torch.zeros_like(xt_BL)
            size = block_size or self.block_size or 1
            ids_bL = document_ids_BL[: len(x0_bL)]
            return self._block_rows(xt_BL, wanted_BL, x0_bL, ids_bL, size, next_bL)
        assert next_bL is None, "only a model with blocks reads clean tokens"
        if self.shift:
            assert not bool(wanted_BL[:, 0].any()), (
                "position 0 of a shifted model has no predecessor"
            )
            wanted_BL = wanted_BL.roll(-1, dims=1)
        layout = attention_layout(
            document_ids_BL, xt_BL, self.model.dtype, causal=False, always=self.always_mask
        )
        device = self.device
        layout = {name: part.to(device, non_blocking=True) for name, part in layout.items()}
        return self._outputs(xt_BL.to(device, non_blocking=True), wanted_BL, layout)

    def _block_rows(
        self,
        xt_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        x0_bL: torch.Tensor,
        document_ids_bL: torch.Tensor,
        block_size: int,
        next_bL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N + A, D) inputs of the head for the wanted positions and, from the clean tokens, for the ones
        after `next_bL`, from one pass over [x_t ; x_0]."""
        rows, length = x0_bL.shape
        copies = len(xt_BL) // rows
        tokens = attention.two_stream(document_ids_bL, xt_BL == self.mask_id)
        visible_bSS = attention.block_visible(tokens, tokens, block_size, self.attention)
        layout = {
            "attention_mask": attention.float_mask(visible_bSS, self.model.dtype),
            "position_ids": tokens.position,
        }
        row_N, place_N = wanted_BL.nonzero(as_tuple=True)
        stream_N, row_N = row_N // rows, row_N % rows
        if self.shift:
            position_N = tokens.position[row_N, place_N]
            assert bool((position_N > 0).all()), "position 0 of a shifted model has no predecessor"
            stream_N = torch.where(position_N % block_size == 0, copies, stream_N)
            place_N = place_N - 1
        place_N = stream_N * length + place_N
        if next_bL is not None:
            row_A, place_A = next_bL.nonzero(as_tuple=True)
            row_N, place_N = (
                torch.cat([row_N, row_A]),
                torch.cat([place_N, copies * length + place_A]),
            )
        needed_bS = torch.zeros_like(tokens.masked)
        needed_bS[row_N, place_N] = True
        x_bS = torch.cat([*xt_BL.chunk(copies), x0_bL], dim=1)
        # Copies of a row may need one and the same clean output.
        number_bS = needed_bS.flatten().cumsum(0).view_as(needed_bS) - 1
        return self._outputs(x_bS, needed_bS, layout)[number_bS[row_N, place_N]]

    def _outputs(
        self, x_BL: torch.Tensor, needed_BL: torch.Tensor, layout: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """(M, D) inputs of the head at the outputs that are needed; (M, V) logits if it is not plain."""
        if self.plain_head:
            needed_M = needed_BL.flatten().nonzero()[:, 0].to(self.device, non_blocking=True)
            return self.model.base_model(x_BL, use_cache=False, **layout)[0].flatten(0, 1)[needed_M]
        needed_BL = needed_BL.to(self.device)
        return self.model(x_BL, use_cache=False, logits_to_keep=needed_BL, **layout).logits

    def head(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 logits from the inputs of the head; -inf where no token can be sampled."""
        return self.raw_head(rows_ND).float().index_fill(-1, self.never_sampled, float("-inf"))

    def chunks(self, rows: int) -> Iterator[slice]:
        """Slices of `rows` inputs of the head whose logits stay small."""
        return row_chunks(rows, self.model.config.get_text_config().vocab_size)

    def raw_head(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) logits as the model gives them, the mask token's included."""
        return self.model.get_output_embeddings()(rows_ND) if self.plain_head else rows_ND


def check_attention(name: str, block_size: int | None) -> None:
    """Raise ConfigError unless the attention is known and fits the presence of blocks."""
    check_known("attention", name, attention.ATTENTIONS)
    if (name == FULL) != (block_size is None):
        raise ConfigError(
            f"attention={name} with block_size={block_size}: a model has blocks and one of"
            f" {', '.join(attention.BLOCK_ATTENTIONS)}, or no blocks and attention=full"
        )


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` whose float32 logits of `width` columns stay small; one if there are none."""
    size = max(1, CHUNK_BYTES // (4 * width))
    for first in range(0, max(1, rows), size):
        yield slice(first, first + size)


def attention_layout(
    document_ids_BL: torch.Tensor | None,
    x_BL: torch.Tensor,
    dtype: torch.dtype,
    *,
    causal: bool,
    always: bool = False,
) -> dict[str, torch.Tensor]:
    """Model arguments that keep documents and padding apart; empty when there is nothing to keep apart.

    Without a mask the fast attention kernels can be used, so the mask is made only when needed.
    """
    if document_ids_BL is None:
        if not always:
            return {}
        document_ids_BL = torch.zeros_like(x_BL)
    if not always and attention.is_one_full_document(document_ids_BL):
        return {}
    visible_BLL = attention.visible(document_ids_BL, causal=causal)
    return {
        "attention_mask": attention.float_mask(visible_BLL, dtype),
        "position_ids": attention.positions(document_ids_BL),
    }


def max_length(config: Any) -> int:
    """Longest row a model with this config was built for, in tokens; huge if it states none (ALiBi)."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**30)


def has_sliding_window(config: Any) -> bool:
    """Does any layer of this model attend to a window only?"""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return getattr(text, "sliding_window", None) is not None


@torch.no_grad()
def probe_attention(model: PreTrainedModel, *, causal: bool) -> None:
    """Raise CheckpointError unless attention really is what was asked.

    Changes the last of six tokens and looks at the first position: it must change if attention is
    bidirectional and must not if it is causal. An architecture that ignores `is_causal` fails here.
    """
    x_L = _probe_tokens(model)
    # Several last tokens: untrained rows of a real vocabulary can be exactly equal.
    x_BL = x_L.repeat(len(x_L), 1)
    x_BL[:, -1] = x_L
    with _evaluating(model):
        first_BD = model.base_model(x_BL, use_cache=False)[0][:, 0].float()
    change, size = (first_BD - first_BD[:1]).abs().max(), first_BD.abs().max()
    sees_right = bool(change > 1e-3 * size)  # rounding may differ between rows of a batch
    if sees_right == causal:
        asked, found = ("causal", "bidirectional") if causal else ("bidirectional", "causal")
        raise CheckpointError(
            f"attention of {type(model).__name__} should be {asked} but is {found}: either this is"
            f" not {'an autoregressive' if causal else 'a denoising'} checkpoint, or its"
            " architecture ignores config.is_causal and mdm cannot use it"
        )


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Are the logits just head(last hidden state), with no scaling or capping in between?"""
    x_BL = _probe_tokens(model)[None]
    with _evaluating(model):
        hidden_BLD = model.base_model(x_BL, use_cache=False)[0]
        plain_BLV = model.get_output_embeddings()(hidden_BLD)
        return torch.equal(plain_BLV, model(x_BL, use_cache=False).logits)


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """(6,) ids spread over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.linspace(0, rows - 1, 6, device=model.device).long()


@dataclasses.dataclass
class _evaluating:
    """Context: the module in eval mode, its mode restored afterwards."""

    module: nn.Module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was_training)
