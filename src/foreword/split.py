"""Attention over [prefix; tokens] as attentions over parts, merged by their log-sum-exp; exact, nothing concatenated.

Each part runs the CPU's flash kernel, so the tokens keep its causal path, and a prefix that the batch shares is read
once: the batch is folded into more queries of it. Rows may lie one behind another in a single sequence (`packing`);
those of one length are then a part together. Where each row has one query, as while decoding, one softmax over both
parts is less work than the merge. The backward pass is in gradients.py.

Shapes as in attention.py. Half precision is computed in float32: in bfloat16 the rounding of sharp attention is several
percent of the gradient. Long rows alone, whose forward pass it makes twice as fast, are computed in half precision, as
exactly as the base computes them without a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gradients import attention_gradients
from .packing import Packing, Run

LONG = 256  # tokens, from which half precision pays

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class _Part:
    """Queries, all or those of a run of packed rows, attend to keys `[B or 1, H_kv, m, d_k]`; folded: the whole batch
    is queries of one row."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False
    folded: bool = False
    run: Run | None = None

    def queries(self, x: Tensor) -> Tensor:
        """This part's share of `[B, H, n, ...]`."""
        if self.folded:
            return _fold(x, self.keys.shape[1])
        return x if self.run is None else self.run.of(x)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `queries` for a result, `like` being `[B, H, n, d]`."""
        if self.folded:
            return _unfold(x, *like.shape[:3])
        return x if self.run is None else self.run.back(x)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, n, ...] -> [1, H_kv, B * groups * n, ...]."""
    rows, heads, length, *rest = x.shape
    x = x.reshape(rows, kv_heads, heads // kv_heads, length, *rest)
    return x.transpose(0, 1).reshape(1, kv_heads, -1, *rest)


def _unfold(x: Tensor, rows: int, heads: int, length: int) -> Tensor:
    """The inverse of `_fold`."""
    kv_heads = x.shape[1]
    x = x.reshape(kv_heads, rows, heads // kv_heads, length, *x.shape[3:]).transpose(0, 1)
    return x.reshape(rows, heads, length, *x.shape[4:])


def _parts(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    masks: Sequence[Tensor | None],
    hidden: Tensor | None,
    causal: bool,
    packing: Packing | None,
) -> tuple[list[_Part], list[_Part]]:
    """The parts over the tokens and those over the prefix; each list covers every query once."""
    if packing is None:
        (mask,) = masks
        tokens = [_Part(keys, values, mask, causal and mask is None)]
    else:
        tokens = [
            _Part(run.of(keys), run.of(values), mask, causal and mask is None, run=run)
            for run, mask in zip(packing.runs, masks, strict=True)
        ]
    if prefix_keys.shape[0] == 1 and hidden is None:
        return tokens, [_Part(prefix_keys, prefix_values, folded=True)]
    if packing is None:
        return tokens, [_Part(prefix_keys, prefix_values, hidden)]
    return tokens, [
        _Part(prefix_keys[run.own, :, : run.prefix], prefix_values[run.own, :, : run.prefix], run=run)
        for run in packing.runs
    ]


def _attend(query: Tensor, parts: list[_Part], scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, H, n, d_v]` and log-sum-exp `[B, H, n]` over parts that cover every query once."""
    found = [_attend_part(query, part, scale) for part in parts]
    if len(found) == 1:
        return found[0]
    outs, sums = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _attend_part(query: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    q = part.queries(query)
    out, lse = _over(q, part.keys, part.values, part.mask, scale, part.causal)
    return part.back(out, query), part.back(lse, query)


def _over(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel's output and log-sum-exp, right for no keys, for any strides, and for a query that may see nothing."""
    if keys.shape[2] == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))  # unchecked by the kernel
    if mask is None:
        return _flash(q, k, v, 0.0, causal, scale=scale)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask.expand(-1, -1, q.shape[2], -1), scale=scale)
    return out, lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)  # the kernel reports 0


def _merged(
    tensors: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    hidden: Tensor | None,
    causal: bool,
    scale: float,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the log-sum-exps over the tokens and over the prefix."""
    long = packing is None and tensors[0].shape[2] >= LONG
    q, k, v, pk, pv = (x.to(tensors[0].dtype) if long else _wide(x) for x in tensors)
    tokens, prefix = _parts(k, v, pk, pv, masks, hidden, causal, packing)
    out, lse = _attend(q, tokens, scale)
    p_out, p_lse = _attend(q, prefix, scale)
    return _merge(_wide(p_out), p_lse, _wide(out), lse), lse, p_lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over both parts."""
    share = torch.sigmoid(other_lse - lse).nan_to_num_(0.0)  # e^other / (e^other + e^lse); one that sees nothing: 0
    return torch.lerp(out, other, share.unsqueeze(-1))


def _one_query(tensors: Sequence[Tensor], mask: Tensor | None, hidden: Tensor | None, scale: float) -> Tensor:
    """The output `[B, H, 1, d_v]` where every row has one query, as while decoding: one softmax, over scores that the
    products with both parts are written into. The heads that share keys are queries of one head, so that these keys are
    read once."""
    query, keys, values, prefix_keys, prefix_values = (_wide(x) for x in tensors)
    rows, heads, _, size = query.shape
    kv_heads, length = prefix_keys.shape[1:3]
    groups = heads // kv_heads
    if mask is not None and mask.shape[1] > 1:  # of each head
        mask = mask.reshape(-1, kv_heads, groups, mask.shape[-1])
    q = (query * scale).reshape(rows, kv_heads, groups, size)
    prefix = _Part(prefix_keys, prefix_values, folded=prefix_keys.shape[0] < rows)
    asked = prefix.queries(q)
    scores = q.new_empty(*asked.shape[:3], length + keys.shape[2])
    over_prefix, over_tokens = scores[..., :length], prefix.back(scores[..., length:], q)
    if prefix.folded:
        torch.bmm(asked[0], prefix_keys[0].transpose(1, 2), out=over_prefix[0])
    else:
        _write(over_prefix, q @ prefix_keys.transpose(2, 3), hidden)
    _write(over_tokens, q @ keys.transpose(2, 3), mask)
    blind = None
    if hidden is not None or length == 0:  # else every query sees the prefix
        blind = prefix.back(scores.amax(-1, keepdim=True) == -torch.inf, q)
    torch.softmax(scores, -1, out=scores)
    out = over_tokens @ values + prefix.back(over_prefix @ prefix_values, q)
    if blind is not None:  # a query that sees nothing gets nothing, not NaN
        out.masked_fill_(blind, 0.0)
    return out.reshape(rows, heads, 1, size)


def _write(place: Tensor, scores: Tensor, mask: Tensor | None) -> None:
    """Into `place`, which need not lie together, the masked scores."""
    if mask is None:
        place.copy_(scores)
    else:
        torch.add(scores, mask, out=place)


class _SplitAttention(torch.autograd.Function):
    """Masks are additive and get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        masks: Sequence[Tensor | None],
        hidden: Tensor | None,
        causal: bool,
        scale: float,
        packing: Packing | None,
    ) -> Tensor:
        tensors = query, key, value, prefix_key, prefix_value
        out, lse, p_lse = _merged(tensors, masks, hidden, causal, scale, packing)
        merged = torch.logaddexp(lse, p_lse)  # [B, H, n]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, merged)
        ctx.settings = masks, hidden, causal, scale, packing
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        masks, hidden, causal, scale, packing = ctx.settings
        wide = [_wide(x) for x in tensors]
        found = attention_gradients(_wide(grad), wide, _wide(out), lse, masks, hidden, causal, scale, packing)
        grads = [g.to(x.dtype) for g, x in zip(found, tensors, strict=True)]
        return *grads, None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype.itemsize < 4 else x


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask in the dtype that is computed in, with a row for every query."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.to(torch.promote_types(query.dtype, torch.float32)).expand(-1, -1, query.shape[2], -1)


def window_mask(length: int, window: int, like: Tensor) -> Tensor:
    """`[1, 1, length, length]`, additive: a token sees itself and the `window - 1` before it."""
    at = torch.arange(length, device=like.device)
    back = at[:, None] - at
    seen = (back >= 0) & (back < window)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(1, 1, length, length, dtype=wide, device=like.device).masked_fill_(~seen, -torch.inf)


def can_split(query: Tensor, value: Tensor, prefix_keys: Tensor, hidden: Tensor | None) -> bool:
    """Whether the split form serves these tensors: on the CPU, keys and values of one size, and a prefix that is
    shared and seen whole or each row's own."""
    own = prefix_keys.shape[0] == query.shape[0]
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and (hidden is None or own)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    mask: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    packing: Packing | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention over [prefix; tokens], for what `can_split` accepts. Returns `[B, H, n, d_v]` in the query's dtype.

    hidden: an additive mask `[R, 1, n or 1, P]` over the prefix.
    packing: the rows of a sequence with B = 1; `mask` is then not read, and `window` is how far a token sees its own
        row's earlier tokens (None: all).
    """
    scale = scale if scale is not None else query.shape[-1] ** -0.5
    masks: list[Tensor | None] = [_additive(mask, query)]
    if packing is not None:
        lengths = [run.length for run in packing.runs]
        masks = [None if window is None or n <= window else window_mask(n, window, query) for n in lengths]
    tensors = query, key, value, prefix_keys, prefix_values
    settings = masks, _additive(hidden, query), causal, scale, packing
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _SplitAttention.apply(*tensors, *settings)
    if packing is None and query.shape[2] == 1 and not causal:
        return _one_query(tensors, masks[0], settings[1], scale).to(query.dtype)
    return _merged(tensors, *settings)[0].to(query.dtype)
