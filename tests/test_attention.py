"""The reference attention against a computation by hand in float64, and the split attention against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreword.attention import (
    ATTRIBUTE,
    ReadPrefix,
    listening,
    prefix_attention,
    prefix_mask,
    reference_attention,
)
from foreword.kv import SiteKV

ROWS, HEADS, LENGTH, PREFIX, SIZE = 3, 4, 6, 5, 8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(
    kv_heads: int = HEADS,
    value_size: int = SIZE,
    shared: bool = True,
    queries: int = LENGTH,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Query, key, value, prefix keys and prefix values."""
    rows = 1 if shared else ROWS
    shapes = [
        (ROWS, HEADS, queries, SIZE),
        (ROWS, kv_heads, LENGTH, SIZE),
        (ROWS, kv_heads, LENGTH, value_size),
        (rows, kv_heads, PREFIX, SIZE),
        (rows, kv_heads, PREFIX, value_size),
    ]
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    sees: Any = lambda b, h, i, j: True,
    sees_prefix: Any = lambda b, i, j: True,
    bias: Any = lambda b, h, i, j: 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One query at a time, in Python: scores of [prefix; tokens], exponentials, weighted sum."""
    rows, heads, length, size = query.shape
    out = torch.zeros(rows, heads, length, value.shape[-1], dtype=query.dtype)
    scale = scale if scale is not None else 1 / math.sqrt(size)
    group = heads // key.shape[1]
    for b, h, i in itertools.product(range(rows), range(heads), range(length)):
        g, r = h // group, min(b, prefix_key.shape[0] - 1)
        cap = (lambda s: softcap * torch.tanh(s / softcap)) if softcap else (lambda s: s)
        pairs = [
            (cap(query[b, h, i] @ prefix_key[r, g, j] * scale), prefix_value[r, g, j])
            for j in range(prefix_key.shape[2])
            if sees_prefix(b, i, j)
        ]
        pairs += [
            (cap(query[b, h, i] @ key[b, g, j] * scale) + bias(b, h, i, j), value[b, g, j])
            for j in range(key.shape[2])
            if sees(b, h, i, j)
        ]
        total = sum(score.exp() for score, _ in pairs) + (0 if sinks is None else sinks[h].exp())
        for score, vector in pairs:
            out[b, h, i] += score.exp() / total * vector
    return out


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
@pytest.mark.parametrize("value_size", [SIZE, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_attention_over_prefix_and_tokens(
    kv_heads: int, value_size: int, shared: bool, causal: bool
) -> None:
    q, k, v, pk, pv = tensors(kv_heads, value_size, shared)
    found, weights = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv)), causal=causal)
    same(found, by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: not causal or j <= i))
    assert weights.shape == (ROWS, HEADS, LENGTH, PREFIX + LENGTH)
    same(weights.sum(-1), torch.ones(ROWS, HEADS, LENGTH))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=["bool", "float"])
def test_reference_reads_masks(dtype: torch.dtype) -> None:
    q, k, v, pk, pv = tensors(2)
    seen = draw(ROWS, 1, LENGTH, LENGTH, seed=9) > 0
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)
    found, _ = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv)), mask)
    same(found, by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: seen[b, 0, i, j]))


def test_reference_of_left_padding_and_of_rows_with_no_visible_token() -> None:
    """A query of padding that sees no token reads the prefix alone."""
    q, k, v, pk, pv = tensors(2)
    first = [0, 2, 5]  # each row's first real token
    seen = torch.tensor([[[j <= i and j >= f for j in range(LENGTH)] for i in range(LENGTH)] for f in first])
    found, _ = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv)), seen[:, None])
    same(found, by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: seen[b, i, j]))


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_a_query_that_sees_nothing_at_all_gets_nothing(sinks: bool) -> None:
    """Neither prefix nor token: zero and a finite gradient, not NaN, which would poison the row's next layer."""
    q, k, v, pk, pv = (t.requires_grad_() for t in tensors(2, shared=False))
    mask = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.float64)
    mask[0, :, :2] = -torch.inf
    hidden = torch.zeros(ROWS, 1, 1, PREFIX, dtype=torch.float64)
    hidden[0] = -torch.inf
    column = draw(HEADS, seed=7) if sinks else None
    out, _ = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv), hidden), mask, sinks=column)
    assert torch.equal(out[0, :, :2], torch.zeros_like(out[0, :, :2]))
    gradients = torch.autograd.grad(out.pow(2).sum(), (q, k, v, pk, pv))
    assert all(bool(g.isfinite().all()) for g in (out, *gradients))


def test_reference_softcap_sinks_and_scale() -> None:
    q, k, v, pk, pv = tensors(2)
    sinks = draw(HEADS, seed=7)
    for settings in ({"softcap": 1.5}, {"sinks": sinks}, {"scale": 0.7}, {"softcap": 2.0, "sinks": sinks}):
        found, _ = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv)), causal=True, **settings)
        same(found, by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: j <= i, **settings))


