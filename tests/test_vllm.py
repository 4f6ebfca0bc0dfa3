"""What the connector and the front decide, without vLLM: its few names that they import are replaced here."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from foreword import files, model
from foreword.errors import InputError
from foreword.interop.vllm import cache, prefixes, requests
from foreword.model import PrefixModel

P, LAYERS, HEADS, SIZE, BLOCK = 6, 3, 2, 8, 4
DIGEST = "d" * 64
WANTED = requests.Wanted("news", DIGEST, 9)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prefixes `news` and `mail`."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    own = PrefixModel(transformers.LlamaForCausalLM(config).eval())
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("news", "mail")):
        own.add(name, length=P, seed=seed)
        own.save_pretrained(folder / name, name)
    return folder


# ---- requests


def test_names_of_prefixes_are_the_models_own() -> None:
    assert prefixes.NAME.pattern == model.NAME_PATTERN.pattern


def test_a_request_says_its_prefix_and_gets_it_back() -> None:
    assert requests.wanted_by(requests.transfer_params(WANTED)) == WANTED
    assert requests.wanted_by(None) is None and requests.wanted_by({"do_remote_prefill": True}) is None
    assert requests.with_placeholders([1, 2], 3, 9) == [9, 9, 9, 1, 2]
    with pytest.raises(InputError, match="prompt is empty"):
        requests.with_placeholders([], 3, 9)


@pytest.mark.parametrize(
    "given",
    ["news", {}, {"prefix": "news"}, {"prefix": 1, "digest": DIGEST, "placeholder": 9},
     {"prefix": "news", "digest": DIGEST, "placeholder": True},
     {"prefix": "news", "digest": DIGEST, "placeholder": 9, "path": "/"}],
)  # fmt: skip
def test_malformed_parameters_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="malformed"):
        requests.wanted_by({"foreword": given})


def test_salt_prompt_and_parameters_are_checked_against_each_other() -> None:
    salt, prompt = requests.salt("news", DIGEST), [9] * P + [1]
    assert requests.refusal(WANTED, P, prompt, salt) is None
    assert requests.refusal(None, 0, [1], "mine") is None and requests.refusal(None, 0, [1], None) is None
    for wanted, ids, given, reason in (
        (WANTED, prompt, None, "cache salt is not that of the prefix"),
        (WANTED, prompt, requests.salt("news", "e" * 64), "cache salt is not that of the prefix"),
        (WANTED, [9] * P, salt, "no text behind 6 placeholders"),
        (WANTED, None, salt, "no text behind"),
        (WANTED, [9] * (P - 1) + [1, 1], salt, "does not begin with 6 placeholders"),
        (None, prompt, salt, "names none"),
    ):
        assert reason in str(requests.refusal(wanted, P, ids, given))


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_body_is_rewritten_and_what_the_client_may_not_set_is_dropped() -> None:
    body = {
        "model": "news", "prompt": ["ab", "c"], "temperature": 0, "seed": 0, "stream": False, "logprobs": None,
        "kv_transfer_params": {"foreword": {}}, "cache_salt": "mine", "vllm_xargs": {"kv_transfer_params": 1},
    }  # fmt: skip
    assert requests.rewrite(body, WANTED, 2, encode, "base") == {
        "model": "base",
        "prompt": [[9, 9, 97, 98], [9, 9, 99]],
        "temperature": 0,
        "seed": 0,
        "kv_transfer_params": requests.transfer_params(WANTED),
        "cache_salt": requests.salt("news", DIGEST),
    }
    plain = requests.rewrite({**body, "model": "base", "echo": True}, None, 0, encode, "base")
    assert plain["prompt"] == ["ab", "c"] and plain["echo"]
    assert not plain.keys() & set(requests.DROPPED)


@pytest.mark.parametrize("field", requests.REFUSED)
def test_what_would_skip_the_prefix_is_refused_with_one(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} cannot be asked for with a prefix"):
        requests.rewrite({"prompt": "a", field: 1}, WANTED, 2, encode, "base")


def test_unknown_fields_and_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="the field magic is unknown"):
        requests.rewrite({"prompt": "a", "magic": 1}, None, 0, encode, "base")
    assert requests.prompt_ids([1, 2], encode) == [[1, 2]] and requests.prompt_ids([[1], [2]], encode) == [[1], [2]]
    for prompt in (None, [], 3, [1, "a"], [[1], "a"], [["a"]], [True]):
        with pytest.raises(InputError, match="the prompt must be"):
            requests.prompt_ids(prompt, encode)


def test_usage_counts_no_placeholders() -> None:
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 5,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    found = requests.without_placeholders({"usage": usage, "model": "base"}, 6, 2, "news")
    assert found["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert requests.without_placeholders({"model": "base"}, 6, 1, "news") == {"model": "news"}


# ---- the cache


def test_slots_follow_the_blocks_and_leave_the_null_block_out() -> None:
    assert cache.slots([5, 2], 4, 0, 6) == ([0, 1, 2, 3, 4, 5], [20, 21, 22, 23, 8, 9])
    assert cache.slots([5, 2], 4, 4, 6) == ([4, 5], [8, 9])
    assert cache.slots([0, 2], 4, 0, 6) == ([4, 5], [8, 9])


def test_ranks_share_heads_or_repeat_one() -> None:
    heads = list(range(8))
    assert [heads[cache.head_slice(8, 4, r)] for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [heads[cache.head_slice(2, 4, r)] for r in range(4)] == [[0], [0], [1], [1]]
    with pytest.raises(InputError, match="3 key-value heads cannot be laid over 2 ranks"):
        cache.head_slice(3, 2, 0)


def test_layers_come_in_order_of_their_numbers() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(12)]
    assert cache.in_order(reversed(names)) == names
    for wrong in ([], names[1:], [*names, "draft.layers.3.attn"]):
        with pytest.raises(InputError, match="not every layer"):
            cache.in_order(wrong)
    with pytest.raises(InputError, match="is not numbered"):
        cache.layer_index("visual.2.layers.3")


# ---- the folder


def test_the_folder_lists_finds_and_refuses(served: Path, tmp_path: Path) -> None:
    shutil.copytree(served, tmp_path / "served")
    folder = prefixes.PrefixFolder(tmp_path / "served")
    (tmp_path / "served/broken").mkdir()
    names, refused = folder.names()
    assert names == ["mail", "news"] and "holds no saved prefix" not in names
    assert refused == {"broken": "there is no prefix 'broken'."}
    (tmp_path / "served/broken/prefix.json").write_text("{")
    assert "damaged" in folder.names()[1]["broken"]
    for name in ("..", "", "a/b", "../served/news", "unknown", "x" * 65):
        with pytest.raises(InputError, match="there is no prefix"):
            folder.find(name)
    with pytest.raises(InputError, match="is no folder"):
        prefixes.PrefixFolder(tmp_path / "nowhere")


def test_a_prefix_that_changed_on_disk_is_read_again(served: Path, tmp_path: Path) -> None:
    shutil.copytree(served, tmp_path / "served")
    folder = prefixes.PrefixFolder(tmp_path / "served")
    first = folder.find("news")
    assert folder.find("news") is first
    shutil.rmtree(tmp_path / "served/news")
    shutil.copytree(served / "mail", tmp_path / "served/news")
    assert folder.find("news").digest == folder.find("mail").digest != first.digest


def test_only_prefixes_of_the_engines_model_fit(served: Path) -> None:
    found = prefixes.PrefixFolder(served).find("news")
    base, layers = found.header["base"]["id"], [prefixes.CacheLayer(HEADS, SIZE, SIZE)] * LAYERS
    prefixes.check_fits(found, layers, 1, base)
    prefixes.check_fits(found, [prefixes.CacheLayer(1, SIZE, SIZE)] * LAYERS, 2, base)
    prefixes.check_fits(found, [prefixes.CacheLayer(1, SIZE, SIZE)] * LAYERS, 4, base)
    for wrong, ranks, name, reason in (
        (layers, 1, "other", "was made for .* and the engine serves other"),
        (layers[1:], 1, base, "has 3 layers and the model 2"),
        (
            [*layers[1:], prefixes.CacheLayer(HEADS, SIZE, 4)],
            1,
            base,
            "layer 2 of prefix 'news' has other heads or sizes",
        ),
        (layers, 2, base, "layer 0"),
    ):
        with pytest.raises(InputError, match=reason):
            prefixes.check_fits(found, wrong, ranks, name)


def test_export_copies_what_can_be_served_under_a_name(served: Path, tmp_path: Path) -> None:
    assert prefixes.export(served / "news", tmp_path / "out/front-page") == []
    assert prefixes.PrefixFolder(tmp_path / "out").find("front-page").length == P
    with pytest.raises(InputError, match="cannot be requested by name"):
        prefixes.export(served / "news", tmp_path / "out/front page")
    header, tensors = files.read(served / "news")
    header["prefix"]["positions"] = "kept"
    files.write(tmp_path / "kept", header, tensors)
    with pytest.raises(InputError, match="vLLM cannot carry this prefix: its text keeps positions"):
        prefixes.export(tmp_path / "kept", tmp_path / "out/kept")
    assert not (tmp_path / "out/kept").exists()


# ---- the connector, on an engine of a few lines


@dataclasses.dataclass
class Results:
    finished_sending: set[str] = dataclasses.field(default_factory=set)
    finished_recving: set[str] = dataclasses.field(default_factory=set)
    failed_recving: set[str] = dataclasses.field(default_factory=set)


class Base:
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config = vllm_config

    def _get_connector_metadata(self) -> Any:
        return self.orders


class Writer:
    """An attention layer whose cache is `[slots, heads, d]` twice."""

    def __init__(self, heads: int) -> None:
        self.impl, self.kv_cache = self, torch.zeros(2, 16 * BLOCK, heads, SIZE)

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, mapping: Any) -> None:
        kv_cache[0][mapping], kv_cache[1][mapping] = key, value


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Any:
    root = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    parts = root.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for name in [*names, "vllm.distributed.parallel_state", "vllm.logger"]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[root].__dict__.update(
        KVConnectorBase_V1=Base, SupportsHMA=type("SupportsHMA", (), {}), KVConnectorTransferResults=Results,
        KVConnectorMetadata=type("KVConnectorMetadata", (), {}), KVConnectorRole=type("KVConnectorRole", (), {}),
    )  # fmt: skip
    log = SimpleNamespace(warning=lambda *_: None, exception=lambda *_: None)
    sys.modules["vllm.logger"].init_logger = lambda name: log
    sys.modules["vllm.distributed.parallel_state"].get_tensor_model_parallel_rank = lambda: 1
    monkeypatch.delitem(sys.modules, "foreword.interop.vllm.connector", raising=False)
    return importlib.import_module("foreword.interop.vllm.connector")


def engine(connector: Any, served: Path, ranks: int = 1, **changes: Any) -> Any:
    names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
    spec = SimpleNamespace(
        block_size=BLOCK, num_kv_heads=max(1, HEADS // ranks), head_size=SIZE, head_size_v=None
    )  # fmt: skip
    groups = [SimpleNamespace(layer_names=names[:2], kv_cache_spec=spec)]
    groups.append(SimpleNamespace(layer_names=names[2:], kv_cache_spec=spec))
    base = prefixes.PrefixFolder(served).find("news").header["base"]["id"]
    transfer = SimpleNamespace(
        kv_load_failure_policy="fail", kv_connector_extra_config={"prefixes": str(served), "base": base}
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="somewhere", dtype=torch.float32, use_mla=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        kv_transfer_config=transfer,
        compilation_config=SimpleNamespace(static_forward_context={n: Writer(spec.num_kv_heads) for n in names}),
    )
    for path, value in changes.items():
        part, key = path.split("__")
        setattr(getattr(config, part) if part != "config" else config, key, value)
    return connector.ForewordConnector(config, None, SimpleNamespace(kv_cache_groups=groups))


def request_for(served: Path, name: str = "news", **changes: Any) -> SimpleNamespace:
    found = prefixes.PrefixFolder(served).find("news")
    wanted = requests.Wanted(name, found.digest, 9)
    ids = requests.with_placeholders([1, 2, 3], P, 9)
    return SimpleNamespace(**{
        "request_id": "r", "kv_transfer_params": requests.transfer_params(wanted), "prompt_token_ids": ids,
        "cache_salt": requests.salt(name, found.digest), "skip_reading_prefix_cache": False, "num_tokens": len(ids),
        **changes,
    })  # fmt: skip


def step(own: Any, request: Any, blocks: tuple[list[int], ...], computed: int = 0) -> Results:
    """A request's first step, scheduler and worker."""
    count, later = own.get_num_new_matched_tokens(request, computed)
    assert later == (count > 0)
    own.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: blocks), count)
    own.orders = own.build_connector_meta(None)
    own.start_load_kv(None)
    return own.get_transfer_results(set())


