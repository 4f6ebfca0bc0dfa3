"""How training and decoding scale beside PEFT's prefix tuning: with the rows' length, the prefix's, and the batch.

Every point is an experiment of compare.py (methods alternating in one process; memory in a process of its own) and a
file under benchmarks/results/scaling; a point whose file is there is not measured again. `--picture` draws them.

    python benchmarks/scaling.py --data-folder FOLDER [--only decoding] [--threads 1] [--picture docs/scaling.png]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "scaling"
OVER = {"row_tokens": "tokens of a row", "length": "virtual tokens", "batch_size": "rows"}
COLUMNS = 3  # of the picture
TOKENS = 2048  # of a batch whose rows grow longer
BESIDE = {"methods": ["peft-text", "foreword"], "rounds": 2}
SWEEPS: dict[str, tuple[str, str, list[int], dict[str, Any]]] = {
    "training by row length": ("step", "row_tokens", [64, 256, 512, 1024, 2048], BESIDE),
    "training by prefix": ("step", "length", [16, 64, 256, 1024], {**BESIDE, "batch_size": 8}),
    "training by batch": ("step", "batch_size", [1, 4, 16, 32], BESIDE),
    "memory by row length": ("memory", "row_tokens", [64, 256, 512, 1024, 2048], BESIDE),
    "decoding by prefix": ("generation", "length", [16, 128, 512, 2048, 4096], {**BESIDE, "new_tokens": 16}),
    "decoding by batch": ("generation", "batch_size", [1, 4, 16, 32], {**BESIDE, "length": 128, "new_tokens": 16}),
}


def points(only: str) -> Iterator[tuple[str, Path, compare.Settings]]:
    defaults = json.loads((compare.HERE / "experiments" / "defaults.json").read_text())
    for sweep, (kind, over, values, own) in SWEEPS.items():
        for value in values:
            settings = {**defaults, **own, "kind": kind, over: value}
            if over == "row_tokens":
                settings |= {"batch_size": max(1, TOKENS // value), "max_length": value}
            if only in sweep:
                yield sweep, RESULTS / f"{sweep.replace(' ', '-')}-{value}.json", settings


def draw(target: str) -> None:
    """PEFT's time or memory over foreword's, for every sweep that has two points or more."""
    ratios: dict[str, dict[int, float]] = {sweep: {} for sweep in SWEEPS}
    for sweep, path, settings in points(""):
        if path.exists():
            ratios[sweep][settings[SWEEPS[sweep][1]]] = 1 / json.loads(path.read_text())["ratio"]["foreword"]
    drawn = [sweep for sweep, found in ratios.items() if len(found) > 1]
    lines = -(-len(drawn) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(3.7 * COLUMNS, 3 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, sweep in zip(axes.flat, drawn, strict=False):
        (kind, over, _, _), found = SWEEPS[sweep], ratios[sweep]
        axis.axhline(1, color="#c9b79c", linewidth=1)
        axis.plot(list(found), list(found.values()), marker="o", color="#2f6f8f")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), [f"{value:,}" for value in found])
        axis.minorticks_off()
        axis.set_ylim(0, None)
        what = "memory" if kind == "memory" else "time"
        axis.set(title=sweep, xlabel=OVER[over], ylabel=f"PEFT's {what} over foreword's")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", required=True)
    parser.add_argument("--only", default="", help="only sweeps whose name holds this")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--picture", help="draw what there is to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for sweep, path, settings in points(arguments.only):
        if path.exists():
            continue
        asked = {**settings, "threads": arguments.threads}
        found, facts = compare.measured(asked, {"folder": arguments.data_folder, "name": path.stem, "device": "cpu"})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"sweep": sweep, "settings": asked, **found, **facts}, indent=1) + "\n")
        compare.say(f"{path.stem}: {found['ratio']['foreword']:.2f}")
    if arguments.picture:
        draw(arguments.picture)


if __name__ == "__main__":
    main()
