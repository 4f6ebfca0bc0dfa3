"""What a table's columns mean to a task: their usual names, and how a row is read out of them and checked.

Here is what the tasks share and classification's own; the other tasks' schemas stand in their files.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from foreword.errors import InputError
from foreword.rows import listed
from foreword.sources import Tables

TEXT_NAMES = "text sentence content article review question utterance query message comment tweet document body"
TEXT_NAMES += " description headline title input prompt"
LABEL_NAMES = "label labels category class topic intent sentiment target label_text coarse_label emotion genre"
LABEL_NAMES += " stars rating tag type output y"
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))


@dataclass(frozen=True)
class Row:
    """What a model reads and what it should answer.

    text: a string, or a tuple of strings where a row has several texts (or is split into words).
    label: what the task's schema makes of the label column: a name, names, a number, tags, a completion, answers.
    """

    text: Any
    label: Any


@dataclass(frozen=True)
class Schema:
    """How a task reads a table.

    text_names, label_names: usual names of the two columns, likeliest first; groups: of several text columns.
    read_text(row, columns, place), read_label(row, column, place, text): what they hold, checked.
    labels(splits, tables, label column): the label names that the training rows have between them.
    stratified: splits are cut with the labels in their proportions.
    guesses: of two columns with unusual names, the longer is the text.
    also: another name that the label column has in some splits.
    """

    text_names: str
    label_names: str
    read_text: Callable[[dict[str, Any], tuple[str, ...], str], Any]
    read_label: Callable[[dict[str, Any], str, str, Any], Any]
    groups: tuple[tuple[str, ...], ...] = ()
    labels: Callable[[dict[str, list[Row]], Tables, str], list[str]] | None = None
    stratified: bool = False
    guesses: bool = False
    also: str | None = None


def read_string(row: dict[str, Any], column: str, place: str) -> str:
    """One text of a row. Raises InputError where it is empty, of another type, or not whole."""
    text = row.get(column)
    if text is None or text == "" or (isinstance(text, str) and not text.strip()):
        raise InputError(f"{place} has an empty text; fill it or remove the row.")
    if not isinstance(text, str):
        raise InputError(f"{place} has {type(text).__name__} in {column!r} where a text belongs; correct it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place} holds half a character (a lone surrogate); correct the text.") from None
    return text


def read_strings(row: dict[str, Any], columns: tuple[str, ...], place: str) -> Any:
    """The text of a row, or the tuple of its texts where there are several columns."""
    texts = tuple(read_string(row, column, place) for column in columns)
    return texts[0] if len(texts) == 1 else texts


def _read_label(row: dict[str, Any], column: str, place: str, text: Any) -> Any:
    """The label's name; a tuple of names where the table has a list."""
    label = row.get(column)
    if isinstance(label, list | tuple):
        return tuple(dict.fromkeys(_label_name(one, column, place) for one in label))
    return _label_name(label, column, place)


def _label_name(label: Any, column: str, place: str) -> str:
    """1 and 1.0 are both "1"; text stays as written, without spaces around."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, float) and math.isnan(label):
        label = None
    if label is None or not str(label).strip():
        raise InputError(f"{place} has no label; fill it or remove the row.")
    if not isinstance(label, str | int | float):
        raise InputError(f"{place} has {type(label).__name__} in {column!r}; give one label, a name or a number.")
    return str(label).strip()


def _labels(splits: dict[str, list[Row]], tables: Tables, column: str) -> list[str]:
    """The labels of the training rows: in the order of the hub's names, or sorted (whole numbers by size)."""
    for split, rows in splits.items():
        _check_alike(rows, isinstance(splits["train"][0].label, tuple), tables.sources[split], column)
    found = label_names(splits["train"])
    for split, rows in splits.items():
        refuse_strange(label_names(rows) - found, tables.sources[split])
    if len(found) < 2:
        source = tables.sources["train"]
        raise InputError(f"{source} has one label, {listed(found)}; give rows of two labels or more.")
    if column in tables.names:
        return [name for name in tables.names[column] if name in found]
    whole = all(re.fullmatch(r"-?[0-9]+", label) for label in found)
    return sorted(found, key=lambda label: (int(label) if whole else 0, label))


def _check_alike(rows: list[Row], lists: bool, source: str, column: str) -> None:
    """Every row has one label, or every row a list of them."""
    for number, row in enumerate(rows, 1):
        if isinstance(row.label, tuple) and not lists:
            raise InputError(f"{source}, row {number} has list in {column!r}; give one label, a name or a number.")
        if lists and not isinstance(row.label, tuple):
            raise InputError(
                f"{source}, row {number} has one label in {column!r} where others have lists; give a list."
            )


def label_names(rows: Iterable[Row]) -> set[str]:
    """Every label name among rows that have one or a tuple of them."""
    return {name for row in rows for name in (row.label if isinstance(row.label, tuple) else (row.label,))}


def refuse_strange(strange: set[str], source: str) -> None:
    """Raise InputError for labels that the training rows lack."""
    if strange:
        more = ", ..." if len(strange) > 5 else ""
        raise InputError(
            f"{source} has labels that the training rows lack: {listed(sorted(strange)[:5])}{more}; "
            "add training rows for them or correct them."
        )


CLASSIFY = Schema(
    TEXT_NAMES,
    LABEL_NAMES,
    read_strings,
    _read_label,
    groups=PAIRS,
    labels=_labels,
    stratified=True,
    guesses=True,
)
