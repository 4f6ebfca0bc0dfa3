"""Attention over [prefix; tokens] in one fused kernel of PyTorch's, the prefix put in front of the keys and values.

The way of accelerators, whose kernels are fast and which have no split form here. Where nothing but causality hides
keys, no mask is made: token i sees the prefix and the tokens up to itself, which is causality aligned to the last key.

Shapes as in attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def joined_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The output `[B, H, n, d_v]` in the query's dtype, in which all is computed.

    mask: additive, over [prefix; tokens], or None; `causal` counts where there is none.
    """
    rows, heads, length, _ = query.shape
    keys, values = (
        torch.cat([of_prefix.to(query.dtype).expand(rows, -1, -1, -1), x], dim=2).repeat_interleave(
            heads // x.shape[1], dim=1
        )
        for of_prefix, x in ((prefix_keys, key), (prefix_values, value))
    )
    if mask is None:
        bias = causal_lower_right(length, keys.shape[2]) if causal else None
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    blind = (mask == -torch.inf).all(-1, keepdim=True)  # a query that sees nothing gets nothing, not NaN
    seen = mask.masked_fill(blind, 0.0).to(query.dtype)
    out = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    return out.masked_fill(blind, 0.0)
