"""Combinations: start as no change, train together, are one directory, and leave the fingerprint the bare base's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.families import BY_NAME, add, base, fresh, inputs, off_by, text

from foreword import files
from foreword.combine import add_adapters, add_lora, lora_layers, merge_lora
from foreword.errors import InputError
from foreword.model import PrefixModel

LORA = {"r": 2, "lora_alpha": 4}
FAMILIES = ["llama", "gpt2", "t5"]
PARTS = ["lora", "gated lora", "adapters", "gated adapters", "both"]


def combined(name: str, parts: str, **settings: object) -> PrefixModel:
    model = PrefixModel(fresh(name))
    add(model, "p", **settings)
    if "lora" in parts or parts == "both":
        add_lora(model, gated="gated" in parts, **LORA)
    if "adapters" in parts or parts == "both":
        add_adapters(model, size=8, gated="gated" in parts)
    return model


def train(model: PrefixModel, batch: dict[str, torch.Tensor], steps: int = 3) -> list[str]:
    """Train everything that is trainable; the names of what did not move."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).logits.pow(2).mean().backward()
        optimizer.step()
    return [n for n, p in named.items() if torch.equal(p, before[n])]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parts", PARTS)
def test_parts_start_as_no_change_train_together_and_come_back(name: str, parts: str, tmp_path: Path) -> None:
    batch = inputs(BY_NAME[name], [7, 5, 3])
    alone = PrefixModel(base(name))
    add(alone, "p")
    model = combined(name, parts)
    with torch.no_grad():
        assert off_by(model(**batch).logits, alone(**batch).logits) < 1e-6
    assert not train(model, batch)
    model.save_pretrained(tmp_path / "saved")
    assert files.read_header(tmp_path / "saved")["base"]["fingerprint"] == files.fingerprint(base(name))
    loaded = PrefixModel.from_pretrained(tmp_path / "saved", fresh(name))
    trainable = PrefixModel(fresh(name))
    trainable.load(tmp_path / "saved", "p", trainable=True)
    with torch.no_grad():
        expected = model(**batch).logits
        assert off_by(loaded(**batch).logits, expected) < 1e-6
        assert off_by(trainable(**batch).logits, expected) < 1e-6
        assert off_by(expected, alone(**batch).logits) > 1e-3
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not train(trainable, batch)


def test_merged_lora_gives_the_same_and_the_prefix_stays(tmp_path: Path) -> None:
    model, ids = combined("llama", "lora"), text()
    train(model, {"input_ids": ids})
    with torch.no_grad():
        expected = {name: model(ids, prefix=name).logits for name in ("p", None)}
        merge_lora(model)
        for name, logits in expected.items():
            assert off_by(model(ids, prefix=name).logits, logits) < 1e-5
        assert off_by(expected["p"], expected[None]) > 1e-2
        model.save_pretrained(tmp_path / "merged")
        loaded = PrefixModel.from_pretrained(tmp_path / "merged", fresh("llama"))
        assert off_by(loaded(ids).logits, expected["p"]) < 1e-5
    assert not any(layer.merged for layer in lora_layers(loaded))


def test_one_on_top_of_the_other() -> None:
    """LoRA trained first and frozen, then a prefix on top; the prefix alone moves."""
    model, batch = PrefixModel(fresh("llama")), {"input_ids": text()}
    add_lora(model, **LORA)
    train(model, batch)
    for layer in lora_layers(model):
        layer.requires_grad_(False)
    add(model, "p")
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"forms"}
    assert not train(model, batch)


def test_gates_of_every_part_with_a_dynamic_prefix(tmp_path: Path) -> None:
    """UniPELT: the prefix, LoRA and adapters, each with a gate from the input; decoding agrees with whole forwards."""
    model = combined("llama", "gated lora", dynamic="gates", dynamic_layer=1)
    add_adapters(model, size=8, gated=True)
    assert not train(model, {"input_ids": text()})
    ids = text()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    mask = torch.ones_like(made)
    asked = mask.clone()
    asked[:, 7:] = 0
    with torch.no_grad():
        again = model(made, attention_mask=mask, prompt_mask=asked).logits[:, 6:-1].argmax(-1)
    assert torch.equal(again, made[:, 7:])
    model.save_pretrained(tmp_path / "saved")
    loaded = PrefixModel.from_pretrained(tmp_path / "saved", fresh("llama"))
    with torch.no_grad():
        assert off_by(loaded(ids).logits, model(ids).logits) < 1e-6


def test_bad_input_is_said(tmp_path: Path) -> None:
    model = combined("llama", "both")
    with pytest.raises(InputError, match="has LoRA already"):
        add_lora(model, **LORA)
    with pytest.raises(InputError, match="has adapters already"):
        add_adapters(model)
    merge_lora(model)
    with pytest.raises(InputError, match="LoRA is merged already; load the base afresh"):
        add_lora(model, **LORA)
    with pytest.raises(InputError, match=r"LoRA is merged already\.$"):
        merge_lora(model)
    with pytest.raises(InputError, match=r"gated LoRA .* cannot be merged"):
        merge_lora(combined("llama", "gated lora"))
    plain = PrefixModel(fresh("bert"))
    with pytest.raises(InputError, match="no LoRA to merge"):
        merge_lora(plain)
    with pytest.raises(InputError, match=r"feed-forward of BertForMaskedLM .* is not one module"):
        add_adapters(plain)
    with pytest.raises(InputError, match="size of adapters must be at least 1, not 0"):
        add_adapters(plain, size=0)
    with pytest.raises(InputError, match=r"LoRA cannot be put on this base: .*nowhere"):
        add_lora(plain, target_modules=["nowhere"])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="already; load the directory on a base of its own"):
        model.load(tmp_path / "saved", "again")
