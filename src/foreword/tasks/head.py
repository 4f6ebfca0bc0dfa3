"""A trained linear layer over hidden states, in units that learn at one rate on every base.

Hidden states of language models differ from base to base by a factor of a hundred, and in each a few coordinates are
large and nearly constant. What the head reads is therefore measured from its mean and in its deviations, coordinate by
coordinate, on some of the rows to learn from, and divided by the root of the width. What is saved is the plain layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST = 0.1  # of the mean deviation, that a coordinate's counts for at least


class Head(nn.Module):
    """`weight (h - mean) / deviation + bias`, nought at first. Without `measure` mean and deviation are 0 and 1."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., outputs]` in float32, of hidden states `[..., d]`."""
        read = (hidden.to(self.weight.dtype) - self.mean) / self.deviation
        return nn.functional.linear(read, self.weight, self.bias).float()

    def measure(self, hidden: Tensor) -> None:
        """Take mean and deviation of hidden states `[N, d]`, unless they are all alike."""
        hidden = hidden.to(self.mean)
        deviation = hidden.std(0, correction=0)
        if bool(deviation.any()):
            self.mean.copy_(hidden.mean(0))
            self.deviation.copy_(deviation.clamp(min=LEAST * float(deviation.mean())) * hidden.shape[1] ** 0.5)

    def plain(self) -> dict[str, Tensor]:
        """Weight and bias of the same layer over hidden states as they are."""
        weight = self.weight / self.deviation
        return {"weight": weight, "bias": self.bias - weight @ self.mean}

    def become_plain(self) -> None:
        """Compute as what is saved will; trained on, it would learn at other rates."""
        self.load_plain(**self.plain())

    @torch.no_grad()
    def load_plain(self, weight: Tensor, bias: Tensor) -> None:
        """Be the layer that `plain` gave."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.mean.zero_()
        self.deviation.fill_(1.0)
