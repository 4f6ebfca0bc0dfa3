"""The average of trained parameters over the steps, the later ones weighing more.

Polynomial-decay averaging (Shamir & Zhang 2013, arXiv:1212.1824, section 4): after step t the average moves by
(1 + eta) / (t + eta) towards the parameters, so that it looks back over a fifth of the steps there were (eta = 3),
however many are still to come. At a constant learning rate it is what a decay to nought would end in, after any step.

Each parameter counts its own steps, those in which it had a gradient. Nothing here knows of prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ETA = 3.0


class WeightAverage(TrainerCallback):
    """The averages of a model's trainable parameters, which an optimizer's steps keep up to date."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Count one more step of every parameter that has a gradient."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            step = self._steps[name] = self._steps.get(name, 0) + 1
            if step == 1:
                self._averages[name] = parameter.detach().clone()
            else:
                self._averages[name].lerp_(parameter.detach(), (1 + ETA) / (step + ETA))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.update()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the parameters are their averages."""
        own = {name: self._parameters[name].detach().clone() for name in self._averages}
        self.put()
        try:
            yield
        finally:
            self._put(own)

    def put(self) -> None:
        """Set the parameters to their averages."""
        self._put(self._averages)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    # ---- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """All of its state: the averages by name, and the steps that each counts as `name.steps`."""
        steps = {f"{name}.steps": torch.tensor(count) for name, count in self._steps.items()}
        return {**self._averages, **steps}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._steps = {name: int(saved[f"{name}.steps"]) for name in self._parameters if name in saved}
        self._averages = {name: saved[name].to(self._parameters[name], copy=True) for name in self._steps}
