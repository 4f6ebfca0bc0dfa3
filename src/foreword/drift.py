"""Forgetting: how far a prefix moves the base on text outside its task, and training that keeps it near.

The text is the base's own, sampled from it without a prefix. Drift is the mean over its tokens of the divergence

    KL(base || prefix) = Σ_v p(v) (log p(v) - log q(v))

in nats, p the base's prediction of the next token and q that of the base behind the prefix, with its LoRA and adapters
where it has any: nought where nothing is forgotten. As a term of the loss it is learning without forgetting (Li & Hoiem
2017, arXiv:1606.09282, equation 2) on samples instead of the new task's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .combine import apart
from .errors import InputError
from .model import ACTIVE, PrefixModel

TEXTS, TOKENS = 64, 32  # of the base's own text, to train with or to measure on
AT_ONCE = 4  # of them in a training step
HELD_OUT = 1_000_003  # added to a run's seed: texts that the run was not kept near


def own_texts(model: PrefixModel, seed: int, rows: int = TEXTS, tokens: int = TOKENS) -> Tensor:
    """Token ids `[rows, tokens]` that the bare base writes, sampled at temperature 1 from where a document begins.

    Raises InputError for a base that does not write.
    """
    base: Any = model.base
    settings = getattr(base, "generation_config", None) if model.kind == "decoder" else None
    starts = (settings.bos_token_id, settings.eos_token_id) if settings is not None else ()
    start = next((i for i in starts if isinstance(i, int)), None)
    if start is None:
        raise InputError("drift is measured on text that the base writes; leave it out for one that is no decoder.")
    ids = torch.full((rows, 1), start, device=model.device)
    count = tokens - 1
    with torch.random.fork_rng(), apart(model):
        torch.manual_seed(seed)
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            prefix=None,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=base.config.get_text_config().pad_token_id or start,
        )


def drift(model: PrefixModel, texts: Tensor, prefix: Any = ACTIVE) -> Tensor:
    """The mean divergence over the texts' tokens, in nats; a gradient reaches what is trained alone."""
    with torch.no_grad(), apart(model):
        before = model(input_ids=texts, prefix=None).logits.float().log_softmax(-1)
    after = model(input_ids=texts, prefix=prefix).logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()


@torch.no_grad()
def measured_drift(model: PrefixModel, seed: int, batch_size: int = 16) -> float:
    """The active prefix's drift on texts that only the base and the seed decide."""
    texts = own_texts(model, seed + HELD_OUT)
    parts = [drift(model, part) * len(part) for part in texts.split(batch_size)]
    return float(torch.stack(parts).sum()) / len(texts)


def keeping(model: PrefixModel, texts: Tensor, weight: float) -> Callable[[int], Tensor]:
    """A term of the loss of a step: `weight` times the active prefix's drift on some of the texts, in turn."""

    def term(step: int) -> Tensor:
        rows = torch.arange(step * AT_ONCE, (step + 1) * AT_ONCE) % len(texts)
        return weight * drift(model, texts[rows])

    return term
