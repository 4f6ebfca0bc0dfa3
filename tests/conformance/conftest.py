"""Quiet models, one thread, and the table of the largest differences at the end of every run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests recorded as ("difference", (family, measure, value)), the largest of each."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, []):
            for key, value in getattr(report, "user_properties", ()):
                if key == "difference":
                    family, measure, size = value
                    table[family][measure] = max(size, table[family].get(measure, 0.0))
    if not table:
        return
    measures = sorted({measure for row in table.values() for measure in row})
    terminalreporter.section("largest differences from the reference attention, relative")
    terminalreporter.write_line(" ".join([f"{'family':12}", *(f"{m:>18}" for m in measures)]))
    for family, row in table.items():
        cells = (f"{row[m]:18.1e}" if m in row else f"{'-':>18}" for m in measures)
        terminalreporter.write_line(" ".join([f"{family:12}", *cells]))
