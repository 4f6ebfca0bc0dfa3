"""Input embeddings as a form: equal to embeddings in front of the text, alone, behind a prefix, and with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.families import add, base, fresh, off_by, text, wrapped

from foreword.combine import add_lora
from foreword.errors import InputError
from foreword.model import PrefixModel
from foreword.prompt_tuning import Embeddings, add_prompt


@torch.no_grad()
def moved(form: Embeddings) -> Embeddings:
    form.change.normal_()
    return form


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt-neox", "gpt-oss"])
@pytest.mark.parametrize("prefix", [None, "p"], ids=["alone", "behind a prefix"])
def test_it_equals_embeddings_in_front_of_the_text(name: str, prefix: str | None, tmp_path: Path) -> None:
    model, ids = wrapped(name), text(length=3)
    add(model, "q", length=2)
    if prefix:
        add(model, "both")
        model.forms["both"].load_state_dict(model.forms["p"].state_dict())
    form = moved(add_prompt(model, "both" if prefix else "alone", 3))
    with torch.no_grad():
        embedded = model.base.get_input_embeddings()(ids)
        whole = torch.cat([form.embeddings().expand(3, -1, -1), embedded], 1)
        if name == "gpt-oss" and prefix is None:  # within its window
            whole = whole[:1]
        expected = model(inputs_embeds=whole, prefix=prefix).logits[:, 3:]
        found = model(ids, prefix=model.active).logits[: len(expected)]
        rows = model(ids, prefix=["q", model.active, None]).logits
    if name != "gpt-oss":  # whose windows pass over embeddings in the text and not over a prefix
        assert off_by(found, expected) < 1e-5
    assert off_by(rows[1], model(ids).logits[1]) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    loaded = PrefixModel.from_pretrained(tmp_path / "saved", base(name))
    with torch.no_grad():
        assert off_by(loaded(ids).logits, model(ids).logits) < 1e-6
        assert loaded.form("saved").length == form.length == (8 if prefix else 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_embeddings_and_lora_train_together(checkpointing: bool) -> None:
    model, ids = PrefixModel(fresh("llama")), text()
    add(model, "p")
    add_lora(model, r=2)
    add_prompt(model, "p", 3)
    if checkpointing:
        model.base.train()
        model.gradient_checkpointing_enable()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids).logits.pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not [n for n, p in named.items() if torch.equal(p, before[n])]
    assert any("lora_" in n for n in named) and any("change" in n for n in named)


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="needs a decoder whose positions can move"):
        add_prompt(wrapped("bert"), "e", 3)
    model = wrapped("llama", dynamic="gates")
    add(model, "last", layers=(1,))
    with pytest.raises(InputError, match="'p' is dynamic"):
        add_prompt(model, "p", 3)
    with pytest.raises(InputError, match="'last' must enter every layer"):
        add_prompt(model, "last", 3)
    with pytest.raises(InputError, match="length must be at least 1, not 0"):
        add_prompt(model, "e", 0)
