"""Texts continued with a prefix in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import set_seed

from .errors import InputError
from .model import PrefixModel


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
    if model.kind == "encoder":
        raise InputError(f"{model.base_id} is an encoder and generates no text; use predict.")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {i + 1} is empty; write at least one word.")
    tokenizer = model.tokenizer
    # A prefix opens the sequence, so a decoder's text needs no token that does.
    inputs = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=model.kind != "decoder",
    ).to(model.device)
    limit = model.text_limit()
    longest = inputs["input_ids"].shape[1] + (max_new_tokens if model.kind == "decoder" else 0)
    if limit is not None and longest > limit:
        raise InputError(f"prompt and answer take {longest} tokens and the base has room for {limit}; shorten them.")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
        set_seed(seed)
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=beams, **sampling)
    if model.kind == "decoder":
        ids = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
