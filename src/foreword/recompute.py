"""What training computes again instead of keeping, bit for bit the same.

A gated feed-forward, `down(act(gate(x)) * up(x))`, keeps three tensors of its inner width for each token: `gate(x)` for
the activation's gradient, `act(gate(x))` and `up(x)` for the product's. The middle one is an elementwise function of
the first, so it is computed again from it, by the same call. In a Llama-like layer with frozen weights this is about a
fifth of all that training keeps.

A norm computes in float32. Where hidden states are in half precision it keeps its float32 copy of them, which holds no
more than they do: what is kept is the half, and the copy is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2CLS

ACTIVATIONS: tuple[Any, ...] = tuple({kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()})
Kept = Tensor | Callable[[], Tensor]


@contextmanager
def recomputing_activations(base: nn.Module) -> Iterator[None]:
    """While open, forward passes of `base` keep for the backward pass an activation's input alone, not its output, and
    of a tensor that was turned to float32 the original precision."""
    latest: list[Any] = [None, None, None]  # the last activation that ran, its input and its output
    widened: list[Any] = [None, None]  # the last tensor that was turned to float32, and its half: it is kept twice

    def ran(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        latest[:] = module, args[0].detach(), output

    def pack(x: Tensor) -> Kept:
        module, given, output = latest
        if x is output:
            latest[:] = None, None, None
            return partial(module.forward, given)
        if x is not widened[0]:
            half = _narrower(x)
            if half is None:
                return x
            widened[:] = x, x.detach().to(half)
        return partial(widened[1].to, x.dtype)

    def unpack(kept: Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with ExitStack() as stack:
        for module in base.modules():
            if isinstance(module, ACTIVATIONS) and not any(True for _ in module.parameters()):
                stack.callback(module.register_forward_hook(ran).remove)
        stack.enter_context(saved_tensors_hooks(pack, unpack))
        yield
        # The graph holds `pack`, and would hold the last tensors with it.
        latest.clear()
        widened.clear()


def _narrower(x: Tensor) -> torch.dtype | None:
    """The half precision that a float32 tensor was turned from, if it was."""
    node = x.grad_fn
    if x.dtype != torch.float32 or node is None or node.name() != "ToCopyBackward0":
        return None
    source, output = node.next_functions[0]
    dtype = None if source is None else source._input_metadata[output].dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
