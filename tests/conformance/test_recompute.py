"""Activations that are computed again: the same gradients bit for bit, and what is kept is smaller by their outputs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from conformance.families import BY_NAME, inputs, wrapped
from foreword import model as model_module
from foreword.model import PrefixModel
from foreword.recompute import ACTIVATIONS

GATED = ["llama", "qwen3", "gemma3", "mixtral"]
LENGTHS = [7, 5, 3]


def kept(model: PrefixModel, batch: dict[str, Any]) -> int:
    """Bytes that are held after a forward pass and were not before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        held = model(**batch).logits
    assert held.requires_grad
    return sum(event.self_cpu_memory_usage for event in measured.key_averages())


def gradients(model: PrefixModel, batch: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    model(**batch).logits.pow(2).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", GATED)
def test_gradients_are_the_same_bit_for_bit_and_less_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped(name), inputs(BY_NAME[name], LENGTHS)
    outputs: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, output: outputs.append(output.numel() * output.element_size()))
        for module in model.base.modules()
        if isinstance(module, ACTIVATIONS)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    lean, less = gradients(model, batch), kept(model, batch)
    monkeypatch.setattr(model_module, "recomputing_activations", lambda base: nullcontext())
    plain, more = gradients(model, batch), kept(model, batch)
    assert lean and all(torch.equal(a, b) for a, b in zip(lean, plain, strict=True))
    assert more - less == sum(outputs) > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_of_states_in_half_precision_no_float32_copy_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped(name, own=True), inputs(BY_NAME[name], LENGTHS)
    model.base.to(torch.bfloat16)
    lean, less = gradients(model, batch), kept(model, batch)
    monkeypatch.setattr("foreword.recompute._narrower", lambda x: None)
    plain, more = gradients(model, batch), kept(model, batch)
    assert lean and all(torch.equal(a, b) for a, b in zip(lean, plain, strict=True))
    hidden = 4 * batch["input_ids"].numel() * model.config.hidden_size  # bytes in float32
    assert more - less >= hidden, "two norms a layer keep half of a float32 copy less"
