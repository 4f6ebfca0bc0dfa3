"""Some of the rows, and splits that are not there cut off the training rows: the same for the same seed."""

import random
from collections import Counter
from collections.abc import Sequence

from foreword.errors import InputError
from foreword.schemas import Row


def _stratum(row: Row, stratified: bool) -> str | None:
    return row.label if stratified and isinstance(row.label, str) else None


def _order(rows: Sequence[Row], seed: int, stratified: bool) -> list[int]:
    """Row numbers in a random order; stratified, every start of it has the labels in (nearly) their proportions.

    The i-th of a label's n rows, shuffled, stands at (i + 1/2) / n of the way. A label's only row is thus in
    the middle, and a split that is cut off the start never takes it.
    """
    rng = random.Random(seed)
    draw = [rng.random() for _ in rows]
    labels = [_stratum(row, stratified) for row in rows]
    count, seen = Counter(labels), Counter[str | None]()
    place = [0.0] * len(rows)
    for i in sorted(range(len(rows)), key=draw.__getitem__):
        place[i] = (seen[labels[i]] + 0.5) / count[labels[i]]
        seen[labels[i]] += 1
    return sorted(range(len(rows)), key=lambda i: (place[i], draw[i]))


def with_all_splits(splits: dict[str, list[Row]], source: str, seed: int, stratified: bool) -> dict[str, list[Row]]:
    """Cut each missing split, a tenth of the training rows, off the training rows; all keep their order."""
    missing = [split for split in ("test", "validation") if split not in splits]
    train = splits["train"]
    order, size = _order(train, seed, stratified), max(1, round(len(train) / 10))
    cut = {split: sorted(order[k * size : (k + 1) * size]) for k, split in enumerate(missing)}
    kept = sorted(order[len(missing) * size :])
    strata = {_stratum(row, stratified) for row in train}
    if not kept or {_stratum(train[i], stratified) for i in kept} != strata:
        of_each = " of each label" if stratified else ""
        raise InputError(
            f"{source} has {len(train)} rows, too few to cut {' and '.join(missing)} from; "
            f"give more rows{of_each}, or a folder with train, validation and test files."
        )
    made = {split: [train[i] for i in numbers] for split, numbers in cut.items()}
    return splits | made | {"train": [train[i] for i in kept]}


def some_rows(rows: list[Row], count: int | None, seed: int, split: str, stratified: bool = True) -> list[Row]:
    """`count` of the rows (all where None), the labels in their proportions where `stratified`.

    Raises InputError where there are not so many.
    """
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise InputError(f"{split}_rows is {count}; give a number from 1 to {len(rows)}, the {split} rows there are.")
    return [rows[i] for i in sorted(_order(rows, seed, stratified)[:count])]
