"""The base's output layer: swapped while a task reads hidden states, and its cross-entropy in chunks.

A task needs the logits of few positions or of few words, or none of the vocabulary's at all. Here the layer is taken
out of the base's forward, so that the tensor [rows, tokens, vocabulary] is never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import InputError
from ..model import PrefixModel
from ..sites import run_inputs, vocabulary_size

CHUNK = 2**24  # logits at a time: 64 MiB in float32


@contextmanager
def output_layer(base: Any, forward: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Iterator[None]:
    """While open, the base's output layer is `forward`, of hidden states `[B, n, d]`; all around it stays the base's.
    May be opened within itself.

    bias: what then stands for the bias that some bases (BART) add over the whole vocabulary after the layer; by
    default none.
    """
    layer = base.get_output_embeddings()
    final, before = getattr(base, "final_logits_bias", None), vars(layer).get("forward")
    layer.forward = forward
    try:
        if final is not None:
            base.final_logits_bias = final.new_zeros(1, 1) if bias is None else bias
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
        if final is not None:
            base.final_logits_bias = final


def nothing_read(hidden: Tensor) -> Tensor:
    """In place of logits that nobody reads, something small for what comes after the layer. No view: a sharded base
    warns of them."""
    return hidden[:, -1:, :1].clone()


def hidden_before_output(model: PrefixModel, inputs: dict[str, Tensor], prefix: Any) -> Tensor:
    """`[B, n, d]`, what the output layer would read; the layer itself is not run."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return nothing_read(hidden)

    with output_layer(model.base, keep):
        model(**inputs, prefix=prefix)
    return found[0]


class OutputLayer:
    """From the hidden states that reach the output layer to the base's logits, on positions picked out of the batch.

    Some bases change the layer's result: a bias (BART), a factor (Cohere, Granite), a soft cap (Gemma). Which is read
    from the configuration and checked against the base's own logits. Raises InputError where they differ.
    """

    def __init__(self, model: PrefixModel) -> None:
        base: Any = model.base
        config = base.config.get_text_config()
        self.base, self.sharded = base, model.is_sharded
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.factor: float = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._check(model)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, vocabulary]` in float32 for `[N, d]`. Two dimensions on purpose: a frozen layer over sliced
        three-dimensional hidden states would expand its weight for every row."""
        layer = self.base.get_output_embeddings()
        # Calling a sharded layer runs FSDP's hooks, whose end of a backward pass frees weights that this step's still
        # needs; after the base's forward the layer is whole.
        logits = (layer.forward if self.sharded else layer)(hidden).float()
        bias = getattr(self.base, "final_logits_bias", None)
        logits = (logits if bias is None else logits + bias) * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
        """The mean cross-entropy of `[N, d]` against token ids `[N]`, `chunk` positions at a time.

        Equal to plain cross-entropy over all logits. The layer must be frozen; where it is trained (LoRA on it), the
        plain form is computed, so that it gets its gradient.
        """
        layer = self.base.get_output_embeddings()
        if any(p.requires_grad for p in layer.parameters()):
            return nn.functional.cross_entropy(self.logits(hidden), targets)
        chunk = chunk or max(1, CHUNK // vocabulary_size(self.base))
        return _ChunkedCrossEntropy.apply(hidden, targets, self.logits, chunk)

    @torch.no_grad()
    def _check(self, model: PrefixModel) -> None:
        ids = (torch.arange(5, 9, device=model.device) % vocabulary_size(model.base))[None]
        inputs = run_inputs(model.base, ids)
        training = [module for module in model.modules() if module.training]
        model.eval()
        own = model(**inputs, prefix=None).logits[0].float()
        made = self.logits(hidden_before_output(model, inputs, None)[0])
        for module in training:
            module.training = True
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        if own.shape != made.shape or not torch.allclose(
            own, made, rtol=tolerance, atol=tolerance * float(own.abs().max())
        ):
            raise InputError(
                f"{type(model.base).__name__} makes its logits in a way that foreword does not know, so a loss over "
                "chosen tokens would be wrong there; choose another model."
            )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose gradient with respect to the hidden states is found chunk by chunk, in the forward pass.

    Only `[N, d]` is kept: the layer is frozen, so no other gradient is needed.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        needed = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if needed else None
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            with torch.set_grad_enabled(needed):
                leaf = hidden[part].detach().requires_grad_(needed)
                loss = nn.functional.cross_entropy(logits(leaf), targets[part], reduction="sum")
            total += loss.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        ctx.count = len(targets)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.count).to(gradient.dtype), None, None, None
