"""Every form from every start on AG News: one epoch over 2,000 training rows, label words, SmolLM2-135M.

One JSON file per run under benchmarks/results/ag_news; a run whose file is there is not repeated. `tables.py` makes
the table from them. The whole grid is 27 runs; `--only` takes a part of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foreword.forms import PrefixConfig
from foreword.train import TrainConfig, train

RESULTS = Path(__file__).parent / "results" / "ag_news"
FORMS = ("direct", "projected", "mlp")
STARTS = ("instruction", "vocabulary", "random")
LENGTH = 22  # the derived instruction's own length, so that every start has it


def hardware() -> dict[str, object]:
    """The machine, in the words that make a figure comparable."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    threads = torch.get_num_threads()
    return {"cpu": model, **gpu, "threads": threads, "capability": torch.backends.cpu.get_cpu_capability()}


def commit() -> str:
    """The commit that is checked out; asked when the run begins."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def run(form: str, start: str, seed: int, arguments: argparse.Namespace) -> None:
    record(
        RESULTS / f"{form}-{start}-{seed}.json",
        {"form": form, "start": start, "seed": seed},
        data=arguments.data,
        prefix=PrefixConfig(form=form, start=start, length=LENGTH),  # type: ignore[arg-type]
        train_rows=2000,
        validation_rows=arguments.validation_rows,
        test_rows=arguments.test_rows,
        max_length=arguments.max_length,
        epochs=1,
        save_steps=63,
        zero_shot=(form, start, seed) == ("direct", "instruction", 0),
        seed=seed,
    )


def record(
    path: Path,
    experiment: dict[str, object],
    also: Callable[[Path], dict[str, Any]] = lambda saved: {},
    **settings: Any,
) -> None:
    """Train with these settings of TrainConfig and write what was found to `path`, unless it is there already.

    also: what more to find out about the saved prefix."""
    if path.exists():
        return
    began_at = commit()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output=Path(folder) / "prefix", **settings)
        summary = train(config, say=lambda line: print(line, file=sys.stderr, flush=True)).summary
        summary |= also(config.output)
    write(path, {"experiment": experiment, **shortened(summary)}, began_at)
    print(json.dumps({**experiment, **summary["test"]}), flush=True)


def write(path: Path, found: dict[str, Any], began_at: str) -> None:
    """What a run found, with the commit at which it began and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, "commit": began_at, "hardware": hardware()}, indent=1) + "\n")


def shortened(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run found, without paths of the machine it ran on, and without a table per label where labels are many."""
    settings = {key: value for key, value in summary["settings"].items() if key != "data"}
    many = len(summary.get("per_label", ())) > 20
    kept = {key: value for key, value in summary.items() if not (many and key in ("per_label", "confusion"))}
    return {**kept, "settings": settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fancyzhx/ag_news", help="hub id or folder with train, validation, test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=40)
    parser.add_argument("--validation-rows", type=int, default=50)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--only", default="", help="e.g. direct-instruction: only runs whose name holds this")
    arguments = parser.parse_args()
    grid = [(f, s, seed) for seed in range(arguments.seeds) for f in FORMS for s in STARTS]
    for form, start, seed in grid:
        if arguments.only in f"{form}-{start}-{seed}":
            run(form, start, seed, arguments)


if __name__ == "__main__":
    main()
