"""foreword inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Say what is in a saved prefix: base, form, length, parameters, size, task, figures.

    Example: foreword inspect runs/news
    """
    from ..inspect import describe
    from . import show

    description = describe(directory)
    if as_json:
        show.json(description)
    else:
        show.described(description)
