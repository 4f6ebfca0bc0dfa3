"""Rows to learn from, in three splits, read as a task's schema says out of whatever table holds them.

`import foreword.data` loads neither torch nor datasets. What is wrong with the data is an InputError that names the
file, the row and what to do.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword import defaults
from foreword.errors import InputError
from foreword.rows import listed, read_rows
from foreword.schemas import CLASSIFY, Row, Schema
from foreword.sources import Tables, read_tables
from foreword.splits import some_rows, with_all_splits


@dataclass(frozen=True)
class Data:
    """Rows in three splits. `labels` is the order in which a model numbers them, empty where a task has none."""

    name: str
    labels: list[str]
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    text_column: str  # several with commas between
    label_column: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The text columns' names."""
        return tuple(self.text_column.split(","))


def load_data(
    data: str | Path,
    schema: Schema,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    train_rows: int | None = None,
) -> Data:
    """Load `bbc_news`, a file, a folder of `train`/`validation`/`test` files, or a hub id.

    A split that is not there is cut from the training rows: a tenth, stratified by label where there are labels, the
    same for the same `seed`. `train_rows` keeps that many training rows, in the same way; fewer are a subset of more.
    Several text columns are given with commas between. Raises InputError for what is wrong with the data.
    """
    tables = read_tables(str(data))
    text, label = _find_columns(tables.rows["train"], tables.sources["train"], schema, text_column, label_column)
    if tables.on_hub:
        tables = _without_unusable(tables, text, label)
    splits = {s: _to_rows(rows, tables.sources[s], schema, text, label) for s, rows in tables.rows.items()}
    labels = schema.labels(splits, tables, label) if schema.labels else []
    splits = with_all_splits(splits, tables.sources["train"], seed, schema.stratified)
    train = some_rows(splits["train"], train_rows, seed, "train", schema.stratified)
    return Data(str(data), labels, train, splits["validation"], splits["test"], ",".join(text), label)


def load_classification(data: str | Path = defaults.DATA, **settings: Any) -> Data:
    """`load_data` for texts and the names of their labels."""
    return load_data(data, CLASSIFY, **settings)


def read_labelled(
    path: str | Path, text_column: str | None = None, label_column: str | None = None, schema: Schema | None = None
) -> list[Row]:
    """Every row of one file, unsplit: what a finished prefix is evaluated on. Raises InputError."""
    rows, schema = read_rows(path), schema or CLASSIFY
    return _to_rows(rows, str(path), schema, *_find_columns(rows, str(path), schema, text_column, label_column))


def read_texts(path: str | Path, text_column: str | None = None, schema: Schema | None = None) -> list[Any]:
    """The text of every row of one file, labelled or not: what a prefix predicts. Raises InputError."""
    rows, schema = read_rows(path), schema or CLASSIFY
    columns = _columns(rows)
    found = _find_text(columns, str(path), schema, text_column, None)
    if found is None and len(columns) == 1 and schema.text_names:
        found = tuple(columns)
    if found is None:
        raise InputError(
            f"{path} has no column that is clearly the text among {listed(columns)}; name it as text_column."
        )
    return [schema.read_text(row, found, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


# ---- columns


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _known(columns: Sequence[str], names: str, but: Sequence[str | None] = ()) -> str | None:
    """The column whose name comes first among `names`, in whatever case, and is not one of `but`."""
    by_name = {column.lower(): column for column in reversed(columns) if column not in but}
    return next((by_name[name] for name in names.split() if name in by_name), None)


def _check_column(given: str | None, columns: list[str], source: str, role: str) -> None:
    if given is not None and given not in columns:
        raise InputError(f"{source} has no {role} column {given!r}; its columns are {listed(columns)}.")


def _find_text(
    columns: list[str], source: str, schema: Schema, given: str | None, label: str | None
) -> tuple[str, ...] | None:
    """The text columns: as given, a usual group of several, or the one with a usual name; None where there is none."""
    if given is not None:
        named = tuple(name.strip() for name in given.split(","))
        for name in named:
            _check_column(name, columns, source, "text")
        return named
    group = next((g for g in schema.groups if set(g) <= set(columns) - {label}), None)
    one = _known(columns, schema.text_names, but=(label,))
    return group or (None if one is None else (one,))


def _find_columns(
    rows: list[dict[str, Any]], source: str, schema: Schema, text: str | None, label: str | None
) -> tuple[tuple[str, ...], str]:
    """The text columns and the label column: as given, by a usual name, or of two columns the longer as text."""
    columns = _columns(rows)
    texts = _find_text(columns, source, schema, text, label)
    _check_column(label, columns, source, "label")
    label = label or _known(columns, schema.label_names, but=texts or ())
    if schema.guesses and len(columns) == 2 and (texts is None or label is None):
        length = {c: sum(len(v) for row in rows if isinstance(v := row.get(c), str)) for c in columns}
        texts = texts or (max((c for c in columns if c != label), key=lambda c: length[c]),)
        label = next(c for c in columns if c not in texts)
    if texts is None or label is None:
        role = "text" if texts is None else "label"
        raise InputError(
            f"{source} has no column that is clearly the {role} among {listed(columns)}; name it as {role}_column."
        )
    return texts, label


def _to_rows(rows: list[dict[str, Any]], source: str, schema: Schema, text: tuple[str, ...], label: str) -> list[Row]:
    columns = _columns(rows)
    for name in text:
        _check_column(name, columns, source, "text")
    if schema.also in columns and label not in columns:
        label = str(schema.also)
    _check_column(label, columns, source, "label")
    made = []
    for number, row in enumerate(rows, 1):
        place = f"{source}, row {number}"
        read = schema.read_text(row, text, place)
        made.append(Row(read, schema.read_label(row, label, place, read)))
    return made


def _without_unusable(tables: Tables, text: tuple[str, ...], label: str) -> Tables:
    """A hub's tables with names for the numbers of the label column, and without rows that nobody can correct there:
    those without text, and those whose label is hidden (-1 in GLUE's test splits)."""
    names = tables.names.get(label)
    splits = {}
    for split, rows in tables.rows.items():
        if names is not None:
            rows = [row | {label: _named(row[label], names)} for row in rows if _shown(row.get(label))]
        kept = [row for row in rows if all(str(row.get(column) or "").strip() for column in text)]
        if len(kept) < len(rows):
            print(
                f"foreword: {tables.sources[split]}: left out {len(rows) - len(kept)} rows without text",
                file=sys.stderr,
            )
        if kept or split == "train":
            splits[split] = kept
    return Tables(splits, tables.sources, tables.names, on_hub=True)


def _shown(label: Any) -> bool:
    return label is not None and (isinstance(label, list) or label >= 0)


def _named(label: Any, names: list[str]) -> Any:
    return [names[number] for number in label] if isinstance(label, list) else names[label]
