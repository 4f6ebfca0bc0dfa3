"""A folder of prefixes over a small random Llama, the server as a process, and what each answer must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from foreword.bases import load_base
from foreword.forms import PrefixConfig
from foreword.model import PrefixModel
from foreword.tasks.classify import PrefixClassifier
from foreword.tasks.generate import PrefixGenerator

NAMES = [f"p{i}" for i in range(6)]
CLASSIFIERS = ["sorts", "tells"]  # by label words, and by a linear head
OTHERS = ["pairs", "many", "writes"]  # two texts a row, lists of labels, a task that generates
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
WORDS = "the cat sleeps on a warm stone and dog runs after red ball".split()


def add_random(model: PrefixModel, name: str, seed: int, **settings: Any) -> None:
    """A prefix whose keys and values are strong enough to change every answer."""
    form = model.add(name, PrefixConfig(form="direct", start="random", seed=seed, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def save_prefixes(model: PrefixModel, folder: Path) -> None:
    for seed, name in enumerate(NAMES):
        add_random(model, name, seed, length=3 + 2 * (seed % 3))
        model.save_pretrained(folder / name, name)
    for seed, (name, head) in enumerate(zip(CLASSIFIERS, ("words", "linear"), strict=True), 50):
        add_random(model, name, seed, length=4)
        classifier = PrefixClassifier.for_labels(model, ("animal", "tool"), head=head, max_length=48)
        if classifier.head is not None:
            torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(seed))
        classifier.save_pretrained(folder / name)
    for seed, name in enumerate(OTHERS, 60):
        add_random(model, name, seed, length=4)
        tasks = {
            "pairs": lambda: PrefixClassifier.for_labels(model, ("animal", "tool"), fields=("one", "two")),
            "many": lambda: PrefixClassifier.for_labels(model, ("animal", "tool"), multi_label=True),
            "writes": lambda: PrefixGenerator.for_data(model, template="Text: {prompt}\n", max_new_tokens=24),
        }
        tasks[name]().save_pretrained(folder / name)
    shutil.copytree(folder / "p0", folder / "damaged")
    (folder / "damaged" / "prefix.json").write_text("{", encoding="utf-8")
    header = json.loads((folder / "p0" / "prefix.json").read_text(encoding="utf-8"))
    changes = {"moving": {"prefix": {**header["prefix"], "dynamic": "gates"}}, "adapted": {"combined": {"lora": {}}}}
    for name, change in changes.items():
        shutil.copytree(folder / "p0", folder / name)
        (folder / name / "prefix.json").write_text(json.dumps({**header, **change}), encoding="utf-8")


@pytest.fixture(scope="session")
def chat_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama, whose tokenizer knows how a chat is written."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-llama"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prefixes(chat_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixes")
    save_prefixes(PrefixModel(*load_base(str(chat_llama), torch.float32)), folder)
    return folder


class Offline:
    """What each request alone must be answered, by PrefixModel.generate and PrefixClassifier.predict."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.model = PrefixModel(*load_base(str(base), torch.float32))
        self.tokenizer = self.model.tokenizer
        for name in (*NAMES, "writes"):
            self.model.load(folder / name, name)
        self.classifiers = {n: PrefixClassifier.from_pretrained(folder / n, self.model) for n in CLASSIFIERS}
        self.tokens = cache(self._tokens)

    def _tokens(self, model: str, prompt: str, count: int) -> list[int]:
        name = model if model in self.model.configs else None
        ids = self.tokenizer(prompt, add_special_tokens=name is None, return_tensors="pt")["input_ids"]
        made = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), prefix=name, max_new_tokens=count, do_sample=False
        )
        return made[0, ids.shape[1] :].tolist()

    def text(self, model: str, prompt: str, count: int) -> str:
        return self.tokenizer.decode(self.tokens(model, prompt, count), skip_special_tokens=True)


@pytest.fixture(scope="session")
def offline(chat_llama: Path, prefixes: Path) -> Offline:
    return Offline(chat_llama, prefixes)


@dataclass
class Server:
    """A running `foreword serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_server(log: Path, *arguments: object, environment: dict[str, str] | None = None) -> Server:
    """The server as a process, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "foreword", "serve", "--port", str(port), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        try:
            httpx.get(f"{server.url}/healthz")
            return server
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


@pytest.fixture(scope="session")
def server(chat_llama: Path, prefixes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = start_server(log, "--prefixes", prefixes, "--model", chat_llama)
    yield running
    running.end()


@pytest.fixture
def serve(tmp_path: Path, chat_llama: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the test's own; they end with it."""
    started: list[Server] = []

    def start(folder: Path, *arguments: object, **settings: Any) -> Server:
        log = tmp_path / f"server{len(started)}.log"
        started.append(start_server(log, "--prefixes", folder, "--model", chat_llama, *arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
