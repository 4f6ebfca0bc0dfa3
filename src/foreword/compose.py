"""Composition: prefixes put one behind the other, between one another, or cut to the tokens that do most.

Keys are stored rotated for positions 0..P-1. A token that moves to another position is turned by as much, and how is
probed: single tokens run through the base at two positions show their keys before and after, in float32 on any base. In
a rotary embedding (Su et al. 2021, arXiv:2104.09864, section 3.2) every channel turns with one partner, found by least
squares, so that no arrangement of channels is assumed. Where text does not come after a prefix (positions `kept`)
nothing is turned.

Everything here takes and gives finished `KVPrefix`es; `PrefixModel.put` gives one a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import InputError
from .forms import Finished
from .kv import KVPrefix, SiteKV, joined
from .model import PrefixModel
from .sites import Site, keys_at, vocabulary_size
from .unrounded import Unrounded
from .worth import rises

PROBES = 192  # tokens that are run to see how keys turn


def concatenate(model: PrefixModel, names: Sequence[str]) -> KVPrefix:
    """The prefixes one behind the other, keys turned to their new positions.

    None has seen those before it: of instructions it is the text in which each part reads itself alone.
    Raises InputError when they enter different layers, differ in positions, or their keys cannot be turned.
    """
    kvs = _together(model, names)
    if not _same(model, names):
        raise InputError("prefixes that differ in `positions` or `window` cannot be concatenated.")
    starts = [sum(kv.length for kv in kvs[:i]) for i in range(len(kvs))]
    moved = [moved_by(model, names[0], kv, torch.full((kv.length,), at)) for kv, at in zip(kvs, starts, strict=True)]
    return joined(moved)


def interpolate(model: PrefixModel, a: str, b: str, weight: float) -> KVPrefix:
    """(1 - weight) a + weight b, token by token. Raises InputError when their lengths, layers or positions differ."""
    first, second = _together(model, (a, b))
    if first.length != second.length or not _same(model, (a, b)):
        raise InputError(
            f"{a!r} and {b!r} differ in length, `positions` or `window` ({first.length} and {second.length} tokens), "
            "so nothing lies between them."
        )
    sites = {
        name: SiteKV(*(torch.lerp(x.float(), y.float(), weight) for x, y in zip(kv, second.sites[name], strict=True)))
        for name, kv in first.sites.items()
    }
    return KVPrefix(sites)


def cut(model: PrefixModel, name: str, keep: int | Sequence[int], worths: Sequence[float] | None = None) -> KVPrefix:
    """The prefix with some of its tokens alone, in their order and turned to the positions 0.. .

    keep: which tokens, or how many: those whose `worths` are furthest from 0, either way. On few rows a worth below 0
    is noise about a token that does something (docs/composition.md has the measurement).
    Raises InputError for tokens that are not there, or a number without one worth per token.
    """
    kv = model.kv(name).detach()
    if isinstance(keep, int):
        if worths is None or len(worths) != kv.length:
            raise InputError(f"to keep {keep} of {kv.length} tokens, give the worth of each (see `worth`).")
        keep = furthest(worths, keep)
    index = list(keep)
    if not index or index != sorted(set(index)) or index[0] < 0 or index[-1] >= kv.length:
        raise InputError(f"keep must name some of the tokens 0 to {kv.length - 1} in rising order, not {index}.")
    return moved_by(model, name, kv.take(index), torch.arange(len(index)) - torch.tensor(index))


def furthest(worths: Sequence[float], count: int) -> list[int]:
    """The `count` tokens whose worths are furthest from 0, in rising order."""
    return sorted(sorted(range(len(worths)), key=lambda i: -abs(worths[i]))[:count])


def worth(model: PrefixModel, name: str, loss: Callable[[], float]) -> list[float]:
    """What each token is worth: how much `loss()`, measured while the prefix is short of it, is higher than whole.

    The others close up as in `cut`. `loss` is called P + 1 times; any measure serves where lower is better.
    """
    own, whole = model.form(name), model.kv(name).detach()
    tokens = range(whole.length)
    if len(tokens) == 1:
        raise InputError(f"{name!r} has one token, so there is nothing to compare it with.")
    shorter = [cut(model, name, [i for i in tokens if i != gone]) for gone in tokens]

    def measured(kv: KVPrefix) -> float:
        model.forms[name] = own if kv is whole else Finished(kv)
        return loss()

    try:
        return rises(whole, shorter, measured)
    finally:
        model.forms[name] = own


def moved_by(model: PrefixModel, name: str, kv: KVPrefix, shifts: Tensor) -> KVPrefix:
    """`kv` with token i's keys turned by `shifts[i]` positions, where text comes after the prefix `name`."""
    if model.configs[name].positions == "kept" or not bool(shifts.any()):
        return kv
    sites = dict(kv.sites)
    for shift in sorted(set(shifts.tolist()) - {0}):
        at = (shifts == shift).to(next(iter(sites.values())).keys.device)
        for site, turn in turns(model, shift).items():
            if site in sites:
                keys = sites[site].keys
                turned = (keys.double() @ turn).to(keys.dtype)
                sites[site] = SiteKV(torch.where(at[:, None], turned, keys), sites[site].values)
    return KVPrefix(sites)


