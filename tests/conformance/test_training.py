"""What every form must do in training, on every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreword.attention import listening
from foreword.errors import InputError
from foreword.model import PrefixModel

from .families import (
    ALL,
    BY_NAME,
    FORMS,
    LENGTH,
    Family,
    add,
    base,
    flat_gradient,
    fresh,
    inputs,
    off_by,
    parameters,
    real,
    wrapped,
)

every_form = pytest.mark.parametrize("form", FORMS)
every_family = pytest.mark.parametrize("family", ALL, ids=str)


def loss_of(model: PrefixModel, family: Family, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return real(family, batch, model(**batch, **kwargs).logits).float().pow(2).mean()


def train(model: PrefixModel, family: Family, batch: dict[str, Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.forms["p"].parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, family, batch).backward()
        optimizer.step()


@every_family
@every_form
def test_each_parameter_moves_after_validate_then_train(family: Family, form: str) -> None:
    """The base too is checked here: no gradient, equal bits, and off is what it was before wrapping."""
    own = fresh(family.name)
    bits = copy.deepcopy(own.state_dict())
    batch = inputs(family, [7, 5, 3])
    with torch.no_grad():
        bare = own(**batch).logits
    model = PrefixModel(own)
    add(model, "p", form, moved=False)
    with torch.no_grad():
        validated = loss_of(model, family, batch)
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    train(model, family, batch)
    unmoved = [name for name, p in parameters(model).items() if torch.equal(p, before[name])]
    assert not unmoved
    assert loss_of(model, family, batch) < validated
    assert all(not p.requires_grad and p.grad is None for p in own.parameters())
    assert all(torch.equal(bits[name], tensor) for name, tensor in own.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**batch, prefix=None).logits, bare)
        assert off_by(model(**batch).logits, bare) > 1e-2, "the prefix is not active"


@every_family
def test_every_number_of_a_direct_prefix_gets_gradient(family: Family) -> None:
    """Every virtual token, head and channel of every layer is read; no layer has another's prefix."""
    model = wrapped(family.name)
    loss_of(model, family, inputs(family)).backward()
    silent = {name: int((p.grad == 0).sum()) for name, p in parameters(model).items() if bool((p.grad == 0).any())}
    assert not silent


@every_family
@every_form
def test_gradient_checkpointing_changes_nothing(family: Family, form: str) -> None:
    model = wrapped(family.name, form, own=True)
    checkpointed, expected = gradients_by_checkpointing(model, family)
    assert off_by(checkpointed, expected) < family.tolerance


def gradients_by_checkpointing(model: PrefixModel, family: Family) -> tuple[Tensor, Tensor]:
    """The prefix's gradient in training mode, with checkpointing and without."""
    batch = inputs(family, [7, 5, 3], "left" if family.kind == "decoder" else "right")
    quiet_training_mode(model)
    loss_of(model, family, batch).backward()
    expected = flat_gradient(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls: list[str] = []
    with listening(lambda module, *_: calls.append(type(module).__name__)):
        loss = loss_of(model, family, batch)
        ran = len(calls)
        loss.backward()
    assert len(calls) - ran == len(model.sites), "no attention was run again in the backward pass"
    return flat_gradient(model), expected


def quiet_training_mode(model: PrefixModel) -> None:
    """Training mode, in which checkpointing is active, with every dropout at nought."""
    model.base.train()
    for module in model.base.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "t5"])
