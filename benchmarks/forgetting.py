"""How far a prefix for AG News drifts from its base, and what keeping it near costs: SmolLM2-135M, 40 steps of 16 rows.

One JSON file per weight of `--keep` under benchmarks/results/forgetting; a run whose file is there is not repeated.
`tables.py` makes the table from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ag_news import record

from foreword import load
from foreword.drift import measured_drift

RESULTS = Path(__file__).parent / "results" / "forgetting"
WEIGHTS = (0.0, 0.1, 1.0)


def run(keep: float, data: str) -> None:
    record(
        RESULTS / f"{keep:g}.json",
        {"keep": keep, "seed": 0},
        also=lambda saved: {"measured_drift": measured_drift(load(saved).model, seed=0)},
        data=data,
        keep=keep,
        train_rows=640,
        validation_rows=50,
        test_rows=500,
        max_length=40,
        save_steps=20,
        zero_shot=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fancyzhx/ag_news", help="hub id or folder with train, validation, test")
    parser.add_argument("--only", type=float, help="one weight alone")
    arguments = parser.parse_args()
    for keep in WEIGHTS:
        if arguments.only in (None, keep):
            run(keep, arguments.data)


if __name__ == "__main__":
    main()
