"""report.html of a search: its trials as a table and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import charts, pages

NAME = "report.html"
LOSS = "validation loss"
FIGURES = ("accuracy", "f1", "pearson")  # the first that a task has stands beside the loss


def write_search(output: Path, summary: dict[str, Any]) -> Path:
    """Write the page of a search from what its trials.json holds. Raises RunError where it cannot be written."""
    trials = summary["trials"]
    content = {
        "title": output.resolve().name,
        **summary,
        "defaults": trials[0],
        "metric": figure_of(trials),
        "charts": [_history(trials), *(_slice(trials, name) for name in summary["over"])],
    }
    pages.write(output / NAME, "search.html", content)
    return output / NAME


def figure_of(trials: Sequence[dict[str, Any]]) -> str | None:
    """The figure that stands beside the loss in a table of trials, if the task has one."""
    return next((name for name in FIGURES if any(name in row for row in trials)), None)


def _history(trials: Sequence[dict[str, Any]]) -> Markup:
    """Each trial's loss in the order of trials; those that ended, and those that were stopped at their lowest."""
    groups: dict[str, list[tuple[Any, float]]] = {}
    for row in trials:
        if "loss" in row:
            groups.setdefault(row["state"], []).append((row["trial"], row["loss"]))
    best = accumulate((row["loss"] if row["state"] == "finished" else float("inf") for row in trials), min)
    line = [(row["trial"], loss) for row, loss in zip(trials, best, strict=True) if loss < float("inf")]
    return charts.points("Trials, and the best so far", groups, "trial", LOSS, line=line)


def _slice(trials: Sequence[dict[str, Any]], name: str) -> Markup:
    """Loss by one setting, a colour per form."""
    groups: dict[str, list[tuple[Any, float]]] = {}
    for row in trials:
        if row["state"] == "finished":
            groups.setdefault(row["form"], []).append((row[name], row["loss"]))
    shown = name.replace("_", " ")
    return charts.points(f"By {shown}", groups, shown, LOSS, log=name == "learning_rate")
