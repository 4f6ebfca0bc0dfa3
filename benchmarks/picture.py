"""The README's picture from a finished run: `python benchmarks/picture.py runs/demo docs/demo.png`."""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from foreword.files import read_header

INK, PREFIX, BASE = "#1f2933", "#2f6f8f", "#c9b79c"


def draw(run: str, target: str) -> None:
    """Loss by step, figures beside zero-shot, and the confusion matrix of the test rows."""
    header = read_header(run)
    training, labels = header["training"], header["task"]["labels"]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")

    left.plot(*zip(*training["losses"], strict=True), color=PREFIX, marker="o", markersize=3)
    left.set(title="training loss", xlabel="step", ylim=(0, None))

    metrics = ("accuracy", "precision", "recall", "f1")
    places = range(len(metrics))
    for offset, name, color in ((-0.2, "zero_shot", BASE), (0.2, "test", PREFIX)):
        values = [(training[name] or {}).get(metric, 0.0) for metric in metrics]
        shown = "base, zero-shot" if name == "zero_shot" else "with the prefix"
        bars = middle.bar([p + offset for p in places], values, 0.38, color=color, label=shown)
        middle.bar_label(bars, fmt="%.2f", fontsize=7)
    middle.set_xticks(list(places), metrics)
    middle.set(title=f"{training['rows']['test']} test rows", ylim=(0, 1.25))
    middle.legend(frameon=False, loc="upper center", ncols=2, fontsize=8)

    right.imshow(training["confusion"], cmap="Blues")
    right.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    right.set_yticks(range(len(labels)), labels)
    right.set(title="confusion: rows true, columns predicted")
    largest = max(map(max, training["confusion"]))
    for i, row in enumerate(training["confusion"]):
        for j, count in enumerate(row):
            right.text(j, i, count, ha="center", va="center", color="white" if count > largest / 2 else INK)

    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    draw(sys.argv[1], sys.argv[2])
