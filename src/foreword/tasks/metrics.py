"""Figures of predictions: by scikit-learn and scipy, sacrebleu, rouge-score and seqeval."""

from __future__ import annotations

import re
import string
from collections import Counter
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


def regression_metrics(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where either side is constant), and the mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    constant = len(set(truth)) < 2 or len(set(predicted)) < 2
    return {
        "pearson": 0.0 if constant else float(pearsonr(truth, predicted).statistic),
        "spearman": 0.0 if constant else float(spearmanr(truth, predicted).statistic),
        "mse": float(np.mean((np.asarray(truth) - np.asarray(predicted)) ** 2)),
    }


def entity_metrics(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities, as seqeval and CoNLL's script count them; accuracy of words."""
    from seqeval.metrics import accuracy_score as word_accuracy
    from seqeval.metrics import f1_score as entity_f1
    from seqeval.metrics import precision_score, recall_score

    true, made = [list(tags) for tags in truth], [list(tags) for tags in predicted]
    return {
        "precision": float(precision_score(true, made, zero_division=0)),
        "recall": float(recall_score(true, made, zero_division=0)),
        "f1": float(entity_f1(true, made, zero_division=0)),
        "accuracy": float(word_accuracy(true, made)),
    }


def answer_metrics(truth: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 over words after SQuAD's normalisation, each against the closest of a row's answers
    (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1)."""
    exact = [max(normalised(a) == normalised(text) for a in row) for row, text in zip(truth, predicted, strict=True)]
    f1 = [max(word_f1(a, text) for a in row) for row, text in zip(truth, predicted, strict=True)]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def normalised(answer: str) -> str:
    """Lower case, without ASCII punctuation and English articles, white space evened out."""
    plain = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(truth: str, predicted: str) -> float:
    """F1 of the words that two normalised answers share."""
    true, made = normalised(truth).split(), normalised(predicted).split()
    shared = sum((Counter(true) & Counter(made)).values())
    if not true or not made:
        return float(true == made)
    return 2 * shared / (len(true) + len(made))
