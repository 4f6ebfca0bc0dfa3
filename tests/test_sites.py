"""Sites: found by running, projected by the model's own code, and left as they were."""

from __future__ import annotations

import pytest
import torch
import transformers
from conformance.families import ALL, SIZES, Family, add, base, fresh, off_by, text, wrapped

from foreword.attention import NAME
from foreword.sites import capture, find_sites, moves_positions, project, routed


@pytest.mark.parametrize("family", ALL, ids=str)
def test_projecting_the_captured_hidden_states_gives_the_captured_keys(family: Family) -> None:
    """The model's own forward on P^l: norms, biases, fused weights, latent projections and rotation included."""
    model = base(family.name)
    sites = find_sites(model)
    read = capture(model, sites, text(1, 5))
    for site in sites:
        with torch.no_grad(), routed(model):
            made = project(site, read.calls[site.name], read.hidden[site.name])
        for found, expected in zip(made, read.kv.sites[site.name], strict=True):
            assert off_by(found, expected) < 1e-6


def test_capture_reads_what_the_cache_holds() -> None:
    """The captured keys and values are those that transformers itself would keep in its cache."""
    for name in ("llama", "gpt2", "gemma3", "phi3"):
        model, ids = base(name), text(1, 4)
        read = capture(model, find_sites(model), ids)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        for layer, kv in zip(cache.layers, read.kv.sites.values(), strict=True):
            length = layer.keys.shape[2]  # a sliding layer keeps its window alone
            assert off_by(kv.keys[:, :, -length:], layer.keys) < 1e-6
            assert off_by(kv.values[:, :, -length:], layer.values) < 1e-6


def test_capture_of_some_sites_leaves_the_others_out() -> None:
    model = base("llama")
    sites = find_sites(model)
    read = capture(model, sites[1:], text(1, 5))
    assert list(read.kv.sites) == list(read.hidden) == [sites[1].name]


def test_windows_heads_and_sizes() -> None:
    shapes = {
        name: [(s.kv_heads, s.key_size, s.value_size, s.window) for s in find_sites(base(name))]
        for name in ("llama-mqa", "mistral", "gemma4", "deepseek-v3")
    }
    assert shapes["llama-mqa"] == [(1, 8, 8, None)] * 2
    assert shapes["mistral"] == [(2, 8, 8, 4)] * 2
    assert shapes["gemma4"] == [(2, 8, 8, 4), (1, 16, 16, None)]
    assert shapes["deepseek-v3"] == [(4, 16, 8, None)] * 2


@pytest.mark.parametrize(
    "name, moves",
    [("llama", True), ("gpt2", True), ("bert", True), ("roberta", False), ("bart", False), ("t5", False)],
)
def test_positions_move_where_the_base_counts_from_nought(name: str, moves: bool) -> None:
    assert moves_positions(base(name)) is moves


def test_finding_sites_leaves_modes_and_hooks_as_they_were() -> None:
    model = fresh("llama")
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    capture(model, find_sites(model), text(1, 3))
    moves_positions(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation != NAME


def test_routing_ends_with_an_exception() -> None:
    model = base("bart")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), routed(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == before


def test_no_hook_and_no_prefix_stay_after_a_call() -> None:
    model = wrapped("llama", own=True)
    add(model, "q")
    with torch.no_grad(), pytest.raises(ZeroDivisionError), model.reading(["p", "q"]):
        model.base(text(2))
        raise ZeroDivisionError
    assert not model.base._forward_pre_hooks
    assert all(getattr(site.module, "_foreword_prefix", None) is None for site in model.sites)


def test_a_tiny_vocabulary_is_probed_too() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 6})
    assert len(find_sites(transformers.LlamaForCausalLM(config))) == 2


def test_a_base_without_a_head_has_sites() -> None:
    assert len(find_sites(transformers.AutoModel.from_config(base("llama").config))) == 2
