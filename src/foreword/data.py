"""Texts with labels to learn from, in three splits: out of a hub id, a file, a folder, or BBC News.

`import foreword.data` loads neither torch nor datasets: a hub id alone needs the latter. What is wrong with
the data is an InputError that names the file, the row and what to do.
"""

import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword import defaults
from foreword.errors import InputError
from foreword.rows import SPLITS, listed, read_rows, split_files

TEXT_NAMES = "text sentence content article review question utterance query message comment tweet document body"
TEXT_NAMES += " description headline title input prompt"
LABEL_NAMES = "label labels category class topic intent sentiment target label_text coarse_label emotion genre"
LABEL_NAMES += " stars rating tag type output y"


@dataclass(frozen=True)
class Row:
    """One text and the name of its label."""

    text: str
    label: str


@dataclass(frozen=True)
class ClassificationData:
    """Labelled texts in three splits. `labels` is the order in which a model numbers them."""

    name: str
    labels: list[str]
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    text_column: str
    label_column: str


@dataclass(frozen=True)
class _Raw:
    """Rows as read and where they are from, by split; the label names, if the source orders them."""

    rows: dict[str, list[dict[str, Any]]]
    sources: dict[str, str]
    names: list[str] | None = None


def load_classification(
    data: str | Path = defaults.DATA,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    train_rows: int | None = None,
) -> ClassificationData:
    """Load `bbc_news`, a file, a folder of `train`/`validation`/`test` files, or a hub id.

    A split that is not there is cut from the training rows: a tenth, stratified by label, the same for the
    same `seed`. `train_rows` keeps that many training rows, stratified too; fewer are a subset of more.
    Raises InputError for what is wrong with the data.
    """
    data = str(data)
    if data == defaults.DATA:
        raw = _Raw(
            {"train": [{"text": text, "label": label} for text, label in defaults.bbc_news()[1]]},
            {"train": data},
        )
    elif _is_local(data):
        files = split_files(Path(data).expanduser())
        raw = _Raw({split: read_rows(path) for split, path in files.items()}, {s: str(f) for s, f in files.items()})
    else:
        raw = _read_hub(data, text_column, label_column)
    text, label = _find_columns(raw.rows["train"], raw.sources["train"], text_column, label_column)
    splits = {split: _to_rows(rows, raw.sources[split], text, label) for split, rows in raw.rows.items()}
    labels = _labels(splits, raw.sources, raw.names)
    splits = _with_all_splits(splits, raw.sources["train"], seed)
    train = some_rows(splits["train"], train_rows, seed, "train")
    return ClassificationData(data, labels, train, splits["validation"], splits["test"], text, label)


def read_labelled(path: str | Path, text_column: str | None = None, label_column: str | None = None) -> list[Row]:
    """Every row of one file, unsplit: what a finished prefix is evaluated on. Raises InputError."""
    rows = read_rows(path)
    return _to_rows(rows, str(path), *_find_columns(rows, str(path), text_column, label_column))


