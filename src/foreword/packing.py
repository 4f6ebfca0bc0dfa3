"""Rows that lie one behind another in one sequence, so that nothing is padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Rows that lie one behind another in a sequence of `sum(lengths)` tokens.

    prefixes: how many prefix tokens each row reads, where every row has a prefix of its own.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] | None = None

    def spans(self) -> list[tuple[int, int]]:
        """First and last (exclusive) token of each row."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))
