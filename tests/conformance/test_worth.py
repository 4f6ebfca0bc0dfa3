"""What tokens and sites are worth, by a loss that says it and by a model that really reads the cut prefix."""

from __future__ import annotations

import pytest
import torch

from foreword.kv import KVPrefix, SiteKV
from foreword.worth import reading_instead, site_worth, token_worth, without_tokens

from . import families as f


def counting() -> KVPrefix:
    keys = torch.arange(4.0).reshape(1, 1, 4, 1).expand(1, 2, 4, 3)
    return KVPrefix({"a": SiteKV(keys, keys), "b": SiteKV(2 * keys, keys)})


def minus_the_sum_of_keys(kv: KVPrefix) -> float:
    return -sum(float(site.keys[:, 0, :, 0].sum()) for site in kv.sites.values())


def test_worth_is_the_rise_of_the_loss() -> None:
    seen: list[tuple[int, int]] = []
    found = token_worth(counting(), minus_the_sum_of_keys, lambda done, total: seen.append((done, total)))
    assert found == [0, 3, 6, 9]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert site_worth(counting(), minus_the_sum_of_keys) == {"a": 6, "b": 12}


def test_one_token_or_one_site_has_nothing_to_compare_with() -> None:
    one = KVPrefix({"a": SiteKV(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))})
    assert token_worth(one, minus_the_sum_of_keys) == []
    assert site_worth(one, minus_the_sum_of_keys) == {}


@pytest.mark.parametrize("tokens", [[4], [0, 1, 2, 3], [-1]])
def test_tokens_that_cannot_be_cut(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot cut tokens"):
        without_tokens(counting(), tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_cut_token_is_as_one_that_nothing_sees(name: str) -> None:
    """Against the reference with the token masked: the others, and the text, stay where they were."""
    model, batch = f.wrapped(name, kernel="reference"), f.inputs(f.BY_NAME[name])
    whole = model.kv("p").detach()
    with torch.no_grad(), reading_instead(model, "p", without_tokens(whole, [2])):
        cut = model(**batch, prefix="p").logits
    far = {n: SiteKV(s.keys.clone(), s.values) for n, s in whole.sites.items()}
    hidden = torch.zeros(1, 1, 1, f.LENGTH)
    hidden[..., 2] = -torch.inf
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreword.reading._hidden", lambda *_: hidden)
        with reading_instead(model, "p", KVPrefix(far)):
            masked = model(**batch, prefix="p").logits
        assert f.off_by(cut, masked) < 1e-5
    with torch.no_grad():
        assert f.off_by(cut, model(**batch, prefix="p").logits) > 1e-4  # and the own prefix is back
