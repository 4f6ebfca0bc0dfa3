"""Activations of frozen lower layers, kept across epochs: the same run in fewer layer calls, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_config
from safetensors.torch import load_file

from foreword import InputError, PrefixConfig, TrainConfig, files
from foreword.lower_layers import LowerLayers
from foreword.train import NAME, build, encoded, load_rows, make_trainer, train

LAYERS = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config()
    config.num_hidden_layers = LAYERS
    return save_tiny(tmp_path_factory.mktemp("deep") / "llama", config)


def config(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 8, "max_length": 40, "zero_shot": False, "save_steps": 4}
    return replace(TrainConfig(output=output, model=str(model), data=str(data), **settings), **changes)


@pytest.mark.parametrize("changes", [{}, {"head": "words"}, {"gradient_checkpointing": True}], ids=str)
def test_a_run_ends_where_it_would_without(
    deep: Path, topics: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    plain = train(config(deep, topics, tmp_path / "plain", **changes))
    kept = train(config(deep, topics, tmp_path / "kept", activation_cache=1.0, **changes))
    first, second = (load_file(tmp_path / name / files.TENSORS) for name in ("plain", "kept"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    assert kept.summary["losses"][-1][1] == pytest.approx(plain.summary["losses"][-1][1], rel=1e-4)
    assert kept.test == plain.test


def test_known_rows_pass_over_the_lower_layers(deep: Path, topics: Path, tmp_path: Path) -> None:
    given = config(deep, topics, tmp_path / "p", activation_cache=1.0)
    data = load_rows(given)
    task = build(given, data)
    assert task.model.can_pack  # asked once, by running a few tokens
    ran: Counter[int] = Counter()
    for i, layer in enumerate(task.model.base.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.update([i]))
    (rows, _), (validation, _) = encoded(task, data.train), encoded(task, data.validation)
    make_trainer(given, task, rows, validation).train()
    assert task.cache is not None and 0 < len(task.cache) <= len(data.train) + len(data.validation)
    lower = LAYERS // 2
    assert ran[0] == ran[lower - 1] < ran[lower] == ran[LAYERS - 1]
    batches = {name: -(-len(split) // 8) for name, split in (("train", data.train), ("validation", data.validation))}
    assert ran[0] == batches["train"] + batches["validation"]  # once each
    assert ran[lower] >= 3 * ran[0]
    before = ran[0]
    with torch.no_grad():
        task.model(input_ids=torch.tensor([rows.rows[0]["input_ids"]]), prefix=None)
    assert ran[0] == before + 1  # the bare base runs whole
    assert not any("forward" in vars(layer) for layer in task.model.base.model.layers)


def test_memory_is_bounded_and_rows_beyond_it_are_computed(deep: Path, topics: Path, tmp_path: Path) -> None:
    given = config(deep, topics, tmp_path / "p")
    data = load_rows(given)
    task = build(given, data)
    rows, _ = encoded(task, data.train)
    batch = task.collate(rows.rows[:4])
    with torch.no_grad():
        expected = task.eval()(**batch)["logits"]
    width, lengths = task.model.base.config.hidden_size, [len(row["input_ids"]) for row in rows.rows[:4]]
    task.cache = LowerLayers(task.model, NAME, memory=4 * width * (lengths[0] + lengths[1]))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(task(**batch)["logits"], expected, rtol=1e-5, atol=1e-5)
        assert len(task.cache) == 2
        known = task.collate(rows.rows[:2])
        again = task(**known)["logits"]
        task.cache = None
        torch.testing.assert_close(task(**known)["logits"], again, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_kept_is_said(deep: Path, topics: Path, tmp_path: Path) -> None:
    def refused(said: str, **changes: object) -> None:
        with pytest.raises(InputError, match=said):
            train(config(deep, topics, tmp_path / "p", **{"activation_cache": 1.0, **changes}))
        assert not (tmp_path / "p").exists()

    refused("LoRA, adapters and dynamic prefixes change the lower layers", lora=2)
    refused("LoRA, adapters and dynamic prefixes change the lower layers", prefix=PrefixConfig(dynamic="gates"))
    refused("learns in the first layer", prompt_tokens=2)
    refused("learns in the first layer", prefix=PrefixConfig(frozen_layers=0))
    refused("activation_cache must be 0 or more, not -1", activation_cache=-1.0)
