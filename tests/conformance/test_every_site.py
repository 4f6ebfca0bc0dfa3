"""Split against reference on what each family's sites really get: its queries, keys, values, masks and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from foreword.attention import ATTRIBUTE, NAME, ReadPrefix, prefix_attention
from foreword.split import can_split

from .families import ALL, Family, inputs, wrapped

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Call = tuple[torch.nn.Module, list[Tensor], ReadPrefix, dict[str, Any]]


def calls_of(family: Family, dtype: torch.dtype, lengths: list[int]) -> list[Call]:
    """Every call that a forward pass makes and that the split form serves."""
    model = wrapped(family.name, own=True)
    model.base.to(dtype)
    calls: list[Call] = []

    def keeping(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        read = getattr(module, ATTRIBUTE)
        special = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
        if can_split(query, value, read.kv.keys, read.hidden) and not special:
            calls.append((module, [query, key, value], read, {"attention_mask": mask, **kwargs}))
        return prefix_attention(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(NAME, keeping)
    try:
        with torch.no_grad():
            model(**inputs(family, lengths))
    finally:
        AttentionInterface.register(NAME, prefix_attention)
    return calls


def outputs(call: Call, kernel: str) -> list[Tensor]:
    """The output, and the gradients of query, key, value, prefix keys and prefix values."""
    module, tensors, read, kwargs = call
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *read.kv)]
    setattr(module, ATTRIBUTE, ReadPrefix(type(read.kv)(*leaves[3:]), read.hidden, kernel))  # type: ignore[arg-type]
    out = prefix_attention(module, *leaves[:3], **kwargs)[0]
    generator = torch.Generator().manual_seed(0)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 2]], ids=["full", "padded"])
@pytest.mark.parametrize("family", ALL, ids=str)
def test_split_equals_reference_forward_and_backward_at_every_site(
    family: Family, lengths: list[int], dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    calls = calls_of(family, dtype, lengths)
    if not calls:
        pytest.skip("every site takes the reference: softcap, sinks, or keys and values of different size")
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    for call in calls:
        split, reference = outputs(call, "split"), outputs(call, "reference")
        for part, found, expected in zip(("forward", *["backward"] * 5), split, reference, strict=True):
            error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
            record_property("difference", (family.name, f"site {part} {name}", error))
            assert error < BOUNDS[dtype]
