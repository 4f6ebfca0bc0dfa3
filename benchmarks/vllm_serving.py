"""64 requests over 8 prefixes and none on vLLM: are the greedy tokens transformers' own, and what does a prefix cost?

Every round sends 64 texts with their prefixes (each of 8 and none in turn), then the same texts without, to
SmolLM2-135M in float32; texts are new in every round, so the prefix cache helps with prefixes alone. The prefixes are
instructions' keys and values with noise of half their deviation, of lengths that do and do not fill blocks. The first
round, whose prefixes are loaded from disk, is compared with foreword on transformers. The last line is JSON.

    make vllm && .venv/bin/python benchmarks/vllm_serving.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from ag_news import commit, hardware

import foreword
from foreword import defaults

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "vllm_serving.json"
LENGTHS = (8, 16, 24, 32, 40, 48, 64, 100)
REQUESTS = 64


def make_prefixes(model: foreword.PrefixModel, folder: Path) -> list[str]:
    """Eight saved prefixes, each of its own length."""
    names = []
    for seed, length in enumerate(LENGTHS):
        name = f"p{length}"
        text = f"You are editor number {seed}. Read the article and go on in its own words."
        form = model.add(name, instruction=text, length=length, seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in form.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.save_pretrained(folder / name, name)
        names.append(name)
    return names


def rounds_of(model: foreword.PrefixModel, names: list[str], rounds: int, length: int) -> list[list[dict[str, Any]]]:
    """Requests per round: `{"ids", "prefix"}`, the first tokens of BBC News articles."""
    texts = [text for text, _ in defaults.bbc_news()[1]][:: max(1, 2086 // (rounds * REQUESTS))]
    chosen: list[str | None] = [*names, None]
    requests = [
        {
            "ids": model.tokenizer(text, add_special_tokens=False)["input_ids"][:length],
            "prefix": chosen[i % len(chosen)],
        }
        for i, text in enumerate(texts[: rounds * REQUESTS])
    ]
    return [requests[i : i + REQUESTS] for i in range(0, len(requests), REQUESTS)]


def reference(model: foreword.PrefixModel, request: dict[str, Any], new: int) -> list[int]:
    """The same request by transformers, alone."""
    ids = torch.tensor([request["ids"]])
    out = model.generate(input_ids=ids, prefix=request["prefix"], max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def on_vllm(python: str, folder: Path, batches: list[list[dict[str, Any]]], new: int) -> dict[str, Any]:
    job = {
        "model": str(defaults.model_path()),
        "prefixes": str(folder / "prefixes"),
        "base": defaults.MODEL,
        "engine": {"dtype": "float32", "block_size": 32, "max_model_len": 512, "max_num_seqs": 16},
        "max_tokens": new,
        "batches": batches,
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "2"}
    command = [python, ROOT / "tests/vllm_engine.py", folder / "job.json", folder / "result.json"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text())


def cache_hits(metrics: list[dict[str, float]], batch: int, source: str) -> dict[str, float]:
    """Tokens asked for and found by one batch; `source` is vLLM's own cache or, external, the connector."""

    def grown(what: str) -> float:
        name = f"vllm:{source}prefix_cache_{what}"
        return metrics[batch].get(name, 0) - (metrics[batch - 1].get(name, 0) if batch else 0)

    return {"queries": grown("queries"), "hits": grown("hits")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=str(ROOT / ".venv-vllm/bin/python"), help="the environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    model = foreword.PrefixModel(*foreword.load_base(defaults.MODEL, torch.float32))
    model.base.generation_config.eos_token_id = None  # both go on behind it
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rounds = rounds_of(
            model, make_prefixes(model, folder / "prefixes"), arguments.rounds + 1, arguments.text_tokens
        )
        bare = [[{**request, "prefix": None} for request in batch] for batch in rounds]
        batches = [batch for pair in zip(rounds, bare, strict=True) for batch in pair]
        result = on_vllm(arguments.python, folder, batches, arguments.new_tokens)
    expected = [reference(model, request, arguments.new_tokens) for request in rounds[0]]
    equal = sum(a == b["ids"] for a, b in zip(expected, result["batches"][0], strict=True))
    differ = sum(a["ids"] != b["ids"] for a, b in zip(*result["batches"][:2], strict=True))
    seconds = [result["seconds"][i : i + 2] for i in range(2, len(batches), 2)]  # the first round warms up
    tokens = REQUESTS * arguments.new_tokens
    report = {
        "requests": REQUESTS,
        "equal_to_transformers": equal,
        "changed_by_their_prefix": differ,
        "tokens_per_second_with": statistics.median(tokens / a for a, _ in seconds),
        "tokens_per_second_without": statistics.median(tokens / b for _, b in seconds),
        "throughput_ratio": statistics.median(b / a for a, b in seconds),
        "rounds": seconds,
        "cold": {s or "own": cache_hits(result["metrics"], 0, s) for s in ("", "external_")},
        "warm": {s or "own": cache_hits(result["metrics"], 2, s) for s in ("", "external_")},
        "text_tokens": arguments.text_tokens,
        "new_tokens": arguments.new_tokens,
        "commit": commit(),
        "hardware": hardware(),
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
