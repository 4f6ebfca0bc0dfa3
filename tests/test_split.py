"""The split attention against the reference, padded and packed, forward and backward."""

from __future__ import annotations

import pytest
import torch
from test_attention import LENGTH, PREFIX, ROWS, draw, masks, tensors
from torch import Tensor

from foreword.attention import ReadPrefix, packed_reference, reference_attention
from foreword.joined import joined_attention
from foreword.kv import SiteKV
from foreword.packing import Packing, grouped
from foreword.split import LONG, can_split, split_attention

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(made: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], bound: float) -> None:
    """Outputs, and gradients of a fixed weighting of them with respect to the leaves."""
    found = [
        [out.double(), *(g.double() for g in torch.autograd.grad((out * draw(*out.shape, seed=11)).sum(), leaves))]
        for out, leaves in (made, expected)
    ]
    for part, truth in zip(*found, strict=True):
        assert (part - truth).norm() <= bound * truth.norm()


def leaves_of(given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in given]


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "least", "per head"])
def test_split_equals_reference_forward_and_backward(
    kind: str, kv_heads: int, shared: bool, dtype: torch.dtype
) -> None:
    """Against the reference in float64 on the same (rounded) numbers."""
    given = tensors(kv_heads, shared=shared, dtype=dtype)
    mask, causal = (None, True) if kind == "causal" else (masks(kind, dtype), False)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    narrow, exact = leaves_of(given, dtype), leaves_of(given, torch.float64)
    assert can_split(narrow[0], narrow[2], narrow[3], None)
    made = split_attention(*narrow, mask, causal=causal)  # type: ignore[misc]
    expected = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])), wide, causal=causal)[0]
    compare((made, narrow), (expected, exact), BOUNDS[dtype])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
@pytest.mark.parametrize("queries", [1, LENGTH], ids=["one query", "all"])
@pytest.mark.parametrize("strided", range(5), ids=["query", "key", "value", "prefix keys", "prefix values"])
def test_numbers_may_lie_in_any_order_in_memory(strided: int, queries: int, shared: bool) -> None:
    """The kernel takes neighbours in memory for one vector and says nothing where they are not."""
    given = tensors(2, shared=shared, queries=queries, dtype=torch.float32)
    given[strided] = given[strided].transpose(1, 3).contiguous().transpose(1, 3)
    lying, exact = leaves_of(given, torch.float32), leaves_of(given, torch.float64)
    assert lying[strided].stride(-1) > 1
    expected = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])))[0]
    compare((split_attention(*lying), lying), (expected, exact), 1e-5)  # type: ignore[misc]
    with torch.no_grad():
        assert torch.allclose(split_attention(*lying).double(), expected, atol=1e-5)  # type: ignore[misc]


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
def test_long_rows_in_half_precision_are_as_exact_as_the_fused_kernel(shared: bool, masked: bool) -> None:
    """Errors against float64, of the output and of every gradient, beside PyTorch's own attention in bfloat16."""
    shapes = [(2, 4, LONG, 16), (2, 2, LONG, 16), (2, 2, LONG, 16), *[(1 if shared else 2, 2, 5, 16)] * 2]
    given = [draw(*shape, seed=i, dtype=torch.bfloat16) * 1.5 for i, shape in enumerate(shapes)]
    after = torch.ones(LONG, LONG, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, LONG, LONG).masked_fill(after, -torch.inf) if masked else None
    whole = None if mask is None else torch.cat([torch.zeros(1, 1, LONG, 5), mask], -1)
    exact = leaves_of(given, torch.float64)
    truth = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])), causal=True)[0]
    errors = []
    for call in (
        lambda x: split_attention(*x, mask, causal=not masked),
        lambda x: joined_attention(*x, whole, causal=not masked),
    ):
        narrow = leaves_of(given, torch.bfloat16)
        out = call(narrow)
        weights = draw(*out.shape, seed=11)
        made = [out, *torch.autograd.grad((out * weights).sum(), narrow)]
        right = [truth, *torch.autograd.grad((truth * weights).sum(), exact, retain_graph=True)]
        errors.append([float((m.double() - r).norm() / r.norm()) for m, r in zip(made, right, strict=True)])
    for split, joined in zip(*errors, strict=True):
        assert split <= max(1.2 * joined, 2**-8)
    assert errors[0] != errors[1]


