"""Whether a search of 12 trials on AG News beats the defaults: `foreword tune`, SmolLM2-135M, label words.

The search lies in runs/ and goes on where it was stopped. One JSON file under benchmarks/results/tune: every trial, the
winner's figures on the test rows, and by how much validation loss and accuracy differ from the defaults'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ag_news import commit, hardware

from foreword.search import SearchConfig, search
from foreword.train import TrainConfig

RESULTS = Path(__file__).parent / "results" / "tune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fancyzhx/ag_news", help="hub id or folder with train, validation, test")
    parser.add_argument("--output", type=Path, default=Path("runs/tune-ag_news"), help="the search's own folder")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--validation-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = TrainConfig(
        output=arguments.output,
        data=arguments.data,
        train_rows=arguments.train_rows,
        validation_rows=arguments.validation_rows,
        test_rows=arguments.test_rows,
        max_length=40,
        zero_shot=False,
        seed=arguments.seed,
    )
    began_at = commit()
    result = search(
        SearchConfig(config, trials=arguments.trials), say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    rows = {row["trial"]: row for row in result.summary["trials"]}
    first, best = rows[result.summary["defaults"]], rows[result.summary["best"]]
    gain = {name: best[name] - first[name] for name in ("loss", "accuracy") if name in first}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "output")}
    record = {"experiment": settings, **result.summary, "gain": gain, "commit": began_at, "hardware": hardware()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"ag_news-{arguments.seed}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"best": best, "defaults": first, "gain": gain, "test": result.summary["test"]}))


if __name__ == "__main__":
    main()
