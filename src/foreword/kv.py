"""KVPrefix: the finished keys and values that every form makes and every site reads. Plain data, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SiteKV(NamedTuple):
    """One site's share: keys `[R, H_kv, P, d_k]` as attention sees them (rotated), values `[R, H_kv, P, d_v]`."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class KVPrefix:
    """Keys and values per site.

    R is 1 when the whole batch shares the prefix, else the number of rows. `lengths` `[R]` holds each row's own
    length where they differ; the tokens beyond it are padding that nothing attends to.
    """

    sites: dict[str, SiteKV]
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("a prefix needs at least one site")
        shapes = {(kv.keys.shape[0], kv.keys.shape[2]) for kv in self.sites.values()}
        shapes |= {(kv.values.shape[0], kv.values.shape[2]) for kv in self.sites.values()}
        if len(shapes) != 1:
            raise ValueError(f"the sites of a prefix differ in rows or length: {sorted(shapes)}")

    @property
    def rows(self) -> int:
        return next(iter(self.sites.values())).keys.shape[0]

    @property
    def length(self) -> int:
        """P, the number of virtual tokens (of the longest row)."""
        return next(iter(self.sites.values())).keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.sites.values())).keys.dtype

    @property
    def visible(self) -> Tensor | None:
        """`[R, P]`, False on padding; None when every row has the full length."""
        if self.lengths is None:
            return None
        return torch.arange(self.length, device=self.lengths.device) < self.lengths[:, None]

    def numel(self) -> int:
        """Numbers held, padding included."""
        return sum(kv.keys.numel() + kv.values.numel() for kv in self.sites.values())

    def take(self, tokens: Sequence[int]) -> KVPrefix:
        """These of its tokens alone, as they are; for prefixes whose rows are of one length."""
        index = list(tokens)
        sites = {name: SiteKV(kv.keys[:, :, index], kv.values[:, :, index]) for name, kv in self.sites.items()}
        return KVPrefix(sites)

    def to(self, *args: object, **kwargs: object) -> KVPrefix:
        """Moved or converted as `Tensor.to` does; `lengths` follows the device and stays integer."""
        sites = {
            name: SiteKV(kv.keys.to(*args, **kwargs), kv.values.to(*args, **kwargs))  # type: ignore[call-overload]
            for name, kv in self.sites.items()
        }
        device = next(iter(sites.values())).keys.device
        return KVPrefix(sites, None if self.lengths is None else self.lengths.to(device))

    def detach(self) -> KVPrefix:
        """Cut from the graph."""
        sites = {name: SiteKV(kv.keys.detach(), kv.values.detach()) for name, kv in self.sites.items()}
        return KVPrefix(sites, self.lengths)


def joined(prefixes: Sequence[KVPrefix]) -> KVPrefix:
    """The prefixes one behind the other, as they are; for prefixes of the same sites, whose rows are of one length."""
    sites = {
        name: SiteKV(*(torch.cat(parts, 2) for parts in zip(*(p.sites[name] for p in prefixes), strict=True)))
        for name in prefixes[0].sites
    }
    return KVPrefix(sites)


def mix_rows(prefixes: Sequence[KVPrefix], rows: Sequence[int]) -> KVPrefix:
    """One prefix whose row r is `prefixes[rows[r]]`; shorter ones are padded at the end and `lengths` says where.

    A prefix that differs by row gives its rows in their order to the rows that name it.
    Raises ValueError when the prefixes enter different sites or one has not as many rows as name it.
    """
    if any(p.rows not in (1, rows.count(i)) or p.lengths is not None for i, p in enumerate(prefixes)):
        raise ValueError("only prefixes that a whole batch can share, or one per row, can be mixed by row")
    if any(p.sites.keys() != prefixes[0].sites.keys() for p in prefixes):
        raise ValueError("prefixes that enter different sites cannot be mixed in one batch")
    longest = max(p.length for p in prefixes)
    device = next(iter(prefixes[0].sites.values())).keys.device
    first = [sum(p.rows for p in prefixes[:i]) for i in range(len(prefixes))]
    place = [first[i] + (rows[:r].count(i) if prefixes[i].rows > 1 else 0) for r, i in enumerate(rows)]
    index = torch.tensor(place, device=device)

    def gather(tensors: list[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors]
        return torch.cat(padded)[index]

    sites = {
        name: SiteKV(gather([p.sites[name].keys for p in prefixes]), gather([p.sites[name].values for p in prefixes]))
        for name in prefixes[0].sites
    }
    lengths = torch.tensor([prefixes[i].length for i in rows], device=device)
    return KVPrefix(sites, None if bool((lengths == longest).all()) else lengths)
