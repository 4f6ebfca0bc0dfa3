"""Prefix attention: softmax(Q [K_p; K]^T * scale + mask) [V_p; V], exactly, in two ways.

`reference_attention` concatenates, masks and takes the softmax. `split_attention` attends to the prefix and to the
tokens apart and merges the two by their log-sum-exp, so the tokens keep the flash kernel's causal path and a prefix
that the batch shares is read once, never expanded. The backward pass of a part needs the whole softmax's output and
log-sum-exp alone (the identity behind ring attention, Liu et al. 2023, arXiv:2310.01889), so each part runs the
flash backward kernel with the merged statistics.

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

from .kv import SiteKV

NAME = "foreword"
Kernel = Literal["auto", "split", "reference"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class ReadPrefix:
    """What a site reads in the forward pass at hand; sits on the attention module while a prefix is active.

    `hidden` is an additive mask `[R, 1, n or 1, P]` over the prefix, or None where every query sees all of it.
    """

    kv: SiteKV
    hidden: Tensor | None = None
    kernel: Kernel = "auto"


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
    tokens = key.shape[2]
    if prefix is not None:
        p = prefix.kv
        key = torch.cat([p.keys.to(key.dtype).expand(rows, -1, -1, -1), key], dim=2)  # [B, H_kv, P+m, d_k]
        value = torch.cat([p.values.to(value.dtype).expand(rows, -1, -1, -1), value], dim=2)
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2)  # [B, H, n, P+m]
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
    return (weights @ value.to(wide)).to(query.dtype), weights


def _full_mask(scores: Tensor, tokens: int, prefix: ReadPrefix | None, mask: Tensor | None, causal: bool) -> Tensor:
    """The additive mask over [prefix; tokens], broadcastable to `scores`."""
    rows, _, length, total = scores.shape
    if mask is None:
        mask = scores.new_zeros(1, 1, length, tokens)
        if causal:
            mask = mask.masked_fill(_after(length, tokens, scores.device), -torch.inf)
    elif mask.dtype == torch.bool:
        mask = scores.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    mask = mask.to(scores.dtype)
    if prefix is None:
        return mask
    hidden = prefix.hidden if prefix.hidden is not None else scores.new_zeros(1, 1, 1, total - tokens)
    hidden = hidden.to(scores.dtype).expand(rows, mask.shape[1], length, -1)
    return torch.cat([hidden, mask.expand(rows, -1, length, -1)], dim=-1)


def _after(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, n, d] -> [1, H_kv, B * groups * n, d]: the batch becomes more queries of one shared prefix."""
    rows, heads, length, size = x.shape
    x = x.view(rows, kv_heads, heads // kv_heads, length, size)
    return x.transpose(0, 1).reshape(1, kv_heads, -1, size)


def _unfold(x: Tensor, rows: int, heads: int, length: int) -> Tensor:
    """The inverse of `_fold`; also takes statistics [1, H_kv, B * groups * n]."""
    kv_heads = x.shape[1]
    x = x.reshape(kv_heads, rows, heads // kv_heads, length, *x.shape[3:]).transpose(0, 1)
    return x.reshape(rows, heads, length, *x.shape[4:])


class _SplitAttention(torch.autograd.Function):
    """Two flash attentions merged by log-sum-exp; `mask` is additive and gets no gradient.

    Half precision is computed in float32: the CPU's flash backward is slower in bfloat16 than in float32 on short
    rows, and where attention is sharp its rounding is several percent of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        q, k, v, pk, pv = (_wide(x) for x in (query, key, value, prefix_key, prefix_value))
        rows, heads, length, _ = q.shape
        out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        if mask is not None:  # the kernel reports 0, not -inf, for a query that may see no token
            lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        shared = pk.shape[0] == 1
        p_out, p_lse = _flash(_fold(q, k.shape[1]) if shared else q, pk, pv, 0.0, False, scale=scale)
        if shared:
            p_out, p_lse = (_unfold(x, rows, heads, length) for x in (p_out, p_lse))
        merged = torch.logaddexp(lse, p_lse)  # [B, H, n]
        token_share, prefix_share = (lse - merged).exp_(), (p_lse - merged).exp_()
        out = (out * token_share.unsqueeze(-1)).add_(p_out * prefix_share.unsqueeze(-1))
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mask, out, merged)
        ctx.causal, ctx.scale = causal, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, mask, out, lse = ctx.saved_tensors
        q, k, v, pk, pv = (_wide(x) for x in tensors)
        rows, heads, length, _ = q.shape
        grad = _wide(grad).contiguous()
        dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        part: tuple[Tensor, ...] = (grad, q, out, lse)
        shared = pk.shape[0] == 1
        if shared:
            part = tuple(_fold(x.reshape(*x.shape[:3], -1), k.shape[1]) for x in part)
        p_grad, p_q, p_out, p_lse = part
        p_lse = p_lse.reshape(p_q.shape[:3])
        p_dq, dpk, dpv = _flash_backward(p_grad, p_q, pk, pv, p_out, p_lse, 0.0, False, scale=ctx.scale)
        dq = dq + (_unfold(p_dq, rows, heads, length) if shared else p_dq)
        grads = [g.to(x.dtype) for g, x in zip((dq, dk, dv, dpk, dpv), tensors, strict=True)]
        return *grads, None, None, None


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: ReadPrefix,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The split form, for what `can_split` accepts. Returns `[B, H, n, d_v]` in the query's dtype."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        mask = mask.to(torch.promote_types(query.dtype, torch.float32)).expand(-1, -1, query.shape[2], -1)
    kv = prefix.kv
    scale = scale if scale is not None else query.shape[-1] ** -0.5
    keys, values = kv.keys.to(key.dtype), kv.values.to(value.dtype)
    return _SplitAttention.apply(query, key, value, keys, values, mask, causal, scale)


def can_split(query: Tensor, value: Tensor, prefix: ReadPrefix) -> bool:
    """Whether the split form serves these tensors: on the CPU, keys and values of one size, all of the prefix seen."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and prefix.hidden is None


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
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # the first pass over an empty static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if position_bias is not None:
        attention_mask = _add_bias(position_bias[..., : key.shape[2]], attention_mask, causal)
        causal = False
    plain = dropout == 0.0 and softcap is None and s_aux is None and not output_attentions
    if prefix is not None and plain and prefix.kernel != "reference" and can_split(query, value, prefix):
        out = split_attention(query, key, value, prefix, attention_mask, causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    out, weights = reference_attention(
        query,
        key,
        value,
        prefix,
        attention_mask,
        causal=causal,
        scale=scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
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
