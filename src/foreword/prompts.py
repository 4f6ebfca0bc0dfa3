"""Prompts: what a call of the base is asked, found in its arguments and kept while the answer is decoded.

A dynamic prefix is made from the prompt alone. A call that brings tokens and an empty cache brings the prompt; later
steps bring a cache, or an encoder's outputs, and read what was made from it. Knows nothing of forms or names.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .kv import KVPrefix
from .reading import positions_of, text_of

IGNORED = -100  # transformers' label of a token that is no part of the answer


@dataclass
class Prompt:
    """One batch of prompts: the arguments that run the base over them, and `mask` `[B, n]`, True on their tokens.

    `pooled` keeps what was computed from them, by layer.
    """

    inputs: dict[str, Any]
    mask: Tensor
    pooled: dict[int, Tensor] = field(default_factory=dict)


class Prompted:
    """The prefix of a batch, made by `make` from the prompt when a call brings one, and kept for the calls after it.

    kept: where the prompt of a returned cache is remembered, so that a call that goes on from the cache finds it.
    once: every call belongs to the first prompt (`generate`, which without a cache brings all tokens every time).
    """

    def __init__(
        self,
        make: Callable[[Prompt], KVPrefix],
        find: Callable[[tuple[Any, ...], dict[str, Any]], Prompt | None],
        kept: MutableMapping[Any, Prompt],
        once: bool = False,
    ) -> None:
        self._make, self._find, self._kept, self._once = make, find, kept, once
        self._made: tuple[Prompt, KVPrefix] | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KVPrefix:
        """What the call with these arguments reads. Raises InputError where its prompt is not known."""
        made = self._made
        if made is not None and self._once:
            return made[1]
        prompt = self._find(args, kwargs)
        if prompt is None:
            cache = kwargs.get("past_key_values")
            prompt = self._kept.get(cache) if cache is not None else None
            prompt = prompt or (made[0] if made is not None else None)
        if prompt is None:
            raise InputError(
                "a dynamic prefix is made from the prompt, and this call goes on from a cache or encoder outputs that "
                "were made without it; call the model on the prompt first."
            )
        if made is None or made[0] is not prompt:
            self._made = made = (prompt, self._make(prompt))
        return made[1]

    def remember(self, output: Any) -> None:
        """After a call of the base: its cache belongs to the prompt."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._made is not None:
            self._kept[cache] = self._made[0]


def find_prompt(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    prompt_mask: Tensor | None = None,
    decoder: bool,
    positions: bool,
) -> Prompt | None:
    """The prompt that a call brings, None where it goes on from an earlier one.

    prompt_mask: `[B, n]`, 1 on the prompt's tokens. Without it a decoder's prompt ends where `labels` begin, and is
        everything where there are none; an encoder's is everything.
    positions: the base takes `position_ids`, so rows padded on the left are counted from their first token.
    """
    cache = kwargs.get("past_key_values")
    if kwargs.get("encoder_outputs") is not None or (cache is not None and int(cache.get_seq_length()) > 0):
        return None
    text = text_of(args, kwargs)
    real = _real(kwargs.get("attention_mask"), text)
    _check_unpacked(kwargs.get("position_ids"), real)
    labels = kwargs.get("labels")
    if prompt_mask is None and decoder and labels is not None and labels.shape == text.shape[:2]:
        prompt_mask = (labels != IGNORED).cumsum(1) == 0
    if prompt_mask is not None and prompt_mask.shape != real.shape:
        raise InputError(f"prompt_mask has shape {list(prompt_mask.shape)}, the batch {list(real.shape)}.")
    inputs = {"inputs_embeds" if text.dim() == 3 else "input_ids": text, "attention_mask": real.long()}
    if kwargs.get("token_type_ids") is not None:
        inputs["token_type_ids"] = kwargs["token_type_ids"]
    if positions:
        inputs["position_ids"] = positions_of(text, kwargs)
    return Prompt(inputs, real if prompt_mask is None else real & prompt_mask.bool())


def _real(mask: Any, text: Tensor) -> Tensor:
    """`[B, n]`, True on tokens that are no padding: in a mask of four dimensions, those that some query sees."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if mask.dim() == 4:
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = mask[:, 0].any(1).expand(len(text), -1)
    return mask[:, : text.shape[1]].bool()


def _check_unpacked(positions: Tensor | None, real: Tensor) -> None:
    """Several texts packed into one row would each need a prefix of their own."""
    if positions is None or positions.dim() != 2 or positions.shape[1] != real.shape[1]:
        return
    falls = (positions[:, 1:] < positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    if bool(falls.any()):
        raise InputError("a dynamic prefix is one per row, so rows cannot be packed with several texts; unpack them.")
