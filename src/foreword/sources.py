"""Where tables of rows come from: a hub id, a file, a folder of splits, or BBC News. What rows mean is not known here.

Loads neither torch nor, but for a hub id, datasets. What is wrong is an InputError that names the source.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword import defaults
from foreword.errors import InputError
from foreword.rows import SPLITS, listed, read_rows, split_files


@dataclass(frozen=True)
class Tables:
    """Rows as read and what each split is called in messages, by split.

    names: by column, the names that a hub's numbers stand for; on_hub: nobody here can correct these rows.
    """

    rows: dict[str, list[dict[str, Any]]]
    sources: dict[str, str]
    names: dict[str, list[str]] = field(default_factory=dict)
    on_hub: bool = False


def read_tables(data: str) -> Tables:
    """The splits of `bbc_news`, a file (all training rows), a folder, or a hub id. Raises InputError."""
    if data == defaults.DATA:
        rows = [{"text": text, "label": label} for text, label in defaults.bbc_news()[1]]
        return Tables({"train": rows}, {"train": data})
    if _is_local(data):
        files = split_files(Path(data).expanduser())
        return Tables({split: read_rows(path) for split, path in files.items()}, {s: str(f) for s, f in files.items()})
    return _read_hub(data)


def _is_local(data: str) -> bool:
    """Whether it is a path rather than a hub id: `name` or `owner/name`, perhaps with .1 at its end."""
    extension = re.fullmatch(r"\.\w*[A-Za-z]\w*", Path(data).suffix)
    looks_like_path = bool(extension) or data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data
    return looks_like_path or Path(data).exists()


def _read_hub(data: str) -> Tables:
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
    names = {}
    for column, feature in hub[found["train"]].features.items():
        inner = getattr(feature, "feature", feature)  # of a list of classes, such as tags
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)
    return Tables(rows, sources, names, on_hub=True)
