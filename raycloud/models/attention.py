"""Scaled-dot-product attention for parts of a model; the caller always supplies the complete mask."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

SDPA = "raycloud_sdpa"
"""Name under which :func:`sdpa_attention` is registered in ``transformers``."""


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the same as the library's ``sdpa`` without its checks of masks and layouts.

    For one token those checks cost as much as the attention itself.

    Args:
        module: the attention module that calls this function.
        query: (B, H, T, d).
        key: (B, G, S, d), where G divides H.
        value: (B, G, S, d).
        attention_mask: additive, or True where a query sees a key, (B, 1, T, S); None if every query sees all keys, or
            for a text from its beginning.
        dropout: dropout probability of the attention weights.
        scaling: factor of the dot products of queries and keys.

    Returns:
        The output (B, T, H, d), and None in place of the attention weights.
    """
    causal = attention_mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, sdpa_attention)
# Without it the library's own forwards would give this function no mask: padding and windows would be lost.
AttentionMaskInterface.register(SDPA, sdpa_mask)
