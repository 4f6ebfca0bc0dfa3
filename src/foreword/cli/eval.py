"""foreword eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    data: Annotated[str | None, typer.Option(help="By default the data it was trained on.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test; a single file is taken whole.")] = "test",
    rows: Annotated[int | None, typer.Option(help="Only so many rows.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; found if not given.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels; found if not given.")] = None,
    batch_size: Annotated[int, typer.Option()] = 32,
    drift: Annotated[
        bool, typer.Option("--drift", help="Also how far it is from the base on texts of the base's own, nats a token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure a saved prefix by its task's metrics.

    Example: foreword eval runs/news --split validation
    """
    from ..drift import measured_drift
    from ..evaluate import evaluate
    from ..tasks import load_task
    from . import show

    task = load_task(directory)
    with show.progress("evaluating") as progress:
        report = evaluate(
            task,
            data,
            split=split,
            rows=rows,
            text_column=text_column,
            label_column=label_column,
            batch_size=batch_size,
            progress=progress,
        )
    if drift:
        report["drift"] = measured_drift(task.model, seed=0)
    show.cut(report["cut"], report["rows"], task.settings.max_length)
    if as_json:
        show.json(report)
    else:
        show.evaluated(report)
