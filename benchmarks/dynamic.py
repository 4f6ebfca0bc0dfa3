"""Dynamic prefixes against the static one on AG News and Banking77: validation rows, SmolLM2-135M.

One JSON file per run under benchmarks/results/dynamic; a run whose file is there is not repeated. `tables.py` makes the
table from them. `--data-folder` holds a folder of train, validation and test for each data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ag_news import record

from foreword.forms import PrefixConfig

RESULTS = Path(__file__).parent / "results" / "dynamic"
PREFIXES = ("static", "low_rank", "mixture", "gates")
TASKS: dict[str, dict[str, Any]] = {
    "banking77": {"train_rows": 1600, "max_length": 32, "save_steps": 50},
    "ag_news": {"train_rows": 640, "max_length": 40, "save_steps": 40},
}


def run(data: str, prefix: str, seed: int, folder: Path) -> None:
    record(
        RESULTS / f"{data}-{prefix}-{seed}.json",
        {"data": data, "prefix": prefix, "seed": seed},
        data=str(folder / data),
        prefix=PrefixConfig(dynamic=None if prefix == "static" else prefix),  # type: ignore[arg-type]
        validation_rows=500,
        test_rows=50 if data == "ag_news" else 77,  # chosen by validation; the test rows are not looked at
        zero_shot=False,
        seed=seed,
        **TASKS[data],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="e.g. ag_news-gates: only runs whose name holds this")
    arguments = parser.parse_args()
    for data in TASKS:
        for seed in range(arguments.seeds):
            for prefix in PREFIXES:
                if arguments.only in f"{data}-{prefix}-{seed}":
                    run(data, prefix, seed, arguments.data_folder)


if __name__ == "__main__":
    main()
