"""foreword cut"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix with a task.")],
    length: Annotated[int, typer.Option(help="How many of its virtual tokens to keep.")],
    output: Annotated[Path, typer.Option(help="Folder to save the shorter prefix in.")],
    data: Annotated[str | None, typer.Option(help="By default the data it was trained on.")] = None,
    rows: Annotated[int, typer.Option(help="How many validation rows to measure on; a single file is one split.")] = 48,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure what each virtual token is worth, and save the prefix with those alone that do most.

    A token's worth is how much the loss rises without it; kept are those whose worths are furthest from 0.

    Example: foreword cut runs/news --length 8 --output runs/short
    """
    from ..compose_saved import cut
    from . import show

    with show.progress("measuring") as progress:
        found = cut(directory, length, output, data, rows=rows, say=show.news, progress=progress)
    if as_json:
        show.json(found)
    else:
        show.shortened(found)
        show.news(f"Saved {output}.")
