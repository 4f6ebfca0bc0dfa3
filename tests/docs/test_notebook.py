"""The worked example as a notebook: what it shows is what it computes, and it runs from top to bottom."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from .pages import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
FIGURES = re.compile(r"^(accuracy|precision|recall|f1) +(\d\.\d+) +(\d\.\d+)$", re.MULTILINE)


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(book: Any) -> str:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_it_is_committed_as_it_ran_and_the_prefix_is_better_than_none() -> None:
    book = notebook()
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    figures = {name: (float(without), float(trained)) for name, without, trained in FIGURES.findall(printed(book))}
    assert figures.keys() == {"accuracy", "precision", "recall", "f1"}
    assert all(trained > without for without, trained in figures.values())
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(book))


def test_its_cells_run_on_a_small_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setenv("FOREWORD_STEPS", "2")
    monkeypatch.setenv("FOREWORD_ROWS", "8")
    backend, names, out = matplotlib.get_backend(), {"__name__": "notebook"}, io.StringIO()
    matplotlib.use("Agg")
    try:
        with redirect_stdout(out):
            for cell in notebook().cells:
                if cell.cell_type == "code":
                    exec(compile(cell.source, str(NOTEBOOK), "exec"), names)
    finally:
        matplotlib.use(backend)
    assert len(FIGURES.findall(out.getvalue())) == 4 and out.getvalue().rstrip().endswith("True")
    assert (world / "runs" / "quickstart" / "prefix.safetensors").is_file()


@pytest.mark.slow
def test_it_runs_in_a_kernel_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_STEPS", os.environ.get("FOREWORD_STEPS", "4"))
    monkeypatch.setenv("FOREWORD_ROWS", os.environ.get("FOREWORD_ROWS", "16"))
    book = notebook()
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(FIGURES.findall(printed(book))) == 4
    assert (tmp_path / "runs" / "quickstart" / "prefix.json").is_file()