def written(own: Any, layer: int) -> torch.Tensor:
    return own._vllm_config.compilation_config.static_forward_context[f"model.layers.{layer}.attn"].kv_cache


def test_a_prefix_is_written_where_the_scheduler_says(connector: Any, served: Path) -> None:
    own, request = engine(connector, served), request_for(served)
    own.register_kv_caches({})
    own.on_new_request(request)
    results = step(own, request, ([5, 2, 7], [0, 3, 8]))
    assert results.finished_recving == {"r"} and not results.failed_recving
    _, tensors = files.read(served / "news")
    for layer in range(LAYERS):
        for part, cached in zip(("keys", "values"), written(own, layer), strict=True):
            right = tensors[f"model.layers.{layer}.self_attn.{part}"].transpose(0, 1)
            expected = torch.zeros_like(cached)
            if layer < 2:
                expected[20:24], expected[8:10] = right[:4], right[4:]
            else:  # the window has passed the first block
                expected[12:14] = right[4:]
            assert torch.equal(cached, expected)
    assert own.get_transfer_results(set()).finished_recving == set()
    assert own.request_finished_all_groups(request, ()) == (False, None)
    assert own.get_num_new_matched_tokens(request, 0) == (0, False)


def test_only_what_is_not_cached_is_written(connector: Any, served: Path) -> None:
    own, request = engine(connector, served), request_for(served)
    own.on_new_request(request)
    step(own, request, ([5, 2, 7], [5, 2, 7]), computed=4)
    assert not written(own, 0)[:, 20:24].any() and written(own, 0)[:, 8:10].any()
    assert own.get_num_new_matched_tokens(request, 8) == (0, False)


