"""What a base computes, in float32 whatever its weights are: for measuring it more exactly than it runs.

A weight in half precision is turned to float32 when an operation reads it, so no more than one is held twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Unrounded(TorchDispatchMode):
    """While open, PyTorch's own operations take half precision as float32. Kernels from elsewhere (quantised products)
    take what they were written for, and what is written in place stays where it is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and not func._schema.is_mutable:
            args, kwargs = tree_map_only(torch.Tensor, _float32, (args, kwargs))
        return func(*args, **kwargs)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
