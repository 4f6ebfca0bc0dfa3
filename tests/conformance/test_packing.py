"""Rows packed one behind another equal the same rows padded: logits, gradients, mixed prefixes, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foreword.errors import InputError
from foreword.model import PrefixModel

from .families import ALL, LENGTH, WINDOW, Family, add, flat_gradient, inputs, off_by, real, wrapped
from .test_training import quiet_training_mode

LENGTHS = [7, 2 * WINDOW + 1, 1, 4]
CANNOT = {  # and why
    "roberta": "its positions cannot be moved",
    "modernbert": "its windows look both ways",
    "bart": "its positions cannot be moved",
    "t5": "its positions cannot be moved",
}
PACKING = [family for family in ALL if family.name not in CANNOT]
every_packing = pytest.mark.parametrize("family", PACKING, ids=str)


def both(
    model: PrefixModel, family: Family, prefix: Any, lengths: list[int] = LENGTHS
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the real tokens, and all forms' gradients: padded first, then packed."""
    batch = inputs(family, lengths)
    ids = batch["input_ids"][batch["attention_mask"].bool()][None]
    logits, gradients = [], []
    for run in (
        lambda: real(family, batch, model(**batch, prefix=prefix).logits),
        lambda: model(input_ids=ids, packed=lengths, prefix=prefix).logits[0],
    ):
        model.zero_grad()
        out = run()
        out.pow(2).mean().backward()
        logits.append(out.detach())
        gradients.append(torch.cat([flat_gradient(model, name) for name in model.forms]))
    return logits, gradients


@every_packing
@pytest.mark.parametrize("kernel", ["split", "reference"])
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 4, 4]], ids=["all different", "two alike"])
def test_packed_equals_padded(family: Family, kernel: str, lengths: list[int]) -> None:
    model = wrapped(family.name, kernel=kernel)
    assert model.packs()
    logits, gradients = both(model, family, "p", lengths)
    assert off_by(*logits) < 1e-5
    assert off_by(*gradients) < family.tolerance


@every_packing
def test_packed_rows_with_prefixes_of_their_own(family: Family) -> None:
    """Two prefixes of different length and form, and a row without any."""
    model = wrapped(family.name, None)
    add(model, "a", "direct", length=LENGTH)
    add(model, "b", "mlp", length=2)
    logits, gradients = both(model, family, ["a", "b", None, "a"])
    assert off_by(*logits) < 1e-5
    assert off_by(*gradients) < family.tolerance


@every_packing
def test_packed_rows_of_a_prefix_in_some_layers(family: Family) -> None:
    """In a layer without the prefix rows do not see one another either."""
    model = wrapped(family.name, layers=(1,))
    logits, gradients = both(model, family, "p")
    assert off_by(*logits) < 1e-5
    assert off_by(*gradients) < family.tolerance


@every_packing
def test_packed_rows_under_gradient_checkpointing(family: Family) -> None:
    model = wrapped(family.name, own=True)
    quiet_training_mode(model)
    expected = both(model, family, "p")
    model.gradient_checkpointing_enable()
    found = both(model, family, "p")
    assert torch.equal(found[0][1], expected[0][1])
    assert off_by(found[1][1], expected[1][1]) < family.tolerance


@pytest.mark.parametrize("family", [f for f in ALL if f.name in CANNOT], ids=str)
def test_bases_that_cannot_pack_say_so(family: Family) -> None:
    assert not wrapped(family.name).packs()


def test_what_cannot_be_packed_is_refused() -> None:
    model = wrapped("mistral", window="slides")
    ids = torch.arange(5, 12)[None]
    assert not model.packs() and not model.packs(None)
    with pytest.raises(InputError, match="cannot be packed behind a prefix that slides or is dynamic"):
        model(ids, packed=[3, 4])
    model = wrapped("llama")
    with pytest.raises(InputError, match=r"packed rows of 9 tokens in all .* \[1, 7\]"):
        model(ids, packed=[5, 4])
    with pytest.raises(InputError, match="there are 2 prefixes"):
        model(ids, packed=[3, 3, 1], prefix=["p", None])