def test_a_rank_writes_its_own_head(connector: Any, served: Path) -> None:
    own, request = engine(connector, served, ranks=2), request_for(served)
    own.on_new_request(request)
    step(own, request, ([5, 2, 7], [5, 2, 7]))
    _, tensors = files.read(served / "news")
    assert torch.equal(written(own, 1)[0][20:24, 0], tensors["model.layers.1.self_attn.keys"][1, :4])


def test_a_request_for_no_prefix_passes_by(connector: Any, served: Path) -> None:
    own, request = engine(connector, served), request_for(served, kv_transfer_params=None, cache_salt=None)
    own.on_new_request(request)
    assert step(own, request, ([5, 2, 7],)) == Results()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "unknown"}, {"name": "../news"}, {"cache_salt": None}, {"cache_salt": "mine"},
        {"prompt_token_ids": [1] * 9}, {"prompt_token_ids": [9] * P}, {"prompt_token_ids": None},
        {"skip_reading_prefix_cache": True}, {"kv_transfer_params": {"foreword": "news"}}, {"kv_transfer_params": None},
        {"kv_transfer_params": requests.transfer_params(WANTED), "cache_salt": requests.salt("news", DIGEST)},
    ],
)  # fmt: skip
def test_a_bad_request_fails_alone_and_nothing_is_written(connector: Any, served: Path, changes: dict) -> None:
    own, request = engine(connector, served), request_for(served, **changes)
    own.on_new_request(request)
    assert request.skip_reading_prefix_cache is False
    results = step(own, request, ([5, 2, 7], [5, 2, 7]))
    assert results.failed_recving == results.finished_recving == {"r"}
    assert not written(own, 0).any()


