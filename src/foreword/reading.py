"""Reading: for the calls in between, a base's attention is routed and its sites hold what they are to read.

Knows keys and values, positions and windows; nothing of names, forms or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import ATTRIBUTE, Kernel, ReadPrefix
from .errors import InputError
from .kv import KVPrefix, SiteKV
from .packing import Packing
from .sites import Site, implementations, routed

TEXT_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
Installed = list[tuple[nn.Module, ReadPrefix | None]]


@dataclass(frozen=True)
class _Manner:
    """How a prefix is read; `Reader.open` says what each means."""

    after: bool
    slides: bool
    kernel: Kernel
    lengths: Sequence[int] | None


class Source(Protocol):
    """A prefix that depends on what the base is called with."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KVPrefix:
        """The prefix for a call with these arguments; the base reads nothing meanwhile."""

    def remember(self, output: Any) -> None:
        """Told of what each call of the base returned."""


class Reader:
    """What makes the calls of one base read a prefix."""

    def __init__(self, base: PreTrainedModel, sites: list[Site]) -> None:
        self._base, self._sites = base, sites
        self._innermost: object = None  # the innermost of the nested `open`
        self._outside = implementations(base)  # the base's own attention
        self._installed: Installed = []

    @contextmanager
    def open(
        self,
        kv: KVPrefix | Source | None,
        *,
        after: bool = False,
        slides: bool = False,
        kernel: Kernel = "auto",
        lengths: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """While open, every call of the base reads `kv`, or nothing where it is None, inside another `open` too.

        after: text comes at positions P.., so position ids are moved; slides: sliding windows pass over the prefix;
        lengths: of the rows, where they are packed one behind another into one.
        """
        outer, self._innermost = self._innermost, (this := object())
        try:
            with ExitStack() as stack:
                if outer is None:
                    self._outside = implementations(self._base)
                if kv is None:
                    off: Installed = [(site.module, None) for site in self._sites]
                    stack.enter_context(self._holding(off, self._outside))
                else:
                    self._hook(stack, this, kv, _Manner(after, slides, kernel, lengths))
                    stack.enter_context(self._holding([]))
                yield
        finally:
            self._innermost = outer
            self._installed = []

    def _hook(self, stack: ExitStack, this: object, kv: KVPrefix | Source, manner: _Manner) -> None:
        if isinstance(kv, KVPrefix) and not torch.is_grad_enabled():
            kv = kv.to(torch.promote_types(kv.dtype, torch.float32))  # once, and not in every layer of every step
        encoder = self._base.get_encoder() if self._base.config.is_encoder_decoder else None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._innermost is not this:
                return None
            if isinstance(kv, KVPrefix):
                return args, self._install(kv, manner, args, kwargs)
            if module is self._base and encoder is not None and kwargs.get("encoder_outputs") is None:
                return None  # the call of the encoder that follows brings the prompt
            with self.open(None):
                made = kv(args, kwargs)
            return args, self._install(made, manner, args, kwargs)

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            if self._innermost is this and not isinstance(kv, KVPrefix):
                kv.remember(output)

        if not isinstance(kv, KVPrefix):
            stack.callback(self._base.register_forward_hook(remember).remove)
        for module in (self._base, encoder):  # `generate` calls the encoder by itself
            if module is not None:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        head = self._base.get_output_embeddings()
        if head is not None:  # a frozen layer over sliced hidden states would expand its weight for every row
            stack.callback(head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:])).remove)

    def _install(self, kv: KVPrefix, manner: _Manner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before each forward of the base: put on every site what it is to read; returns the arguments to call with."""
        text = text_of(args, kwargs)
        if manner.lengths is not None:
            kwargs = self._install_packed(kv, manner, tuple(manner.lengths), text, kwargs)
        else:
            kwargs = self._install_padded(_for_rows(kv, text.shape[0]), manner, text, kwargs)
        for module, read in self._installed:
            setattr(module, ATTRIBUTE, read)
        return kwargs

    def _install_padded(self, kv: KVPrefix, manner: _Manner, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = self._without_dropped_queries(text, kwargs)
        if manner.after:
            offset = kv.length if kv.lengths is None else kv.lengths[:, None]
            kwargs = {**kwargs, "position_ids": positions_of(text, kwargs) + offset}
        self._installed = []
        for site in self._sites:
            if site.name in kv.sites:
                hidden = _hidden(kv, site.window if manner.slides else None, kwargs.get("position_ids"))
                self._installed.append((site.module, ReadPrefix(kv.sites[site.name], hidden, manner.kernel)))
        return kwargs

    def _install_packed(
        self, kv: KVPrefix, manner: _Manner, lengths: tuple[int, ...], text: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Every site is told where the rows lie, those without a prefix too; positions start anew with each row."""
        if text.shape[:2] != (1, sum(lengths)) or kv.rows not in (1, len(lengths)):
            raise InputError(
                f"packed rows of {sum(lengths)} tokens in all need one sequence of that length and one prefix or one "
                f"for each row; the sequence has the shape {list(text.shape[:2])}, and there are {kv.rows} prefixes."
            )
        prefixes = None if kv.lengths is None else tuple(kv.lengths.tolist())
        packing = Packing(lengths, prefixes)
        self._installed = []
        for site in self._sites:
            own = kv.sites.get(site.name) or site.nothing(self._base)
            self._installed.append((site.module, ReadPrefix(own, None, manner.kernel, packing, site.window)))
        offsets = (prefixes or (kv.length,) * len(lengths)) if manner.after else (0,) * len(lengths)
        positions = torch.cat([torch.arange(n) + offset for n, offset in zip(lengths, offsets, strict=True)])
        # A mask of four dimensions is taken as it is, so that none is made over all tokens; no site reads it.
        return {
            **kwargs,
            "position_ids": positions[None].to(text.device),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=self._base.dtype, device=text.device),
        }

    def _without_dropped_queries(self, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Given `logits_to_keep` as a number, models with shared keys and values (Gemma 3n, 4) drop queries between
        layers, which neither the causal flag nor `hidden` can follow; given as indices they do not."""
        keep = kwargs.get("logits_to_keep")
        if not (isinstance(keep, int) and keep) or not self._shares_kv:
            return kwargs
        length = text.shape[1]
        return {**kwargs, "logits_to_keep": torch.arange(max(0, length - keep), length, device=text.device)}

    @property
    def _shares_kv(self) -> bool:
        return bool(getattr(self._base.config.get_text_config(), "num_kv_shared_layers", 0))

    @contextmanager
    def _holding(self, installed: Installed, to: list[tuple[Any, str | None]] | None = None) -> Iterator[None]:
        """While open, attention is routed and the sites read `installed`; afterwards what they read before."""
        before = [(site.module, getattr(site.module, ATTRIBUTE, None)) for site in self._sites]
        for module, read in installed:
            setattr(module, ATTRIBUTE, read)
        try:
            with routed(self._base, to):
                yield
        finally:
            for module, read in before:
                setattr(module, ATTRIBUTE, read)

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """For torch's checkpoint: the second run of a layer, in the backward pass, reads what its first run read."""
        return nullcontext(), self._holding(list(self._installed)) if self._installed else nullcontext()


def text_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The ids or embeddings that a call of the base was given; the decoder's where its encoder has run already."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in TEXT_ARGUMENTS))
    return next(text for text in given if text is not None)


def _for_rows(kv: KVPrefix, rows: int) -> KVPrefix:
    """`kv` for a batch of `rows`: each row's own prefix repeated where beams multiplied the rows."""
    if kv.rows in (1, rows):
        return kv
    index = torch.tensor(rows_for(kv.rows, rows), device=next(iter(kv.sites.values())).keys.device)
    sites = {name: SiteKV(site.keys[index], site.values[index]) for name, site in kv.sites.items()}
    return KVPrefix(sites, None if kv.lengths is None else kv.lengths[index])


def rows_for(named: int, rows: int) -> list[int]:
    """Which of `named` prefixes each of `rows` reads: its own, also where beams multiplied the rows."""
    if rows % named:
        raise InputError(f"the batch has {rows} rows, but prefixes were named for {named}.")
    return [row * named // rows for row in range(rows)]


def positions_of(text: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Position ids `[B, n]` of the tokens at hand, counted from 0 at each row's first real token."""
    given = kwargs.get("position_ids")
    if given is not None:
        return given
    length, mask, cache = text.shape[1], kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None and mask.dim() == 2:
        first = mask.long().argmax(-1, keepdim=True)
        return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)[:, -length:]
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(length, device=text.device)[None] + past


def _hidden(kv: KVPrefix, window: int | None, positions: Tensor | None) -> Tensor | None:
    """The additive mask over the prefix, `[R, 1, n or 1, P]`: padding of shorter rows, and what slid out."""
    visible = kv.visible
    seen = None if visible is None else visible[:, None, None, :]
    if window is not None and positions is not None:
        near = positions[:, None, :, None] - torch.arange(kv.length, device=positions.device) < window
        seen = near if seen is None else seen & near
    if seen is None:
        return None
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
