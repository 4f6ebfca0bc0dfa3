"""Minutes of everything at once: no wrong answer, no request lost, memory flat.

Runs for FOREWORD_SOAK_MINUTES (10 by default): clients that ask and compare, clients that go away, bad requests,
reloads. Half way the server is killed and started again: requests that it held then fail openly, and none is answered
wrongly.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx
import openai
import psutil
import pytest

from .conftest import CLASSIFIERS, NAMES, Offline, Server
from .test_server import BASE, complete, post, prompt_of

MINUTES = float(os.environ.get("FOREWORD_SOAK_MINUTES", "10"))
ASKING = 8


class Soak:
    """Threads that do one thing each to a server until told to stop; what came of it is counted."""

    def __init__(self, server: Server, offline: Offline) -> None:
        self.server, self.offline = server, offline
        self.seen: Counter[str] = Counter()
        self.wrong: list[object] = []
        self.down = threading.Event()  # the server was killed by us
        self._stop = threading.Event()
        random = Random(0)
        self.prompts = [prompt_of(random) for _ in range(12)]
        self.right = {(m, p): offline.text(m, p, 24) for m in (*NAMES, BASE) for p in self.prompts}
        self.labels = {
            name: [one["label"] for one in offline.classifiers[name].predict(self.prompts, prefix=name)]
            for name in CLASSIFIERS
        }

    def begin(self) -> None:
        work = [self.ask] * ASKING + [self.leave, self.leave, self.err, self.reload, self.classify]
        self._threads = [threading.Thread(target=self._repeat, args=(one, Random(i))) for i, one in enumerate(work)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request hangs"

    def _repeat(self, work: Callable[[Random], None], random: Random) -> None:
        while not self._stop.is_set():
            down = self.down.is_set()
            try:
                work(random)
            except (httpx.TransportError, openai.APIConnectionError) as error:
                if not (down or self.down.is_set()):
                    self.wrong.append(error)
                self.seen["lost to the kill"] += 1
                time.sleep(0.1)
            except Exception as error:
                self.wrong.append(error)

    def ask(self, random: Random) -> None:
        model, prompt = random.choice((*NAMES, BASE)), random.choice(self.prompts)
        try:
            if random.random() < 0.5:
                text = complete(self.server, model, prompt, 24).choices[0].text
            else:
                text = "".join(c.choices[0].text for c in complete(self.server, model, prompt, 24, stream=True))
        except openai.RateLimitError:
            self.seen["refused"] += 1
            return
        self.seen["answered"] += 1
        if text != self.right[model, prompt]:
            self.wrong.append((model, prompt, text))

    def classify(self, random: Random) -> None:
        name = random.choice(CLASSIFIERS)
        answer = post(self.server, "/v1/classify", {"model": name, "input": self.prompts})
        self.seen["classified"] += 1
        if [one["label"] for one in answer.json()["data"]] != self.labels[name]:
            self.wrong.append((name, answer.text))

    def leave(self, random: Random) -> None:
        body = {"model": random.choice(NAMES), "prompt": "the cat", "max_tokens": 100, "stream": random.random() < 0.5}
        try:
            httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.03))
        except httpx.ReadTimeout:
            self.seen["left"] += 1

    def err(self, random: Random) -> None:
        body = random.choice([{"model": "p0"}, {"model": "none", "prompt": "a"}, [], {"model": "p0", "prompt": ""}])
        status = post(self.server, "/v1/completions", body).status_code
        self.seen["bad"] += 1
        if status not in (400, 404):
            self.wrong.append((body, status))
        time.sleep(0.02)

    def reload(self, random: Random) -> None:
        answer = post(self.server, f"/v1/prefixes/{random.choice(NAMES)}/reload", None)
        self.seen["reloaded"] += 1
        if answer.status_code != 200:
            self.wrong.append(answer.text)
        time.sleep(0.05)

    def memory(self) -> float:
        return psutil.Process(self.server.process.pid).memory_info().rss / 2**20


@pytest.mark.slow
def test_soak(serve: Callable[..., Server], prefixes: Path, offline: Offline) -> None:
    soak = Soak(serve(prefixes, "--rows", 8), offline)
    third = MINUTES * 60 / 3
    soak.begin()
    try:
        time.sleep(third)
        soak.down.set()
        soak.server.end(signal.SIGKILL)
        soak.server = serve(prefixes, "--rows", 8)
        soak.down.clear()
        time.sleep(third)
        sizes = [soak.memory()]
        time.sleep(third)
        sizes.append(soak.memory())
    finally:
        soak.finish()
    print(f"\nsoak: {MINUTES:g} minutes, {dict(soak.seen)}, memory {sizes[0]:.0f} to {sizes[1]:.0f} MiB")
    assert not soak.wrong, soak.wrong[:3]
    assert min(soak.seen[kind] for kind in ("answered", "classified", "left", "bad", "reloaded")) > 0
    assert sizes[1] < sizes[0] * 1.1 + 5
    assert complete(soak.server, "p1", "the cat").choices[0].text == offline.text("p1", "the cat", 12)
    assert soak.server.end() == 0
