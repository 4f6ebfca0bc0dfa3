"""Batches of rows of similar length, so that little is padded, and results back in the order of the rows."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
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

    def sampler(self, batch_size: int, seed: int) -> "BucketSampler":
        """The order of training."""
        return BucketSampler(self.lengths, batch_size, seed)


class SeveralRows(Dataset[Any]):
    """Several data sets as one. ratios: how many epochs of a part make one of the whole."""

    def __init__(self, parts: Sequence[Rows], ratios: Sequence[float]) -> None:
        self.parts, self.ratios = list(parts), list(ratios)
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self._starts, index) - 1
        return self.parts[part][index - self._starts[part]]

    def sampler(self, batch_size: int, seed: int) -> "InterleavedSampler":
        """The order of training."""
        return InterleavedSampler([part.lengths for part in self.parts], self.ratios, batch_size, seed)


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


class InterleavedSampler(Sampler[int]):
    """Indices of several data sets laid end to end: full batches of one of them each, a set's batches evenly spaced.

    A set of n rows and ratio r gives r n / batch_size batches an epoch, rounded up. They are drawn from the orders that
    `BucketSampler` would give it, one behind the other, so that it sees what it would see alone.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], ratios: Sequence[float], batch_size: int, seed: int) -> None:
        self.parts = [BucketSampler(part, batch_size, seed) for part in lengths]
        self.counts = [math.ceil(r * len(part) / batch_size) for r, part in zip(ratios, lengths, strict=True)]
        self.batch_size, self.epoch = batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """As of BucketSampler."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts) * self.batch_size

    @property
    def order(self) -> list[int]:
        """Which set each batch of an epoch is of."""
        places = sorted(((j + 0.5) / count, i) for i, count in enumerate(self.counts) for j in range(count))
        return [i for _, i in places]

    def __iter__(self) -> Iterator[int]:
        drawn = [self._drawn(part, count) for part, count in zip(self.parts, self.counts, strict=True)]
        starts = np.cumsum([0, *map(len, self.parts)]).tolist()
        for i in self.order:
            for _ in range(self.batch_size):
                yield starts[i] + next(drawn[i])

    def _drawn(self, part: BucketSampler, count: int) -> Iterator[int]:
        """This epoch's rows of a part."""
        first = self.epoch * count * self.batch_size
        part.set_epoch(first // len(part))
        rows: Iterator[int] = islice(part, first % len(part), None)
        for _ in range(count * self.batch_size):
            if (row := next(rows, None)) is None:
                part.set_epoch(part.epoch + 1)
                rows = iter(part)
                row = next(rows)
            yield row


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