@pytest.mark.parametrize("kind", ["causal", "float", "per head"])
def test_split_of_prefixes_with_lengths_of_their_own(kind: str) -> None:
    """Padding of shorter prefixes is hidden; a row without any prefix, and one that sees nothing at all, are right."""
    given = tensors(2, shared=False, dtype=torch.float32)
    hidden = torch.zeros(ROWS, 1, 1, PREFIX)
    for row, length in enumerate([PREFIX, 2, 0]):
        hidden[row, ..., length:] = -torch.inf
    mask, causal = (None, True) if kind == "causal" else (masks(kind, torch.float32), False)
    narrow, exact = leaves_of(given, torch.float32), leaves_of(given, torch.float64)
    assert can_split(narrow[0], narrow[2], narrow[3], hidden)
    made = split_attention(*narrow, mask, hidden, causal=causal)  # type: ignore[misc]
    read = ReadPrefix(SiteKV(*exact[3:]), hidden)
    expected = reference_attention(*exact[:3], read, None if mask is None else mask.double(), causal=causal)[0]
    compare((made, narrow), (expected, exact), 1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
@pytest.mark.parametrize("queries", [2, 11])
def test_queries_of_another_number_than_keys_as_in_cross_attention(queries: int, shared: bool) -> None:
    given = tensors(2, shared=shared, queries=queries, dtype=torch.float32)
    assert given[0].shape[2] == queries != given[1].shape[2]
    mask = draw(1, 1, 1, given[1].shape[2]) * 3
    for seen in (None, mask):
        narrow, exact = leaves_of(given, torch.float32), leaves_of(given, torch.float64)
        made = split_attention(*narrow, seen)  # type: ignore[misc]
        wide = None if seen is None else seen.double()
        expected = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])), wide)[0]
        compare((made, narrow), (expected, exact), 1e-5)


