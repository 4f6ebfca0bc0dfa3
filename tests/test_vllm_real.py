"""vLLM itself serves prefixes: greedy tokens equal foreword's own. Run by `make test-slow` after `make vllm`.

vLLM has its own environment; tests/vllm_engine.py runs there, as $FOREWORD_VLLM_PYTHON or .venv-vllm/bin/python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from foreword.forms import Finished, PrefixConfig
from foreword.interop.vllm import prefixes, requests
from foreword.model import PrefixModel
from foreword.sites import capture

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("FOREWORD_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"vLLM is not installed: {PYTHON} is missing (make vllm)"),
]
NEW = 12
BLOCK = 32
SPECIAL = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.12}


def base_of(family: str) -> transformers.PreTrainedModel:
    layers = {"num_hidden_layers": 3, "head_dim": 32}
    config = {
        "grouped": lambda: transformers.LlamaConfig(**SPECIAL, **SIZES, **layers, num_key_value_heads=2),
        "single": lambda: transformers.LlamaConfig(**SPECIAL, **SIZES, **layers, num_key_value_heads=1),
        "qwen3": lambda: transformers.Qwen3Config(**SPECIAL, **SIZES, **layers, num_key_value_heads=2),
        "windows": lambda: transformers.MistralConfig(
            **SPECIAL, **SIZES, **layers, num_key_value_heads=2, sliding_window=48
        ),
    }[family]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class World:
    """A random model on disk, prefixes of several lengths, and what foreword generates with them."""

    def __init__(self, family: str, root: Path, lengths: dict[str, int], dtype: torch.dtype = torch.float32) -> None:
        self.path, self.folder = root / "model", root / "prefixes"
        self.folder.mkdir(parents=True)
        base_of(family).save_pretrained(self.path)
        base = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).eval()
        base.generation_config.eos_token_id = None  # both go on behind it
        self.model = PrefixModel(base)
        for i, (name, length) in enumerate(lengths.items()):
            self.add(name, length, seed=i)

    def add(self, name: str, length: int, seed: int) -> None:
        window = "slides" if any(site.window for site in self.model.sites) else "visible"
        if name in self.model.forms:
            self.model.remove(name)
        form = self.model.add(name, length=length, window=window, seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in form.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.7)
        self.model.save_pretrained(self.folder / name, name)

    def expected(self, request: dict[str, Any]) -> list[int]:
        ids = torch.tensor([request["ids"]])
        out = self.model.generate(input_ids=ids, prefix=request["prefix"], max_new_tokens=NEW, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    def run(self, batches: list[list[dict[str, Any]]], environment: dict[str, str] | None = None, **engine: Any) -> Any:
        job, result = self.path.parent / "job.json", self.path.parent / "result.json"
        settings = {"dtype": "float32", "block_size": BLOCK, "max_model_len": 256, "max_num_seqs": 8, **engine}
        content = {"model": str(self.path), "prefixes": str(self.folder), "base": self.model.base_id}
        job.write_text(json.dumps({**content, "engine": settings, "max_tokens": NEW, "batches": batches}))
        extra = {"PYTHONPATH": str(ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [PYTHON, ROOT / "tests/vllm_engine.py", job, result],
            env={**os.environ, **extra, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(result.read_text())

    def assert_equal(self, batches: list[list[dict[str, Any]]], **engine: Any) -> Any:
        result = self.run(batches, **engine)
        for batch, found in zip(batches, result["batches"], strict=True):
            for request, output in zip(batch, found, strict=True):
                assert output["ids"] == self.expected(request), request
        return result


def text(seed: int, length: int) -> list[int]:
    return torch.randint(4, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests_for(names: list[str | None], seed: int, length: int = 9) -> list[dict[str, Any]]:
    return [{"ids": text(seed + i, length + i), "prefix": name} for i, name in enumerate(names)]


# Below a block, a block, across blocks, whole blocks.
LENGTHS = {"short": 5, "block": BLOCK, "across": BLOCK + 13, "blocks": 2 * BLOCK}


def bad_requests(world: World) -> list[dict[str, Any]]:
    """None of these may be answered."""
    found = prefixes.PrefixFolder(world.folder).find("across")
    wanted = requests.Wanted("across", found.digest, 3)
    good = {
        "ids": [],
        "prompt": requests.with_placeholders(text(90, 9), found.length, 3),
        "params": requests.transfer_params(wanted),
        "salt": requests.salt("across", found.digest),
    }
    other = requests.Wanted("across", "0" * 64, 3)
    unknown = requests.Wanted("unknown", found.digest, 3)
    return [
        {**good, "params": requests.transfer_params(unknown), "salt": requests.salt("unknown", found.digest)},
        {**good, "params": requests.transfer_params(other), "salt": requests.salt("across", "0" * 64)},
        {**good, "salt": "mine"},
        {**good, "salt": None},
        {**good, "prompt": text(91, 60)},
        {**good, "prompt": good["prompt"][: found.length]},
        {**good, "prompt_logprobs": 1},
        {**good, "params": {"foreword": "across"}},
        {**good, "params": None},
    ]


@pytest.mark.parametrize("family", ["grouped", "single", "qwen3"])
def test_greedy_tokens_equal_forewords_and_bad_requests_fail_alone(family: str, tmp_path: Path) -> None:
    world = World(family, tmp_path, LENGTHS)
    names = [*LENGTHS, None]
    ones = [[request] for request in requests_for(names, 0)]  # one at a time, then again from the prefix cache
    mixed = requests_for([*names, *names, "across", None], 40)
    bad = bad_requests(world)
    result = world.run([*ones, *ones, mixed, bad + mixed])
    for batch, found in zip([*ones, *ones, mixed], result["batches"], strict=False):
        for request, output in zip(batch, found, strict=True):
            assert output["ids"] == world.expected(request), request
    last = result["batches"][-1]
    assert [(output["ids"], output["reason"]) for output in last[: len(bad)]] == [([], "error")] * len(bad)
    assert [output["ids"] for output in last[len(bad) :]] == [world.expected(request) for request in mixed]
    assert result["metrics"][-1]["vllm:prefix_cache_hits"] > 0
    assert any(world.expected(r) != world.expected({**r, "prefix": None}) for r in mixed)


ALL = [*LENGTHS, None]


def test_sliding_windows_pass_over_the_prefix_as_forewords_do(tmp_path: Path) -> None:
    world = World("windows", tmp_path, LENGTHS)  # a window of 48
    batches = [requests_for([*ALL, *ALL], 0), requests_for(ALL, 0, length=70)]
    world.assert_equal([*batches, *batches])


def test_long_prompts_in_chunks_and_preempted_requests_are_exact(tmp_path: Path) -> None:
    world = World("grouped", tmp_path, LENGTHS)
    batch = requests_for([*ALL, *ALL], 0, length=50)
    world.assert_equal([batch], max_num_batched_tokens=32, enable_chunked_prefill=True)
    preempted = world.assert_equal([batch], num_gpu_blocks_override=10, max_model_len=160)
    assert preempted["metrics"][-1]["vllm:num_preemptions"] > 0


def test_without_prefix_caching_every_request_loads_its_own(tmp_path: Path) -> None:
    world = World("grouped", tmp_path, LENGTHS)
    result = world.assert_equal([requests_for([*ALL, *ALL], 0)], enable_prefix_caching=False)
    assert result["metrics"][-1]["vllm:prefix_cache_hits"] == 0


@pytest.mark.parametrize("family", ["grouped", "single"])
def test_two_ranks_hold_their_own_heads(family: str, tmp_path: Path) -> None:
    world = World(family, tmp_path, LENGTHS)
    world.assert_equal(
        [requests_for([*ALL, *ALL], 0)], tensor_parallel_size=2, environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    )


def test_in_bfloat16_a_prefix_that_is_text_is_vllms_own_reading_of_it_up_to_rounding(tmp_path: Path) -> None:
    world = World("grouped", tmp_path, {}, dtype=torch.bfloat16)
    opening = text(7, 41)
    kv = capture(world.model.base, world.model.sites, torch.tensor([opening])).kv
    world.model.forms["text"] = Finished(kv)
    world.model.configs["text"] = PrefixConfig(length=41, positions="after")
    world.model.headers["text"] = {"prefix": {"parameters": 0}}
    world.model.save_pretrained(world.folder / "text", "text")
    trios = [
        ({"ids": text(i, 9), "prefix": "text"}, {"ids": opening + text(i, 9), "prefix": None}, {"ids": text(i, 9)})
        for i in range(8)
    ]
    outputs = world.run([[request for trio in trios for request in trio]], dtype="bfloat16")["batches"][0]
    read, own, bare = outputs[::3], outputs[1::3], outputs[2::3]
    assert [a["ids"][0] for a in read] == [b["ids"][0] for b in own] != [c["ids"][0] for c in bare]
    assert max(abs(a["logprob"] - b["logprob"]) for a, b in zip(read, own, strict=True)) < 0.05
