"""AG News, Banking77 and STS-B trained in one run, against each trained alone with the same settings: SmolLM2-135M.

One JSON file per run under benchmarks/results/joint; a run whose file is there is not repeated. `tables.py` makes the
table from them. `--data-folder` holds a folder of train, validation and test for each data set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ag_news import commit, record, shortened, write

from foreword.joint import JointConfig, train_jointly
from foreword.train import TrainConfig

RESULTS = Path(__file__).parent / "results" / "joint"
SETTINGS: dict[str, Any] = {"train_rows": 1600, "validation_rows": 100, "max_length": 40, "zero_shot": False}
TASKS: dict[str, dict[str, Any]] = {
    "ag_news": {"test_rows": 1000},
    "banking77": {"test_rows": 1000},
    "stsb": {"task": "regress", "max_length": 64},
}


def alone(name: str, seed: int, data: Path) -> None:
    path = RESULTS / f"{name}-{seed}.json"
    settings = {**SETTINGS, **TASKS[name]}
    record(path, {"task": name, "run": "alone", "seed": seed}, data=str(data / name), seed=seed, **settings)


def together(seed: int, data: Path) -> None:
    path, began_at = RESULTS / f"together-{seed}.json", commit()
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "jobs"
        run = TrainConfig(output, seed=seed, **SETTINGS)
        tasks = {n: replace(run, output=output / n, data=str(data / n), **own) for n, own in TASKS.items()}
        config = JointConfig(output, tasks, ratios={})
        result = train_jointly(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    found = {name: shortened(task.summary) for name, task in result.tasks.items()}
    write(path, {"experiment": {"run": "together", "seed": seed}, "tasks": found}, began_at)
    print(json.dumps({name: summary["test"] for name, summary in found.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="together, or the name of a task: only that")
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        for name in TASKS:
            if arguments.only in name:
                alone(name, seed, arguments.data_folder)
        if arguments.only in "together":
            together(seed, arguments.data_folder)


if __name__ == "__main__":
    main()
