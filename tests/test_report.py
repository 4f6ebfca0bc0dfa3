"""report.html: from any header, self-contained, escaped, with the figures of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreword import InputError, PrefixConfig, PrefixModel, RunError, TrainConfig, files, load_base, pages
from foreword.progress import validations
from foreword.report import mistakes, write_report
from foreword.train import train


def saved(tiny_llama: Path, folder: Path, training: dict[str, Any] | None, task: dict[str, Any] | None = None) -> Path:
    base, tokenizer = load_base(str(tiny_llama))
    model = PrefixModel(base, tokenizer)
    model.add("p", PrefixConfig(length=3))
    model.save_pretrained(folder, task=task, training=training)
    return folder


def test_a_run_leaves_its_report(tiny_llama: Path, topics: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        output=tmp_path / "run", model=str(tiny_llama), data=str(topics), epochs=1, batch_size=8, max_length=40
    )
    summary = train(config).summary
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{summary['test']['accuracy']:.4f}" in page and f"{summary['zero_shot']['f1']:.4f}" in page
    assert page.count("<svg") == 3 and "foreword.load(&#34;run&#34;)" in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")
    wrong = summary["rows"]["test"] - round(summary["test"]["accuracy"] * summary["rows"]["test"])
    assert page.count('<td class="text">') == wrong
    assert [entry["step"] for entry in summary["validations"]] == sorted({e["step"] for e in summary["validations"]})
    assert {"loss", "accuracy"} <= summary["validations"][0].keys()
    assert not any(key.endswith("runtime") for key in summary["validations"][0])


def test_other_tasks_have_what_they_have(tiny_llama: Path, tmp_path: Path) -> None:
    training = {"test": {"pearson": 0.5, "rmse": 0.25}, "losses": [[1, 2.0], [2, 1.5]], "zero_shot": None}
    folder = saved(tiny_llama, tmp_path / "p", training, {"task": "regress", "labels": []})
    page = write_report(folder).read_text(encoding="utf-8")
    assert "pearson" in page and "0.5000" in page and page.count("<svg") == 1
    assert "Confusion" not in page and "highest confidence" not in page and "zero-shot" not in page


def test_a_prefix_that_was_never_trained(tiny_llama: Path, tmp_path: Path) -> None:
    page = write_report(saved(tiny_llama, tmp_path / "p", None)).read_text(encoding="utf-8")
    assert "<svg" not in page and "model.generate" in page


def test_texts_and_labels_are_escaped_and_many_labels_listed(tiny_llama: Path, tmp_path: Path) -> None:
    labels = [f"<b>{i}</b>" for i in range(21)]
    matrix = np.diag(range(21)).tolist()
    matrix[3][4] = 7
    folder = saved(tiny_llama, tmp_path / "p", {"confusion": matrix}, {"task": "classify", "labels": labels})
    wrong = [{"text": "<script>alert(1)</script>", "label": labels[0], "predicted": labels[1], "score": 0.9}]
    page = write_report(folder, wrong).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>3" not in page
    assert "Most often confused" in page and "Rows are the true label" not in page
    assert '<td>&lt;b&gt;3&lt;/b&gt;</td><td>&lt;b&gt;4&lt;/b&gt;</td><td class="number">7</td>' in page


def test_mistakes_are_the_wrong_rows_by_confidence() -> None:
    results = [{"label": label, "score": score} for label, score in zip("xyyx", (0.9, 0.7, 0.95, 0.7), strict=True)]
    found = mistakes(["a", "b", ("c", "d"), "e"], "xxxx", results)
    assert found is not None
    assert [(row["text"], row["label"], row["predicted"]) for row in found] == [("c / d", "x", "y"), ("b", "x", "y")]
    assert found[0]["score"] == 0.95
    assert len(mistakes(["a", "b", "c", "d"], "yxxy", results, count=2) or []) == 2
    assert mistakes(["a"], ["b"], [{"completion": "c"}]) is None


def test_validations_are_the_log_s_without_its_clock() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0, "eval_f1": 0.5, "eval_runtime": 3, "epoch": 1}]
    assert validations(log) == [{"step": 2, "loss": 1.0, "f1": 0.5}]


def test_where_it_cannot_be_written(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no saved prefix"):
        write_report(tmp_path)
    folder = saved(tiny_llama, tmp_path / "p", None)
    (folder / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted([files.CARD, files.HEADER, files.TENSORS, "report.html"])


def test_values_as_people_read_them() -> None:
    assert [pages.plain(v) for v in (True, 12345, 0.000123456, ["a", 2], {"a": 1, "b": None}, " x ")] == [
        "yes",
        "12,345",
        "0.0001235",
        "a, 2",
        "a 1",
        "x",
    ]
