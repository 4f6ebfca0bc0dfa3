"""Lengths from 4 to 64 tokens on AG News: form `direct`, 40 steps of 16 rows, label words, SmolLM2-135M.

One JSON file per run under benchmarks/results/lengths; a run whose file is there is not repeated. A length that is not
the instruction's own repeats the instruction or keeps its end. `tables.py` makes the table from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ag_news import record

from foreword.forms import PrefixConfig

RESULTS = Path(__file__).parent / "results" / "lengths"
LENGTHS = (4, 8, 16, 32, 64)


def run(length: int, seed: int, data: str) -> None:
    record(
        RESULTS / f"{length}-{seed}.json",
        {"length": length, "seed": seed},
        data=data,
        prefix=PrefixConfig(start="instruction", length=length),
        train_rows=640,
        validation_rows=50,
        test_rows=500,
        max_length=40,
        save_steps=20,
        zero_shot=False,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fancyzhx/ag_news", help="hub id or folder with train, validation, test")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        for length in LENGTHS:
            run(length, seed, arguments.data)


if __name__ == "__main__":
    main()
