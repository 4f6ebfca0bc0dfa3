"""Where the pages and the notebook run: the default model and data, and what they name on the hub, all small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, make_tokenizer, tiny_config
from transformers import LlamaForCausalLM, set_seed

from foreword import defaults

from .pages import ROOT

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SENTENCES = [text for text, _ in ROWS]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model and data, and what pages name on the hub, small."""
    folder = tmp_path_factory.mktemp("world")
    base = folder / "cache" / defaults.MODEL
    set_seed(0)
    LlamaForCausalLM(tiny_config(positions=8192)).save_pretrained(base)
    words = " animal tool business entertainment politics sports tech work private Category: Text: Topic:"
    tokenizer = make_tokenizer(SENTENCES + [words] * 20)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    shutil.copytree(base, folder / "meta-llama" / "Llama-3.2-1B")
    articles = [{"text": SENTENCES[i % 8], "label": TOPICS[i % 5]} for i in range(200)]
    write(folder / "cache" / f"{defaults.DATA}.jsonl", articles)
    table(folder / "fancyzhx" / "ag_news", articles[:20])
    table(folder / "e2e", [{"prompt": text, "completion": text[4:]} for text in SENTENCES])
    pairs = [{"sentence1": text, "sentence2": SENTENCES[0], "score": i / 2} for i, text in enumerate(SENTENCES)]
    table(folder / "stsb", pairs)
    table(folder / "wnut17", [{"tokens": t.split(), "tags": ["O", "B-x"] + ["O"] * 5} for t in SENTENCES[:3]])
    answers = [{"text": text.split()[1], "start": text.index(text.split()[1])} for text in SENTENCES]
    asked = [{"question": "who?", "context": t, "answers": [a]} for t, a in zip(SENTENCES, answers, strict=True)]
    table(folder / "squad", asked)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(folder: Path, rows: list[dict[str, Any]]) -> None:
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", rows)


@pytest.fixture
def world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for one page, in which the small world lies."""
    for part in small_world.iterdir():
        (tmp_path / part.name).symlink_to(part)
    for part in ("examples", "benchmarks"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    return tmp_path
