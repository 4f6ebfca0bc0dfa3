"""Where few tokens are read, the last layer's feed-forward runs for them alone, and what is read stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foreword.last_layer import last_feed_forward
from foreword.model import PrefixModel

from .families import DECODERS, LENGTH, Family, add, base, flat_gradient, fresh, inputs, off_by, wrapped

WHOLE = {  # families whose last layer is run for every token, and why
    "gpt2": "dropout",
    "opt": "two layers of its own, and a norm between",
    "mixtral": "experts",
    "qwen3-moe": "experts",
    "gpt-oss": "experts",
    "deepseek-v3": "experts",
    "gemma4-shared": "something comes behind the feed-forward",
}
LENGTHS = [7, 3, 5]


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_what_is_read_is_the_same(family: Family) -> None:
    """Logits at the rows' last tokens, and the prefix's gradients; rows with prefixes of their own among them."""
    model = wrapped(family.name, None)
    add(model, "a", "direct", length=LENGTH)
    add(model, "b", "mlp", length=2)
    batch = inputs(family, LENGTHS)
    place = torch.arange(3) * batch["input_ids"].shape[1] + torch.tensor(LENGTHS) - 1
    for prefix in ("a", ["a", None, "b"]):
        logits, gradients = [], []
        for read_at in (None, place):
            model.zero_grad()
            read = model(**batch, prefix=prefix, read_at=read_at).logits.flatten(0, 1)[place]
            read.pow(2).mean().backward()
            logits.append(read.detach())
            gradients.append(torch.cat([flat_gradient(model, name) for name in model.forms if name in prefix]))
        assert off_by(*logits) < 1e-5
        assert off_by(*gradients) < family.tolerance


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_other_tokens_are_left_out(family: Family) -> None:
    model, sizes = PrefixModel(fresh(family.name)), []
    add(model, "p")
    last = last_feed_forward(model.base, model.sites)
    assert (last is None) == (family.name in WHOLE)
    if last is not None:
        inner = next(m for m in last.modules() if next(m.children(), None) is None and list(m.parameters()))
        inner.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[:-1].numel()))
        model(**inputs(family, LENGTHS), read_at=torch.tensor([6, 9]))
        assert sizes == [2] and "forward" not in vars(last)


def test_what_is_not_plain_runs_whole() -> None:
    """Dropout draws for every token, checkpointing runs the layer a second time, an encoder's tokens are all read."""
    model = PrefixModel(fresh("gpt2"))
    for dropout in (module for module in model.base.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    assert last_feed_forward(model.base, model.sites) is model.base.transformer.h[-1].mlp
    encoder = PrefixModel(base("bert"))
    assert last_feed_forward(encoder.base, encoder.sites) is None
    model, sizes = PrefixModel(fresh("llama")), []
    add(model, "p")
    model.base.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: sizes.append(len(args[0][0])))
    model.gradient_checkpointing_enable()
    model.train()
    model(torch.arange(5, 12)[None], read_at=torch.tensor([6])).logits.sum().backward()
    assert set(sizes) == {7}
