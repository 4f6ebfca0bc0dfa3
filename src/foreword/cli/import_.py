"""foreword import"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Source(StrEnum):
    peft = "peft"


def command(
    directory: Annotated[Path, typer.Argument(help="A prefix-tuning or cartridge checkpoint.")],
    source: Annotated[Source, typer.Option("--from", help="The library that wrote it.")],
    output: Annotated[Path, typer.Option(help="Folder to save the prefix in.")],
    model: Annotated[str | None, typer.Option(help="Its base; by default the one that the checkpoint names.")] = None,
) -> None:
    """Save another library's prefix as foreword's, with equal logits.

    Example: foreword import --from peft news-peft --output runs/news
    """
    from ..interop import peft
    from . import show

    for note in peft.import_(directory, output, model):
        show.news(note)
    show.news(f"Saved {output}.")
