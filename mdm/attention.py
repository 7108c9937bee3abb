"""Who sees whom: from document ids to attention masks and position ids.

`document_ids_BL` numbers the documents packed into a row; -1 is padding. Two positions may see each
other only if they have the same id, so documents and padding never leak. The mask is a float 4-D
tensor because that is what every attention implementation of `transformers` treats alike (a bool
mask is silently *added* as 0/1 by eager attention). Shapes: B batch, L length, Q queries, K keys.
"""

from __future__ import annotations

import torch


def visible(document_ids_BL: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """(B, L, L) bool: may query position q see key position k?"""
    same_BLL = document_ids_BL[:, :, None] == document_ids_BL[:, None, :]
    return same_BLL.tril() if causal else same_BLL


def float_mask(visible_BQK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, Q, K) additive mask: 0 where visible, the most negative finite number elsewhere.

    Not -inf: a row that sees nothing would become NaN.
    """
    hidden = torch.finfo(dtype).min
    mask_BQK = torch.zeros(visible_BQK.shape, dtype=dtype, device=visible_BQK.device)
    return mask_BQK.masked_fill_(~visible_BQK, hidden)[:, None]


def positions(document_ids_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) position ids that restart at 0 with every document, so packing changes nothing."""
    length = document_ids_BL.shape[1]
    index_L = torch.arange(length, device=document_ids_BL.device)
    new_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    new_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    start_BL = torch.where(new_BL, index_L, torch.zeros_like(document_ids_BL))
    return index_L - start_BL.cummax(dim=1).values


def is_one_full_document(document_ids_BL: torch.Tensor) -> bool:
    """True if no row has padding or a second document, so that no mask is needed."""
    return bool((document_ids_BL == document_ids_BL[:, :1]).all()) and bool(
        (document_ids_BL[:, 0] >= 0).all()
    )
