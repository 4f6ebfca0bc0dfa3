"""foreword generate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(help="A saved prefix.")],
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="By default what it was trained with, else 64.")] = None,
    beams: Annotated[int | None, typer.Option(help="Beam search over so many.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Continue prompts with the prefix in front; a prefix of the task generate puts its template around them.

    Example: foreword generate runs/news "Text: The bank raised its rates.\\nCategory:" --max-new-tokens 4
    """
    from .. import load
    from ..generate import complete
    from ..tasks.generate import PrefixGenerator
    from . import show

    loaded = load(directory)
    settings = {"temperature": temperature, "seed": seed}
    if isinstance(loaded, PrefixGenerator):
        made = loaded.predict(prompts, max_new_tokens=max_new_tokens, beams=beams, **settings)  # type: ignore[arg-type]
        results = [{"prompt": prompt, **row} for prompt, row in zip(prompts, made, strict=True)]
        show.cut(sum(row["cut"] for row in made), len(made), loaded.settings.max_length)
    else:
        model = getattr(loaded, "model", loaded)
        results = complete(model, prompts, max_new_tokens=max_new_tokens or 64, beams=beams or 1, **settings)  # type: ignore[arg-type]
    if as_json:
        show.json_lines(results)
    else:
        show.generated(results)
