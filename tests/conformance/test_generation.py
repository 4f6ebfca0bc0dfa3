"""Generation: every cache and way of decoding gives what repeated forwards give. Encoders do not generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from foreword import few_rows
from foreword.model import PrefixModel

from .families import DECODERS, GENERATORS, Family, add, inputs, off_by, padded, text, wrapped

STEPS = 6
generators = pytest.mark.parametrize("family", GENERATORS, ids=str)
decoders = pytest.mark.parametrize("family", DECODERS, ids=str)
Prefix = str | Sequence[str | None] | None


def prompt(family: Family, lengths: list[int]) -> dict[str, Tensor]:
    """A left-padded batch; an encoder-decoder's is padded on the right, and without decoder tokens."""
    batch = inputs(family, lengths, "left" if family.kind == "decoder" else "right")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def row(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row alone, without its padding."""
    kept = batch["attention_mask"][index].bool()
    return {key: tensor[index : index + 1, kept] for key, tensor in batch.items()}


def generate(model: PrefixModel, batch: dict[str, Tensor], steps: int = STEPS, **kwargs: Any) -> Tensor:
    """The new tokens `[B, steps]`."""
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, disable_compile=True, **kwargs)
    return out[:, -steps:]


@torch.no_grad()
def repeated(model: PrefixModel, family: Family, batch: dict[str, Tensor], prefix: Prefix) -> Tensor:
    """Greedy decoding by whole forwards, no cache and no `generate`."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if family.kind == "seq2seq":
        made = torch.full((len(ids), 1), model.config.decoder_start_token_id)
        for _ in range(STEPS):
            logits = model(**batch, decoder_input_ids=made, use_cache=False, prefix=prefix).logits
            made = torch.cat([made, logits[:, -1:].argmax(-1)], 1)
        return made[:, -STEPS:]
    for _ in range(STEPS):
        logits = model(ids, attention_mask=mask, use_cache=False, prefix=prefix).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -STEPS:]


@generators
@pytest.mark.parametrize("window", ["visible", "slides"])
def test_generate_equals_repeated_forward(family: Family, window: str) -> None:
    """Greedy, a padded batch; and without a cache; and every row as if it were alone."""
    if window == "slides" and not (family.windowed and family.kind == "decoder"):
        pytest.skip("no sliding-window layers")
    model = wrapped(family.name, window=window)
    batch = prompt(family, [7, 4, 2])
    expected = repeated(model, family, batch, "p")
    assert torch.equal(generate(model, batch), expected)
    assert torch.equal(generate(model, batch, use_cache=False), expected)
    for index in range(3):
        assert torch.equal(generate(model, row(batch, index)), expected[index : index + 1])
    assert not torch.equal(generate(model, batch, prefix=None), expected), "the prefix is not active"


@generators
def test_off_is_bit_identical_after_generate(family: Family) -> None:
    model = wrapped(family.name)
    batch = inputs(family)
    with torch.no_grad():
        before = model.base(**batch).logits
        generate(model, prompt(family, [7, 4]))
        assert torch.equal(model.base(**batch).logits, before)


@generators
def test_a_static_cache_equals_a_dynamic_one(family: Family) -> None:
    model = wrapped(family.name)
    batch = prompt(family, [7, 4, 2])
    assert torch.equal(generate(model, batch, cache_implementation="static"), generate(model, batch))


@generators
def test_generate_with_prefixes_per_row_equals_each_row_alone(family: Family) -> None:
    model = wrapped(family.name)
    add(model, "q", "direct", length=2)
    batch, names = prompt(family, [7, 4, 6]), ["p", "q", None]
    mixed = generate(model, batch, prefix=names)
    assert torch.equal(mixed, repeated(model, family, batch, names))
    for index, name in enumerate(names):
        assert torch.equal(mixed[index : index + 1], generate(model, row(batch, index), prefix=name))


@generators
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
def test_beam_search_equals_one_row_at_a_time(family: Family, shared: bool) -> None:
    model = wrapped(family.name)
    add(model, "q", "direct", length=2)
    batch, names = prompt(family, [7, 4]), ["p", "p" if shared else "q"]
    found = generate(model, batch, prefix="p" if shared else names, num_beams=3)
    for index, name in enumerate(names):
        alone = generate(model, row(batch, index), prefix=name, num_beams=3)
        assert torch.equal(found[index : index + 1], alone)