def test_reference_of_prefixes_with_lengths_of_their_own() -> None:
    q, k, v, pk, pv = tensors(2, shared=False)
    lengths = [PREFIX, 2, 0]
    hidden = torch.zeros(ROWS, 1, 1, PREFIX, dtype=torch.float64)
    for row, length in enumerate(lengths):
        hidden[row, ..., length:] = -torch.inf
    found, _ = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv), hidden), causal=True)
    seen = {"sees": lambda b, h, i, j: j <= i, "sees_prefix": lambda b, i, j: j < lengths[b]}
    same(found, by_hand(q, k, v, pk, pv, **seen))


def test_reference_without_a_prefix_is_scaled_dot_product_attention() -> None:
    q, k, v, *_ = tensors(2)
    found, _ = reference_attention(q, k, v, causal=True)
    same(found, nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def masks(kind: str, dtype: torch.dtype) -> Tensor | None:
    """The masks that the split form meets: none, left padding (rows that see nothing), a mask per head."""
    if kind == "none":
        return None
    if kind == "per head":
        return draw(1, HEADS, LENGTH, LENGTH, seed=8).to(dtype)
    seen = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[1, ..., :3], seen[2, ..., :5] = False, False
    if kind == "bool":
        return seen
    least = -torch.inf if kind == "float" else torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, least)


class Module(nn.Module):
    """Stands for an attention module."""

    is_causal = True


def call(prefix: ReadPrefix | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    module = Module()
    setattr(module, ATTRIBUTE, prefix)
    return prefix_attention(module, *args, **kwargs)


@pytest.mark.parametrize("kernel", ["split", "joined", "reference"])
def test_the_interface_transposes_and_is_causal_without_a_mask(kernel: Any) -> None:
    q, k, v, pk, pv = tensors(2)
    out, weights = call(ReadPrefix(SiteKV(pk, pv), kernel=kernel), q, k, v, None)
    same(out.transpose(1, 2), by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: j <= i), 1e-10)
    assert weights is None


def test_the_interface_gives_weights_where_asked() -> None:
    q, k, v, pk, pv = tensors(2)
    _, weights = call(ReadPrefix(SiteKV(pk, pv)), q, k, v, None, output_attentions=True)
    assert weights is not None
    assert weights.shape == (ROWS, HEADS, LENGTH, PREFIX + LENGTH)


def test_one_query_sees_all_and_an_empty_static_cache_nothing_of_its_rest() -> None:
    q, k, v, pk, pv = tensors(2, queries=1)
    out, _ = call(ReadPrefix(SiteKV(pk, pv)), q, k, v, None)
    same(out.transpose(1, 2), by_hand(q, k, v, pk, pv), 1e-10)
    q, k, v, pk, pv = tensors(2, queries=4)
    out, _ = call(ReadPrefix(SiteKV(pk, pv)), q, k, v, None)
    same(out.transpose(1, 2), by_hand(q, k, v, pk, pv, sees=lambda b, h, i, j: j <= i), 1e-10)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [True, False])
def test_position_bias_is_added_to_the_tokens_alone(kind: str, causal: bool) -> None:
    q, k, v, pk, pv = tensors()
    bias = draw(1, HEADS, LENGTH, LENGTH + 2, seed=12)  # longer than the keys, as a static cache's is
    mask = masks(kind, torch.float64)

    def sees(b: int, h: int, i: int, j: int) -> bool:
        if mask is None:
            return j <= i or not causal
        return bool(mask[b, 0, i, j]) if kind == "bool" else bool(mask[b, 0, i, j] == 0)

    out, _ = call(ReadPrefix(SiteKV(pk, pv)), q, k, v, mask, position_bias=bias, is_causal=causal)
    expected = by_hand(q, k, v, pk, pv, sees=sees, bias=lambda b, h, i, j: bias[0, h, i, j])
    same(out.transpose(1, 2), expected, 1e-10)


def test_dropout_drops_weights_of_prefix_and_tokens() -> None:
    q, k, v, pk, pv = tensors()
    torch.manual_seed(0)
    _, weights = reference_attention(q, k, v, ReadPrefix(SiteKV(pk, pv)), dropout=0.5)
    for part in (weights[..., :PREFIX], weights[..., PREFIX:]):
        assert 0.3 < float((part == 0).double().mean()) < 0.7


def test_listeners_nest_and_end() -> None:
    q, k, v, *_ = tensors()
    heard: list[str] = []
    with listening(lambda *_: heard.append("outer")):
        with listening(lambda *_: heard.append("inner")):
            call(None, q, k, v, None)
        call(None, q, k, v, None)
    call(None, q, k, v, None)
    assert heard == ["inner", "outer"]


def mask_for(mask: Tensor | None, **changes: Any) -> Tensor | None:
    """`prefix_mask` as transformers calls it for plain causal attention over rows of four tokens."""
    from transformers.masking_utils import causal_mask_function

    arguments = {"batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": causal_mask_function}
    return prefix_mask(attention_mask=mask, **{**arguments, **changes})


def test_no_mask_is_made_for_right_padding() -> None:
    """The causal flag alone hides padding at the end; padding at the start needs a mask."""
    right, left = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert mask_for(right) is None
    made = mask_for(left.bool())
    assert made is not None
    assert made.dtype == torch.float32
    seen = left.bool()[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(made == 0, seen)
    assert bool((made[~seen] == -torch.inf).all())
    assert mask_for(right, allow_is_causal_skip=False) is not None
