"""The start is the instruction in context, the split attention is the reference, rows do not touch one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foreword import defaults
from foreword.bases import load_base
from foreword.forms import start_ids
from foreword.model import PrefixModel

from .families import (
    ALL,
    BY_NAME,
    DECODERS,
    ENCODERS,
    FORMS,
    LENGTH,
    WINDOW,
    Family,
    add,
    base,
    flat_gradient,
    fresh,
    inputs,
    off_by,
    real,
    text,
    wrapped,
)

every_form = pytest.mark.parametrize("form", FORMS)
every_family = pytest.mark.parametrize("family", ALL, ids=str)
Record = Callable[[str, object], None]


def started(family: Family, form: str, **settings: Any) -> tuple[PrefixModel, Tensor]:
    """A model with an untrained prefix, and the token ids that it starts from."""
    model = PrefixModel(base(family.name))
    add(model, "p", form, moved=False, **settings)
    ids = start_ids(model.configs["p"], model.base, None, torch.Generator().manual_seed(0))
    return model, ids


@pytest.mark.parametrize("family", DECODERS, ids=str)
@every_form
def test_zero_change_is_the_start_in_context(family: Family, form: str) -> None:
    """Longer than any window: in windowed layers the prefix slides out as real tokens do."""
    model, ids = started(family, form, window="slides")
    tokens = text(length=8)
    with torch.no_grad():
        expected = model.base(torch.cat([ids.expand(3, -1), tokens], 1)).logits[:, LENGTH:]
        assert off_by(model(tokens).logits, expected) < 1e-5
        rows = {"attention_mask": torch.ones_like(tokens)}
        rows["attention_mask"][1, :3] = 0
        padded = model(tokens, **rows).logits[1, 3:]
        alone = model.base(torch.cat([ids, tokens[1:2, 3:]], 1)).logits[0, LENGTH:]
    assert off_by(padded, alone) < 1e-5


@pytest.mark.parametrize("family", [f for f in DECODERS if f.windowed], ids=str)
@every_form
def test_a_visible_prefix_inside_the_window_is_the_start_in_context(family: Family, form: str) -> None:
    model, ids = started(family, form, length=2)
    tokens = text(length=WINDOW - 2)
    with torch.no_grad():
        expected = model.base(torch.cat([ids.expand(3, -1), tokens], 1)).logits[:, 2:]
        assert off_by(model(tokens).logits, expected) < 1e-5


@pytest.mark.parametrize("family", [f for f in DECODERS if f.windowed], ids=str)
def test_the_prefix_stays_visible_beyond_the_window(family: Family) -> None:
    """By default the last token still reads the prefix in every layer; sliding, windowed layers have lost it."""
    gradients = {}
    for window in ("visible", "slides"):
        model = wrapped(family.name, window=window)
        model(text(length=3 * WINDOW)).logits[:, -1].pow(2).sum().backward()
        gradients[window] = [p.grad.abs().max() for p in model.forms["p"].values]
    assert all(size > 0 for size in gradients["visible"])
    last = [site.window for site in model.sites][-1]
    if last is not None:  # nothing after the last layer carries what earlier tokens read
        assert gradients["slides"][-1] == 0


@pytest.mark.parametrize("family", ENCODERS, ids=str)
@every_form
def test_an_encoder_starts_as_tokens_that_see_themselves_alone(family: Family, form: str) -> None:
    """Zero change is [start; text] under a mask in which the start does not see the text."""
    model, ids = started(family, form)
    tokens = text(length=3)  # within ModernBERT's window
    total = LENGTH + tokens.shape[1]
    mask = torch.zeros(3, 1, total, total)
    mask[:, :, :LENGTH, LENGTH:] = torch.finfo(torch.float32).min
    positions = torch.arange(total)[None]
    if not model.can_move_positions:  # RoBERTa: each part is counted from its padding index + 1
        positions = torch.cat([torch.arange(LENGTH), torch.arange(3)])[None] + model.config.pad_token_id + 1
    both = torch.cat([ids.expand(3, -1), tokens], 1)
    with torch.no_grad():
        expected = model.base(both, attention_mask=mask, position_ids=positions).logits[:, LENGTH:]
        assert off_by(model(tokens).logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["bart", "t5"])
@every_form
def test_an_encoder_decoder_starts_at_its_own_keys_and_values(name: str, form: str) -> None:
    """Each site's start is what its own projections make of the start's tokens, read off the bare base by hooks."""
    family = BY_NAME[name]
    model, ids = started(family, form)
    seen: dict[int, Tensor] = {}
    handles = []
    for site in model.sites:
        key, value = ("k_proj", "v_proj") if name == "bart" else ("k", "v")
        for part in (getattr(site.module, key), getattr(site.module, value)):
            handles.append(part.register_forward_hook(lambda m, _, out: seen.__setitem__(id(m), out)))
    with torch.no_grad():
        model.base(input_ids=ids, decoder_input_ids=ids)
        made = model.kv("p")
    for handle in handles:
        handle.remove()
    for site in model.sites:
        for part, found in zip((key, value), made.sites[site.name], strict=True):
            expected = seen[id(getattr(site.module, part))]
            assert off_by(found.transpose(1, 2).flatten(2), expected) < 1e-6


def both_kernels(
    model: PrefixModel, family: Family, batch: dict[str, Tensor], kernel: str = "split"
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of real tokens and the form's gradients, of `kernel` first and then of the reference."""
    logits, gradients = [], []
    for way in (kernel, "reference"):
        model.kernel = way  # type: ignore[assignment]
        model.zero_grad()
        out = real(family, batch, model(**batch).logits)
        out.float().pow(2).mean().backward()
        logits.append(out.detach().float())
        gradients.append(flat_gradient(model))
    return logits, gradients


