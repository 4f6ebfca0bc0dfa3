"""foreword serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directories: Annotated[list[Path] | None, typer.Argument(help="Saved prefixes.")] = None,
    prefixes: Annotated[Path | None, typer.Option(help="A folder of saved prefixes.")] = None,
    model: Annotated[str | None, typer.Option(help="The base; by default the first prefix's.")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="FOREWORD_API_KEY", help="Any of them opens the server.")
    ] = None,
    memory: Annotated[int, typer.Option(min=1, help="MiB of prefixes kept in memory.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Rows that decode at once.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 128,
    context: Annotated[int, typer.Option(min=2, help="Tokens that prompt and answer may take.")] = 2048,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 120.0,
) -> None:
    """Serve one base and many prefixes over HTTP, as OpenAI's API; a prefix is a model name. `/` is a page to try them.

    Example: foreword serve --prefixes runs   (then: curl http://127.0.0.1:8000/v1/models)
    """
    from ..errors import InputError

    try:
        from ..serve.server import ServeConfig, run
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}; pip install 'foreword[serve]'.") from error
    config = ServeConfig(
        directories=tuple(directories or ()),
        prefixes=prefixes,
        model=model,
        host=host,
        port=port,
        keys=tuple(api_key or ()),
        memory=memory,
        rows=rows,
        waiting=waiting,
        context=context,
        deadline=deadline,
    )
    run(config, lambda line: typer.echo(line, err=True))
