"""Where attention goes: the mass that each head of each site puts on each prefix token.

λ(x) of He et al. 2022 (arXiv:2110.04366, section 3.2): attention over [prefix; text] is (1 - λ) attention over the text
plus λ attention over the prefix, λ = exp(lse_prefix) / (exp(lse_prefix) + exp(lse_text)). Two log-sum-exps give it
exactly; scores over the text exist only a slice of keys at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .attention import ATTRIBUTE, NAME, ReadPrefix, prefix_attention
from .model import PrefixModel

SLICE = 256  # keys at a time
Watcher = Callable[[nn.Module, Tensor], None]
Batch = dict[str, Tensor]


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """While open, every attention call that reads a prefix first reports (module, mass `[B, H, n, P]`).

    mass[b, h, i, p] is the attention weight of token i on prefix token p in head h; its sum over p is λ.
    """

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        read: ReadPrefix | None = getattr(module, ATTRIBUTE, None)
        if read is not None:
            assert read.packing is None, "shares are measured on padded rows"
            watcher(module, _prefix_mass(module, query, key, read, mask, **kwargs))
        return prefix_attention(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, prefix_attention)


@torch.no_grad()
def attention_shares(
    model: PrefixModel,
    call: Callable[[Batch], Any],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The mean over all real tokens of `batches` of the mass on the prefix, `[H, P]` float64 by site; λ is its sum
    over P.

    call: runs the model with its prefix on a batch. Padding is what the batch's `attention_mask` hides; a decoder
    behind an encoder has its own `decoder_attention_mask`, or no padding. `progress(done)` is called after each batch.
    """
    sites = {id(site.module): site for site in model.sites}
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}

    def watcher(module: nn.Module, mass: Tensor) -> None:
        site = sites[id(module)]
        behind = model.kind == "encoder-decoder" and site.kind != "encoder"
        real = batch.get("decoder_attention_mask" if behind else "attention_mask")
        weight = mass.new_ones(mass.shape[0], mass.shape[2]) if real is None else real[:, -mass.shape[2] :].to(mass)
        found = torch.einsum("bhnp,bn->hp", mass, weight).double()
        sums[site.name] = sums.get(site.name, 0) + found
        counts[site.name] = counts.get(site.name, 0.0) + float(weight.sum())

    with watching(watcher), model.padded():
        for done, batch in enumerate(batches, 1):
            call(batch)
            progress(done)
    return {site.name: sums[site.name] / counts[site.name] for site in model.sites if site.name in sums}


@torch.no_grad()
def token_shares(model: PrefixModel, call: Callable[[], Any]) -> Tensor | None:
    """λ at each token of a single row without padding, the mean over all heads of the sites in which the text attends
    to itself and that the prefix enters: `[n]` in float32. None where there is no such site.

    call: runs the model with its prefix on the row.
    """
    sites = {id(site.module): site for site in model.sites}
    found: list[Tensor] = []

    def watcher(module: nn.Module, mass: Tensor) -> None:
        site = sites[id(module)]
        if model.kind != "encoder-decoder" or site.kind == "encoder":
            found.append(mass[0].sum(-1).float())  # [H, n]

    with watching(watcher), model.padded():
        call()
    return torch.cat(found).mean(0).cpu() if found else None


@torch.no_grad()
def _prefix_mass(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    read: ReadPrefix,
    mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The weights on the prefix `[B, H, n, P]`, at least float32: exp(prefix scores - log-sum-exp over everything)."""
    length = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and mask is None and length > 1
    wide = torch.promote_types(query.dtype, torch.float32)
    query = query.to(wide) * (scaling if scaling is not None else query.shape[-1] ** -0.5)

    def scores(keys: Tensor) -> Tensor:  # [R, H_kv, m, d_k] -> [B, H, n, m]
        found = query @ keys.to(key.dtype).to(wide).repeat_interleave(query.shape[1] // keys.shape[1], 1).mT
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    on_prefix = scores(read.kv.keys)
    if read.hidden is not None:
        on_prefix = on_prefix + read.hidden
    everything = on_prefix.logsumexp(-1)  # [B, H, n]
    if s_aux is not None:  # sinks take mass too
        everything = torch.logaddexp(everything, s_aux.to(wide).reshape(1, -1, 1))
    for start in range(0, length if causal else key.shape[2], SLICE):
        keys = key[:, :, start : start + SLICE]
        part = slice(start, start + keys.shape[2])
        on_text = scores(keys)
        if position_bias is not None:
            on_text = on_text + position_bias[..., part]
        if mask is not None:
            shown = mask[..., part]
            on_text = on_text.masked_fill(~shown, -torch.inf) if mask.dtype == torch.bool else on_text + shown
        if causal:
            after = torch.arange(start, part.stop, device=key.device) > torch.arange(length, device=key.device)[:, None]
            on_text = on_text.masked_fill(after, -torch.inf)
        everything = torch.logaddexp(everything, on_text.logsumexp(-1))
    return (on_prefix - everything.unsqueeze(-1)).exp().nan_to_num(0.0)  # a query that sees nothing gives nothing
