"""foreword export"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    peft = "peft"
    vllm = "vllm"


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    to: Annotated[Target, typer.Option(help="peft: a checkpoint. vllm: a folder that foreword's connector serves.")],
    output: Annotated[Path, typer.Option(help="Folder to write; for vllm its name is the served one.")],
) -> None:
    """Write a saved prefix for another library, or say why that library cannot carry it exactly.

    Example: foreword export runs/news --to peft --output news-peft
    """
    from ..interop import peft
    from ..interop.vllm import prefixes
    from . import show

    for note in (peft.export if to == Target.peft else prefixes.export)(directory, output):
        show.news(note)
    show.news(f"Written to {output}.")
