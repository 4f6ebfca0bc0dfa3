"""Prompt tuning: trainable input embeddings E `[P, d]` in front of the text (Lester et al. 2021, arXiv:2104.08691).

A causal base reads E before and apart from the text, so what each layer makes of E is keys and values like any other
prefix's: a form. Behind a prefix the embeddings read it, and the text reads both. Saved finished, as every form is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import listening
from .dynamic import Dynamic
from .errors import InputError
from .forms import Form, PrefixConfig, start_ids
from .kv import KVPrefix, SiteKV
from .model import PrefixModel
from .tasks.output import nothing_read, output_layer


class Embeddings(Form):
    """The keys and values of trainable input embeddings, behind those of another form where there is one."""

    def __init__(self, model: PrefixModel, inner: Form | None, config: PrefixConfig, start: Tensor) -> None:
        super().__init__()
        self._model, self._config = [model], config  # in a list, so that it does not become a submodule
        self.inner = inner
        self.length = len(start) + (inner.length if inner is not None else 0)
        self.register_buffer("start", start.detach().float())  # [P, d]
        self.register_buffer("deviation", start.detach().float().std(correction=0).clamp(min=1e-6))
        self.change = nn.Parameter(torch.zeros(start.shape))

    def embeddings(self) -> Tensor:
        """`[1, P, d]`, as the base takes them."""
        start, deviation = self.get_buffer("start"), self.get_buffer("deviation")
        return (start + deviation * self.change)[None].to(self._model[0].dtype)

    def forward(self) -> KVPrefix:
        model, before = self._model[0], self.inner() if self.inner is not None else None
        names = {id(site.module): site.name for site in model.sites}
        found: dict[str, SiteKV] = {}

        def listener(module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
            found[names[id(module)]] = SiteKV(key, value)

        has_output = model.base.get_output_embeddings() is not None
        unread = output_layer(model.base, nothing_read) if has_output else nullcontext()
        with model.routed(before, self._config), listening(listener), unread:
            model.base(inputs_embeds=self.embeddings(), use_cache=False)
        if before is None:
            return KVPrefix(found)
        if found.keys() != before.sites.keys():
            raise InputError("embeddings cannot stand behind a prefix that enters some of the layers alone.")
        sites = {
            name: SiteKV(*(torch.cat([a.to(b.dtype), b], 2) for a, b in zip(kv, found[name], strict=True)))
            for name, kv in before.sites.items()
        }
        return KVPrefix(sites)


def add_prompt(model: PrefixModel, name: str, length: int) -> Embeddings:
    """Put `length` trainable input embeddings, at first those of common tokens, behind the prefix `name`, or alone
    under a new name; and activate it.

    Raises InputError for a base that is no decoder or cannot move positions, and behind a dynamic prefix.
    """
    if model.kind != "decoder" or not model.can_move_positions:
        raise InputError(f"prompt tuning needs a decoder whose positions can move; {model.base_id} is another kind.")
    inner = model.form(name) if name in model.forms else None
    if isinstance(inner, Dynamic):
        raise InputError(f"{name!r} is dynamic, and embeddings read one prefix for all rows; use a static one.")
    config = model.configs[name] if inner is not None else PrefixConfig(positions="after")
    if config.positions != "after" or config.layers is not None:
        raise InputError(f"{name!r} must enter every layer and stand before the text for embeddings to follow it.")
    drawn = replace(config, length=length, start="vocabulary", instruction=None)
    ids = start_ids(drawn, model.base, model.tokenizer, torch.Generator().manual_seed(config.seed))[0]
    embed: Any = model.base.get_input_embeddings()
    with torch.no_grad():
        form = Embeddings(model, inner, config, embed(ids.to(model.device))).to(model.device)
    if inner is not None:
        model.remove(name)
    return model.hold(name, form, config)
