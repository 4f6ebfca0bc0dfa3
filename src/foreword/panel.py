"""The live panel of a run on a terminal, by rich: bars, and below them what `Facts` says."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from .progress import Facts

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a curve


class LivePanel:
    """One panel that is drawn anew four times a second until `close`, and then stays as it is; with a heading, as one
    of several, it goes."""

    def __init__(self, console: Console, heading: str = "") -> None:
        self.heading, self.notice = heading, ""
        self._curves = not console.options.ascii_only
        self._facts: Facts | None = None
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(28), MofNCompleteColumn(), console=console)
        self._tasks: dict[str, TaskID] = {}
        self._live = Live(get_renderable=self._draw, console=console, transient=bool(heading))
        self._live.start()

    def show(self, what: str, done: int, total: int, facts: Facts) -> None:
        """Set the bar of `what`, and what is known."""
        self._facts, new = facts, what not in self._tasks
        if new:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if new:  # a bar that lives for less than a quarter of a second is seen too
            self._live.refresh()

    def remove(self, what: str) -> None:
        """Take the bar of `what` away, if there is one."""
        if what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))

    def close(self) -> None:
        """Draw it for the last time and give the terminal back."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, *cells in self._rows():
            table.add_row(f"[dim]{name}[/]", *cells)
        parts: list[RenderableType] = [self._bars, table]
        if self.notice:
            parts.append(self.notice)
        return Panel(Group(*parts), title=self.heading or None, title_align="left", expand=False)

    def _rows(self) -> list[tuple[str, ...]]:
        facts = self._facts
        rows: list[tuple[str, ...]] = []
        if facts is None:
            return rows
        if facts.losses:
            rows.append(("loss", f"{facts.losses[-1]:.4g}", sparkline(facts.losses) if self._curves else ""))
        if (metric := facts.metric) is not None:
            best = f"best {metric.best:.4g} at step {metric.best_step}"
            rows.append((f"validation {metric.name}", f"{metric.last:.4g}", best))
            rows += [(f"validation {name}", f"{value:.4g}") for name, value in metric.others.items()]
        if facts.learning_rate is not None:
            rows.append(("learning rate", f"{facts.learning_rate:.2g}"))
        if facts.rows_per_second is not None:
            rows.append(("rate", f"{facts.rows_per_second:.1f} rows/s", f"{facts.left} left"))
        rows += [(place, f"{size / 2**30:.2f} GiB") for place, size in facts.memory.items()]
        return rows


def sparkline(values: list[float]) -> str:
    """A curve in block characters, at most `WIDTH` of them, each the mean of a stretch of values."""
    count = min(WIDTH, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((mean - low) / (high - low or 1) * (len(BLOCKS) - 1))] for mean in means)
