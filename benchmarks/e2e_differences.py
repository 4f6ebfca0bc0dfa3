"""How far methods' BLEU on E2E differs, and how much of that the choice of test tables may be.

Of what e2e.py found, each method's best setting with seed 0. The standard error of a difference is by the paired
bootstrap (Koehn, 2004): 1,000 times 630 tables are drawn from the 630, the same ones for both methods. What another
seed of the training would change is not in it.

    python benchmarks/e2e_differences.py --data-folder FOLDER    # after e2e.py; tables.py makes the table
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import stdev
from typing import Any

from ag_news import commit, write
from e2e_metrics import References, lowered
from sacrebleu.metrics import BLEU
from tables import RESULTS, e2e_runs

DRAWS = 1000
Counts = list[list[int]]  # of each text: matches of n = 1 ... 4, n-grams of n = 1 ... 4, words, the reference's words


def counts(texts: Sequence[str], references: References) -> Counts:
    found = BLEU(tokenize="13a", force=True, effective_order=True)  # which says nothing of the counts
    scores = [
        found.sentence_score(lowered(text), [lowered(reference) for reference in row])
        for text, row in zip(texts, references, strict=True)
    ]
    return [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]


def bleu(counts: Counts, tables: Sequence[int]) -> float:
    """From 0 to 100, over the tables given, each as often as it is there."""
    total = [sum(column) for column in zip(*(counts[i] for i in tables), strict=True)]
    return BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score


def differences(texts: dict[str, Sequence[str]], references: References) -> list[dict[str, Any]]:
    of = {method: counts(each, references) for method, each in texts.items()}
    draw, everything = random.Random(0), range(len(references))
    drawn = [draw.choices(everything, k=len(everything)) for _ in range(DRAWS)]
    scores = {method: [bleu(each, tables) for tables in (everything, *drawn)] for method, each in of.items()}
    return [
        {
            "methods": [a, b],
            "bleu": scores[a][0] - scores[b][0],
            "standard_error": stdev(x - y for x, y in zip(scores[a][1:], scores[b][1:], strict=True)),
        }
        for a, b in combinations(scores, 2)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True, help="holds e2e/test.jsonl")
    arguments = parser.parse_args()
    lines = (arguments.data_folder / "e2e" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["references"] for line in lines]
    found = {}
    for pairs, folder in ((4000, "e2e"), (1000, "e2e_1000")):
        texts = {method: runs[0]["texts"] for method, runs in e2e_runs(folder).items()}
        found[str(pairs)] = differences(texts, references)
        print(json.dumps({"pairs": pairs, "differences": found[str(pairs)]}), flush=True)
    write(RESULTS / "e2e_differences.json", {"draws": DRAWS, "pairs": found}, commit())


if __name__ == "__main__":
    main()
