"""foreword compose"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Two saved prefixes or more of one base, in their order.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to save the result in.")],
    weight: Annotated[
        float | None, typer.Option(help="0 to 1: how far the result lies from the first of two to the second.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was saved as JSON.")] = False,
) -> None:
    """Put saved prefixes one behind the other, or with --weight take what lies between two.

    The result has the task and the head of the first; two heads for the same labels are interpolated too.

    Example: foreword compose runs/style runs/news --output runs/both
    """
    from ..compose_saved import compose
    from ..inspect import describe
    from . import show

    compose(directories, output, weight, say=show.news)
    if as_json:
        show.json(describe(output))
    else:
        show.described({str(output): describe(output)})
        show.news(f"Saved {output}.")