@pytest.mark.parametrize("window", [None, 3], ids=["whole", "window"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("prefixes", [None, (PREFIX, 2, 0), (PREFIX, 2, 2)], ids=["shared", "per-row", "two alike"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(6, 1, 4), (6, 4, 4), (5, 5, 5)], ids=str)
def test_packed_rows_are_each_row_alone(
    lengths: tuple[int, ...], kv_heads: int, prefixes: tuple[int, ...] | None, causal: bool, window: int | None
) -> None:
    """Against the reference in float64, row by row, each with its own part of tensors padded to the longest."""
    if window is not None and not causal:
        pytest.skip("a window is one of causal attention")
    q, k, v, pk, pv = tensors(kv_heads, shared=prefixes is None, dtype=torch.float32)

    def packed(x: Tensor) -> Tensor:
        return torch.cat([x[r : r + 1, :, :n] for r, n in enumerate(lengths)], 2)

    given = [packed(q), packed(k), packed(v), pk, pv]
    packing = Packing(lengths, prefixes)
    narrow, exact, wide = leaves_of(given, torch.float32), leaves_of(given, torch.float64), []
    made = split_attention(*narrow, causal=causal, packing=packing, window=window)  # type: ignore[misc]
    read = ReadPrefix(SiteKV(*exact[3:]), packing=packing, window=window)
    by_row, _ = packed_reference(*exact[:3], read, causal=causal)
    compare((made, narrow), (by_row, exact), 1e-5)
    for r, (n, (a, b)) in enumerate(zip(lengths, packing.spans(), strict=True)):
        own = [x[:, :, a:b].double() for x in given[:3]]
        p = PREFIX if prefixes is None else prefixes[r]
        alone = ReadPrefix(SiteKV(*(x[r if prefixes else 0, :, :p][None].double() for x in (pk, pv))))
        at = torch.arange(n)
        seen = (at[:, None] - at < (window or n)) & ((at[:, None] >= at) | (not causal))
        wide.append(reference_attention(*own, alone, seen[None, None])[0])
    torch.testing.assert_close(by_row, torch.cat(wide, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [*BOUNDS, torch.float64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("prefixes", ["shared", "per-row", "of own lengths", "of no tokens"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "least", "per head"])
def test_a_single_query_as_while_decoding(kind: str, kv_heads: int, prefixes: str, dtype: torch.dtype) -> None:
    given = tensors(kv_heads, shared=prefixes in ("shared", "of no tokens"), queries=1, dtype=dtype)
    mask = masks(kind, dtype)
    mask = None if mask is None else mask[..., -1:, :]
    hidden = None
    if prefixes == "of no tokens":
        given = [*given[:3], *(x[:, :, :0] for x in given[3:])]
    if prefixes == "of own lengths":
        hidden = torch.zeros(ROWS, 1, 1, PREFIX)
        for row, length in enumerate([PREFIX, 2, 0]):
            hidden[row, ..., length:] = -torch.inf
    if prefixes in ("of own lengths", "of no tokens") and mask is not None and mask.dtype == torch.bool:
        mask = mask.expand(ROWS, -1, -1, -1).clone()
        mask[2] = False  # neither a prefix nor a token to see
    with torch.no_grad():
        made = split_attention(*given, mask, hidden)  # type: ignore[misc]
    exact = [x.double() for x in given]
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected, _ = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:]), hidden), wide)
    assert made.dtype == dtype
    assert (made.double() - expected).norm() <= BOUNDS.get(dtype, 1e-12) * expected.norm()
    assert made.isfinite().all()


@pytest.mark.parametrize("dtype", [*BOUNDS, torch.float64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_single_query_of_a_single_row(kv_heads: int, dtype: torch.dtype) -> None:
    given = [x[:1] for x in tensors(kv_heads, queries=1, dtype=dtype)]
    with torch.no_grad():
        made = split_attention(*given)  # type: ignore[misc]
    exact = [x.double() for x in given]
    expected, _ = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])))
    assert made.dtype == dtype and made.shape == expected.shape
    assert (made.double() - expected).norm() <= BOUNDS.get(dtype, 1e-12) * expected.norm()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_the_backward_pass_in_blocks_of_queries_and_rows(
    block: int, shared: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreword.gradients.BLOCK", block)
    monkeypatch.setattr("foreword.gradients.SCORES", 1)
    monkeypatch.setattr("foreword.gradients.REPEATED", 2 * 2 * (PREFIX + 6) * 8)  # two of three rows together
    given = tensors(2, shared=shared, dtype=torch.float32)
    narrow, exact = leaves_of(given, torch.float32), leaves_of(given, torch.float64)
    made = split_attention(*narrow, causal=causal)  # type: ignore[misc]
    expected = reference_attention(*exact[:3], ReadPrefix(SiteKV(*exact[3:])), causal=causal)[0]
    compare((made, narrow), (expected, exact), 1e-5)


def test_split_refuses_what_its_kernels_cannot_do() -> None:
    q, _, v, pk, _ = tensors()
    hidden = torch.zeros(1, 1, 1, PREFIX)
    assert can_split(q, v, pk, None)
    assert not can_split(q, v[..., :3], pk, None)
    assert not can_split(q, v, pk, hidden), "a prefix that is shared yet not seen whole"
    assert can_split(q, v, pk.expand(ROWS, -1, -1, -1), hidden)
    assert not can_split(q.to("meta"), v, pk, None)


def test_rows_alike_in_length_are_grouped() -> None:
    lengths = [50, 100, 98, 9, 48, 10, 100]
    order, given = grouped(lengths)
    assert [lengths[i] for i in order] == [100, 100, 98, 50, 48, 10, 9] and given == [100, 100, 100, 50, 50, 10, 10]
    assert grouped([100, 97, 10, 8])[1] == [100, 97, 10, 8], "too much padding, in tokens and as a share"
    assert grouped(lengths, exact=True)[1] == sorted(lengths, reverse=True)
    assert grouped([]) == ([], [])
    runs = Packing(tuple(given)).runs
    assert [(run.first, run.rows, run.start, run.length) for run in runs] == [
        (0, 3, 0, 100),
        (3, 2, 300, 50),
        (5, 2, 400, 10),
    ]
