"""What a prefix's tokens and layers are worth: how much the loss rises when one is cut. Plain leave-one-out.

Knows keys and values and a loss of them; nothing of tasks or data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .forms import Finished
from .kv import KVPrefix, SiteKV
from .model import PrefixModel
from .reading import text_positions

Loss = Callable[[KVPrefix], float]
Progress = Callable[[int, int], None]


def without_tokens(kv: KVPrefix, tokens: Sequence[int]) -> KVPrefix:
    """`kv` without these of its tokens; the others keep the order and the rotation that they were trained in.

    Raises ValueError where tokens are not in the prefix, or none would be left.
    """
    gone = set(tokens)
    if not gone <= set(range(kv.length)) or len(gone) == kv.length or kv.lengths is not None:
        raise ValueError(f"cannot cut tokens {sorted(gone)} of a prefix of {kv.length}")
    kept = [p for p in range(kv.length) if p not in gone]
    return KVPrefix({name: SiteKV(site.keys[:, :, kept], site.values[:, :, kept]) for name, site in kv.sites.items()})


def without_site(kv: KVPrefix, name: str) -> KVPrefix:
    """`kv` without the site `name`, which then reads the text alone; positions stay as they are."""
    return KVPrefix({n: site for n, site in kv.sites.items() if n != name}, kv.lengths)


def token_worth(kv: KVPrefix, loss: Loss, progress: Progress = lambda done, total: None) -> list[float]:
    """How much `loss` rises, in its own unit, when each token is cut; below 0 where cutting helps. P + 1 losses.

    A prefix of one token has nothing to compare with: [].
    """
    cuts = [without_tokens(kv, [p]) for p in range(kv.length)] if kv.length > 1 else []
    return _rises(kv, cuts, loss, progress)


def site_worth(kv: KVPrefix, loss: Loss, progress: Progress = lambda done, total: None) -> dict[str, float]:
    """How much `loss` rises when the prefix is taken from one site, by site; {} where there is but one."""
    names = list(kv.sites) if len(kv.sites) > 1 else []
    rises = _rises(kv, [without_site(kv, name) for name in names], loss, progress)
    return dict(zip(names, rises, strict=True))


def _rises(kv: KVPrefix, cuts: Sequence[KVPrefix], loss: Loss, progress: Progress) -> list[float]:
    if not cuts:
        return []
    whole, rises = loss(kv), []
    for done, cut in enumerate(cuts, 1):
        rises.append(loss(cut) - whole)
        progress(done, len(cuts))
    return rises


@contextmanager
def reading_instead(model: PrefixModel, name: str, kv: KVPrefix) -> Iterator[None]:
    """While open, the prefix `name` of `model` is `kv`, and text stays at the positions that it had, so that tokens
    which `kv` lacks leave a gap and nothing else changes."""
    own = model.form(name)
    gap = own.length - kv.length if model.configs[name].positions == "after" else 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": text_positions(args, kwargs) + gap}

    handle = model.base.register_forward_pre_hook(before, with_kwargs=True)  # runs before the one that reads
    model.forms[name] = Finished(kv)
    try:
        with model.padded():  # packed rows get their positions anew
            yield
    finally:
        model.forms[name] = own
        handle.remove()
