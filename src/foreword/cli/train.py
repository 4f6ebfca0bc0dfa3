"""foreword train"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import given, with_training

# What only names things, and may differ between a run and its resumption, is not compared.
UNCOMPARED = {"output", "resume", "as_json"}


@with_training
def command(
    config: Any,
    context: typer.Context,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train a prefix, test it, save it.

    Example: foreword train --data fancyzhx/ag_news --length 32 --output runs/ag_news
    """
    from .. import processes
    from ..train import train, unfinished_config
    from . import show

    unfinished = unfinished_config(config.output) if resume else None
    if unfinished is not None and not set(given(context)) - UNCOMPARED:  # `--resume --output DIR` takes them all
        config = unfinished
    result = train(config, resume=resume, say=show.news)
    if not processes.first():
        return
    if as_json:
        show.json(result.summary)
    else:
        show.trained(result)
