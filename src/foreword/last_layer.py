"""The last layer's feed-forward, run for those tokens alone whose hidden states are read afterwards.

Above the last attention every token goes on by itself, so what is not read need not be computed: a classifier reads one
token of a row. The result for the tokens that are read is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .recompute import ACTIVATIONS
from .sites import Site, layer_of

PLAIN = (nn.Linear, Conv1D, nn.Identity, *ACTIVATIONS)


def last_feed_forward(base: nn.Module, sites: list[Site]) -> nn.Module | None:
    """The part of a decoder's last layer that takes token by token, or None where it is not one plain module: experts,
    dropout, or what LoRA and adapters have put there."""
    if any(site.kind != "decoder" for site in sites):
        return None
    attention, at, found = base.get_submodule(sites[-1].name), layer_of(base, sites[-1].name), []
    if at is None or at[1] < len(at[0]) - 1:
        return None  # something may come behind it
    for child in at[0][-1].children():
        leaves = [module for module in child.modules() if next(module.children(), None) is None]
        if attention in child.modules() or not any(isinstance(leaf, nn.Linear | Conv1D) for leaf in leaves):
            continue
        if len(leaves) < 2 or not all(map(_is_plain, leaves)):
            return None
        found.append(child)
    return found[0] if len(found) == 1 else None


def _is_plain(leaf: nn.Module) -> bool:
    return isinstance(leaf, PLAIN) or (isinstance(leaf, nn.Dropout) and leaf.p == 0)


@contextmanager
def run_at(module: nn.Module, places: Tensor) -> Iterator[None]:
    """While open, `module` computes the tokens `places` `[N]`, counted through all rows, and gives zeros for others."""
    own, before = module.forward, vars(module).get("forward")

    def forward(hidden: Tensor) -> Tensor:  # [..., d]
        made = own(hidden.flatten(0, -2)[places].reshape(*[1] * (hidden.dim() - 2), len(places), -1))
        everywhere = made.new_zeros(hidden.shape[:-1].numel(), made.shape[-1])
        return everywhere.index_copy(0, places, made.flatten(0, -2)).reshape(*hidden.shape[:-1], -1)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
