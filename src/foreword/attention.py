"""Prefix attention: softmax(Q [K_p; K]^T * scale + mask) [V_p; V], exactly, in three ways.

`reference_attention` concatenates, masks and takes the softmax; `split_attention` (split.py), on CPUs, merges
attentions over parts; `joined_attention` (joined.py), on accelerators, runs PyTorch's fused kernel over both.
`prefix_attention` is what transformers calls; it picks the way and knows nothing of models or forms.

Shapes: query [B, H, n, d_k], key [B, H_kv, m, d_k], value [B, H_kv, m, d_v]; prefix keys [R, H_kv, P, d_k] and values
[R, H_kv, P, d_v] with R = 1 or B; masks are additive, broadcastable to [B, H, n, m].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .joined import joined_attention
from .kv import SiteKV
from .packing import Packing
from .split import can_split, split_attention, window_mask

NAME = "foreword"
Kernel = Literal["auto", "split", "joined", "reference"]


@dataclass
class ReadPrefix:
    """What a site reads in the forward pass at hand; sits on the attention module while a prefix is active.

    hidden: an additive mask `[R, 1, n or 1, P]` over the prefix, or None where every query sees all of it.
    packing: the rows, where they lie one behind another in one sequence; R is then 1 or their number, and `window` how
        far a token sees (None: its whole row).
    """

    kv: SiteKV
    hidden: Tensor | None = None
    kernel: Kernel = "auto"
    packing: Packing | None = None
    window: int | None = None

    def way(self, query: Tensor, value: Tensor) -> Kernel:
        """How plain attention, without caps, sinks or weights, is to be computed on these tensors."""
        if self.kernel in ("auto", "split") and can_split(query, value, self.kv.keys, self.hidden):
            return "split"
        fused = self.kernel == "joined" or (self.kernel == "auto" and query.device.type != "cpu")
        return "joined" if fused and self.packing is None else "reference"

    def of_row(self, row: int) -> SiteKV:
        """The keys and values `[1, H_kv, P, d]` that a row of a packed sequence reads."""
        if self.kv.keys.shape[0] == 1:
            return self.kv
        length = None if self.packing is None or self.packing.prefixes is None else self.packing.prefixes[row]
        return SiteKV(*(x[row : row + 1, :, :length] for x in self.kv))


ATTRIBUTE = "_foreword_prefix"
Listener = Callable[[torch.nn.Module, Tensor, Tensor, dict[str, Any]], None]
_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While open, every call of `prefix_attention` first reports (module, key, value, keyword arguments)."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: ReadPrefix | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain form: concatenate, mask, softmax; at least float32 inside, whatever the inputs.

    `causal` masks token j from token i < j; the prefix is before them all. `softcap` caps the scores as
    softcap * tanh(scores / softcap) (Gemma 2); `sinks` `[H]` are scores that take mass and give nothing (gpt-oss).

    Returns the output `[B, H, n, d_v]` in the query's dtype and the weights `[B, H, n, P + m]`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, heads, length, _ = query.shape
    tokens, key, value = key.shape[2], key.to(wide), value.to(wide)
    if prefix is not None:
        p = prefix.kv
        key = torch.cat([p.keys.to(wide).expand(rows, -1, -1, -1), key], dim=2)  # [B, H_kv, P+m, d_k]
        value = torch.cat([p.values.to(wide).expand(rows, -1, -1, -1), value], dim=2)
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.to(wide) @ key.transpose(-1, -2)  # [B, H, n, P+m]
    scores = scores * (scale if scale is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    full = _full_mask(scores, tokens, prefix, mask, causal)
    scores = scores + full
    if sinks is not None:
        column = sinks.to(wide).reshape(1, -1, 1, 1).expand(rows, heads, length, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        blind = (full == -torch.inf).all(-1, keepdim=True)  # a query that sees nothing gets nothing, not NaN
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).to(query.dtype), weights


def _full_mask(like: Tensor, tokens: int, prefix: ReadPrefix | None, mask: Tensor | None, causal: bool) -> Tensor:
    """The additive mask over [prefix; tokens] for queries or scores `[B, H, n, ...]`, in their dtype."""
    rows, _, length, _ = like.shape
    if mask is None:
        mask = like.new_zeros(1, 1, length, tokens)
        if causal:
            mask = mask.masked_fill(_after(length, tokens, like.device), -torch.inf)
    elif mask.dtype == torch.bool:
        mask = like.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    mask = mask.to(like.dtype)
    if prefix is None:
        return mask
    hidden = prefix.hidden if prefix.hidden is not None else like.new_zeros(1, 1, 1, prefix.kv.keys.shape[2])
    hidden = hidden.to(like.dtype).expand(rows, mask.shape[1], length, -1)
    return torch.cat([hidden, mask.expand(rows, -1, length, -1)], dim=-1)


def _after(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def packed_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: ReadPrefix,
    *,
    causal: bool,
    **settings: Any,
) -> tuple[Tensor, None]:
    """`reference_attention` row by row over a packed sequence `[1, H, n, d]`."""
    assert prefix.packing is not None
    outs = []
    for row, (a, b) in enumerate(prefix.packing.spans()):
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        windowed = prefix.window is not None and b - a > prefix.window
        mask = window_mask(b - a, prefix.window, query) if windowed else None  # type: ignore[arg-type]
        own = ReadPrefix(prefix.of_row(row))
        outs.append(reference_attention(q, k, v, own, mask, causal=causal and not windowed, **settings)[0])
    return torch.cat(outs, 2), None


def prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention interface calls: attention over [the module's prefix, if any; tokens].

    Returns the output `[B, n, H, d_v]`, and the weights `[B, H, n, P + m]` where they were asked for.
    """
    if _listener is not None:
        _listener(module, key, value, kwargs)
    prefix: ReadPrefix | None = getattr(module, ATTRIBUTE, None)
    if prefix is not None and prefix.packing is not None:  # each row is masked by itself
        attention_mask = None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # the first pass over an empty static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if position_bias is not None:
        attention_mask = _add_bias(position_bias[..., : key.shape[2]], attention_mask, causal)
        causal = False
    rest: dict[str, Any] = {"scale": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    plain = dropout == 0.0 and softcap is None and s_aux is None and not output_attentions
    weights = None
    way = prefix.way(query, value) if prefix is not None and plain else "reference"
    if prefix is not None and way == "split":
        out = split_attention(
            query,
            key,
            value,
            *prefix.kv,
            attention_mask,
            prefix.hidden,
            causal=causal,
            scale=scaling,
            packing=prefix.packing,
            window=prefix.window,
        )
    elif prefix is not None and way == "joined":
        full = None
        if attention_mask is not None or prefix.hidden is not None:
            full = _full_mask(query, key.shape[2], prefix, attention_mask, causal)
        out = joined_attention(query, key, value, *prefix.kv, full, causal=causal, scale=scaling)
    elif prefix is not None and prefix.packing is not None:
        out, weights = packed_reference(query, key, value, prefix, causal=causal, **rest)
    else:
        out, weights = reference_attention(query, key, value, prefix, attention_mask, causal=causal, **rest)
    return out.transpose(1, 2).contiguous(), weights if output_attentions else None


def _add_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is None:
        if not causal:
            return bias
        return bias.masked_fill(_after(bias.shape[2], bias.shape[3], bias.device), -torch.inf)
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask


def prefix_mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask over the tokens, additive; None where the causal flag alone is exact, right padding included."""
    if _causality_hides_padding(kwargs):
        return None
    mask = sdpa_mask(**kwargs)
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _causality_hides_padding(arguments: dict[str, Any]) -> bool:
    """True for plain causal attention over rows padded at the end only: no token there can see the padding."""
    mask = arguments.get("attention_mask")
    return (
        arguments.get("allow_is_causal_skip", True)
        and arguments.get("mask_function") is causal_mask_function
        and isinstance(mask, Tensor)
        and mask.dim() == 2
        and arguments["q_length"] == arguments["kv_length"] == mask.shape[-1]
        and bool((mask[:, 1:] <= mask[:, :-1]).all())
    )


AttentionInterface.register(NAME, prefix_attention)
AttentionMaskInterface.register(NAME, prefix_mask)
