"""foreword predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved classification prefix.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    input: Annotated[Path | None, typer.Option(help="A file of rows to classify: csv, tsv, jsonl, parquet.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines there.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; found if not given.")] = None,
    batch_size: Annotated[int, typer.Option()] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Classify texts.

    Example: foreword predict runs/news "The striker scored twice in the final."
    """
    from ..data import read_texts
    from ..errors import InputError
    from ..tasks.classify import PrefixClassifier
    from . import show

    if bool(texts) == bool(input):
        raise InputError("give texts, or --input with a file of them; one of the two.")
    rows = texts or read_texts(input, text_column)  # type: ignore[arg-type]
    classifier = PrefixClassifier.from_pretrained(directory)
    with show.progress("predicting") as progress:
        results = classifier.predict(rows, batch_size, progress=progress)
    show.cut(sum(result["cut"] for result in results), len(results), classifier.settings.max_length)
    results = [{"text": text, **result} for text, result in zip(rows, results, strict=True)]
    if output is not None:
        show.write_lines(output, results)
    elif as_json:
        show.json_lines(results)
    else:
        show.predicted(results)
