"""foreword generate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    beams: Annotated[int, typer.Option(help="Beam search over so many.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Continue prompts with the prefix in front.

    Example: foreword generate runs/news "Text: The bank raised its rates.\\nCategory:" --max-new-tokens 4
    """
    from ..generate import complete
    from ..model import PrefixModel
    from . import show

    model = PrefixModel.from_pretrained(directory)
    results = complete(model, prompts, max_new_tokens=max_new_tokens, beams=beams, temperature=temperature, seed=seed)
    if as_json:
        show.json_lines(results)
    else:
        show.generated(results)