def read_texts(path: str | Path, text_column: str | None = None) -> list[str]:
    """The text of every row of one file, labelled or not: what a prefix predicts. Raises InputError."""
    rows = read_rows(path)
    columns = _columns(rows)
    _check_column(text_column, columns, str(path), "text")
    column = text_column or _known(columns, TEXT_NAMES) or (columns[0] if len(columns) == 1 else None)
    if column is None:
        raise InputError(
            f"{path} has no column that is clearly the text among {listed(columns)}; name it as text_column."
        )
    return [_text(row, column, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _is_local(data: str) -> bool:
    """Whether it is a path rather than a hub id: `name` or `owner/name`, perhaps with .1 at its end."""
    extension = re.fullmatch(r"\.\w*[A-Za-z]\w*", Path(data).suffix)
    looks_like_path = bool(extension) or data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data
    return looks_like_path or Path(data).exists()


def _read_hub(data: str, text: str | None, label: str | None) -> _Raw:
    """The splits of a hub data set, numbers of a ClassLabel replaced by its names."""
    import datasets

    try:
        hub = datasets.load_dataset(data)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{data} is no local path and could not be loaded from the hub ({reason}); "
            "check the id and the connection, or give a file or a folder."
        ) from error
    found = {split: name for split, names in SPLITS.items() for name in reversed(names) if name in hub}
    if "train" not in found:
        raise InputError(f"{data} has no train split, only {listed(hub)}; give another data set.")
    sources = {split: f"{data} ({name})" for split, name in found.items()}
    rows = {split: [dict(row) for row in hub[name]] for split, name in found.items()}
    text, label = _find_columns(rows["train"], sources["train"], text, label)
    feature = hub[found["train"]].features[label]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if names is not None:
        rows = {split: _named(of_split, label, names) for split, of_split in rows.items()}
    rows = {split: _without_empty(of_split, sources[split], text) for split, of_split in rows.items()}
    return _Raw({split: of_split for split, of_split in rows.items() if of_split or split == "train"}, sources, names)


def _named(rows: list[dict[str, Any]], label: str, names: list[str]) -> list[dict[str, Any]]:
    """Names for numbers, without the rows that the hub marks -1: GLUE's test splits hide their labels."""
    return [row | {label: names[row[label]]} for row in rows if row.get(label) is not None and row[label] >= 0]


def _without_empty(rows: list[dict[str, Any]], source: str, text: str) -> list[dict[str, Any]]:
    """The hub's rows that have a text: nobody can correct them there, as they can in a file."""
    kept = [row for row in rows if str(row.get(text) or "").strip()]
    if len(kept) < len(rows):
        print(f"foreword: {source}: left out {len(rows) - len(kept)} rows without text", file=sys.stderr)
    return kept


def _columns(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _known(columns: Sequence[str], names: str, but: str | None = None) -> str | None:
    """The column whose name comes first among `names`, in whatever case, and is not `but`."""
    by_name = {column.lower(): column for column in reversed(columns) if column != but}
    return next((by_name[name] for name in names.split() if name in by_name), None)


def _check_column(given: str | None, columns: list[str], source: str, role: str) -> None:
    if given is not None and given not in columns:
        raise InputError(f"{source} has no {role} column {given!r}; its columns are {listed(columns)}.")


def _find_columns(rows: list[dict[str, Any]], source: str, text: str | None, label: str | None) -> tuple[str, str]:
    """The text and the label column: as given, by a usual name, or of two columns the longer as text."""
    columns = _columns(rows)
    _check_column(text, columns, source, "text")
    _check_column(label, columns, source, "label")
    text = text or _known(columns, TEXT_NAMES, but=label)
    label = label or _known(columns, LABEL_NAMES, but=text)
    if len(columns) == 2 and (text is None or label is None):
        length = {c: sum(len(v) for row in rows if isinstance(v := row.get(c), str)) for c in columns}
        text = max((c for c in columns if c != label), key=lambda c: length[c]) if text is None else text
        label = next(c for c in columns if c != text)
    if text is None or label is None:
        role = "text" if text is None else "label"
        raise InputError(
            f"{source} has no column that is clearly the {role} among {listed(columns)}; name it as {role}_column."
        )
    return text, label


def _to_rows(rows: list[dict[str, Any]], source: str, text: str, label: str) -> list[Row]:
    columns = _columns(rows)
    _check_column(text, columns, source, "text")
    _check_column(label, columns, source, "label")
    places = ((row, f"{source}, row {number}") for number, row in enumerate(rows, 1))
    return [Row(_text(row, text, place), _label(row, label, place)) for row, place in places]


def _text(row: dict[str, Any], column: str, place: str) -> str:
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


def _label(row: dict[str, Any], column: str, place: str) -> str:
    """The label's name: 1 and 1.0 are both "1"; text stays as written, without spaces around."""
    label = row.get(column)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, float) and math.isnan(label):
        label = None
    if label is None or not str(label).strip():
        raise InputError(f"{place} has no label; fill it or remove the row.")
    if not isinstance(label, (str, int, float)):
        raise InputError(f"{place} has {type(label).__name__} in {column!r}; give one label, a name or a number.")
    return str(label).strip()


def _labels(splits: dict[str, list[Row]], sources: dict[str, str], names: Sequence[str] | None) -> list[str]:
    """The labels of the training rows: in the order of `names`, or sorted (whole numbers by size)."""
    found = {row.label for row in splits["train"]}
    for split, rows in splits.items():
        if strange := sorted({row.label for row in rows} - found):
            more = ", ..." if len(strange) > 5 else ""
            raise InputError(
                f"{sources[split]} has labels that the training rows lack: {listed(strange[:5])}{more}; "
                "add training rows for them or correct them."
            )
    if len(found) < 2:
        raise InputError(f"{sources['train']} has one label, {listed(found)}; give rows of two labels or more.")
    if names is not None:
        return [name for name in names if name in found]
    whole = all(re.fullmatch(r"-?[0-9]+", label) for label in found)
    return sorted(found, key=lambda label: (int(label) if whole else 0, label))


def _stratified_order(rows: Sequence[Row], seed: int) -> list[int]:
    """Row numbers in a random order in which every start has the labels in (nearly) their proportions.

    The i-th of a label's n rows, shuffled, stands at (i + 1/2) / n of the way. A label's only row is thus in
    the middle, and a split that is cut off the start never takes it.
    """
    rng = random.Random(seed)
    draw = [rng.random() for _ in rows]
    count, seen = Counter(row.label for row in rows), Counter[str]()
    place = [0.0] * len(rows)
    for i in sorted(range(len(rows)), key=draw.__getitem__):
        label = rows[i].label
        place[i] = (seen[label] + 0.5) / count[label]
        seen[label] += 1
    return sorted(range(len(rows)), key=lambda i: (place[i], draw[i]))


def _with_all_splits(splits: dict[str, list[Row]], source: str, seed: int) -> dict[str, list[Row]]:
    """Cut each missing split, a tenth of the training rows, off the training rows; all keep their order."""
    missing = [split for split in ("test", "validation") if split not in splits]
    train = splits["train"]
    order, size = _stratified_order(train, seed), max(1, round(len(train) / 10))
    cut = {split: sorted(order[k * size : (k + 1) * size]) for k, split in enumerate(missing)}
    kept = sorted(order[len(missing) * size :])
    if {train[i].label for i in kept} != {row.label for row in train}:
        raise InputError(
            f"{source} has {len(train)} rows, too few to cut {' and '.join(missing)} from; "
            "give more rows of each label, or a folder with train, validation and test files."
        )
    made = {split: [train[i] for i in numbers] for split, numbers in cut.items()}
    return splits | made | {"train": [train[i] for i in kept]}


def some_rows(rows: list[Row], count: int | None, seed: int, split: str) -> list[Row]:
    """`count` of the rows (all where None), the labels in their proportions, the same for the same seed.

    Raises InputError where there are not so many.
    """
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise InputError(f"{split}_rows is {count}; give a number from 1 to {len(rows)}, the {split} rows there are.")
    return [rows[i] for i in sorted(_stratified_order(rows, seed)[:count])]
