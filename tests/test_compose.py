"""Composition: turned keys are those of the shifted positions, and what comes out is what the docstrings say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.families import BY_NAME, add, base, fresh, inputs, off_by, text, wrapped

from foreword.attention import listening
from foreword.compose import concatenate, cut, interpolate, turns, worth
from foreword.errors import InputError
from foreword.forms import start_ids
from foreword.model import PrefixModel
from foreword.sites import routed

ROTARY = ["llama", "qwen3", "gemma3", "gemma4", "phi3", "gpt-neox", "deepseek-v3", "modernbert"]


@pytest.mark.parametrize("name", ROTARY)
def test_turned_keys_are_the_keys_at_shifted_positions(name: str) -> None:
    """Tokens at one position each, in one row; by 1, by 9 and back."""
    model, ids = wrapped(name, None), text(1, 6)
    seen = {}
    for at in (2, 3, 11):
        keys = seen.setdefault(at, {})
        listener = lambda module, key, value, _, keys=keys: keys.setdefault(id(module), key)  # noqa: E731
        with torch.no_grad(), routed(model.base), listening(listener):
            model.base(ids, position_ids=torch.arange(6)[None] + at, attention_mask=torch.ones_like(ids))
    for a, b in ((2, 3), (2, 11), (11, 2)):
        found = turns(model, b - a)
        for site in model.sites:
            before, after = (seen[at][id(site.module)] for at in (a, b))
            assert off_by((before.double() @ found[site.name]).float(), after) < 2e-4
            assert off_by(before, after) > 1e-3, "the positions do not show in these keys"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROTARY)
def test_turns_are_those_of_float32_on_a_base_in_half_precision(name: str, dtype: torch.dtype) -> None:
    half = PrefixModel(fresh(name).to(dtype))
    whole = PrefixModel(fresh(name).to(dtype).float())  # with angles that were rounded too
    expected = turns(whole, 7)
    for site, turn in turns(half, 7).items():
        assert off_by(turn, expected[site]) < 1e-6
    assert half.dtype == dtype


def test_keys_of_a_sharded_base_in_half_precision_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PrefixModel(fresh("llama").bfloat16())
    monkeypatch.setattr(PrefixModel, "is_sharded", True)
    with pytest.raises(InputError, match="turned in float32 alone"):
        turns(model, 1)


def started(name: str, *lengths: int) -> tuple[PrefixModel, list[torch.Tensor]]:
    """Untrained prefixes p0, p1.. and the tokens that they start from."""
    model, ids = PrefixModel(base(name)), []
    for i, length in enumerate(lengths):
        add(model, f"p{i}", moved=False, length=length, seed=i)
        ids.append(start_ids(model.configs[f"p{i}"], model.base, None, torch.Generator().manual_seed(i)))
    return model, ids


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_concatenated_starts_are_the_texts_in_which_each_part_reads_itself(name: str) -> None:
    model, parts = started(name, 4, 3, 2)
    tokens = text(2, 5)
    whole = torch.cat([*(ids.expand(2, -1) for ids in parts), tokens], 1)
    seen = torch.ones(14, 14).tril().bool()
    seen[4:7, :4] = False
    seen[7:9, :7] = False
    with torch.no_grad():
        expected = model.base(whole, attention_mask=seen.expand(2, 1, -1, -1)).logits[:, 9:]
        plain = model.base(whole).logits[:, 9:]
        model.put("all", concatenate(model, ["p0", "p1", "p2"]), like="p0")
        found = model(tokens, prefix="all").logits
    assert off_by(found, expected) < 1e-4
    assert off_by(found, plain) > 1e-3


def test_a_composed_prefix_is_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = started("llama", 4, 3)
    model.put("both", concatenate(model, ["p0", "p1"]), like="p0")
    model.save_pretrained(tmp_path / "both")
    model.load(tmp_path / "both", "again")
    with torch.no_grad():
        assert torch.equal(model(text(), prefix="again").logits, model(text(), prefix="both").logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_learned_positions_cannot_be_turned(name: str, dtype: torch.dtype) -> None:
    model = PrefixModel(fresh(name).to(dtype))
    add(model, "p")
    add(model, "q")
    with pytest.raises(InputError, match=r"cannot be turned to new positions.*learned positions"):
        concatenate(model, ["p", "q"])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_kept_positions_need_no_turning(name: str) -> None:
    """[p; nothing of q] and [q; p] read alike: the order of a prefix that has no positions does not matter."""
    model = wrapped(name)
    add(model, "q", length=2)
    batch = inputs(BY_NAME[name])
    model.put("pq", concatenate(model, ["p", "q"]), like="p")
    model.put("qp", concatenate(model, ["q", "p"]), like="p")
    with torch.no_grad():
        assert off_by(model(**batch, prefix="pq").logits, model(**batch, prefix="qp").logits) < 1e-5
    with pytest.raises(InputError, match="cannot move its positions"):
        turns(model, 1)


def test_interpolation_ends_at_both_and_is_linear() -> None:
    model = wrapped("llama")
    add(model, "q")
    for weight, expected in ((0.0, model.kv("p")), (1.0, model.kv("q"))):
        found = interpolate(model, "p", "q", weight)
        for name, site in found.sites.items():
            assert all(off_by(x, y) < 1e-6 for x, y in zip(site, expected.sites[name], strict=True))
    half = interpolate(model, "p", "q", 0.5).sites[model.sites[0].name].keys
    ends = [model.kv(name).sites[model.sites[0].name].keys for name in ("p", "q")]
    assert off_by(half, (ends[0] + ends[1]) / 2) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_cutting_nothing_is_the_identity(name: str) -> None:
    model = wrapped(name)
    for keep in (range(5), 5):
        found = cut(model, "p", keep if isinstance(keep, int) else list(keep), worths=[1, 5, 2, 4, 3])
        for site, kv in model.kv("p").sites.items():
            assert all(torch.equal(x, y) for x, y in zip(found.sites[site], kv, strict=True))


def test_a_number_to_keep_means_the_tokens_that_change_the_loss_most_up_or_down() -> None:
    model = wrapped("llama")
    kept = cut(model, "p", 3, worths=[0.5, -0.4, 0.1, -0.2, 0.3])
    named = cut(model, "p", [0, 1, 4])
    for site, kv in named.sites.items():
        assert all(torch.equal(x, y) for x, y in zip(kept.sites[site], kv, strict=True))


def test_a_cut_start_is_the_shorter_text_in_which_tokens_keep_what_they_read() -> None:
    """Cutting the end leaves the start of the text; keys that close up are turned to their new places."""
    model, (ids,) = started("llama", 5)
    model.put("short", cut(model, "p0", [0, 1, 2]), like="p0")
    tokens = text(2, 4)
    with torch.no_grad():
        expected = model.base(torch.cat([ids[:, :3].expand(2, -1), tokens], 1)).logits[:, 3:]
        assert off_by(model(tokens).logits, expected) < 1e-5
    closed = cut(model, "p0", [0, 3, 4]).sites
    for site, turn in turns(model, -2).items():
        keys = model.kv("p0").sites[site].keys
        assert off_by(closed[site].keys[:, :, 1:], (keys[:, :, 3:].double() @ turn).float()) < 1e-6


def test_the_worth_of_a_token_is_what_the_loss_rises_by() -> None:
    """A copy of a token that matters is worth little; the prefix itself comes back as it was."""
    model, ids = wrapped("llama"), text()
    before = model.forms["p"]
    with torch.no_grad():
        target = model(ids).logits

    @torch.no_grad()
    def loss() -> float:
        return float((model(ids, prefix="p").logits - target).pow(2).mean())

    found = worth(model, "p", loss)
    assert len(found) == 5 and all(value > 0 for value in found)
    assert model.forms["p"] is before
    best = cut(model, "p", 4, worths=found)
    weakest = min(range(5), key=found.__getitem__)
    model.put("best", best, like="p")
    with torch.no_grad():
        measured = float((model(ids, prefix="best").logits - target).pow(2).mean())
    assert measured == pytest.approx(found[weakest])


def test_bad_input_is_said() -> None:
    model = wrapped("llama")
    add(model, "short", length=2)
    add(model, "kept", positions="kept")
    add(model, "last", layers=(1,))
    add(model, "one", length=1)
    for sentence, call in (
        ("composition takes two prefixes or more", lambda: concatenate(model, ["p"])),
        ("there is no prefix named 'x'", lambda: concatenate(model, ["p", "x"])),
        ("differ in `positions` or `window` cannot be conc", lambda: concatenate(model, ["p", "kept"])),
        ("enter different layers cannot be composed", lambda: concatenate(model, ["p", "last"])),
        (r"\(5 and 2 tokens\), so nothing lies between", lambda: interpolate(model, "p", "short", 0.5)),
        ("to keep 2 of 5 tokens, give the worth", lambda: cut(model, "p", 2)),
        (r"tokens 0 to 4 in rising order, not \[3, 1\]", lambda: cut(model, "p", [3, 1])),
        (r"tokens 0 to 4 in rising order, not \[\]", lambda: cut(model, "p", [])),
        ("has one token, so there is nothing to compare", lambda: worth(model, "one", lambda: 0.0)),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
