"""The gradient of attention over [prefix; tokens], in blocks of queries, by plain matrix products.

A block needs nothing of the forward pass but its output and log-sum-exp (the identity behind ring attention, Liu et al.
2023, arXiv:2310.01889), reads prefix and tokens at once, and skips what causality hides. Shapes as in attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import Packing, Run

BLOCK = 128  # queries per block where causality hides what is beyond them
SCORES = 2**18  # scores per head and block elsewhere
REPEATED = 2**22  # keys of a shared prefix and of the rows that are taken together there, in numbers


def attention_gradients(
    grad: Tensor,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    masks: Sequence[Tensor | None],
    hidden: Tensor | None,
    causal: bool,
    scale: float,
    packing: Packing | None,
) -> list[Tensor]:
    """Gradients of `tensors`: query, key, value, prefix keys and prefix values, all of one dtype.

    grad: of the output `out`. lse: `[B, H, n]`, of the whole softmax. masks: additive, over the tokens, for each run of
    packed rows (else one); hidden: over the prefix.
    """
    q, k, v, pk, pv = tensors
    delta = (grad * out).sum(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dpk, dpv = torch.zeros_like(pk), torch.zeros_like(pv)
    for share in _shares(k, v, pk, pv, masks, hidden, packing):
        g_, q_, d_, l_ = (share.of(x) for x in (grad, q, delta, lse))
        share_dq, share_dk, share_dv = _share_gradients(share, g_, q_, d_, l_, causal and share.mask is None, scale)
        share.of(dq).copy_(share_dq)
        for of_tokens, of_prefix, found in ((dk, dpk, share_dk), (dv, dpv, share_dv)):
            share.of(of_tokens).copy_(found[:, :, share.length :])
            own = of_prefix[share.owners, :, : share.length]
            own += found[:, :, : share.length].sum_to_size(own.shape)  # over the rows that share a prefix
    return [dq, dk, dv, dpk, dpv]


@dataclass
class _Share:
    """Some of the queries with all the keys that they may see, those of the prefix first: `[r, H_kv, P + m, d]`.

    mask: over the tokens, hidden: over the prefix; both additive, or None.
    """

    rows: slice
    run: Run | None  # of packed rows
    owners: slice  # whose prefixes are read: the only one's, or these rows'
    keys: Tensor
    values: Tensor
    length: int
    mask: Tensor | None
    hidden: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """This share of `[B, H, n, ...]`, of queries or of keys, as a view."""
        return _share_of(x, self.rows, self.run)


def _share_of(x: Tensor, rows: slice, run: Run | None) -> Tensor:
    return x[rows] if run is None else run.of(x)


def _shares(
    keys: Tensor,
    values: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    masks: Sequence[Tensor | None],
    hidden: Tensor | None,
    packing: Packing | None,
) -> Iterator[_Share]:
    """Every query once: packed rows by their runs, others in groups, so that a shared prefix is repeated for few."""
    batch, kv_heads, count, size = keys.shape
    at_once = max(1, REPEATED // (kv_heads * (prefix_keys.shape[2] + count) * size))
    taken: list[tuple[slice, Run | None]] = [(run.own, run) for run in packing.runs] if packing is not None else []
    if packing is None:
        taken = [(slice(first, min(first + at_once, batch)), None) for first in range(0, batch, at_once)]
    for i, (rows, run) in enumerate(taken):
        owners = slice(0, 1) if prefix_keys.shape[0] == 1 else rows
        length = prefix_keys.shape[2] if run is None or run.prefix is None else run.prefix
        k, v = (
            torch.cat([p[owners, :, :length].expand(rows.stop - rows.start, -1, -1, -1), _share_of(x, rows, run)], 2)
            for p, x in ((prefix_keys, keys), (prefix_values, values))
        )
        mask = masks[0 if run is None else i]
        seen, unseen = (None if m is None else m[rows] if m.shape[0] > 1 else m for m in (mask, hidden))
        yield _Share(rows, run, owners, k, v, length, seen, unseen)


def _share_gradients(
    share: _Share, grad: Tensor, query: Tensor, delta: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a share's queries `[r, H, n, d]`, keys and values `[r, H_kv, P + m, d]`.

    With P = exp(scale Q K^T + mask - lse) and D = rowsum(dO * O):
        dV = P^T dO,  dS = P * (dO V^T - D),  dQ = scale dS K,  dK = scale dS^T Q.

    grad: dO; delta: D `[r, H, n]`; lse: of the whole softmax, +inf where nothing is seen. In blocks of queries.
    """
    rows, kv_heads, total, size = share.keys.shape
    heads, count, length = query.shape[1], query.shape[2], share.length
    keys, values = share.keys.flatten(0, 1), share.values.flatten(0, 1)
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    step = BLOCK if causal else max(BLOCK, SCORES // total)
    for a in range(0, count, step):
        b = min(a + step, count)
        m = length + b if causal else total  # keys that this block may see
        q_, g_, d_, l_ = (_grouped(x[:, :, a:b], kv_heads) for x in (query, grad, delta, lse))
        k_, v_ = keys[:, :m], values[:, :m]
        scores = torch.baddbmm(-l_[..., None], q_, k_.transpose(1, 2), alpha=scale)  # [r H_kv, G (b-a), m]
        by_head = scores.view(rows, heads, b - a, m)
        if share.hidden is not None:
            by_head[..., :length] += share.hidden[:, :, a:b]
        if share.mask is not None:
            by_head[..., length:] += share.mask[:, :, a:b]
        weights = scores.exp_()
        if causal:
            by_head[..., length + a :].masked_fill_(_later(b - a, query.device), 0.0)
        dv[:, :m].baddbmm_(weights.transpose(1, 2), g_)
        change = torch.baddbmm(-d_[..., None], g_, v_.transpose(1, 2)).mul_(weights)  # dS
        dq[:, :, a:b] = torch.bmm(change, k_).view(rows, heads, b - a, size)
        dk[:, :m].baddbmm_(change.transpose(1, 2), q_, alpha=scale)
    return dq.mul_(scale), dk.view_as(share.keys), dv.view_as(share.values)


def _later(count: int, device: torch.device) -> Tensor:
    """`[count, count]`, True where the key comes after the query."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, n, ...] -> [B * H_kv, groups * n, ...]."""
    rows, heads, length, *rest = x.shape
    return x.reshape(rows * kv_heads, heads // kv_heads * length, *rest)