@every_family
@every_form
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kernel", ["split", "joined"])
def test_fast_equals_reference_float32(
    family: Family, form: str, padding: str, kernel: str, record_property: Record
) -> None:
    if padding == "left" and family.kind != "decoder":
        pytest.skip("left padding is for decoders")
    model = wrapped(family.name, form)
    batch = inputs(family, [7, 7, 7] if padding == "none" else [7, 4, 2], padding)
    logits, gradients = both_kernels(model, family, batch, kernel)
    forward, backward = off_by(*logits), off_by(*gradients)
    record_property("difference", (family.name, "float32 logits", forward))
    record_property("difference", (family.name, "float32 gradients", backward))
    assert forward < 1e-5
    assert backward < family.tolerance


def l2_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@every_family
@pytest.mark.parametrize("padding", ["none", "right"])
def test_split_equals_reference_bfloat16(family: Family, padding: str, record_property: Record) -> None:
    model = wrapped(family.name, own=True)
    batch = inputs(family, [7, 7, 7] if padding == "none" else [7, 4, 2])
    model.base.bfloat16()
    logits, gradients = both_kernels(model, family, batch)
    for measure, (split, reference) in (("logits", logits), ("gradients", gradients)):
        difference = l2_error(split, reference)
        record_property("difference", (family.name, f"bfloat16 {measure}", difference))
        assert difference < 2e-2


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_with_prefixes_of_their_own_equal_each_row_alone(family: Family, side: str) -> None:
    """Two prefixes of different length and form, and a row without any, in one batch."""
    if side == "left" and family.kind != "decoder":
        pytest.skip("left padding is for decoders")
    model = wrapped(family.name, None)
    add(model, "a", "direct", length=LENGTH)
    add(model, "b", "mlp", length=2)
    names = ["a", "b", None, "a"]
    batch = inputs(family, [6, 7, 4, 2], side)
    with torch.no_grad():
        mixed = model(**batch, prefix=names).logits
        for row, name in enumerate(names):
            one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
            found = real(family, one, mixed[row : row + 1])
            kept = one["attention_mask"][0].bool()
            if family.kind != "seq2seq":  # without padding, which a bare GPT-2 gets wrong without position ids
                one = {key: tensor[:, kept] for key, tensor in one.items()}
            assert off_by(found, real(family, one, model(**one, prefix=name).logits)) < 1e-5


