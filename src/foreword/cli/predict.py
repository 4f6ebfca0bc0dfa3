"""foreword predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to work on; of a task with several texts a row, each row's in turn."),
    ] = None,
    input: Annotated[Path | None, typer.Option(help="A file of rows: csv, tsv, jsonl, parquet.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines there.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; found if not given.")] = None,
    batch_size: Annotated[int, typer.Option()] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Do a prefix's task on texts: classify, continue, score, label them, or answer questions about them.

    Example: foreword predict runs/news "The striker scored twice in the final."
    """
    from ..data import read_texts
    from ..errors import InputError
    from ..tasks import load_task
    from . import show

    if bool(texts) == bool(input):
        raise InputError("give texts, or --input with a file of them; one of the two.")
    task = load_task(directory)
    rows = task.grouped(texts) if texts else read_texts(input, text_column, task.schema)  # type: ignore[arg-type]
    with show.progress("predicting") as progress:
        results = task.predict(rows, batch_size, progress=progress)
    show.cut(sum(result["cut"] for result in results), len(results), task.settings.max_length)
    results = [{**task.named(row), **result} for row, result in zip(rows, results, strict=True)]
    if output is not None:
        show.write_lines(output, results)
    elif as_json:
        show.json_lines(results)
    else:
        show.predicted(results, task.fields)