def turns(model: PrefixModel, shift: int) -> dict[str, Tensor]:
    """The matrix `[d_k, d_k]` per site that takes a key (a row) `shift` positions on, in float64.

    Raises InputError naming why keys cannot be turned.
    """
    family = type(model.base).__name__
    if not model.can_move_positions:
        raise InputError(f"{family} cannot move its positions, so keys cannot be turned to new ones.")
    if model.is_sharded and model.dtype != torch.float32:
        raise InputError("keys of a sharded base are turned in float32 alone; load it in float32, or whole.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5000, vocabulary_size(model.base)), (PROBES, 1), generator=generator).to(model.device)
    first, second = (0, shift) if shift > 0 else (-shift, 0)
    with model.reading(None), Unrounded():  # keys of bfloat16 do not show which channels are partners
        before, after = (keys_at(model.base, model.sites, ids, position) for position in (first, second))
    return {site.name: _turn(family, site, before[site.name], after[site.name]) for site in model.sites}


def _turn(family: str, site: Site, before: SiteKV, after: SiteKV) -> Tensor:
    """Channel j of a turned key is c x_j + s x_i for one partner i; of all i the one that fits best."""
    x, y = (kv.keys.transpose(1, 2).flatten(0, 2).double() for kv in (before, after))  # [n, d_k]
    still = torch.allclose(before.values, after.values, rtol=1e-3, atol=1e-3 * float(before.values.abs().max()))
    size = x.shape[1]
    xx, xy, yy = x.T @ x, x.T @ y, (y * y).sum(0)
    own = xx.diagonal()
    # For every pair (i, j) the 2 x 2 normal equations of y_j = c x_j + s x_i.
    determinant = own[:, None] * own - xx**2 + torch.eye(size, dtype=x.dtype, device=x.device)
    same = xy.diagonal()
    c = (own[:, None] * same - xx * xy) / determinant
    s = (own * xy - xx * same) / determinant
    error = yy - c * same - s * xy  # [i, j]
    error.fill_diagonal_(torch.inf)
    partner, channel = error.argmin(0), torch.arange(size, device=x.device)
    turn = torch.zeros(size, size, dtype=x.dtype, device=x.device)
    turn[channel, channel] = c[partner, channel]
    turn[partner, channel] += s[partner, channel]
    if not still or float((x @ turn - y).abs().max()) > 1e-3 * float(y.abs().max()):
        raise InputError(
            f"the keys of {family} cannot be turned to new positions: at {site.name} positions do more than turn them "
            "(learned positions are part of what a token is), so train the prefix at the place where it is to stand."
        )
    return turn


def _together(model: PrefixModel, names: Sequence[str]) -> list[KVPrefix]:
    if len(names) < 2:
        raise InputError("composition takes two prefixes or more.")
    kvs = [model.kv(name).detach() for name in names]
    if any(kv.sites.keys() != kvs[0].sites.keys() for kv in kvs):
        raise InputError("prefixes that enter different layers cannot be composed.")
    return kvs


def _same(model: PrefixModel, names: Sequence[str]) -> bool:
    return len({(model.configs[name].positions, model.configs[name].window) for name in names}) == 1
