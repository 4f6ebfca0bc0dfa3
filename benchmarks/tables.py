"""The tables of the README and the documentation, made from benchmarks/results and put in them.

A page says where: `<!-- ag_news -->`, the table, `<!-- end of ag_news -->`; so for each name in `TABLES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import inf
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (
    "README.md",
    "docs/choosing.md",
    "docs/dynamic.md",
    "docs/forgetting.md",
    "docs/joint.md",
    "docs/scaling.md",
    "docs/tasks/README.md",
    "docs/tasks/generate.md",
    "docs/tune.md",
)
Record = dict[str, Any]


def records(folder: str) -> list[Record]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def grouped(records: list[Record], *settings: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records of one experiment but for the seed."""
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record["experiment"][name] for name in settings), []).append(record)
    return cells


def figures(cell: list[Record]) -> str:
    """Median accuracy, median F1, and every seed."""
    accuracies = [record["test"]["accuracy"] for record in cell]
    f1 = median(record["test"]["f1"] for record in cell)
    return f"{median(accuracies):.3f} | {f1:.3f} | {', '.join(f'{value:.3f}' for value in accuracies)}"


def ag_news() -> Iterator[str]:
    """Accuracy by form and start: the median over seeds, and every seed."""
    found = records("ag_news")
    zero_shot = next((record["zero_shot"] for record in found if record["zero_shot"]), None)
    yield "| form | start | accuracy (median) | weighted F1 (median) | each seed | trained parameters | learning rate |"
    yield "|---|---|---|---|---|---|---|"
    if zero_shot:
        yield f"| none (zero-shot) | | {zero_shot['accuracy']:.3f} | {zero_shot['f1']:.3f} | | 0 | |"
    order = {name: i for i, name in enumerate(("direct", "projected", "mlp", "instruction", "vocabulary", "random"))}
    cells = grouped(found, "form", "start")
    for (form, start), cell in sorted(cells.items(), key=lambda item: [order[name] for name in item[0]]):
        facts = f"{cell[0]['parameters']:,} | {cell[0]['learning_rate']:g}"
        yield f"| {form} | {start} | {figures(cell)} | {facts} |"


def lengths() -> Iterator[str]:
    """Accuracy by length."""
    yield "| virtual tokens | accuracy (median) | weighted F1 (median) | each seed | trained parameters | file |"
    yield "|---|---|---|---|---|---|"
    for (length,), cell in sorted(grouped(records("lengths"), "length").items()):
        kib = length * 2 * 30 * 3 * 64 * 4 / 1024  # keys and values of SmolLM2's 30 layers and 3 heads of 64, float32
        yield f"| {length} | {figures(cell)} | {cell[0]['parameters']:,} | {kib / 1024:.2f} MiB |"


METHODS = {"foreword": "foreword", "peft-text": "PEFT prefix", "lora": "LoRA", "bare": "no prefix"}


def compared() -> Iterator[str]:
    """Step time, memory and decoding beside PEFT."""
    yield f"| | {' | '.join(METHODS.values())} | foreword : PEFT prefix |"
    yield "|---|" + "---|" * (len(METHODS) + 1)
    for record in records("compare"):
        if record["settings"].get("seen"):
            continue  # foreword beside itself
        values, unit = record.get("mib"), "MiB"
        if record["settings"]["kind"] in ("generation", "mixed"):
            values, unit = record["tokens_per_second"], "tokens/s"
        elif record["settings"]["kind"] == "step":
            values, unit = record["median"], "s"
        if values:
            digits = 2 if unit == "s" or record["settings"]["kind"] == "size" else 0
            cells = (f"{values[method]:,.{digits}f} {unit}" if method in values else "" for method in METHODS)
            against = record.get("speed") or record["ratio"]
            times = f"{against['foreword']:.2f}" if record["settings"]["methods"][0] == "peft-text" else ""
            precision = record.get("dtype") or record["settings"]["dtype"]
            on = "" if record["settings"]["kind"] == "size" else f", {record['hardware']['capability']}"
            yield f"| {described(record['settings'])}, {precision}{on} | {' | '.join(cells)} | {times} |"


