"""What a prefix's tokens and layers are worth: how much the loss rises when one is cut. Plain leave-one-out.

Knows keys and values and a loss of them; nothing of tasks or data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .forms import Finished
from .kv import KVPrefix
from .model import PrefixModel
from .reading import positions_of, text_of

Loss = Callable[[KVPrefix], float]
Progress = Callable[[int, int], None]


def nothing_said(done: int, total: int) -> None:
    """A progress that nobody sees."""


def without_tokens(kv: KVPrefix, tokens: Sequence[int]) -> KVPrefix:
    """`kv` without these of its tokens; the others keep the order and the rotation that they were trained in.

    Raises ValueError where tokens are not in the prefix, or none would be left.
    """
    gone = set(tokens)
    if not gone <= set(range(kv.length)) or len(gone) == kv.length or kv.lengths is not None:
        raise ValueError(f"cannot cut tokens {sorted(gone)} of a prefix of {kv.length}")
    return kv.take([p for p in range(kv.length) if p not in gone])


def without_site(kv: KVPrefix, name: str) -> KVPrefix:
    """`kv` without the site `name`, which then reads the text alone; positions stay as they are."""
    return KVPrefix({n: site for n, site in kv.sites.items() if n != name}, kv.lengths)


def token_worth(kv: KVPrefix, loss: Loss, progress: Progress = nothing_said) -> list[float]:
    """How much `loss` rises, in its own unit, when each token is cut; below 0 where cutting helps. P + 1 losses.

    A prefix of one token has nothing to compare with: [].
    """
    cuts = [without_tokens(kv, [p]) for p in range(kv.length)] if kv.length > 1 else []
    return rises(kv, cuts, loss, progress)


def site_worth(kv: KVPrefix, loss: Loss, progress: Progress = nothing_said) -> dict[str, float]:
    """How much `loss` rises when the prefix is taken from one site, by site; {} where there is but one."""
    names = list(kv.sites) if len(kv.sites) > 1 else []
    found = rises(kv, [without_site(kv, name) for name in names], loss, progress)
    return dict(zip(names, found, strict=True))


def rises(kv: KVPrefix, cuts: Sequence[KVPrefix], loss: Loss, progress: Progress = nothing_said) -> list[float]:
    """How much `loss` of each cut is above that of the whole."""
    if not cuts:
        return []
    whole, found = loss(kv), []
    for done, cut in enumerate(cuts, 1):
        found.append(loss(cut) - whole)
        progress(done, len(cuts))
    return found


@contextmanager
def reading_instead(model: PrefixModel, name: str, kv: KVPrefix) -> Iterator[None]:
    """While open, the prefix `name` of `model` is `kv`, and text stays at the positions that it had, so that tokens
    which `kv` lacks leave a gap and nothing else changes."""
    own = model.form(name)
    gap = own.length - kv.length if model.configs[name].positions == "after" else 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": positions_of(text_of(args, kwargs), kwargs) + gap}

    handle = model.base.register_forward_pre_hook(before, with_kwargs=True)  # runs before the one that reads
    model.forms[name] = Finished(kv)
    try:
        with model.padded():  # packed rows get their positions anew
            yield
    finally:
        model.forms[name] = own
        handle.remove()
