"""A cache of keys and values with room ahead, so that a token is written where there is place for it; transformers'
own copies all that came before at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are the filled part of larger tensors."""

    _room: tuple[Tensor, Tensor]
    _filled: Tensor | None = None  # the keys as they were left here

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values, used, new = self.keys, self.values, self.get_seq_length(), key_states.shape[2]
        if keys is None or values is None or used == 0:
            self.hold([key_states[:, :, :0]], [value_states[:, :, :0]], 0, new)
        elif keys is not self._filled or used + new > self._room[0].shape[2]:  # others reorder and crop them
            self.hold([keys], [values], used, new)
        self.keys, self.values = (room[:, :, : used + new] for room in self._room)
        self.keys[:, :, used:], self.values[:, :, used:] = key_states, value_states
        self._filled = self.keys
        return self.keys, self.values

    def hold(self, keys: Sequence[Tensor], values: Sequence[Tensor], used: int, new: int = 0) -> None:
        """Hold these rows `[b, H, n, d]`, one part below the other, each ending at column `used`."""
        if not self.is_initialized:
            self.lazy_initialization(keys[0], values[0])
        self._room = _joined(keys, used, used + new + ROOM), _joined(values, used, used + new + ROOM)
        self.keys, self.values = (room[:, :, :used] for room in self._room)
        self._filled = self.keys


def roomy_cache(config: Any = None) -> DynamicCache:
    """An empty cache, of the kinds of layers that a text model's configuration names; with none, all see everything."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def _joined(parts: Sequence[Tensor], end: int, size: int) -> Tensor:
    """`[B, H, size, d]`: the parts below one another, each ending at column `end`; zeros elsewhere."""
    first, at = parts[0], 0
    room = first.new_zeros(sum(map(len, parts)), first.shape[1], size, first.shape[3])
    for part in parts:
        room[at : at + len(part), :, end - part.shape[2] : end] = part
        at += len(part)
    return room
