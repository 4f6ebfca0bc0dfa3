"""How far a prefix moves the base on the base's own texts, and training that keeps it near."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupted_at_step
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from foreword import InputError, PrefixModel, RunError, TrainConfig, load, load_base
from foreword.drift import drift, keeping, measured_drift, own_texts
from foreword.train import train

FAST: dict[str, Any] = {"batch_size": 8, "epochs": 6, "max_length": 40, "learning_rate": 0.03, "zero_shot": False}


@pytest.fixture
def model(tiny_llama: Path) -> PrefixModel:
    made = PrefixModel(*load_base(str(tiny_llama)))
    made.add("p", length=4, start="random")
    return made


def test_drift_is_the_mean_divergence_from_the_base(model: PrefixModel) -> None:
    texts = own_texts(model, seed=0, rows=6, tokens=9)
    with torch.no_grad():
        p = model.base(texts).logits.double().softmax(-1)
        q = model(texts, prefix="p").logits.double().softmax(-1)
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    assert expected > 0.01 and float(drift(model, texts, "p").detach()) == pytest.approx(expected, rel=1e-4)
    assert float(drift(model, texts, None)) == 0
    drift(model, texts).backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.form("p").parameters())


def test_texts_are_what_the_base_writes_and_the_seed_alone_decides(model: PrefixModel) -> None:
    before = torch.get_rng_state()
    texts = own_texts(model, seed=1, rows=200, tokens=3)
    assert torch.equal(before, torch.get_rng_state())
    assert texts.shape == (200, 3) and torch.equal(texts, own_texts(model, seed=1, rows=200, tokens=3))
    assert not torch.equal(texts, own_texts(model, seed=2, rows=200, tokens=3))
    assert (texts[:, 0] == model.generation_config.bos_token_id).all()
    with torch.no_grad():
        p = model.base(texts[:1, :1]).logits[0, 0].softmax(-1)
    seen = torch.bincount(texts[:, 1], minlength=len(p)) / 200
    likely = p.topk(5).indices
    assert float((seen[likely] - p[likely]).abs().max()) < 0.12


def test_the_texts_are_taken_in_turn(model: PrefixModel) -> None:
    texts = own_texts(model, seed=0, rows=6, tokens=5)
    term = keeping(model, texts, weight=3.0)
    with torch.no_grad():
        assert float(term(0)) == pytest.approx(3 * float(drift(model, texts[:4])), rel=1e-5)
        assert float(term(1)) == pytest.approx(3 * float(drift(model, texts[[4, 5, 0, 1]])), rel=1e-5)


def test_a_prefix_that_is_kept_near_drifts_less_and_a_resumed_run_is_the_same(
    tiny_llama: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = TrainConfig(tmp_path / "free", model=str(tiny_llama), data=str(topics), **FAST)
    kept = replace(free, output=tmp_path / "kept", keep=30.0)
    train(free)
    found = train(kept).summary
    before = measured_drift(load(tmp_path / "free").model, seed=0)
    assert found["drift"] < 0.8 * before
    assert found["drift"] == pytest.approx(measured_drift(load(tmp_path / "kept").model, seed=0), rel=1e-4)
    part = replace(kept, output=tmp_path / "part")
    with interrupted_at_step(5, monkeypatch), pytest.raises(RunError, match="interrupted at step"):
        train(part)
    train(part, resume=True)
    whole, own = (load_file(folder / "prefix.safetensors") for folder in (kept.output, part.output))
    assert all(torch.equal(whole[key], own[key]) for key in whole)


def test_what_cannot_be_kept_near_is_refused() -> None:
    with pytest.raises(InputError, match="keep must be 0 or more, not -1"):
        train(TrainConfig(Path("never"), keep=-1.0))
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = PrefixModel(BertForMaskedLM(BertConfig(vocab_size=100, **widths)))
    with pytest.raises(InputError, match="leave it out for one that is no decoder"):
        own_texts(bert, seed=0)


def test_eval_tells_the_drift(
    tiny_llama: Path, topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foreword.cli import app

    output = str(tmp_path / "p")
    arguments = ["--model", str(tiny_llama), "--data", str(topics), "--output", output, "--max-length", "40"]
    app(["train", *arguments, "--keep", "1", "--no-zero-shot"], standalone_mode=False)
    assert "Drift from the base on texts of its own" in capsys.readouterr().out
    app(["eval", output, "--drift"], standalone_mode=False)
    assert "nats a token" in capsys.readouterr().out
    app(["eval", output, "--drift", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["drift"] >= 0
    app(["eval", output, "--json"], standalone_mode=False)
    assert "drift" not in json.loads(capsys.readouterr().out)
