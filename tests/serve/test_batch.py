"""Rows that join and leave: each is continued as `generate` continues it alone, on every decoder family."""

from __future__ import annotations

from random import Random

import pytest
import torch
from conformance.families import DECODERS, VOCABULARY, Family, add, wrapped

from foreword.model import PrefixModel
from foreword.roomy_cache import ROOM
from foreword.serve.batch import Batch, Row

NAMES = ("long", "short", None)


def make_model(name: str) -> PrefixModel:
    model = wrapped(name, None)
    for seed, (prefix, length) in enumerate((("long", 6), ("short", 2))):
        add(model, prefix, start="random", length=length, seed=seed)
    return model.eval()


def run(model: PrefixModel, lives: list[tuple[Row, int, int]]) -> None:
    """Decode rows that join at a step and leave after so many tokens."""
    batch = Batch(model)
    with torch.inference_mode():
        for step in range(200):
            joining = [row for row, at, _ in lives if at == step]
            counts = {row: count for row, _, count in lives}
            staying = [row for row in batch.rows if len(row.chosen) < counts[row]]
            if joining or len(staying) < len(batch.rows):
                logits = batch.change(staying, joining)
                for i, row in enumerate(joining):
                    assert logits is not None
                    row.chosen.append(int(logits[i, 3:].argmax()) + 3)  # generate is told not to end
            if batch.rows:
                for row, token in zip(batch.rows, (batch.step()[:, 3:].argmax(-1) + 3).tolist(), strict=True):
                    row.chosen.append(token)


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_each_row_is_continued_as_if_it_were_alone(family: Family) -> None:
    model, random = make_model(family.name), Random(0)
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(n)] for n in (5, 1, 9, 3, 7, 2)]
    rows = [Row(prompt, NAMES[i % 3]) for i, prompt in enumerate(prompts)]
    lives = list(zip(rows, (0, 0, 2, 3, 3, 30), (8, 3, 12, 2, 9, 5), strict=True))
    run(model, lives)
    for row, _, count in lives:
        expected = Row(row.prompt, row.prefix)
        assert row.chosen[:count] == without_special(model, expected, count), row.prefix


def without_special(model: PrefixModel, row: Row, count: int) -> list[int]:
    """Greedy among the ordinary tokens, one whole forward pass per token and no cache."""
    with torch.inference_mode():
        while len(row.chosen) < count:
            ids = torch.tensor([row.prompt + row.chosen])
            logits = model(input_ids=ids, prefix=row.prefix, use_cache=False).logits[0, -1]
            row.chosen.append(int(logits[3:].argmax()) + 3)
    return row.chosen


def test_rows_outgrow_the_room_kept_ahead() -> None:
    model = make_model("llama")
    rows = [Row([5, 6, 7], "long"), Row([8], None)]
    run(model, [(rows[0], 0, ROOM + 20), (rows[1], 1, ROOM + 9)])
    for row, count in zip(rows, (ROOM + 20, ROOM + 9), strict=True):
        assert row.chosen[:count] == without_special(model, Row(row.prompt, row.prefix), count)


def test_an_emptied_batch_begins_anew() -> None:
    model = make_model("llama")
    batch = Batch(model)
    with torch.inference_mode():
        for _ in range(2):
            row = Row([4, 5, 6], "short")
            logits = batch.change([], [row])
            assert logits is not None
            row.chosen.append(int(logits[0, 3:].argmax()) + 3)
            assert row.chosen == without_special(model, Row(row.prompt, row.prefix), 1)
            assert batch.change([], []) is None and batch.rows == []
        batch.clear()
