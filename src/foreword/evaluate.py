"""A saved prefix measured on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .data import load_data, read_labelled
from .errors import InputError
from .schemas import Row, Schema
from .splits import some_rows
from .tasks.task import PrefixTask, Progress


def evaluate(
    task: PrefixTask,
    data: str | None = None,
    *,
    split: str = "test",
    rows: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of a task's active prefix on a split of `data` (a single file: all of its rows).

    By default the data it was trained on. Raises InputError for rows that do not fit the task, and for labels that the
    prefix does not know.
    """
    data, found = rows_of(task, data, split, text_column, label_column)
    chosen = some_rows(found, rows, 0, split, task.schema.stratified)
    results = task.predict([row.text for row in chosen], batch_size, progress=progress)
    return {
        "data": data,
        "split": split,
        "rows": len(chosen),
        "cut": sum(result["cut"] for result in results),
        **task.report(chosen, results),
    }


def rows_of(
    task: PrefixTask,
    data: str | None,
    split: str,
    text_column: str | None = None,
    label_column: str | None = None,
) -> tuple[str, list[Row]]:
    """The data's name and the rows of its split; by default the data that the active prefix was trained on.

    Raises InputError for rows that do not fit the task, and for labels that the prefix does not know.
    """
    saved = (task.model.headers.get(task.model.active or "") or {}).get("training") or {}
    settings = saved.get("settings") or {}
    if data is None:
        data = settings.get("data")
        text_column = text_column or settings.get("text_column")
        label_column = label_column or settings.get("label_column")
    if data is None:
        raise InputError("the prefix does not say what it was trained on; name the data.")
    found = _split(data, task.schema, split, text_column, label_column)
    task.check_rows(found, data)
    return data, found


def _split(data: str, schema: Schema, split: str, text_column: str | None, label_column: str | None) -> list[Row]:
    if Path(data).is_file():
        return read_labelled(data, text_column, label_column, schema)
    if split not in ("train", "validation", "test"):
        raise InputError(f"split {split!r} is unknown; choose train, validation or test.")
    loaded = load_data(data, schema, text_column=text_column, label_column=label_column)
    return getattr(loaded, split)
