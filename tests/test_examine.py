"""A trained prefix looked into: what is said of it is true of it, and the page holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foreword import InputError, PrefixConfig, PrefixModel, TrainConfig, load_base
from foreword.examine import examine, moved, nearest_words
from foreword.inspect_page import write_inspection
from foreword.train import train


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of `direct` and one of `projected`, a few steps each."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for form in ("direct", "projected"):
        config = TrainConfig(
            output=folder / form,
            model=str(tiny_llama),
            data=str(topics),
            prefix=PrefixConfig(form=form, length=6, instruction="animal or tool"),
            max_steps=6,
            batch_size=8,
            max_length=40,
            learning_rate=0.1,
        )
        found[form] = train(config).output
    return found


def test_examine_says_what_is_so(runs: dict[str, Path], topics: Path) -> None:
    passes: list[tuple[int, int]] = []
    found = examine(runs["direct"], rows=8, batch_size=3, progress=lambda *at: passes.append(at))
    assert passes == [(i + 1, 4 + 6 + 2) for i in range(4 + 6 + 2)]
    sites = found["sites"]
    assert len(sites) == 2 and list(found["shares"]) == sites
    for heads in found["shares"].values():
        assert len(heads) == 4 and all(0 < sum(head) < 1 for head in heads)
    assert len(found["worth"]["tokens"]) == 6 and list(found["worth"]["sites"]) == sites
    assert max(map(abs, found["worth"]["tokens"])) > 1e-6
    again = examine(runs["direct"], str(topics / "validation.jsonl"), rows=8, batch_size=8)
    assert again["loss"] == pytest.approx(found["loss"], abs=1e-5)


def test_moved_is_zero_at_the_start_and_grows(runs: dict[str, Path], tiny_llama: Path) -> None:
    base, tokenizer = load_base(str(tiny_llama))
    model = PrefixModel(base, tokenizer)
    for form in ("direct", "projected"):
        model.add(form, PrefixConfig(form=form, length=4))
        assert all(value == 0 for both in moved(model, form).values() for value in both.values())  # type: ignore[union-attr]
        model.load(runs[form], f"trained-{form}")
        frozen, trained = moved(model, f"trained-{form}").values()
        assert all(value == 0 for value in frozen.values()) and all(value > 1e-3 for value in trained.values())  # type: ignore[union-attr]
    with torch.no_grad():
        model.forms["direct"].values[1].add_(0.5)
    assert moved(model, "direct")[model.sites[1].name]["values"] == pytest.approx(0.5 * (3 / 4) ** 0.5, rel=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("form", ["direct", "projected", "mlp"])
def test_at_step_0_the_nearest_words_are_the_instruction(form: str, tiny_llama: Path) -> None:
    base, tokenizer = load_base(str(tiny_llama))
    model = PrefixModel(base, tokenizer)
    model.add("p", PrefixConfig(form=form, instruction="the hammer or the horse"))
    words = nearest_words(model, "p", 2)
    assert words is not None
    assert "".join(token[0][0] for token in words) == "the hammer or the horse"
    assert all(token[0][1] == pytest.approx(1, abs=1e-3) and token[0][1] >= token[1][1] for token in words)
    model.add("late", PrefixConfig(form=form, length=3, layers=(1,)))
    assert nearest_words(model, "late") is None


def test_the_page_of_two_needs_no_network(runs: dict[str, Path], tmp_path: Path) -> None:
    both = [examine(runs[form], rows=4) for form in ("direct", "projected")]
    write_inspection(tmp_path / "both.html", both)
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 + 2 * 3
    assert "http" not in page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")
    assert "direct" in page and "projected" in page and f"{both[0]['loss']:.4f}" in page
    assert "#030303" not in page and "var(--one)" in page


def test_a_prefix_without_a_task(tiny_llama: Path, tmp_path: Path) -> None:
    base, tokenizer = load_base(str(tiny_llama))
    model = PrefixModel(base, tokenizer)
    model.add("plain", PrefixConfig(length=3))
    model.save_pretrained(tmp_path / "plain")
    found = examine(tmp_path / "plain")
    assert found["shares"] is None and found["worth"] is None and len(found["words"]) == 3
    write_inspection(tmp_path / "page.html", [found])
    assert "saved without a task" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="without a task"):
        examine(tmp_path / "plain", "bbc_news")


def test_rows_that_do_not_fit(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        examine(runs["direct"], rows=0)
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a", "label": "mineral"}\n{"text": "b", "label": "tool"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="not trained for: mineral"):
        examine(runs["direct"], str(strange))
