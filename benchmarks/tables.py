"""The README's tables, made from benchmarks/results and put between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- ag_news -->", "<!-- end of ag_news -->"


def ag_news() -> str:
    """Accuracy by form and start: the median over seeds, and every seed."""
    cells: dict[tuple[str, str], list[dict]] = {}
    zero_shot = None
    for path in sorted((RESULTS / "ag_news").glob("*.json")):
        record = json.loads(path.read_text())
        cells.setdefault((record["experiment"]["form"], record["experiment"]["start"]), []).append(record)
        zero_shot = record["zero_shot"] or zero_shot
    lines = [
        "| form | start | accuracy (median) | weighted F1 (median) | each seed | trained parameters | learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    if zero_shot:
        lines.append(f"| none (zero-shot) | | {zero_shot['accuracy']:.3f} | {zero_shot['f1']:.3f} | | 0 | |")
    order = {name: i for i, name in enumerate(("direct", "projected", "mlp", "instruction", "vocabulary", "random"))}
    for (form, start), records in sorted(cells.items(), key=lambda item: [order[name] for name in item[0]]):
        accuracies = [record["test"]["accuracy"] for record in records]
        f1 = median(record["test"]["f1"] for record in records)
        each = ", ".join(f"{value:.3f}" for value in accuracies)
        facts = f"{records[0]['parameters']:,} | {records[0]['learning_rate']:g}"
        lines.append(f"| {form} | {start} | {median(accuracies):.3f} | {f1:.3f} | {each} | {facts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    table = ag_news()
    readme = Path(__file__).parent.parent / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
