"""Every task on every kind of base that suits it: a prefix and PEFT's LoRA after the same steps, and the bare base.

Real data, settings by default but for the budget; LoRA takes foreword's tasks and trainer with r = 8 on queries and
values (PEFT's default) at 1e-3, a rate that decays to nought. One JSON file per run under benchmarks/results/tasks; a
run whose file is there is not repeated. `tables.py` makes the table from them. `--data-folder` holds a folder for each
data set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ag_news import commit, write
from small_bases import flan_t5, minilm

from foreword import defaults
from foreword.combine import add_lora
from foreword.train import NAME, TrainConfig, build, encoded, load_rows, make_trainer, train

RESULTS = Path(__file__).parent / "results" / "tasks"
BASES: dict[str, Callable[[], str]] = {"smollm2": lambda: defaults.MODEL, "minilm": minilm, "flan-t5": flan_t5}
BUDGET: dict[str, Any] = {"train_rows": 960, "validation_rows": 100, "save_steps": 30}
TASKS: dict[str, dict[str, Any]] = {
    "classify": {"data": "ag_news", "max_length": 40, "test_rows": 500},
    "regress": {"data": "stsb", "max_length": 64, "test_rows": 500},
    "label": {"data": "wnut17", "max_length": 48, "test_rows": 500},
    "answer": {"data": "xquad_en", "max_length": 192, "train_rows": 480, "batch_size": 8, "test_rows": 100},
    "generate": {"data": "e2e", "max_length": 64, "max_new_tokens": 48, "test_rows": 60},
}


def config(task: str, base: str, method: str, output: Path, data: Path) -> TrainConfig:
    settings = {**BUDGET, **TASKS[task]}
    settings["data"] = str(data / settings["data"])
    # MiniLM's package has no language-model head to read words off. A decoder's default head stands beside words for
    # the base without a prefix, as which LoRA's would count.
    linear = base == "minilm" or (base, method) == ("smollm2", "lora")
    own = {"head": "linear"} if task == "classify" and linear else {}
    return TrainConfig(output, model=BASES[base](), task=task, **settings, **own)


def with_prefix(given: TrainConfig) -> dict[str, Any]:
    summary = train(given, say=say).summary
    return {key: summary[key] for key in ("test", "zero_shot", "parameters", "losses", "best_step", "learning_rate")}


def with_lora(given: TrainConfig) -> dict[str, Any]:
    given = replace(given, learning_rate=1e-3, schedule="cosine", average=False)
    data = load_rows(given)
    task = build(given, data)
    task.model.remove(NAME)
    add_lora(task.model, r=8, lora_alpha=16)
    (rows, _), (validation, _) = encoded(task, data.train), encoded(task, data.validation)
    trainer = make_trainer(given, task, rows, validation)
    trainer.train()
    results = task.predict([row.text for row in data.test], given.batch_size)
    head = sum(p.numel() for p in task.head.parameters()) if task.head is not None else 0
    return {
        "test": task.report(data.test, results)["metrics"],
        "parameters": sum(p.numel() for p in task.parameters() if p.requires_grad) - head,
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "best_step": trainer.state.best_global_step,
        "learning_rate": given.learning_rate,
    }


METHODS: dict[str, Callable[[TrainConfig], dict[str, Any]]] = {"prefix": with_prefix, "lora": with_lora}


def run(task: str, base: str, method: str, data: Path) -> None:
    path, began_at = RESULTS / f"{task}-{base}-{method}.json", commit()
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        found = METHODS[method](config(task, base, method, Path(folder) / "run", data))
    experiment = {"task": task, "base": base, "method": method, "data": TASKS[task]["data"]}
    write(path, {"experiment": experiment, **found, "budget": {**BUDGET, **TASKS[task]}}, began_at)
    print(json.dumps({**experiment, **found["test"]}), flush=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True)
    parser.add_argument("--only", default="", help="e.g. label-minilm: only runs whose name holds this")
    arguments = parser.parse_args()
    for base in ("minilm", "flan-t5", "smollm2"):
        for task in TASKS:
            if (task, base) == ("generate", "minilm"):
                continue  # an encoder does not generate
            for method in METHODS:
                if arguments.only in f"{task}-{base}-{method}":
                    run(task, base, method, arguments.data_folder)


if __name__ == "__main__":
    main()