@pytest.mark.slow
def test_eight_real_rows_over_four_prefixes_of_a_real_base_equal_each_alone() -> None:
    """SmolLM2-135M in float32, prefixes of 4 to 64 tokens in every form."""
    base, tokenizer = load_base(defaults.MODEL, torch.float32)
    model = PrefixModel(base, tokenizer)
    lengths = {"a": 4, "b": 16, "c": 32, "d": 64}
    for (name, length), form in zip(lengths.items(), [*FORMS, "direct"], strict=True):
        add(model, name, form, length=length, start="random")
    names = [*lengths, *reversed(lengths)]
    tokenizer.padding_side = "left"
    articles = [article for article, _ in defaults.bbc_news()[1][: len(names)]]
    texts = [article[: 60 + 20 * i] for i, article in enumerate(articles)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        mixed = model(**batch, prefix=names).logits
        for row, name in enumerate(names):
            alone = model(**tokenizer(texts[row], return_tensors="pt"), prefix=name).logits[0]
            assert (mixed[row, -len(alone) :] - alone).abs().max() < 1e-4


@every_family
def test_mixed_rows_train_each_its_own_prefix(family: Family) -> None:
    """The gradient of a prefix comes from its own rows alone, and is finite beside a row without a prefix."""
    model = wrapped(family.name, None)
    for name, length in (("a", LENGTH), ("b", 2)):
        add(model, name, length=length)
    batch = inputs(family, [6, 7, 4], "left" if family.kind == "decoder" else "right")
    logits = model(**batch, prefix=["a", "b", None]).logits
    real(family, batch, logits).pow(2).sum().backward()
    mixed = {name: flat_gradient(model, name) for name in ("a", "b")}
    model.zero_grad()
    for row, name in enumerate(("a", "b")):
        one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        real(family, one, model(**one, prefix=name).logits).pow(2).sum().backward()
        assert off_by(mixed[name], flat_gradient(model, name)) < family.tolerance


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_sliding_encoder_prefix_leaves_the_window_as_tokens_do(kernel: str) -> None:
    """ModernBERT's local layers look both ways; a prefix that slides is out of reach beyond the local window."""
    family = BY_NAME["modernbert"]
    model, ids = started(family, "direct", window="slides")
    model.kernel = kernel  # type: ignore[assignment]
    tokens = text(length=3 * WINDOW)
    total = LENGTH + tokens.shape[1]
    seen = torch.ones(1, 1, total, total, dtype=torch.bool)
    seen[:, :, :LENGTH, LENGTH:] = False
    distance = (torch.arange(total)[:, None] - torch.arange(total)).abs()
    masks = {"full_attention": seen, "sliding_attention": seen & (distance <= WINDOW)}
    both = torch.cat([ids.expand(3, -1), tokens], 1)
    with torch.no_grad():
        expected = model.base(both, attention_mask=masks, position_ids=torch.arange(total)[None]).logits
        assert off_by(model(tokens).logits, expected[:, LENGTH:]) < 1e-5


def test_nested_reading_reads_the_inner_prefix_alone() -> None:
    """Inside `reading("p")`, a call that names another prefix reads that one, and None is the bare base."""
    model = wrapped("llama")
    add(model, "q", length=2)
    ids = text()
    with torch.no_grad():
        expected = {name: model(ids, prefix=name).logits for name in ("p", "q", None)}
        with model.reading("p"):
            for name in ("q", None, "p"):
                assert torch.equal(model(ids, prefix=name).logits, expected[name])
            assert torch.equal(model.base(ids).logits, expected["p"])


@every_family
def test_sites_and_layers_of_different_shape_are_found(family: Family) -> None:
    """Heads and sizes are those of the layer itself; Gemma 4's layers differ, DeepSeek's keys and values do."""
    model = wrapped(family.name)
    for site in model.sites:
        kv = model.kv("p").sites[site.name]
        assert kv.keys.shape == (1, site.kv_heads, LENGTH, site.key_size)
        assert kv.values.shape == (1, site.kv_heads, LENGTH, site.value_size)
    if family.name == "gemma4":
        assert len({kv.keys.shape for kv in model.kv("p").sites.values()}) == 2
    if family.name == "deepseek-v3":
        assert all(site.key_size != site.value_size for site in model.sites)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_family
def test_off_is_bit_identical_and_the_implementation_comes_back(family: Family, implementation: str) -> None:
    """Whatever the base's own attention is; after wrapping, after a call, after an exception inside a call."""
    own = fresh(family.name)
    try:
        own.set_attn_implementation(implementation)
    except ValueError:
        pytest.skip("transformers has no such attention for this family")
    before = own.config._attn_implementation
    batch = inputs(family, [7, 5, 3])
    with torch.no_grad():
        bare = own(**batch).logits
        model = PrefixModel(own)
        add(model, "p")
        assert torch.equal(own(**batch).logits, bare)
        model(**batch)
        with pytest.raises((IndexError, TypeError, ValueError, RuntimeError, AttributeError)):
            model(**{**batch, "input_ids": batch["input_ids"] + 1000})
        assert own.config._attn_implementation == before
        assert torch.equal(own(**batch).logits, bare)
        assert torch.equal(model(**batch, prefix=None).logits, bare)
