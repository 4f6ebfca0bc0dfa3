"""Rows that lie one behind another in one sequence, so that little or nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from torch import Tensor

PADDED, PADDING = 0.9, 2  # of a group's longest row, that its others are long at least, and short of it at most


def grouped(lengths: Sequence[int], exact: bool = False) -> tuple[list[int], list[int]]:
    """An order of rows in which those alike in length are neighbours, and the length that each is to have: its group's
    longest, so that attention takes them together. With `exact` its own, for bases that would see the padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    given: list[int] = []
    for i in order:
        alike = given and lengths[i] >= max(PADDED * given[-1], given[-1] - PADDING) and not exact
        given.append(given[-1] if alike else lengths[i])
    return order, given


@dataclass(frozen=True)
class Run:
    """Neighbours of one length that read as many prefix tokens: `rows` of them from the row `first` on."""

    first: int
    rows: int
    start: int  # in the sequence
    length: int  # of each
    prefix: int | None  # tokens of it, where every row has a prefix of its own

    @property
    def own(self) -> slice:
        """Its rows, of what there is for each row."""
        return slice(self.first, self.first + self.rows)

    def of(self, x: Tensor) -> Tensor:
        """A view `[rows, H, length, ...]` of `[1, H, n, ...]`."""
        own = x[0, :, self.start : self.start + self.rows * self.length]
        return own.unflatten(1, (self.rows, self.length)).transpose(0, 1)

    @staticmethod
    def back(x: Tensor) -> Tensor:
        """`[1, H, rows * length, ...]` of `[rows, H, length, ...]`."""
        return x.transpose(0, 1).flatten(1, 2)[None]


@dataclass(frozen=True)
class Packing:
    """Rows that lie one behind another in a sequence of `sum(lengths)` tokens.

    prefixes: how many prefix tokens each row reads, where every row has a prefix of its own.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] | None = None

    @cached_property
    def runs(self) -> list[Run]:
        """Rows that can be computed together; every row once, in order."""
        found, first, start = [], 0, 0
        prefixes = self.prefixes or (None,) * len(self.lengths)
        for (length, prefix), rows in groupby(zip(self.lengths, prefixes, strict=True)):
            count = len(list(rows))
            found.append(Run(first, count, start, length, prefix))
            first, start = first + count, start + count * length
        return found

    def spans(self) -> list[tuple[int, int]]:
        """First and last (exclusive) token of each row."""
        spans, start = [], 0
        for length in self.lengths:
            spans.append((start, start + length))
            start += length
        return spans
