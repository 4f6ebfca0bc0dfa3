"""Prefixes of a folder by name: loaded when named, gone when memory is short, never wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foreword import InputError, PrefixModel, load_base

ONE = 2 * 2 * 2 * 8 * 4 * 4  # bytes of a prefix of 4: layers, keys and values, heads, head size, tokens, float32


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    model = PrefixModel(*load_base(str(tiny_llama)))
    for seed, name in enumerate(("a", "b", "c", "d")):
        model.add(name, length=4, start="random", seed=seed)
        model.save_pretrained(tmp_path / "jobs" / name, name)
    return tmp_path / "jobs"


def held(model: PrefixModel) -> list[str]:
    return sorted(model.configs)


def test_a_call_names_a_prefix_that_is_loaded_then_and_leaves_when_others_need_the_room(
    tiny_llama: Path, folder: Path
) -> None:
    model, whole = (PrefixModel(*load_base(str(tiny_llama))) for _ in range(2))
    assert model.attach(folder, memory=2 * ONE).names() == ["a", "b", "c", "d"]
    for name in "abcd":
        whole.load(folder / name)
    ids = torch.arange(3, 12).repeat(3, 1)

    def same(*names: str | None) -> None:
        with torch.no_grad():
            assert torch.equal(model(ids, prefix=list(names)).logits, whole(ids, prefix=list(names)).logits)

    assert held(model) == []
    same("a", "a", "b")
    assert held(model) == ["a", "b"] and model.active is None
    same("a", None, "a")
    same("c", "c", "c")  # b was named longest ago
    assert held(model) == ["a", "c"]
    same("b", "c", "d")  # three at once, though there is room for two
    assert held(model) == ["b", "c", "d"]
    same(None, None, None)
    assert held(model) == ["c", "d"]
    made = model.generate(ids, prefix="a", max_new_tokens=5, do_sample=False)
    assert torch.equal(made, whole.generate(ids, prefix="a", max_new_tokens=5, do_sample=False))


def test_prefixes_of_ones_own_stay_and_the_active_one_too(tiny_llama: Path, folder: Path) -> None:
    model = PrefixModel(*load_base(str(tiny_llama)))
    model.add("own", length=4)
    model.attach(folder, memory=ONE)
    ids = torch.arange(3, 9)[None]
    model(ids, prefix="a")
    assert model.active == "own"
    model.activate("a")
    model(ids, prefix="b")
    model(ids)
    assert held(model) == ["a", "own"]
    model.remove("a")
    model(ids, prefix="c")
    model(ids, prefix="d")
    assert held(model) == ["d", "own"]


def test_what_is_not_there_or_damaged_is_said(tiny_llama: Path, folder: Path) -> None:
    model = PrefixModel(*load_base(str(tiny_llama)))
    with pytest.raises(InputError, match="is no folder; give one that holds prefixes"):
        model.attach(folder / "none")
    model.attach(folder)
    ids = torch.arange(3, 9)[None]
    for name in ("e", "../jobs/a", ""):
        with pytest.raises(InputError, match="there is no prefix named"):
            model(ids, prefix=name)
    (folder / "a" / "prefix.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="is damaged"):
        model(ids, prefix=["b", "a"][1])
    assert held(model) == []