def budgets() -> Iterator[str]:
    """Accuracy after a budget of steps: each method at its best learning rate, over seeds."""
    yield "| budget | method | rate | validation | test accuracy (mean) | each seed | half-way | numbers trained | on |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for record in records("compare"):
        of = record["settings"]
        if of["kind"] != "accuracy" or of["rows"] in EFFICIENCY_ALONE:
            continue
        budget = f"{DATA[of['data']]}, {of['steps']} steps of {of['batch_size']}, {of['rows'] or 'new'} rows"
        if of.get("validate_at"):
            budget += f", best of {len(of['validate_at']) + 1} steps"
        for name, runs in accuracy_runs(record).items():
            found = [tested(run, of) for run in runs]
            each = ", ".join(f"{value:.3f}" for value in found)
            half = [run["test"][str(of["steps"] // 2)] for run in runs if str(of["steps"] // 2) in run["test"]]
            each += f" | {mean(half):.3f}" if len(half) == len(runs) else " |"
            first = runs[0]
            facts = f"{first['learning_rate']:g} | {first['validation']:.3f} | {mean(found):.3f} | {each}"
            on = first["hardware"].get("gpu") or f"CPU, {first['dtype']}"
            yield f"| {budget} | {name} | {facts} | {first['parameters']:,} | {on.removeprefix('NVIDIA ')} |"


EFFICIENCY_ALONE = (16, 1024, 4096)  # rows, which stand in the table of data efficiency


def accuracy_runs(record: Record) -> dict[str, list[Record]]:
    """Of each method the runs at the learning rate that is best on the validation rows of seed 0, that seed first."""
    found = {}
    for name in record["settings"]["methods"]:
        runs = [run for run in record["runs"] if run["method"] == name]
        best = max((run for run in runs if run["seed"] == 0), key=lambda run: run["validation"])
        found[name] = [run for run in runs if run["learning_rate"] == best["learning_rate"]]
    return found


def tested(run: Record, settings: Record) -> float:
    return run["test"][str(run.get("step", settings["steps"]))]


def efficiency() -> dict[int, dict[str, list[float]]]:
    """Test accuracy of every seed on AG News, by the rows trained on and the method."""
    found = {}
    for record in records("compare"):
        of = record["settings"]
        if of["kind"] == "accuracy" and of["data"] == "ag_news" and of["rows"]:
            runs = accuracy_runs(record)
            found[of["rows"]] = {name: [tested(run, of) for run in each] for name, each in runs.items()}
    return dict(sorted(found.items()))


def data_efficiency() -> Iterator[str]:
    """Accuracy by the rows trained on: the mean over seeds, and every seed."""
    methods = ("foreword", "lora", "peft-text")
    yield f"| rows | {' | '.join(METHODS[name] for name in methods)} |"
    yield "|---|" + "---|" * len(methods)
    for rows, by_method in efficiency().items():
        found = [by_method[name] for name in methods]
        cells = (f"{mean(each):.3f} ({', '.join(f'{value:.3f}' for value in each)})" for each in found)
        yield f"| {rows:,} | {' | '.join(cells)} |"


def described(settings: Record) -> str:
    """An experiment of compare.py in words."""
    rows, long = settings["batch_size"], settings["row_tokens"]
    kind = settings["kind"]
    if kind in ("generation", "mixed"):
        text = f"{settings['new_tokens']} tokens after each of {rows} openings of news"
    else:
        text = f"{rows} rows of " + (f"{long} tokens" if long else f"news, at most {settings['max_length']} tokens")
    behind = f"{settings['length']} virtual tokens, {text}"
    if kind == "size":
        return f"saved files, {settings['length']} virtual tokens"
    if kind == "mixed":
        return f"decoding, rows over {settings['prefixes']} prefixes of {behind}"
    return f"{ {'step': 'training step', 'memory': 'memory of training', 'generation': 'decoding'}[kind] }, {behind}"


DATA = {"ag_news": "AG News", "banking77": "Banking77"}
METRICS = {"classify": "accuracy", "regress": "pearson", "label": "f1", "answer": "f1", "generate": "bleu"}


def tasks() -> Iterator[str]:
    """Each task on each base: the bare base, a prefix and LoRA."""
    yield "| task | data | base | metric | zero-shot | prefix | LoRA | numbers trained: prefix, LoRA |"
    yield "|---|---|---|---|---|---|---|---|"
    cells = grouped(records("tasks"), "task", "base")
    for (task, base), runs in sorted(cells.items(), key=lambda item: [*METRICS].index(item[0][0])):
        by_method = {run["experiment"]["method"]: run for run in runs}
        if set(by_method) != {"prefix", "lora"}:
            continue
        metric = METRICS[task]
        prefix, lora = by_method["prefix"], by_method["lora"]
        zero = f"{prefix['zero_shot'][metric]:.3f}" if prefix["zero_shot"] else ""
        values = f"{zero} | {prefix['test'][metric]:.3f} | {lora['test'][metric]:.3f}"
        numbers = f"{prefix['parameters']:,}, {lora['parameters']:,}"
        yield f"| {task} | {prefix['experiment']['data']} | {base} | {metric} | {values} | {numbers} |"


def tuned() -> Iterator[str]:
    """Trials of the search on AG News, the best first; the first trial is the defaults."""
    yield "| trial | | form | tokens | start | layers | learning rate | validation loss | validation accuracy |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for record in records("tune"):
        for t in sorted(record["trials"], key=lambda t: t["loss"] if t["state"] == "finished" else inf):
            state = "defaults" if t["trial"] == record["defaults"] else t["state"]
            facts = f"{t['form']} | {t['length']} | {t['start']} | {t['layers']} | {t['learning_rate']:.2g}"
            yield f"| {t['trial']} | {state} | {facts} | {t['loss']:.3f} | {t['accuracy']:.3f} |"


def e2e(folder: str = "e2e") -> Iterator[str]:
    """Figures of the E2E challenge: each method at its best learning rate and schedule, the mean over seeds."""
    yield "| method | learning rate | BLEU | each seed | NIST | METEOR | ROUGE-L | CIDEr | numbers trained |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for method, runs in e2e_runs(folder).items():
        tests = [run["test"] for run in runs]
        found = {name: mean(test[name] for test in tests) for name in tests[0]}
        each = ", ".join(f"{100 * test['bleu']:.1f}" for test in tests)
        words = f"{100 * found['bleu']:.1f} | {each} | {found['nist']:.2f} | {100 * found['meteor']:.1f}"
        values = f"{words} | {100 * found['rouge_l']:.1f} | {found['cider']:.2f}"
        yield f"| {METHODS[method]} | {rate_of(runs[0])} | {values} | {runs[0]['parameters']:,} |"


def e2e_runs(folder: str) -> dict[str, list[Record]]:
    """Of each method the runs at its best learning rate and schedule, that of seed 0 first."""
    found = {}
    cells = grouped(records(folder), "method")
    for method in (name for name in METHODS if (name,) in cells):
        runs = sorted(cells[method,], key=lambda run: run["experiment"]["seed"])
        best = min((run for run in runs if run["experiment"]["seed"] == 0), key=lambda run: run["validation"])
        found[method] = [run for run in runs if rate_of(run) == rate_of(best)]
    return found


def e2e_differences() -> Iterator[str]:
    """BLEU of one method less that of another, and by how much other test tables would move it."""
    yield "| trained on | | BLEU | standard error |"
    yield "|---|---|---|---|"
    for pairs, each in json.loads((RESULTS / "e2e_differences.json").read_text())["pairs"].items():
        for row in each:
            less = " less ".join(METHODS[name] for name in row["methods"])
            yield f"| {int(pairs):,} pairs | {less} | {row['bleu']:+.2f} | {row['standard_error']:.2f} |"


def rate_of(run: dict[str, Any]) -> str:
    constant = run["experiment"]["schedule"] == "constant_with_warmup"
    return f"{run['learning_rate']:g}, {'constant' if constant else 'decaying'}"


def e2e_1000() -> Iterator[str]:
    """E2E with a quarter of the pairs."""
    return e2e("e2e_1000")


def dynamic() -> Iterator[str]:
    """Validation accuracy of dynamic prefixes beside the static one, by data set."""
    yield "| data | prefix | validation accuracy (mean) | each seed | validation loss (mean) | trained parameters |"
    yield "|---|---|---|---|---|---|"
    order = {name: i for i, name in enumerate(("static", "low_rank", "mixture", "gates"))}
    cells = grouped(records("dynamic"), "data", "prefix")
    for (data, prefix), cell in sorted(cells.items(), key=lambda item: (item[0][0], order[item[0][1]])):
        best = [next(v for v in run["validations"] if v["step"] == run["best_step"]) for run in cell]
        accuracies = [v["accuracy"] for v in best]
        each = ", ".join(f"{value:.3f}" for value in accuracies)
        loss = mean(v["loss"] for v in best)
        yield f"| {data} | {prefix} | {mean(accuracies):.3f} | {each} | {loss:.3f} | {cell[0]['parameters']:,} |"


def forgetting() -> Iterator[str]:
    """Test accuracy and drift by the weight of keeping."""
    yield "| `--keep` | test accuracy | drift, nats a token |"
    yield "|---|---|---|"
    for (weight,), (run,) in sorted(grouped(records("forgetting"), "keep").items()):
        yield f"| {weight:g} | {run['test']['accuracy']:.3f} | {run['measured_drift']:.3f} |"


def joint() -> Iterator[str]:
    """Each task trained alone and with the others."""
    yield "| data | rows trained on | rows tested | metric | alone | in one run | difference |"
    yield "|---|---|---|---|---|---|---|"
    found = records("joint")
    for together in (record for record in found if record["experiment"]["run"] == "together"):
        for name, summary in together["tasks"].items():
            experiment = {"task": name, "run": "alone", "seed": together["experiment"]["seed"]}
            alone = next((record for record in found if record["experiment"] == experiment), None)
            if alone is None:
                continue
            metric = "pearson" if "pearson" in summary["test"] else "accuracy"
            before, after = alone["test"][metric], summary["test"][metric]
            rows = f"{summary['rows']['train']:,} | {summary['rows']['test']:,}"
            yield f"| {name} | {rows} | {metric} | {before:.3f} | {after:.3f} | {100 * (after - before):+.1f} points |"


def memory_checks() -> Iterator[str]:
    """The memory of a step of SmolLM2 on paper beside what was measured."""
    yield "| rows × tokens | prefix | checkpointing | paper, MiB | measured, MiB | paper / measured |"
    yield "|---|---|---|---|---|---|"
    for row in json.loads((RESULTS / "memory_recipe.json").read_text())["checks"]:
        paper = row["paper"]["total"] - row["paper"]["weights"]
        what = f"{row['rows']} × {row['tokens']} | {row['length']} | {'yes' if row['checkpointing'] else 'no'}"
        yield f"| {what} | {paper:.0f} | {row['measured']['step']:.0f} | {row['step_paper_over_measured']:.2f} |"


def memory_of_large() -> Iterator[str]:
    """The memory of a step of a 7B and a 70B on paper, GiB per GPU."""
    yield "| model | GPUs | checkpointing | weights | prefix | activations | in all, GiB per GPU |"
    yield "|---|---|---|---|---|---|---|"
    for row in json.loads((RESULTS / "memory_recipe.json").read_text())["large"]:
        paper = {name: mib / 1024 for name, mib in row["paper"].items()}
        how = ", sharded" if row["processes"] > 1 else ", 4 bits" if row["weight_bytes"] else ""
        parts = f"{paper['weights']:.1f} | {paper['prefix']:.2f} | {paper['activations'] + paper['work']:.1f}"
        checkpointing = "yes" if row["checkpointing"] else "no"
        yield f"| {row['model']} | {row['processes']}{how} | {checkpointing} | {parts} | {paper['total']:.1f} |"


TABLES = {
    "ag_news": ag_news,
    "lengths": lengths,
    "compared": compared,
    "budgets": budgets,
    "data_efficiency": data_efficiency,
    "tasks": tasks,
    "tuned": tuned,
    "e2e": e2e,
    "e2e_1000": e2e_1000,
    "e2e_differences": e2e_differences,
    "dynamic": dynamic,
    "forgetting": forgetting,
    "joint": joint,
    "memory_checks": memory_checks,
    "memory_of_large": memory_of_large,
}


def filled(page: str) -> str:
    """The page with every table that it has markers for made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        lines = list(table())
        made = "\n\n".join([begin, *(["\n".join(lines)] if len(lines) > 2 else []), end])  # a head alone says nothing
        page = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, made=made: made, page, flags=re.DOTALL)
    return page


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{name}: tables made.")


if __name__ == "__main__":
    main()