def test_two_forwards_with_different_prefixes_before_one_backward(name: str) -> None:
    """Under checkpointing each recomputed layer reads the prefix of its own forward, not the latest one."""
    model = wrapped(name, own=True)
    add(model, "q", "direct", length=3)
    quiet_training_mode(model)
    family = BY_NAME[name]
    batch = inputs(family)
    expected = {}
    for each in ("p", "q"):
        loss_of(model, family, batch, prefix=each).backward()
        expected[each] = flat_gradient(model, each)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    first, second = (loss_of(model, family, batch, prefix=each) for each in ("p", "q"))
    (first + second).backward()
    for each in ("p", "q"):
        assert off_by(flat_gradient(model, each), expected[each]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointing_of_the_bare_base_after_a_prefix(name: str) -> None:
    """A checkpointed call with prefix=None reads no prefix when its layers run again."""
    model = wrapped(name, own=True)
    quiet_training_mode(model)
    embeddings = model.base.get_input_embeddings().weight[5:12][None].clone().requires_grad_()
    extra = {} if name == "llama" else {"decoder_input_ids": torch.arange(5, 9)[None]}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(inputs_embeds=embeddings.detach(), **extra)
        out = model(inputs_embeds=embeddings, prefix=None, **extra).logits
        gradients += torch.autograd.grad(out.pow(2).sum(), embeddings)
    assert off_by(gradients[1], gradients[0]) < 1e-5


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(InputError, match="needs use_reentrant=False"):
        wrapped("llama", own=True).gradient_checkpointing_enable({"use_reentrant": True})


@every_family
@every_form
def test_save_and_load_are_equal(family: Family, form: str, tmp_path: Path) -> None:
    """Loaded, then loaded to go on training: the same output at first, and it moves after a step."""
    model, batch = wrapped(family.name, form), inputs(family, [7, 5, 3])
    model.save_pretrained(tmp_path / "saved")
    loaded = PrefixModel(base(family.name))
    loaded.load(tmp_path / "saved", "finished")
    loaded.load(tmp_path / "saved", "p", trainable=True)
    with torch.no_grad():
        expected = model(**batch).logits
        finished = loaded(**batch, prefix="finished").logits
        resumed = loaded(**batch, prefix="p").logits
    if form == "direct":
        assert torch.equal(finished, expected)
    assert off_by(finished, expected) < 1e-6
    assert torch.equal(resumed, finished)
    train(loaded, family, batch, steps=1)
    with torch.no_grad():
        assert off_by(loaded(**batch, prefix="p").logits, expected) > 1e-4
        assert torch.equal(loaded(**batch, prefix="finished").logits, finished)


@every_family
def test_a_prefix_of_another_base_is_refused(family: Family, tmp_path: Path) -> None:
    wrapped(family.name).save_pretrained(tmp_path / "saved")
    other = fresh(family.name)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    with pytest.raises(InputError, match=r"was trained for .* not for this base .* load it on its own base"):
        PrefixModel(other).load(tmp_path / "saved")


def formula(model: PrefixModel, form: str, layers: int, frozen: int, length: int) -> int:
    """The closed formulas of `foreword.forms`, over the first `layers` layers of each kind of site."""
    counts = {"decoder": 0, "encoder": 0, "cross": 0}
    width, sizes = 32, []
    for site in model.sites:
        counts[site.kind] += 1
        if counts[site.kind] <= layers:
            sizes.append(site.kv_heads * (site.key_size + site.value_size))
    if form == "projected":  # nothing to project where a layer reads an earlier one's keys
        own = [s for s in model.sites if not getattr(s.module, "is_kv_shared_layer", False)]
        kinds = [[s.kind for s in own][:i].count(s.kind) for i, s in enumerate(own)]
        return sum(place < layers for place in kinds) * length * width
    if form == "direct":
        return sum(sizes) * (length - frozen)
    hidden = 24
    return (length - frozen) * width + (width + 1) * hidden + (hidden + 1) * sum(sizes)


@every_family
@every_form
def test_parameter_counts_follow_the_formula(family: Family, form: str) -> None:
    model = PrefixModel(base(family.name))
    for layers, frozen in ((2, 1), (1, 2)):
        name = f"p{layers}"
        add(model, name, form, layers=tuple(range(layers)), frozen_tokens=frozen)
        assert model.count(name) == formula(model, form, layers, frozen, LENGTH)
        expected = formula(model, "direct", layers, 0, LENGTH)
        assert model.kv(name).numel() == expected


@every_family
@every_form
def test_frozen_layers_keep_their_start_and_no_gradient_reaches_below_them(
    family: Family, form: str, tmp_path: Path
) -> None:
    model = PrefixModel(fresh(family.name))
    add(model, "whole", form, moved=False)
    add(model, "p", form, moved=False, frozen_layers=1)
    start, upper = model.kv("whole").detach(), model.kv("p")
    assert list(upper.sites) == list(start.sites)
    frozen = [name for name, kv in upper.sites.items() if not kv.keys.requires_grad]
    first = {site.kind: site.name for site in reversed(model.sites)}  # the lowest of each kind
    assert set(first.values()) <= set(frozen) and len(frozen) < len(start.sites)
    for name, kv in upper.sites.items():
        assert all(torch.equal(x, y) for x, y in zip(kv, start.sites[name], strict=True)), name
    batch, reached = inputs(family, [7, 5, 3]), {}
    with listening(lambda module, key, value, _: reached.setdefault(module, key.requires_grad)):
        loss_of(model, family, batch, prefix="p").backward()
    below = [site for site in model.sites if site.kind != "cross" and site.name == first[site.kind]]
    assert not any(reached[site.module] for site in below if site.kind == model.sites[0].kind)
    model.remove("whole")
    train(model, family, batch)
    trained = model.kv("p").detach()
    for name, kv in trained.sites.items():
        assert torch.equal(kv.keys, start.sites[name].keys) == (name in frozen), name
    model.save_pretrained(tmp_path / "p", "p")
    again = PrefixModel(model.base)
    again.load(tmp_path / "p", "p", trainable=True)
    assert all(torch.equal(kv.keys, trained.sites[name].keys) for name, kv in again.kv("p").sites.items())
    if form == "direct" and "shared" not in family.name:  # a file does not say which sites share keys and values
        assert again.count("p") == model.count("p")


@every_family
def test_a_subset_of_layers_leaves_the_others_alone(family: Family) -> None:
    """A prefix of the last layer alone leaves the first layer's output as it was, positions apart."""
    model = PrefixModel(base(family.name))
    add(model, "last", layers=(1,), positions="kept")
    batch = inputs(family)
    with torch.no_grad():
        on = model(**batch, output_hidden_states=True)
        off = model(**batch, output_hidden_states=True, prefix=None)
    key = "decoder_hidden_states" if family.kind == "seq2seq" else "hidden_states"
    assert off_by(on[key][1], off[key][1]) < (2 if family.kind == "seq2seq" else 1e-5)
    assert off_by(on.logits, off.logits) > 1e-3
    if family.kind == "seq2seq":
        assert off_by(on.encoder_hidden_states[1], off.encoder_hidden_states[1]) < 1e-5
