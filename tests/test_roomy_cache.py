"""A cache with room ahead against transformers' own, whatever is done to it; and when a generation takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from foreword import PrefixConfig, PrefixModel, load_base
from foreword.roomy_cache import ROOM, RoomyLayer, roomy_cache

STEPS: dict[str, Callable[[Cache], Any]] = {
    "nothing": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "cropped": lambda cache: cache.crop(-3),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([-1])),
    "emptied": lambda cache: cache.reset(),
}


def drawn(rows: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, count, 4, generator=draw), torch.randn(rows, 2, count, 4, generator=draw)


@pytest.mark.parametrize("step", STEPS)
def test_it_holds_what_a_plain_cache_holds(step: str) -> None:
    roomy, plain, rows = roomy_cache(), DynamicCache(), 3
    for i, count in enumerate([5, 1, 1, ROOM - 2, 1, 1, 1, 2 * ROOM, 1]):
        made = [cache.update(*drawn(rows, count, i), 0) for cache in (roomy, plain)]
        for own, theirs in zip(*made, strict=True):
            assert torch.equal(own, theirs)
        if i in (2, 5):
            for cache in (roomy, plain):
                STEPS[step](cache)
            rows = len(plain.layers[0].keys) if plain.get_seq_length() else rows
    assert roomy.get_seq_length() == plain.get_seq_length()


def test_a_token_is_written_where_there_is_place_for_it() -> None:
    cache = roomy_cache()
    keys, _ = cache.update(*drawn(2, 5, 0), 0)
    for i in range(ROOM):
        assert cache.update(*drawn(2, 1, i), 0)[0].data_ptr() == keys.data_ptr()
    assert cache.update(*drawn(2, 1, 0), 0)[0].data_ptr() != keys.data_ptr()


def test_layers_of_other_kinds_stay_theirs(tiny_llama: Path) -> None:
    config = load_base(str(tiny_llama))[0].config
    assert {type(layer) for layer in roomy_cache(config).layers} == {RoomyLayer}
    config.sliding_window, config.layer_types = 8, ["sliding_attention", "full_attention"]
    assert [type(layer) for layer in roomy_cache(config).layers] == [DynamicSlidingWindowLayer, RoomyLayer]


def test_a_generation_takes_it_where_it_would_make_a_plain_one(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PrefixModel(*load_base(str(tiny_llama)))
    model.add("p", PrefixConfig(length=3))
    ids = torch.randint(5, 100, (2, 4))

    def cache(prefix: str | None = "p", **given: Any) -> Any:
        settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, **given}
        return model.generate(input_ids=ids, prefix=prefix, disable_compile=True, **settings).past_key_values

    assert {type(layer) for layer in cache().layers} == {RoomyLayer}
    assert RoomyLayer not in {type(layer) for layer in cache(None).layers}, "without a prefix all is the base's own"
    mine = DynamicCache()
    assert cache(past_key_values=mine) is mine
    assert cache(use_cache=False) is None
    assert {type(layer) for layer in cache(generation_config=GenerationConfig(num_beams=2)).layers} == {RoomyLayer}
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert type(cache(generation_config=GenerationConfig(num_beams=1))).__name__ == "StaticCache"
    monkeypatch.undo()
    assert type(cache(cache_implementation="static")).__name__ == "StaticCache"
