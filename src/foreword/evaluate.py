"""Metrics of predictions, by scikit-learn, and a saved prefix measured on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from .data import Row, load_classification, read_labelled, some_rows
from .errors import InputError
from .tasks.classify import PrefixClassifier


def classification_metrics(truth: Any, predicted: Any) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 as means over labels weighted by their rows (`macro_f1`: unweighted)."""
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="weighted", zero_division=0)
    macro = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[2]
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "macro_f1": float(macro),
    }


def compute_metrics(prediction: EvalPrediction | PredictionOutput) -> dict[str, float]:
    """`classification_metrics` in the form that transformers' Trainer takes."""
    return classification_metrics(prediction.label_ids, np.argmax(prediction.predictions, axis=-1))


def per_label(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and rows of each label, in the order of `labels`."""
    numbers = range(len(labels))
    columns = precision_recall_fscore_support(truth, predicted, labels=list(numbers), zero_division=0)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    ]


def confusion(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> list[list[int]]:
    """Counts `[true label][predicted label]`, in the order of `labels`."""
    return confusion_matrix(truth, predicted, labels=list(range(len(labels)))).tolist()


def evaluate(
    classifier: PrefixClassifier,
    data: str | None = None,
    *,
    split: str = "test",
    rows: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Metrics of a classifier's active prefix on a split of `data` (a single file: all of its rows).

    By default the data it was trained on. Raises InputError for labels that the prefix does not know.
    """
    saved = (classifier.model.headers.get(classifier.model.active or "") or {}).get("training") or {}
    settings = saved.get("settings") or {}
    if data is None:
        data = settings.get("data")
        text_column = text_column or settings.get("text_column")
        label_column = label_column or settings.get("label_column")
    if data is None:
        raise InputError("the prefix does not say what it was trained on; name the data.")
    chosen = some_rows(_split(data, split, text_column, label_column), rows, 0, split)
    labels = list(classifier.settings.labels)
    unknown = sorted({row.label for row in chosen} - set(labels))
    if unknown:
        raise InputError(f"{data} has labels that the prefix was not trained for: {', '.join(unknown[:5])}.")
    results = classifier.predict([row.text for row in chosen], batch_size, progress=progress)
    predicted = [labels.index(result["label"]) for result in results]
    truth = [labels.index(row.label) for row in chosen]
    return {
        "data": data,
        "split": split,
        "rows": len(chosen),
        "cut": sum(result["cut"] for result in results),
        "metrics": classification_metrics(truth, predicted),
        "per_label": per_label(truth, predicted, labels),
        "confusion": confusion(truth, predicted, labels),
    }


def _split(data: str, split: str, text_column: str | None, label_column: str | None) -> list[Row]:
    if Path(data).is_file():
        return read_labelled(data, text_column, label_column)
    if split not in ("train", "validation", "test"):
        raise InputError(f"split {split!r} is unknown; choose train, validation or test.")
    return getattr(load_classification(data, text_column=text_column, label_column=label_column), split)
