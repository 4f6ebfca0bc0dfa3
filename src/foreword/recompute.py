"""What the backward pass computes again instead of keeping.

A gated feed-forward, `down(act(gate(x)) * up(x))`, keeps three tensors of its inner width for each token: `gate(x)` for
the activation's gradient, `act(gate(x))` and `up(x)` for the product's. The middle one is an elementwise function of
the first, so it is computed again from it, by the same call and therefore bit for bit. In a Llama-like layer with
frozen weights this is about a fifth of all that training keeps.
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
    """While open, forward passes of `base` keep for the backward pass an activation's input alone, not its output."""
    latest: list[Any] = [None, None, None]  # the last activation that ran, its input and its output

    def ran(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        latest[:] = module, args[0].detach(), output

    def pack(x: Tensor) -> Kept:
        module, given, output = latest
        if x is not output:
            return x
        latest[:] = None, None, None
        return partial(module.forward, given)

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
        latest.clear()  # the graph holds `pack`, and would hold the last output with it
