"""The rows that decode together: rows join and leave between steps, each reading its own prefix.

Keys and values of the rows' texts lie in one cache, padded at the left, so that every row's next token is the last
column; `mask` says where a row's text begins. Prefixes are not in it: the model reads them by `PrefixModel.reading`,
which stays open for as long as the rows stay the same. Every layer keeps its whole text, windowed layers too: their
window is the mask's, by distance between columns, which padding at the left does not change.

Knows rows, tokens and logits; nothing of requests, text or HTTP.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..model import PrefixModel
from ..roomy_cache import RoomyLayer, roomy_cache


@dataclass(eq=False)
class Row:
    """A text that is being continued: its prompt's ids (at least one), the prefix it reads, the ids chosen so far."""

    prompt: list[int]
    prefix: str | None
    chosen: list[int] = field(default_factory=list)


class Batch:
    """Rows of one model that decode together; all calls come from one thread, under `torch.inference_mode`."""

    def __init__(self, model: PrefixModel) -> None:
        self._model = model
        self._takes = set(inspect.signature(model.base.forward).parameters)
        self._reading = ExitStack()
        self._cache = roomy_cache()
        self._mask = torch.ones(0, 0, dtype=torch.long)  # [B, L]
        self.rows: list[Row] = []

    def change(self, staying: Sequence[Row], joining: Sequence[Row]) -> Tensor | None:
        """Keep `staying`, let every other row go, and run the prompts of `joining`, which come after them.

        Returns the logits `[joining, vocabulary]` that follow each new prompt, in float32; None where none joined.
        """
        self._reading.close()
        parts = [(self._cache, self._mask, [self.rows.index(row) for row in staying])] if staying else []
        logits = None
        if joining:
            cache, mask, logits = self._run_prompts(joining)
            parts.append((cache, mask, list(range(len(joining)))))
        self.rows = [*staying, *joining]
        self._cache, self._mask = _gathered(parts) if parts else (roomy_cache(), self._mask[:0])
        if self.rows:
            self._reading.enter_context(self._model.reading(_names(self.rows)))
        return logits

    def step(self) -> Tensor:
        """Run the last chosen token of every row; returns the logits `[B, vocabulary]` that follow, in float32."""
        device = self._model.device
        ids = torch.tensor([[row.chosen[-1]] for row in self.rows], device=device)
        positions = self._mask.sum(-1, keepdim=True)  # [B, 1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=-1)
        return self._logits(ids, self._mask, positions, self._cache)

    def clear(self) -> None:
        """Let every row go, whatever state an error left behind."""
        self._reading.close()
        self.rows, self._cache, self._mask = [], roomy_cache(), self._mask[:0]

    def _run_prompts(self, rows: Sequence[Row]) -> tuple[DynamicCache, Tensor, Tensor]:
        longest = max(len(row.prompt) for row in rows)
        device = self._model.device
        ids = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows], device=device)
        real = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        mask = torch.tensor(real, device=device)
        cache = roomy_cache()
        with self._model.reading(_names(rows)):
            logits = self._logits(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        return cache, mask, logits

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        return self._model.base(**inputs).logits[:, -1].float()


def _names(rows: Sequence[Row]) -> str | list[str | None] | None:
    """The prefix of every row; one name for all where they agree, so that it is read once and not copied per row."""
    names = [row.prefix for row in rows]
    return names[0] if len(set(names)) == 1 else names


def _gathered(parts: Sequence[tuple[DynamicCache, Tensor, list[int]]]) -> tuple[DynamicCache, Tensor]:
    """The chosen rows of each (cache, mask, rows) in one cache and mask, without columns that no row fills."""
    masks = [mask[rows] for _, mask, rows in parts]
    leads = [int(mask.any(0).long().argmax()) for mask in masks]  # the first column that some row fills
    masks = [mask[:, lead:] for mask, lead in zip(masks, leads, strict=True)]
    longest = max(mask.shape[1] for mask in masks)
    joined = roomy_cache()
    for layers in zip(*(cache.layers for cache, _, _ in parts), strict=True):
        joined.layers.append(layer := RoomyLayer())
        if layers[0].is_initialized:  # not where a layer reads an earlier layer's keys
            picked = [(part, rows, lead) for part, (_, _, rows), lead in zip(layers, parts, leads, strict=True)]
            keys = [part.keys[rows, :, lead:] for part, rows, lead in picked]
            layer.hold(keys, [part.values[rows, :, lead:] for part, rows, lead in picked], longest)
    padded = [torch.nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks]
    return joined, torch.cat(padded)
