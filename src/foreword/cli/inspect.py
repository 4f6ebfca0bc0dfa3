"""foreword inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR [DIR]", help="A saved prefix, or two to compare.")],
    html: Annotated[Path | None, typer.Option(help="Run it on rows and write what it does as a page.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows for --html; by default the data it was trained on.")] = None,
    rows: Annotated[int, typer.Option(help="How many rows --html runs it on.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Say what is in a saved prefix: base, form, length, parameters, size, task, figures.

    With --html also what it does: its share of attention, the words nearest to its tokens, how far it moved from its
    start, and what each token and layer is worth.

    Example: foreword inspect runs/news --html news.html
    """
    from ..errors import InputError
    from ..inspect import describe
    from . import show

    if len(directories) > 2:
        raise InputError(f"inspect compares two prefixes, not {len(directories)}; name one or two.")
    if data is not None and html is None:
        raise InputError("--data is what --html runs the prefix on; give --html FILE too.")
    found = {str(directory): describe(directory) for directory in directories}
    if html is not None:
        from ..examine import examine
        from ..inspect_page import write_inspection

        examined = []
        for directory in directories:
            with show.progress("inspecting") as progress:
                examined.append(examine(directory, data, rows=rows, progress=progress))
        write_inspection(html, examined)
        show.news(f"{html} written.")
        found = {str(directory): one for directory, one in zip(directories, examined, strict=True)}
    if as_json:
        show.json(next(iter(found.values())) if len(found) == 1 else found)
    elif html is None:
        show.described(found)
