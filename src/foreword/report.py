"""report.html: what a run was and what it found, as one page beside the prefix's files.

It is made from the saved header, for any task: what a header does not hold (a confusion matrix, a zero-shot figure)
is left out. The test rows that were wrong are given apart, since the header holds no texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import charts, files, pages

NAME = "report.html"
MOST_LABELS = 20  # of a confusion matrix that can still be read
HEADLINE = ("accuracy", "f1")
STEP = "step (dotted: the one kept)"


def mistakes(
    texts: Sequence[Any], truth: Sequence[Any], results: Sequence[dict[str, Any]], count: int = 20
) -> list[dict[str, Any]] | None:
    """The wrong rows of highest confidence among a classifier's predictions: text, label, predicted, score.

    None for predictions without one label and its score.
    """
    if not results or not {"label", "score"} <= results[0].keys():
        return None
    wrong = [i for i, (label, result) in enumerate(zip(truth, results, strict=True)) if result["label"] != label]
    wrong.sort(key=lambda i: -results[i]["score"])
    return [
        {
            "text": texts[i] if isinstance(texts[i], str) else " / ".join(texts[i]),
            "label": truth[i],
            "predicted": results[i]["label"],
            "score": results[i]["score"],
        }
        for i in wrong[:count]
    ]


def write_report(directory: str | Path, wrong: Sequence[dict[str, Any]] | None = None) -> Path:
    """Write report.html into a saved prefix's directory; `wrong` is what `mistakes` found, None to leave it out.

    Returns its path. Raises InputError where the directory holds no prefix, RunError where the page cannot be written.
    """
    target = Path(directory) / NAME
    header = files.read_header(directory)
    content = _content(header, Path(directory).resolve().name, files.size(directory), wrong)
    pages.write(target, "report.html", content)
    return target


def _content(header: dict[str, Any], name: str, size: int, wrong: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """What the template shows."""
    training, task = header.get("training") or {}, header.get("task") or {}
    figures, zero_shot = training.get("test") or {}, training.get("zero_shot") or {}
    labels, matrix = list(task.get("labels") or ()), training.get("confusion")
    many = len(labels) > MOST_LABELS
    return {
        "title": name,
        "base": header["base"],
        "prefix": header["prefix"],
        "task": task,
        "training": training,
        "size": size,
        "headline": _headline(figures, zero_shot),
        "charts": _charts(training),
        "figures": {key: value for key, value in figures.items() if isinstance(value, int | float)},
        "zero_shot": zero_shot,
        "labels": labels,
        "confusion": None if many else matrix,
        "confused": _confused(matrix, labels) if many and matrix else None,
        "per_label": training.get("per_label"),
        "mistakes": wrong,
        "how_to_load": _how_to_load(name, bool(labels)),
        "settings": _settings(header),
    }


def _headline(figures: dict[str, Any], zero_shot: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, value and zero-shot value of the figures that stand first: a task's own, or its first two."""
    names = [name for name in HEADLINE if name in figures] or list(figures)[:2]
    return [(name.replace("_", " "), figures[name], zero_shot.get(name)) for name in names]


def _charts(training: dict[str, Any]) -> list[Markup]:
    """Loss by step, every other validated figure by step, and figures beside zero-shot; each where there is one."""
    validations: list[dict[str, float]] = training.get("validations") or []
    losses = {"training": training.get("losses") or [], "validation": _points(validations, "loss")}
    losses = {name: points for name, points in losses.items() if points}
    made = []
    if losses:
        made.append(charts.lines("Loss", losses, STEP, mark=training.get("best_step") or None))
    others = {name: _points(validations, name) for name in HEADLINE}
    others = {name: points for name, points in others.items() if points}
    if others:
        title = "Validation: " + " and ".join(others)
        made.append(charts.lines(title, others, STEP, mark=training.get("best_step") or None))
    if training.get("test") and training.get("zero_shot"):
        names = [n for n in training["test"] if n in training["zero_shot"]][:5]
        both = {"zero-shot": training["zero_shot"], "with the prefix": training["test"]}
        values = {shown: [figures[n] for n in names] for shown, figures in both.items()}
        made.append(charts.bars("Zero-shot and trained", values, [n.replace("_", " ") for n in names]))
    return made


def _points(validations: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in validations if name in entry]


def _confused(matrix: Sequence[Sequence[int]], labels: Sequence[str], count: int = 20) -> list[tuple[str, str, int]]:
    """(true, predicted, rows) of the largest entries beside the diagonal."""
    pairs = [(labels[i], labels[j], n) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def _how_to_load(name: str, classifies: bool) -> str:
    call = 'model.predict(["a text"])' if classifies else "model.generate(**inputs)"
    return f'import foreword\n\nmodel = foreword.load("{name}")  # this directory\n{call}'


def _settings(header: dict[str, Any]) -> dict[str, Any]:
    """What the run was told and what was derived, what is not set left out."""
    prefix, task, training = header["prefix"], header.get("task") or {}, header.get("training") or {}
    told = {key: value for key, value in (training.get("settings") or {}).items() if key != "prefix"}
    own = {f"prefix {key}": value for key, value in prefix.items()}
    derived = {key: training.get(key) for key in ("learning_rate", "steps", "best_step", "rows", "cut", "versions")}
    shown = {"base": header["base"]["id"], **own, **told, **task, **derived, "digest": header.get("digest")}
    return {key: value for key, value in shown.items() if value not in (None, "", [], {})}
