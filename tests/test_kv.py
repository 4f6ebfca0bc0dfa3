"""KVPrefix: what it refuses, what it knows of itself, and prefixes mixed by row."""

from __future__ import annotations

import pytest
import torch

from foreword.kv import KVPrefix, SiteKV, mix_rows


def prefix(length: int = 3, rows: int = 1, value: float = 1.0, names: tuple[str, ...] = ("a", "b")) -> KVPrefix:
    """Sites that differ in heads and sizes."""
    sites = {}
    for i, name in enumerate(names):
        keys = torch.full((rows, i + 1, length, 4), value)
        sites[name] = SiteKV(keys, torch.full((rows, i + 1, length, 2 + i), -value))
    return KVPrefix(sites)


def test_a_prefix_needs_a_site() -> None:
    with pytest.raises(ValueError, match="at least one site"):
        KVPrefix({})


@pytest.mark.parametrize("keys, values", [((1, 2, 3, 4), (1, 2, 2, 4)), ((2, 2, 3, 4), (1, 2, 3, 4))])
def test_keys_and_values_of_different_rows_or_length_are_refused(
    keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="differ in rows or length"):
        KVPrefix({"a": SiteKV(torch.zeros(keys), torch.zeros(values))})


def test_sites_of_different_length_are_refused() -> None:
    sites = {**prefix(3, names=("a",)).sites, "b": prefix(2, names=("a",)).sites["a"]}
    with pytest.raises(ValueError, match="differ in rows or length"):
        KVPrefix(sites)


def test_rows_length_and_numbers() -> None:
    made = prefix(5, rows=2)
    assert (made.rows, made.length) == (2, 5)
    assert made.numel() == 2 * 5 * (1 * (4 + 2) + 2 * (4 + 3))
    assert made.visible is None


def test_to_converts_and_detach_cuts() -> None:
    made = prefix()
    made.sites["a"].keys.requires_grad_()
    half = KVPrefix(made.sites, torch.tensor([2])).to(torch.bfloat16)
    assert half.sites["b"].values.dtype == torch.bfloat16
    assert half.lengths is not None
    assert half.lengths.dtype == torch.int64
    assert half.sites["a"].keys.requires_grad
    cut = half.detach()
    assert not cut.sites["a"].keys.requires_grad
    assert cut.lengths is half.lengths


def test_mixed_rows_are_padded_at_the_end() -> None:
    mixed = mix_rows([prefix(3, value=1.0), prefix(1, value=2.0)], [1, 0, 1, 0])
    assert (mixed.rows, mixed.length) == (4, 3)
    assert mixed.lengths is not None
    assert mixed.lengths.tolist() == [1, 3, 1, 3]
    assert mixed.visible is not None
    assert mixed.visible.tolist() == [[True, False, False], [True] * 3, [True, False, False], [True] * 3]
    keys = mixed.sites["b"].keys
    assert keys.shape == (4, 2, 3, 4)
    assert keys[:, 0, :, 0].tolist() == [[2, 0, 0], [1, 1, 1], [2, 0, 0], [1, 1, 1]]


def test_mixed_rows_of_one_length_need_no_lengths() -> None:
    assert mix_rows([prefix(value=1.0), prefix(value=2.0)], [0, 1]).lengths is None


def test_mixed_rows_of_one_short_prefix_keep_their_lengths() -> None:
    """A longer prefix that no row names still decides the padding, never what is seen."""
    mixed = mix_rows([prefix(3), prefix(1)], [1, 1])
    seen = mixed.visible
    assert mixed.length == 1 or (seen is not None and seen.sum(-1).tolist() == [1, 1])


def test_mixing_keeps_the_gradient() -> None:
    first, second = prefix(3), prefix(1)
    leaf = first.sites["a"].keys.requires_grad_()
    mix_rows([first, second], [0, 1, 0]).sites["a"].keys.sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad == 2).all())


def test_prefixes_that_differ_by_row_or_in_sites_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="only prefixes that a whole batch can share"):
        mix_rows([prefix(rows=2), prefix()], [0, 1])
    with pytest.raises(ValueError, match="enter different sites"):
        mix_rows([prefix(), prefix(names=("a",))], [0, 1])
