"""foreword joint"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    tasks: Annotated[Path, typer.Argument(help="A TOML file: a table per task, whose keys are options of train.")],
    output: Annotated[Path, typer.Option(help="Where a folder per finished prefix goes.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train several tasks at once on one base, a prefix for each.

    Keys before the first table are options for all tasks. `ratio` in a table is how many epochs of the task's rows
    make one of the run; a table [shared] (length, form, start, instruction) is a part that all prefixes begin with.

    Example: foreword joint tasks.toml --output runs/jobs
    """
    from ..joint import train_jointly
    from . import show
    from .options import read_tasks

    result = train_jointly(read_tasks(tasks, output), resume=resume, say=show.news)
    if as_json:
        show.json({name: found.summary for name, found in result.tasks.items()})
    else:
        show.trained_jointly(result)
