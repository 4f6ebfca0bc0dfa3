"""Served: many prefixes of SmolLM2-135M at once, against one at a time, against the bare base, and against disk.

Server and clients share the machine, on loopback. Untrained prefixes at their vocabulary start serve as well as
trained ones here: a token costs the same whatever it says. Every answer is compared with the offline greedy one; a
difference fails the run. Three measurements, each a median over `--repeats`:

- load: `--clients` clients in a closed loop over 8 prefixes, tokens per second; the same requests one after the other;
  the same load on the bare base.
- start: seconds until the server answers with `--many` prefixes in the folder, beyond those with one.
- cold: the first token of a prefix that is on disk against one in memory, with room for `--resident` of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
import torch
from ag_news import commit, hardware

from foreword import PrefixConfig, PrefixModel, load_base

RESULTS = Path(__file__).parent / "results" / "serving.json"
MODEL = "smollm2-135m-instruct"
LENGTHS = (16, 22, 32, 16, 48, 22, 64, 32)  # of the 8 prefixes
WORDS = "the bank raised its rates while markets fell and ministers met in the capital to talk about trade".split()
PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")


def requests(models: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(model, prompt), prompts of 8 to 40 words."""
    random = Random(seed)
    return [(models[i % len(models)], " ".join(random.choices(WORDS, k=random.randint(8, 40)))) for i in range(count)]


def offline(model: PrefixModel, asked: Sequence[tuple[str, str]], tokens: int) -> list[str]:
    """Each request alone, by `generate`."""
    answers = []
    for name, prompt in asked:
        prefix = name if name in model.configs else None
        inputs = model.tokenizer(prompt, return_tensors="pt", add_special_tokens=prefix is None)
        ids = model.generate(**inputs, prefix=prefix, max_new_tokens=tokens, do_sample=False)
        answers.append(model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def make_prefixes(model: PrefixModel, folder: Path, many: Path, count: int) -> list[str]:
    """The 8 prefixes in `folder`, and `count` copies of the first, each under its own name, in `many`."""
    names = [f"job{i}" for i in range(len(LENGTHS))]
    for seed, (name, length) in enumerate(zip(names, LENGTHS, strict=True)):
        model.add(name, PrefixConfig(form="direct", start="vocabulary", length=length, seed=seed))
        model.save_pretrained(folder / name, name)
    for i in range(count):
        shutil.copytree(folder / names[0], many / f"copy{i}")
    return names


@contextmanager
def serving(*arguments: object) -> Any:
    """A server process; gives its address and the seconds until it answered."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "foreword", "serve", "--port", str(port), "--model", MODEL, *map(str, arguments)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.02)
        yield url, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def ask(client: httpx.Client, model: str, prompt: str, tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def load(url: str, asked: Sequence[tuple[str, str]], clients: int, tokens: int) -> tuple[list[str], float]:
    """All answers in order, and the seconds they took."""
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda one: ask(client, *one, tokens), asked))
        return answers, time.perf_counter() - began


def first_token(client: httpx.Client, model: str) -> float:
    """Seconds from sending a request to its first streamed token."""
    body = {"model": model, "prompt": " ".join(WORDS), "max_tokens": 2, "temperature": 0, "stream": True}
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        seconds = time.perf_counter() - began
        for _ in lines:
            pass
    return seconds


def measure_load(model: PrefixModel, folder: Path, names: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second together, one at a time, and on the bare base, interleaved; every answer checked."""
    on_prefixes = requests(names, given.requests, 0)
    on_base = [(MODEL, prompt) for _, prompt in on_prefixes]
    loads = {"together": (on_prefixes, given.clients), "one_at_a_time": (on_prefixes, 1)}
    loads["base"] = (on_base, given.clients)
    right = {id(asked): offline(model, asked, given.tokens) for asked in (on_prefixes, on_base)}
    counts = {
        id(asked): sum(len(model.tokenizer(t)["input_ids"]) for t in right[id(asked)]) for asked, _ in loads.values()
    }
    speeds: dict[str, list[float]] = {name: [] for name in loads}
    wrong = 0
    with serving("--prefixes", folder) as (url, _):
        load(url, on_prefixes[: given.clients], given.clients, 4)
        for _ in range(given.repeats):
            for name, (asked, clients) in loads.items():
                answers, seconds = load(url, asked, clients, given.tokens)
                wrong += sum(a != b for a, b in zip(answers, right[id(asked)], strict=True))
                speeds[name].append(counts[id(asked)] / seconds)
    figures = {f"{name}_tokens_per_second": median(values) for name, values in speeds.items()}
    ratios = {
        "together_over_one_at_a_time": median(speeds["together"]) / median(speeds["one_at_a_time"]),
        "together_over_base": median(speeds["together"]) / median(speeds["base"]),
    }
    checked = given.requests * len(loads) * given.repeats
    return {**figures, **ratios, "answers_checked": checked, "answers_wrong": wrong, "each": speeds}


def measure_start(folder: Path, many: Path, given: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"one": [], "many": []}
    single = folder / "job0"
    for _ in range(given.repeats):
        with serving(single) as (_, took):
            seconds["one"].append(took)
        with serving("--prefixes", many) as (_, took):
            seconds["many"].append(took)
    one, all_of_them = median(seconds["one"]), median(seconds["many"])
    return {"one_seconds": one, "many_seconds": all_of_them, "beyond_seconds": all_of_them - one, "each": seconds}


def measure_cold(many: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Cold and warm first tokens in turn, once the memory is full of other prefixes."""
    size = sum(f.stat().st_size for f in (many / "copy0").glob("*.safetensors"))
    memory = max(1, -(-size * given.resident // (1 << 20)))
    cold, warm = [], []
    with (
        serving("--prefixes", many, "--memory", memory) as (url, _),
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        fill = min(given.resident, given.many // 2)
        for i in range(fill):
            first_token(client, f"copy{i}")
        for i in range(fill, min(given.many, fill + given.probes)):
            cold.append(first_token(client, f"copy{i}"))
            warm.append(first_token(client, f"copy{i}"))
        page = client.get("/metrics").text
    held = next(float(line.split()[1]) for line in page.splitlines() if line.startswith("foreword_prefixes "))
    later = median(c - w for c, w in zip(cold, warm, strict=True))
    return {
        "cold_ms": 1e3 * median(cold),
        "warm_ms": 1e3 * median(warm),
        "cold_later_ms": 1e3 * later,
        "cold_later_worst_ms": 1e3 * max(c - w for c, w in zip(cold, warm, strict=True)),
        "resident": held,
        "probes": len(cold),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument("--resident", type=int, default=64)
    parser.add_argument("--probes", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    began_at = commit()
    model = PrefixModel(*load_base(MODEL, torch.float32))
    with tempfile.TemporaryDirectory() as place:
        folder, many = Path(place) / "jobs", Path(place) / "many"
        names = make_prefixes(model, folder, many, given.many)
        record = {
            "load": measure_load(model, folder, names, given),
            "start": measure_start(folder, many, given),
            "cold": measure_cold(many, given),
        }
    settings = {key: value for key, value in vars(given).items() if key != "output"}
    record |= {"settings": settings, "lengths": LENGTHS, "commit": began_at, "hardware": hardware()}
    record["versions"] = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record[name] for name in ("load", "start", "cold")}))
    if record["load"]["answers_wrong"]:
        sys.exit(f"{record['load']['answers_wrong']} answers differ from the offline ones")


if __name__ == "__main__":
    main()
