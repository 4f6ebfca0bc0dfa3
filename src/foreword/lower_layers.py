"""Activations of the layers below the first that learns, kept from one epoch to the next.

What those layers make of a row depends on the row alone: their weights are frozen and so is what they read of the
prefix. So their last hidden states are kept by the row's tokens; when every row of a batch is known, the layers are not
run. The result is that of running them, but for the rounding of a batch that was put together otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .dynamic import Dynamic
from .errors import InputError
from .model import PrefixModel
from .sites import layer_of


class LowerLayers:
    """The layers of a decoder below the first that learns, and what they made of rows.

    memory: bytes that may be kept; further rows are computed every time.

    Raises InputError where nothing can be kept, naming the reason.
    """

    def __init__(self, model: PrefixModel, name: str, memory: float) -> None:
        self._model, self._name, self._left = model, name, memory
        self._blocks = _lower_blocks(model, name)
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._shape_of_output: type = Tensor

    def __len__(self) -> int:
        """How many rows are kept."""
        return len(self._kept)

    @contextmanager
    def passed_over(self, ids: Tensor, mask: Tensor, starts: Tensor, prefix: Any) -> Iterator[None]:
        """While open, a call of the base with the rows `ids` `[B, n]` does not run the layers where all rows are known,
        and else keeps what they make. `starts` `[B]`: where a row's tokens begin, counted through all of the call's.
        """
        if not self._model.reads_only(self._name, prefix):
            yield
            return
        lengths = mask.sum(1).tolist()
        rows = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        places = [slice(start, start + length) for start, length in zip(starts.tolist(), lengths, strict=True)]
        with ExitStack() as stack:
            if all(row in self._kept for row in rows):
                self._skip(stack, rows, places)
            else:
                stack.callback(self._blocks[-1].register_forward_hook(self._keeping(rows, places)).remove)
            yield

    def _keeping(self, rows: list[tuple[int, ...]], places: list[slice]) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._shape_of_output = type(output)
            hidden = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, 1)
            for row, place in zip(rows, places, strict=True):
                size = hidden[place].numel() * hidden.element_size()
                if row not in self._kept and size <= self._left:
                    self._kept[row] = hidden[place].clone()
                    self._left -= size

        return keep

    def _skip(self, stack: ExitStack, rows: list[tuple[int, ...]], places: list[slice]) -> None:
        is_tuple = issubclass(self._shape_of_output, tuple)

        def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if is_tuple else hidden_states

        def kept(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            made = torch.zeros_like(hidden_states)
            flat = made.flatten(0, 1)
            for row, place in zip(rows, places, strict=True):
                flat[place] = self._kept[row]
            return (made,) if is_tuple else made

        for block in self._blocks:
            block.forward = kept if block is self._blocks[-1] else passed
            stack.callback(delattr, block, "forward")


def _lower_blocks(model: PrefixModel, name: str) -> list[nn.Module]:
    """The base's first layers, up to the last below what learns."""
    if model.kind != "decoder" or model.is_sharded:
        raise InputError("activations are kept of a decoder alone, not sharded; leave out --activation-cache.")
    if model.combined or isinstance(model.form(name), Dynamic):
        raise InputError(
            "LoRA, adapters and dynamic prefixes change the lower layers from step to step, so their activations "
            "cannot be kept; leave out --activation-cache."
        )
    learns = {site for site, kv in model.kv(name).sites.items() if kv.keys.requires_grad or kv.values.requires_grad}
    below: list[str] = []
    for site in model.sites:
        if site.name in learns:
            break
        below.append(site.name)
    if not below:
        raise InputError(
            "the prefix learns in the first layer, so nothing below it can be kept; leave out --activation-cache."
        )
    blocks = []
    for name_below in below:
        found = layer_of(model.base, name_below)
        if found is None:
            raise InputError(
                f"{name_below} is in no list of layers, so nothing can be kept; leave out --activation-cache."
            )
        layers, place = found
        blocks.append(layers[place])
    if any(isinstance(module, nn.Dropout) and module.p for block in blocks for module in block.modules()):
        raise InputError(f"{type(model.base).__name__} has dropout, so a row's activations differ from step to step.")
    return blocks
