"""Products of few rows with a frozen layer's weight, as while a batch decodes, the way that is faster here.

`W x^T` holds the same numbers as `x W^T`, and a CPU's library has the many rows of `W` to share among its threads where
the other has the few of `x`: half of the time for some shapes, twice the time for others, and which is which differs
between processors (docs/log.md). So the first products of a shape are made in turn by both and timed, and the faster
way stays; a single thread has nothing to share. The transposed result is not copied: what follows a product,
elementwise for the most part, reads it as it lies, somewhat slower, for which it must be faster by a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW = range(2, 65)  # rows; a single one is a product of another kind, and of more neither way is faster
TRIALS = 3  # of each way
WORTH = 0.9

Way = Callable[[Tensor, Tensor | None, Tensor], Tensor]


@dataclass
class _Trials:
    """What is known of layers of one size: of a number of rows the seconds that both ways took, or the way to go."""

    seconds: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    faster: dict[int, Way] = field(default_factory=dict)


_trials: dict[tuple[Any, ...], _Trials] = {}


@contextmanager
def few_row_products(base: nn.Module) -> Iterator[None]:
    """While open, `base`'s linear layers compute few rows the faster way where no gradient is asked for."""
    taken = [module for module in base.modules() if _can(module)] if torch.get_num_threads() > 1 else []
    for layer in taken:
        size = (layer.weight.shape, layer.weight.dtype, torch.get_num_threads())
        vars(layer)["forward"] = partial(_product, layer.weight, layer.bias, _trials.setdefault(size, _Trials()))
    try:
        yield
    finally:
        for layer in taken:
            vars(layer).pop("forward", None)


def _can(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain layer on the CPU, whose forward nobody else has taken."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.device.type == "cpu"


def _product(weight: Tensor, bias: Tensor | None, trials: _Trials, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if rows not in FEW or torch.is_grad_enabled():
        return linear(x, weight, bias)
    way = trials.faster.get(rows)
    # Of three dimensions whose strides are not the usual ones, which a transposed product leaves, torch makes a product
    # for each row.
    flat = x.reshape(rows, -1)
    made = _tried(weight, bias, trials, flat) if way is None else way(weight, bias, flat)
    return made.view(*x.shape[:-1], -1)


def _tried(weight: Tensor, bias: Tensor | None, trials: _Trials, x: Tensor) -> Tensor:
    own, other = trials.seconds.setdefault(len(x), ([], []))
    way, seconds = (_transposed, other) if len(own) > len(other) else (_plain, own)
    began = perf_counter()
    made = way(weight, bias, x)
    seconds.append(perf_counter() - began)
    if len(other) == TRIALS:
        trials.faster[len(x)] = _transposed if min(other) < WORTH * min(own) else _plain
    return made


def _plain(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return linear(x.contiguous(), weight, bias)


def _transposed(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    made = (weight @ x.t()).t()
    return made if bias is None else made + bias
