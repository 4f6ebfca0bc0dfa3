"""Texts continued with a prefix in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import set_seed

from .errors import InputError
from .model import ACTIVE, PrefixModel


def complete(
    model: PrefixModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    beams: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, str]]:
    """`{"prompt", "completion"}` per prompt, in order; greedy or beam search, or sampled above temperature 0.

    Raises InputError for an empty prompt, one too long for the base, or a base that does not generate.
    """
    check_generates(model)
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {i + 1} is empty; write at least one word.")
    # A prefix opens the sequence, so a decoder's text needs no token that does.
    ids = model.tokenizer(list(prompts), add_special_tokens=model.kind != "decoder")["input_ids"]
    texts = continued(
        model, ids, max_new_tokens=max_new_tokens, beams=beams, temperature=temperature, seed=seed, batch_size=len(ids)
    )
    return [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]


def check_generates(model: PrefixModel) -> None:
    """Raise InputError for an encoder."""
    if model.kind == "encoder":
        raise InputError(f"{model.base_id} is an encoder and generates no text; use predict.")


def continued(
    model: PrefixModel,
    ids: Sequence[list[int]],
    *,
    max_new_tokens: int,
    beams: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    prefix: Any = ACTIVE,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes after each of these token ids (an encoder-decoder: for them), in order.

    Raises InputError where the base has no room for ids and answer.
    """
    limit = model.text_limit()
    longest = max(map(len, ids), default=0) + (max_new_tokens if model.kind == "decoder" else 0)
    if limit is not None and longest > limit:
        raise InputError(f"prompt and answer take {longest} tokens and the base has room for {limit}; shorten them.")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        set_seed(seed)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    texts = [""] * len(ids)
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        made = _generated(model, [ids[i] for i in chosen], prefix, settings)
        for i, text in zip(chosen, made, strict=True):
            texts[i] = text
        if progress:
            progress(at + len(chosen), len(order))
    return texts


def _generated(model: PrefixModel, ids: list[list[int]], prefix: Any, settings: dict[str, Any]) -> list[str]:
    """One batch, padded on the left."""
    longest = max(map(len, ids))
    pad = model.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)
    lengths = torch.tensor([len(row) for row in ids], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    made = model.generate(input_ids=padded, attention_mask=mask, prefix=prefix, **{"pad_token_id": pad, **settings})
    if model.kind == "decoder":
        made = made[:, longest:]
    return model.tokenizer.batch_decode(made, skip_special_tokens=True)
