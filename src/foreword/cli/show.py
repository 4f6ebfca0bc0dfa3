"""How results look in a terminal. Results go to stdout, news and progress to stderr."""

from __future__ import annotations

import json as json_module
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..joint import JointResult
    from ..search import SearchResult
    from ..train import TrainResult

UNSHOWN = {"macro_f1"}  # where it stands beside the weighted means


def news(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def json(content: Any) -> None:
    print(json_module.dumps(content, indent=2, ensure_ascii=False))


def json_lines(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(json_module.dumps(row, ensure_ascii=False))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, written beside and renamed."""
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json_module.dumps(row, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    news(f"{len(rows)} rows written to {path}.")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with an estimate on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn(what), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _metrics_table(title: str, rows: dict[str, dict[str, float] | None]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    known = next(figures for figures in rows.values() if figures)
    metrics = [metric for metric in known if metric not in UNSHOWN or "accuracy" not in known]
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, figures in rows.items():
        if figures:
            table.add_row(name, *(f"{figures[metric]:.3f}" for metric in metrics))
    return table


def trained(result: TrainResult) -> None:
    """Figures beside zero-shot, per label, and what was saved."""
    from .. import files

    summary, console = result.summary, Console()
    weighted = " (precision, recall, F1 weighted by label)" if "confusion" in summary else ""
    title = f"{summary['rows']['test']} test rows{weighted}"
    console.print(_metrics_table(title, {"zero-shot": result.zero_shot, "prefix": result.test}))
    _per_label(console, summary.get("per_label"))
    _drift(console, summary)
    size = files.size(result.output) / 2**20
    seconds = summary["seconds"]
    console.print(
        f"Saved {result.output} ({size:.1f} MiB) after {summary['steps']} steps; "
        f"{seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all. "
        f"Its page: {result.output / 'report.html'}"
    )


def trained_jointly(result: JointResult) -> None:
    """A line per task: its figures, zero-shot in brackets, and what was saved."""
    console, table = Console(), Table()
    for column in ("task", "test (zero-shot)", "rows", "parameters", "saved as"):
        table.add_column(column, justify="right" if column in ("rows", "parameters") else "left")
    for name, found in result.tasks.items():
        zero = found.zero_shot or {}
        figures = [
            f"{metric} {value:.3f}" + (f" ({zero[metric]:.3f})" if metric in zero else "")
            for metric, value in found.test.items()
            if metric not in UNSHOWN
        ]
        table.add_row(
            name,
            "\n".join(figures),
            f"{found.summary['rows']['test']:,}",
            f"{found.summary['parameters']:,}",
            str(found.output),
        )
    console.print(table)
    summary = next(iter(result.tasks.values())).summary
    console.print(
        f"{summary['steps']} steps; {summary['seconds']['training']:.0f} s of training. "
        f"To serve them all: foreword serve --prefixes {result.output}"
    )


def searched(result: SearchResult) -> None:
    """Every trial, whether the defaults were beaten, and the winner's figures."""
    from ..search_page import figure_of

    summary, console = result.summary, Console()
    trials, best = summary["trials"], summary["best"]
    metric = figure_of(trials)
    table = Table(title="Trials, by validation loss", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("trial", "form", "length", "start", "layers", "rate", "loss", *([metric] if metric else []), ""):
        table.add_column(name, justify="left" if name in ("form", "start", "layers", "") else "right", no_wrap=True)
    for row in trials:
        figures = [f"{row[name]:.4f}" if name in row else "" for name in ("loss", *([metric] if metric else []))]
        named = [str(row[name]) for name in ("trial", "form", "length", "start", "layers")]
        state = "best" if row["trial"] == best else "" if row["state"] == "finished" else row["state"]
        table.add_row(*named, f"{row['learning_rate']:.2g}", *figures, state, style="bold" if state == "best" else "")
    console.print(table)
    first, won = trials[0], next(row for row in trials if row["trial"] == best)
    if won is first:
        console.print("The defaults won: no trial had a lower validation loss.")
    else:
        before = f"{first['loss']:.4f}" if "loss" in first else "none: they diverged"
        console.print(f"Trial {best} beat the defaults: validation loss {won['loss']:.4f}; theirs is {before}.")
    if result.winner is not None:
        trained(result.winner)
    else:
        console.print(_metrics_table("The best, tested before", {"prefix": summary["test"]}))
    console.print(f"Every trial: {result.output / 'report.html'}")


def _per_label(console: Console, rows: Sequence[dict[str, Any]] | None) -> None:
    if rows is None:
        return
    table = Table()
    for column in ("label", "precision", "recall", "f1", "rows"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for row in rows:
        figures = [f"{row[column]:.3f}" for column in ("precision", "recall", "f1")]
        table.add_row(row["label"], *figures, str(row["rows"]))
    console.print(table)


def cut(number: int, rows: int, max_length: int) -> None:
    """How many texts were too long to be read whole."""
    if number:
        news(f"{number} of {rows} texts were cut to fit {max_length} tokens.")


def shortened(found: dict[str, Any]) -> None:
    """A row per token: its worth, and whether it was kept."""
    console, table = Console(), Table()
    for column in ("token", "worth", "kept"):
        table.add_column(column, justify="left" if column == "kept" else "right")
    for i, worth in enumerate(found["worth"]):
        table.add_row(str(i), f"{worth:+.4f}", "yes" if i in found["kept"] else "")
    console.print(table)
    console.print(
        f"Loss {found['loss']:.4f} of the whole, {found['loss_cut']:.4f} of {len(found['kept'])} of its "
        f"{len(found['worth'])} tokens."
    )


def evaluated(report: dict[str, Any]) -> None:
    console = Console()
    title = f"{report['rows']} rows of {report['data']}"
    console.print(_metrics_table(title, {"prefix": report["metrics"]}))
    _per_label(console, report.get("per_label"))
    _drift(console, report)


def _drift(console: Console, found: dict[str, Any]) -> None:
    if "drift" in found:
        console.print(f"Drift from the base on texts of its own: {found['drift']:.3f} nats a token.")


def predicted(results: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """A row per result: what was found, then the texts (`fields`) that it was found in."""
    if not results:
        return
    columns = [name for name in results[0] if name not in ("scores", "cut", *fields)] + list(fields)
    table = Table()
    for name in columns:
        numeric = isinstance(results[0][name], float)
        shown = "probability" if name == "score" and "label" in columns else name
        table.add_column(shown, justify="right" if numeric else "left")
    for result in results:
        table.add_row(*(_cell(result[name]) for name in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return " ".join(_cell(one) for one in value)
    return ": ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def generated(results: Sequence[dict[str, str]]) -> None:
    for result in results:
        print(f"{result['prompt']}{result['completion']}")


def described(descriptions: dict[str, dict[str, Any]]) -> None:
    """A row per fact, a column per prefix."""
    table = Table("", *descriptions, show_header=len(descriptions) > 1)
    for name in next(iter(descriptions.values())):
        values = [description[name] for description in descriptions.values()]
        if any(value is not None for value in values):
            shown = ("" if value is None else _plain(name, value) for value in values)
            table.add_row(name.replace("_", " "), *shown)
    Console().print(table)


def _plain(name: str, value: Any) -> str:
    if name == "share_of_base":
        return f"{value:.3%}"
    if name == "bytes":
        return f"{value:,} ({value / 2**20:.2f} MiB)"
    if isinstance(value, bool) or not isinstance(value, int | dict):
        return str(value).strip()
    if isinstance(value, int):
        return f"{value:,}"
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in value.items()}
    return "\n".join(f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v!s}" for k, v in shown.items())
