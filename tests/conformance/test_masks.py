"""Padding sides, masks of four dimensions, kinds of sites, and the families that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from foreword.errors import InputError
from foreword.model import PrefixModel
from foreword.sites import find_sites

from .families import ALL, BY_NAME, DECODERS, IDS, SIZES, Family, base, inputs, off_by, real, text, wrapped

every_family = pytest.mark.parametrize("family", ALL, ids=str)
LENGTHS = [7, 4, 2]


@every_family
def test_the_padding_side_does_not_matter(family: Family) -> None:
    """Left padding (decoders), right padding and single rows give the same logits at real tokens, no position ids."""
    model = wrapped(family.name)
    sides = ["right", "left"] if family.kind == "decoder" else ["right"]
    with torch.no_grad():
        for side in sides:
            batch = inputs(family, LENGTHS, side)
            logits = model(**batch).logits
            for row in range(len(LENGTHS)):
                kept = batch["attention_mask"][row].bool()
                alone = {k: t[row : row + 1] for k, t in batch.items() if k != "decoder_input_ids"}
                alone = {key: tensor[:, kept] for key, tensor in alone.items()}
                if family.kind == "seq2seq":
                    alone["decoder_input_ids"] = batch["decoder_input_ids"][row : row + 1]
                found = logits[row] if family.kind == "seq2seq" else logits[row, kept]
                assert off_by(found, model(**alone).logits[0]) < 1e-5


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_no_mask_equals_a_mask_of_ones(family: Family) -> None:
    model, ids = wrapped(family.name), text()
    with torch.no_grad():
        assert off_by(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits) < 1e-5


def whole_mask(family: Family, mask: Tensor) -> Tensor:
    """The bool mask `[B, 1, n, n]` that a 2-D mask means."""
    seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return seen.tril() if family.kind == "decoder" else seen


@every_family
@pytest.mark.parametrize("dtype", ["bool", "float"])
def test_masks_of_four_dimensions_are_read(family: Family, dtype: str) -> None:
    """Rows of four tokens, within every window, since a mask of four dimensions stands for all layers."""
    if family.name == "t5" and dtype == "bool":
        pytest.skip("T5 itself adds its mask, so transformers takes no bool mask there")
    model = wrapped(family.name)
    batch = inputs(family, [4, 3, 2])
    mask = whole_mask(family, batch["attention_mask"])
    if family.kind == "seq2seq":  # the encoder's own; cross-attention reads a row of it
        mask = mask[:, :, :1]
    if dtype == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = real(family, batch, model(**batch).logits)
        found = real(family, batch, model(**{**batch, "attention_mask": mask}).logits)
    assert off_by(found, expected) < 1e-5


@every_family
def test_sites_are_recognised_by_running(family: Family) -> None:
    sites = wrapped(family.name, None).sites
    kinds = [site.kind for site in sites]
    if family.kind == "seq2seq":
        assert kinds == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]
    else:
        assert kinds == [family.kind] * base(family.name).config.num_hidden_layers
    names = dict(base(family.name).named_modules())
    assert all(names[site.name] is site.module for site in sites)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_all_three_kinds_of_sites_get_gradient(name: str) -> None:
    model = wrapped(name)
    model(**inputs(BY_NAME[name])).logits.pow(2).mean().backward()
    form = model.forms["p"]
    for site, keys, values in zip(model.sites, form.keys, form.values, strict=True):
        assert keys.grad.abs().max() > 0, site
        assert values.grad.abs().max() > 0, site


HEADS = {"vocab_size": 99, "n_layer": 2, "n_head": 4}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "falcon": (
        lambda: tf.FalconConfig(**IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        r"^FalconForCausalLM does not route its attention through transformers' attention interface",
    ),
    "bloom": (
        lambda: tf.BloomConfig(**HEADS, hidden_size=32),
        r"^BloomForCausalLM does not route its attention through transformers' attention interface",
    ),
    "mpt": (
        lambda: tf.MptConfig(vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        r"^MptForCausalLM does not route its attention through transformers' attention interface",
    ),
    "gpt-j": (
        lambda: tf.GPTJConfig(**HEADS, n_embd=32, n_positions=64, rotary_dim=4),
        r"^GPTJForCausalLM does not route its attention through transformers' attention interface",
    ),
    "qwen3-next": (
        lambda: tf.Qwen3NextConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        r"^only 1 of the 2 layers of Qwen3NextForCausalLM mix tokens by attention .* recurrent",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_work_say_why(name: str) -> None:
    config, sentence = REFUSED[name]
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(InputError, match=sentence):
        PrefixModel(model)
    assert model.config._attn_implementation != "foreword"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_does_something_unknown_is_refused(dtype: torch.dtype) -> None:
    """Outputs that differ without any prefix betray an argument that prefix attention would drop."""
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SIZES), dtype=dtype).eval()

    def odd(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        routed = model.config._attn_implementation == "foreword"
        return (output[0] * 2, *output[1:]) if routed else output

    model.model.layers[0].self_attn.register_forward_hook(odd, with_kwargs=True)
    with pytest.raises(InputError, match=r"does something that foreword does not know \(its outputs differ by"):
        find_sites(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_half_precision_each_site_is_looked_at_before_a_base_is_refused(dtype: torch.dtype) -> None:
    """Behind the sites stands what makes the least rounding large."""
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SIZES), dtype=dtype).eval()

    def chaos(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.flip(-1) if model.config._attn_implementation == "foreword" else output

    model.model.norm.register_forward_hook(chaos)
    if dtype == torch.bfloat16:
        assert len(find_sites(model)) == 2
        assert not any(m._forward_pre_hooks for m in model.modules())
        return
    with pytest.raises(InputError, match="does something that foreword does not know"):
        find_sites(model)
