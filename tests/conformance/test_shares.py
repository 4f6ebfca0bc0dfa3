"""The share of attention on the prefix, from log-sum-exps, equals that of the whole materialised attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foreword import attention, shares
from foreword.shares import attention_shares, token_shares, watching

from . import families as f

NAMES = ("llama", "mistral", "gemma2", "gpt2", "gpt-oss", "deepseek-v3", "bert", "modernbert", "bart", "t5")


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights `[B, H, n, P + m]` of every call of the reference, in order."""
    found: list[Tensor] = []
    reference = attention.reference_attention

    def recording(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, weights = reference(*args, **kwargs)
        found.append(weights)
        return out, weights

    monkeypatch.setattr(attention, "reference_attention", recording)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_mass_on_every_prefix_token_equals_the_materialised_attention(
    name: str, side: str, materialised: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "SLICE", 3)  # several slices, the last not full
    family = f.BY_NAME[name]
    model = f.wrapped(name, kernel="reference")
    materialised.clear()  # making the model ran it too
    batch = f.inputs(family, [7, 4, 6], side)
    found: list[Tensor] = []
    with torch.no_grad(), watching(lambda module, mass: found.append(mass)):
        model(**batch, prefix="p")
    assert len(found) == len(materialised) == len(model.sites)
    for mass, weights in zip(found, materialised, strict=True):
        assert float((mass - weights[..., : f.LENGTH]).abs().max()) < 1e-5
        assert 1e-3 < float(mass.sum(-1).mean()) < 1


def test_sliding_prefix_and_rows_of_their_own(materialised: list[Tensor]) -> None:
    model = f.wrapped("mistral", kernel="reference", window="slides")
    f.add(model, "q", length=3, window="slides")
    materialised.clear()
    found: list[Tensor] = []
    with torch.no_grad(), watching(lambda module, mass: found.append(mass)):
        model(**f.inputs(f.BY_NAME["mistral"]), prefix=["p", "q", "p"])
    for mass, weights in zip(found, materialised, strict=True):
        assert float((mass - weights[..., : f.LENGTH]).abs().max()) < 1e-5
    assert float(found[0][1, :, :, 3:].abs().max()) == 0  # the shorter prefix ends there
    assert float(found[0][0, :, -1, 0].abs().max()) == 0  # the first token slid out of the window


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["qwen3", "roberta", "t5"])
def test_shares_are_means_over_real_tokens_whatever_the_batches(name: str, side: str) -> None:
    family, model = f.BY_NAME[name], f.wrapped(name)

    def call(batch: dict[str, Tensor]) -> None:
        model(**batch, prefix="p")

    padded = attention_shares(model, call, [f.inputs(family, [7, 4, 6], side)])
    whole = f.inputs(family, [7, 7, 7])
    single = []
    for row, length in enumerate([7, 4, 6]):
        alone = {k: v[row : row + 1] for k, v in whole.items()}
        single.append({k: v if k.startswith("decoder") else v[:, :length] for k, v in alone.items()})
    done: list[int] = []
    one_by_one = attention_shares(model, call, single, done.append)
    assert done == [1, 2, 3]
    assert list(padded) == [site.name for site in model.sites]
    for site in model.sites:
        assert padded[site.name].shape == (4, f.LENGTH)
        torch.testing.assert_close(padded[site.name], one_by_one[site.name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_token_shares_are_the_materialised_attention_of_the_text(name: str, materialised: list[Tensor]) -> None:
    family, model = f.BY_NAME[name], f.wrapped(name, kernel="reference")
    materialised.clear()
    batch = f.inputs(family, [7])
    found = token_shares(model, lambda: model(**batch, prefix="p"))
    assert found is not None and len(materialised) == len(model.sites)
    reads_text = [model.kind != "encoder-decoder" or site.kind == "encoder" for site in model.sites]
    rows = [w[0, :, :, : f.LENGTH].sum(-1) for w, kept in zip(materialised, reads_text, strict=True) if kept]
    torch.testing.assert_close(found, torch.cat(rows).mean(0), atol=1e-5, rtol=1e-5)
    assert token_shares(model, lambda: model(**batch, prefix=None)) is None


def test_watching_ends_with_the_context_and_hears_nothing_without_a_prefix() -> None:
    model, batch = f.wrapped("llama"), f.inputs(f.BY_NAME["llama"])
    found: list[Tensor] = []
    with torch.no_grad(), watching(lambda module, mass: found.append(mass)):
        model(**batch, prefix=None)
    model(**batch, prefix="p")
    assert found == []
