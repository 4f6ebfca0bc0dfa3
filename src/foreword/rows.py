"""The rows of one file (CSV, TSV, JSON lines, Parquet), and the files of a folder.

What is wrong with a file is an InputError that names it, the line and what to do.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foreword.errors import InputError

SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl, .json (one object a line) or .parquet file, values as they stand.

    CSV has a header and may quote; TSV has a header and never quotes. Raises InputError, also for no rows.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path.")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{path} is not a kind of file that can be read; give one of {listed(READERS)}.")
        rows = reader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the file.") from error
    if not rows:
        raise InputError(f"{path} has no rows; give a file with at least one.")
    return rows


def split_files(path: Path) -> dict[str, Path]:
    """The file of each split that there is in a folder; a file is all training rows. Raises InputError."""
    if not path.is_dir():
        return {"train": path}
    files: dict[str, Path] = {}
    for split, stems in SPLITS.items():
        found = sorted(f for f in path.iterdir() if f.stem.lower() in stems and f.suffix.lower() in READERS)
        if len(found) > 1:
            raise InputError(f"{path} has {found[0].name} and {found[1].name}, both {split}; keep one.")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise InputError(f"{path} has no train file; name one train with one of {listed(READERS)}.")
    return files


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 at line {line} (byte {error.start}); save it again as UTF-8.") from None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not valid JSON ({error}); correct it.") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object; write one {{...}} a line.")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long article
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        table = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not valid CSV ({error}); correct it.") from None
    return _with_header(path, table)


def _read_tsv(path: Path) -> list[dict[str, Any]]:
    lines = enumerate(_read_text(path).split("\n"), 1)
    return _with_header(path, [(n, line.removesuffix("\r").split("\t")) for n, line in lines if line.strip("\r")])


def _with_header(path: Path, table: list[tuple[int, list[str]]]) -> list[dict[str, Any]]:
    """Rows by column name, from (line number, cells), the first of which is the header."""
    if not table:
        return []
    header = [name.strip() for name in table[0][1]]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(f"{path} has more than one column {listed(twice)}; rename or remove one.")
    for number, cells in table[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {number} has {len(cells)} cells and the header {len(header)}; correct the line."
            )
    return [dict(zip(header, cells, strict=True)) for _, cells in table[1:]]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file ({str(error).splitlines()[0]}); check the file.") from error


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}


def listed(names: Iterable[str]) -> str:
    """Names in quotes, with commas; file types as they are."""
    return ", ".join(name if name.startswith(".") else repr(name) for name in names)
