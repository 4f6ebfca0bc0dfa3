"""Products of few rows with a frozen layer's weight, as while a batch decodes, in float32 on several cores.

`W x^T` holds the same numbers as `x W^T`, and on two cores MKL makes it in half of the time at 2 to 4 rows and in three
quarters of it at 16: it has the many rows of `W` to share among threads where the other has the few of `x`. From 8 to
15 rows it is no faster, beyond 64 little, and on one core hardly ever (docs/log.md). The transposed result is not
copied: what follows a product, elementwise for the most part, reads it as it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FASTER = frozenset([*range(2, 8), *range(16, 65)])  # rows


@contextmanager
def few_row_products(base: nn.Module) -> Iterator[None]:
    """While open, `base`'s linear layers compute few rows the faster way where no gradient is asked for."""
    taken = [module for module in base.modules() if _can(module)] if torch.get_num_threads() > 1 else []
    for layer in taken:
        vars(layer)["forward"] = partial(_product, layer)
    try:
        yield
    finally:
        for layer in taken:
            vars(layer).pop("forward", None)


def _can(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain layer in float32 on the CPU, whose forward nobody else has taken."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1]
    if torch.is_grad_enabled() or rows.numel() not in FASTER:
        return linear(x, layer.weight, layer.bias)
    made = (layer.weight @ x.reshape(rows.numel(), -1).t()).t().unflatten(0, rows)
    return made if layer.bias is None else made + layer.bias
