"""Figures of predictions: by scikit-learn and sacrebleu, rouge-score where they are the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput


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


def per_label(truth: Any, predicted: Any, labels: Sequence[str]) -> list[dict[str, Any]]:
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


def multi_label_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of `[rows, labels]` of 0 and 1: rows whose labels are all right, and F1 over all decisions and by label."""
    return {
        "exact_match": float((truth == predicted).all(axis=1).mean()),
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }


def generation_metrics(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU (sacrebleu's, 0 to 100), ROUGE F1 against the closest reference, and answers that equal a reference."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    rouge = [scorer.score_multi(row, text) for row, text in zip(references, predicted, strict=True)]
    right = [
        final_answer(text) in {final_answer(reference) for reference in row}
        for row, text in zip(references, predicted, strict=True)
    ]
    return {
        "bleu": float(corpus_bleu(list(predicted), streams).score),  # type: ignore[arg-type]
        **{name: float(np.mean([scores[name].fmeasure for scores in rouge])) for name in names},
        "exact_match": float(np.mean(right)),
    }


def final_answer(text: str) -> str:
    """What counts for an exact match: the text after the last `####` where there is one (as GSM8K marks the answer,
    commas of numbers left out), else all of it, white space evened out."""
    _, mark, after = text.rpartition("####")
    return " ".join((after.replace(",", "") if mark else text).split())