def test_a_prefix_of_another_base_fails_its_request(connector: Any, served: Path) -> None:
    own, request = engine(connector, served), request_for(served)
    own._base = "another"
    own.on_new_request(request)
    assert step(own, request, ([5, 2, 7], [5, 2, 7])).failed_recving == {"r"}


@pytest.mark.parametrize("damage", ["changed", "damaged"])
def test_a_prefix_that_changes_before_it_is_read_fails_its_request(
    connector: Any, served: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(served, tmp_path / "served")
    own, request = engine(connector, tmp_path / "served"), request_for(served)
    own.on_new_request(request)
    if damage == "changed":
        shutil.rmtree(tmp_path / "served/news")
        shutil.copytree(served / "mail", tmp_path / "served/news")
    else:
        (tmp_path / "served/news/prefix.safetensors").write_bytes(b"nothing")
    assert step(own, request, ([5, 2, 7], [5, 2, 7])).failed_recving == {"r"}
    assert not written(own, 0).any()


def test_a_worker_keeps_a_bounded_number_of_prefixes(
    connector: Any, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "RESIDENT", 1)
    own = engine(connector, served)
    for name in ("news", "mail", "news"):
        found = prefixes.PrefixFolder(served).find(name)
        own._tensors(connector.Load("r", name, found.digest, 0, P, ()))
        assert list(own._resident) == [found.digest]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_config__use_mla": True}, "latent attention"),
        ({"cache_config__cache_dtype": "fp8"}, "a cache of fp8 would round the prefix"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"config__speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config__kv_load_failure_policy": "recompute"}, "must be fail"),
    ],
)
def test_an_engine_that_would_lose_the_prefix_does_not_start(
    connector: Any, served: Path, changes: dict, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        engine(connector, served, **changes)


def test_a_backend_without_a_writer_does_not_start(connector: Any, served: Path) -> None:
    own = engine(connector, served)
    own._vllm_config.compilation_config.static_forward_context["model.layers.2.attn"].impl = object()
    with pytest.raises(InputError, match="the attention backend object has no writer"):
        own.register_kv_caches({})


def test_the_engines_setting_names_the_connector() -> None:
    config = requests.connector_config("served", "base")
    assert json.loads(json.dumps(config))["kv_connector_extra_config"] == {"prefixes": "served", "base": "base"}
    assert config["kv_connector_module_path"] == "foreword.interop.vllm.connector"
