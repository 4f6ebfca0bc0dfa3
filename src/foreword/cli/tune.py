"""foreword tune"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import given, with_training


@with_training
def command(
    config: Any,
    context: typer.Context,
    trials: Annotated[int | None, typer.Option(help="Stop after so many trials; 12 where no budget is given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Start no trial after so many minutes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Search over form, length, start, layers and learning rate by validation loss; test and save the best prefix.

    What is given as an option is not searched. The first trial is the defaults. The same command goes on with a
    search that was stopped, or with a larger budget adds to it.

    Example: foreword tune --data fancyzhx/ag_news --trials 12 --output runs/ag_news-search
    """
    from . import show

    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError('a search needs Optuna, which is not installed; pip install "foreword[tune]".') from error
    from ..search import SEARCHED, SearchConfig, search

    over = tuple(name for name in SEARCHED if name not in given(context))
    result = search(SearchConfig(config, over, trials, minutes), say=show.news)
    if as_json:
        show.json(result.summary)
    else:
        show.searched(result)