@generators
@pytest.mark.parametrize("window", ["visible", "slides"])
def test_transposed_products_of_any_number_of_rows_change_no_token(
    family: Family, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prefill, decoding and beam search, with one prefix and with each row's own."""
    if window == "slides" and not (family.windowed and family.kind == "decoder"):
        pytest.skip("no sliding-window layers")
    model = wrapped(family.name, window=window)
    add(model, "q", "direct", length=2, window=window)
    batch = prompt(family, [7, 4, 2])
    ways: list[dict[str, Any]] = [{"prefix": "p"}, {"prefix": ["p", "q", None]}, {"prefix": "p", "num_beams": 2}]
    expected = [generate(model, batch, **way) for way in ways]
    monkeypatch.setattr(few_rows, "_trials", {})
    monkeypatch.setattr(few_rows, "FEW", range(1, 10**6))
    monkeypatch.setattr(few_rows, "_tried", lambda weight, bias, trials, x: few_rows._transposed(weight, bias, x))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for way, tokens in zip(ways, expected, strict=True):
        assert torch.equal(generate(model, batch, **way), tokens)


@generators
def test_training_goes_on_from_what_a_generation_returns(family: Family) -> None:
    """From its tokens; a decoder's from the cache, too, where the caller asks for it."""
    model = wrapped(family.name)
    batch = prompt(family, [7, 4])
    made = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, disable_compile=True)
    given = {"decoder_input_ids": made, **batch} if family.kind == "seq2seq" else {"input_ids": made}
    model(**given).logits.sum().backward()
    settings: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    found = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, **settings)
    assert torch.equal(found.sequences, made)
    if family.kind == "decoder":
        model(made[:, -1:], past_key_values=found.past_key_values).logits.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.forms.parameters())


@decoders
def test_prompt_lookup_decoding_equals_greedy(family: Family) -> None:
    model = wrapped(family.name)
    batch = {"input_ids": text(1, 4).repeat(1, 3), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    assert torch.equal(generate(model, batch, 12, prompt_lookup_num_tokens=2), generate(model, batch, 12))


@decoders
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "left padding"])
def test_a_forward_continued_from_its_cache_equals_the_whole(family: Family, masked: bool) -> None:
    model = wrapped(family.name)
    ids, mask = padded([7, 5, 7], "left") if masked else (text(), None)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache, parts = None, []
        for begin, end in ((0, 3), (3, 4), (4, 7)):
            seen = None if mask is None else mask[:, :end]
            out = model(ids[:, begin:end], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert cache.get_seq_length() == 7, "the prefix is not in the cache"
    assert off_by(torch.cat(parts, 1)[real], whole[real]) < 1e-5


@pytest.mark.parametrize("family", [f for f in GENERATORS if f.kind == "seq2seq"], ids=str)
@pytest.mark.parametrize("prefix", ["p", ["p", "q", None]], ids=["shared", "per-row"])
def test_a_decoder_continued_from_its_cache_equals_the_whole(family: Family, prefix: Prefix) -> None:
    model = wrapped(family.name)
    add(model, "q", "direct", length=2)
    batch = inputs(family, [7, 5, 3])
    tokens = batch.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**batch, decoder_input_ids=tokens, prefix=prefix).logits
        first = model(**batch, decoder_input_ids=tokens[:, :3], use_cache=True, prefix=prefix)
        rest = model(
            encoder_outputs=(first.encoder_last_hidden_state,),
            attention_mask=batch["attention_mask"],
            decoder_input_ids=tokens[:, 3:],
            past_key_values=first.past_key_values,
            prefix=prefix,
        )
    assert off_by(torch.cat([first.logits, rest.logits], 1), whole) < 1e-5


@decoders
@pytest.mark.parametrize("kept", [1, 3])
def test_logits_to_keep_keeps_the_same_logits(family: Family, kept: int) -> None:
    """Also where the model itself runs its last layers for the kept tokens alone (Gemma 4 with shared keys)."""
    model, ids = wrapped(family.name), text()
    with torch.no_grad():
        assert off_by(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, -kept:]) < 1e-5


@decoders
def test_inputs_embeds_equal_input_ids(family: Family) -> None:
    model = wrapped(family.name)
    batch = prompt(family, [7, 4])
    embeds = model.base.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        expected = model(**batch).logits
        found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert off_by(found, expected) < 1e-5
