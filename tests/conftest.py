"""What several test files need: a small Llama with a tokenizer of its own, saved as a folder, and rows to learn.

Every run ends with the table of the largest differences between split and reference attention."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

os.environ["TOKENIZERS_PARALLELISM"] = "false"
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # two workers share two cores

LABELS = ("animal", "tool")
ROWS = [
    ("the cat sleeps on the warm stone", "animal"),
    ("a dog runs after the red ball", "animal"),
    ("the horse eats grass in the field", "animal"),
    ("a bird sings in the old tree", "animal"),
    ("the hammer lies beside the nails", "tool"),
    ("a saw cuts the long board", "tool"),
    ("the drill makes a small hole", "tool"),
    ("a wrench turns the rusty bolt", "tool"),
]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, with `<s>` before every text, as Llama has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )


def save_tiny(folder: Path, config: AutoConfig, auto: type = AutoModelForCausalLM) -> Path:
    """A random model of `config` and the tokenizer, as a folder that `--model` takes."""
    torch.manual_seed(0)
    base = auto.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    base.save_pretrained(folder)
    make_tokenizer([text for text, _ in ROWS] + [" animal tool Category: Text:"] * 20).save_pretrained(folder)
    return folder


def tiny_config(positions: int = 128) -> LlamaConfig:
    """Of a Llama of two layers that reads what `make_tokenizer` makes."""
    return LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


@contextmanager
def interrupted_at_step(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While open, Ctrl-C comes in the middle of that training step of a classifier."""
    from foreword.tasks.classify import PrefixClassifier

    forward, calls = PrefixClassifier.forward, []

    def forward_and_interrupt(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.training)
        if sum(calls) == step and self.training:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PrefixClassifier, "forward", forward_and_interrupt)
        yield


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: `run("eval", folder)` gives (exit code, stdout, stderr)."""
    from foreword import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", tiny_config())


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of three splits; the label is told by the words of the text."""
    folder = tmp_path_factory.mktemp("topics")
    for split, times in (("train", 8), ("validation", 1), ("test", 1)):
        rows = [{"text": f"{text} {i}", "label": label} for i in range(times) for text, label in ROWS]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests recorded as ("difference", (family, measure, value)), the largest of each."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, []):
            for key, value in getattr(report, "user_properties", ()):
                if key == "difference":
                    family, measure, size = value
                    table[family][measure] = max(size, table[family].get(measure, 0.0))
    if not table:
        return
    measures = sorted({measure for row in table.values() for measure in row})
    terminalreporter.section("largest differences from the reference attention, relative")
    terminalreporter.write_line(" ".join([f"{'family':12}", *(f"{m:>18}" for m in measures)]))
    for family, row in table.items():
        cells = (f"{row[m]:18.1e}" if m in row else f"{'-':>18}" for m in measures)
        terminalreporter.write_line(" ".join([f"{family:12}", *cells]))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; tests that ask for one are skipped where none is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = Path(__file__).parents[1] / "benchmarks" / "pictures.py"  # knows where browsers are
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    found = pictures.find_browser()
    if found is None:
        pytest.skip("no Chromium or Chrome is installed; apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
