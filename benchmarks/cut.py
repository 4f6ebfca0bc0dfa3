"""What it costs to cut the tokens that `inspect` finds worthless: a prefix of 32 on AG News, SmolLM2-135M, label words.

Trains the prefix as ag_news.py does, measures every token's worth on validation rows as `foreword inspect` does, and
cuts a quarter by one of two orders: the tokens of the lowest worth, or those that change the loss least, up or down.
Validation rows choose the order; the whole and the cut prefix are then tested on the same test rows.

    python benchmarks/cut.py --data FOLDER [--prefix DIR]   (where a trained prefix is kept)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ag_news import commit, hardware

from foreword.compose import cut
from foreword.evaluate import evaluate
from foreword.examine import examine
from foreword.forms import PrefixConfig
from foreword.tasks import load_task
from foreword.train import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "cut.json"
LENGTH = 32
KEPT = 24
ORDERS: dict[str, Callable[[float], float]] = {"lowest worth": float, "least change": abs}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def trained(folder: Path, data: str) -> Path:
    prefix = PrefixConfig(form="direct", start="instruction", length=LENGTH)
    settings: dict[str, Any] = {"train_rows": 2000, "validation_rows": 50, "max_length": 40, "epochs": 1}
    train(TrainConfig(output=folder, data=data, prefix=prefix, zero_shot=False, test_rows=100, **settings), say=say)
    return folder


def measure(directory: Path, data: str, worth_rows: int, validation_rows: int, test_rows: int) -> dict[str, Any]:
    found = examine(directory, data, rows=worth_rows, progress=lambda done, total: say(f"inspecting {done}/{total}"))
    worth = found["worth"]["tokens"]
    task = load_task(directory)
    model, name = task.model, task.model.active
    assert name is not None

    def measured(split: str, rows: int, keep: int, order: str) -> dict[str, float]:
        if keep < LENGTH:
            best = sorted(range(LENGTH), key=lambda i: -ORDERS[order](worth[i]))[:keep]
            model.put("cut", cut(model, name, sorted(best)), like=name)
        found = evaluate(
            task, data, split=split, rows=rows, progress=lambda done, total: say(f"{split} {done}/{total}")
        )
        if keep < LENGTH:
            model.remove("cut")
            model.activate(name)
        return {key: found["metrics"][key] for key in ("accuracy", "f1")}

    validation = {order: measured("validation", validation_rows, KEPT, order) for order in ORDERS}
    best = max(ORDERS, key=lambda order: validation[order]["accuracy"])
    results = {str(keep): measured("test", test_rows, keep, best) for keep in (LENGTH, KEPT)}
    rows = {"worth": worth_rows, "validation": validation_rows, "test": test_rows}
    return {"worth": worth, "rows": rows, "validation": validation, "order": best, "by_tokens_kept": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fancyzhx/ag_news", help="hub id or folder with train, validation, test")
    parser.add_argument("--prefix", type=Path, help="a trained prefix of 32 tokens; made here if it is not there yet")
    parser.add_argument("--worth-rows", type=int, default=48)
    parser.add_argument("--validation-rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=2000)
    arguments = parser.parse_args()
    began_at = commit()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.prefix or Path(folder) / "prefix"
        if not directory.exists():
            trained(directory, arguments.data)
        rows = arguments.worth_rows, arguments.validation_rows, arguments.test_rows
        found = measure(directory, arguments.data, *rows)
    RESULT.write_text(json.dumps({**found, "commit": began_at, "hardware": hardware()}, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("validation", "order", "by_tokens_kept")}))


if __name__ == "__main__":
    main()
