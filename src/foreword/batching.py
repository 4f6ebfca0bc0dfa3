"""Batches of rows of similar length, so that little is padded, and results back in the order of the rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.trainer_utils import EvalPrediction

MEGA_BATCHES = 32


class Rows(Dataset[Any]):
    """Rows and their lengths, by which batches are put together. `lengths` is what the trainer looks for."""

    def __init__(self, rows: Sequence[Any], lengths: Sequence[int]) -> None:
        assert len(rows) == len(lengths)
        self.rows, self.lengths = rows, list(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class BucketSampler(Sampler[int]):
    """Row indices, shuffled so that each run of `batch_size` of them has similar lengths.

    Rows are shuffled, cut into mega-batches of 32 batches, sorted by length within each and cut into batches,
    which are shuffled; a last batch that is not full stays last. The order depends on (seed, epoch) alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.tensor(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for mega in order.split(self.batch_size * MEGA_BATCHES):
            ranked = mega[self.lengths[mega].argsort(descending=True, stable=True)]
            batches += ranked.split(self.batch_size)
        full = len(self.lengths) // self.batch_size
        shuffled = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]
        for i in shuffled:
            yield from batches[i].tolist()


def longest_first(dataset: Any) -> np.ndarray | None:
    """Row indices by falling length, or None for a dataset without `lengths`."""
    lengths = getattr(dataset, "lengths", None)
    return None if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")


def reordered(value: Any, order: np.ndarray) -> Any:
    """Every array in nested tuples, lists and dicts with its rows in another order."""
    if isinstance(value, dict):
        return {key: reordered(item, order) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(reordered(item, order) for item in value)
    return value[order] if isinstance(value, np.ndarray) else value


def reordered_prediction(given: EvalPrediction, order: np.ndarray) -> EvalPrediction:
    names = ("predictions", "label_ids", "inputs", "losses")
    return EvalPrediction(*(reordered(getattr(given, name), order) for name in names))
