"""The picture of accuracy by the rows trained on: `python benchmarks/data_efficiency.py docs/data-efficiency.png`.

After `compare.py --only rows`: the mean over seeds, and from the lowest seed to the highest.
"""

from __future__ import annotations

import sys
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import METHODS, efficiency

LOOKS = {"foreword": ("#2f6f8f", "o"), "lora": ("#b5533c", "s"), "peft-text": ("#8a7a5c", "^")}


def draw(target: str) -> None:
    found = efficiency()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for i, (name, (color, marker)) in enumerate(LOOKS.items()):
        places = [rows * 1.05 ** (i - 1) for rows in found]  # side by side
        means = [mean(by_method[name]) for by_method in found.values()]
        below = [m - min(by_method[name]) for m, by_method in zip(means, found.values(), strict=True)]
        above = [max(by_method[name]) - m for m, by_method in zip(means, found.values(), strict=True)]
        look = {"color": color, "marker": marker, "capsize": 2, "linewidth": 1.2}
        axis.errorbar(places, means, (below, above), label=METHODS[name], **look)
    axis.set_xscale("log", base=4)
    axis.set_xticks(list(found), [f"{rows:,}" for rows in found])
    axis.minorticks_off()
    axis.set(title="AG News, SmolLM2-135M", xlabel="rows trained on", ylabel="test accuracy")
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    draw(sys.argv[1])
