"""Scaled-dot-product attention for parts of a model, where the mask is always ours and nothing is left to find out."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface

PLAIN = "raycloud_sdpa"
"""What ``transformers`` knows :func:`plain` by."""


def plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As the library's ``sdpa``, whose questions about masks and layouts cost as much as a token's attention itself.

    Args:
        module: the attention module that calls.
        query: (B, H, T, d).
        key: (B, G, S, d), where G divides H.
        value: (B, G, S, d).
        attention_mask: additive (B, 1, T, S); None where every row sees all keys, or for a text from its beginning.
        dropout: of the attention weights.
        scaling: of the products.

    Returns:
        (B, T, H, d), and no weights.
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


AttentionInterface.register(PLAIN, plain)
