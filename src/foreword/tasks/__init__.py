"""What turns rows into inputs, logits into a loss, and predictions into metrics: one module per task.

Nothing heavy is imported before a task is asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..model import PrefixModel
    from .task import PrefixTask

TASKS = {
    "classify": "PrefixClassifier",
    "generate": "PrefixGenerator",
    "regress": "PrefixRegressor",
    "label": "PrefixLabeller",
    "answer": "PrefixAnswerer",
}


def task_class(name: str) -> type[PrefixTask]:
    """The class of a task. Raises InputError where there is none of that name."""
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}.")
    return getattr(import_module(f".{name}", __name__), TASKS[name])


def load_task(directory: str | Path, model: PrefixModel | None = None) -> Any:
    """A saved prefix with its task, on its base or on `model`. Raises InputError for a prefix without a task."""
    from ..files import read_header

    saved = read_header(directory).get("task")
    if not saved:
        raise InputError(
            f"{directory} holds a prefix without a task; use `foreword generate`, or train one for a task."
        )
    return task_class(saved["task"]).from_pretrained(directory, model)
