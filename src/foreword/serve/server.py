"""Starting and stopping: base, prefixes and engine put together, uvicorn in front, SIGTERM drains."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from .. import files
from ..bases import base_of
from ..errors import InputError
from ..model import PrefixModel
from ..sites import vocabulary_size
from .app import create_app
from .library import Library
from .metrics import Metrics
from .prompts import Prompts
from .scheduler import Scheduler
from .service import Service


@dataclass(frozen=True)
class ServeConfig:
    """What `foreword serve` takes.

    directories: single prefixes. prefixes: a folder of them. model: the base, by default the first prefix's.
    memory: MiB of prefixes kept. rows: that decode at once. waiting: jobs that may wait. context: tokens of text,
    prompt and answer, that one may take. deadline: seconds that a request may take, and that SIGTERM waits for.
    """

    directories: tuple[Path, ...] = ()
    prefixes: Path | None = None
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    memory: int = 1024
    rows: int = 16
    waiting: int = 128
    context: int = 2048
    deadline: float = 120.0


def build(config: ServeConfig, say: Callable[[str], None]) -> FastAPI:
    """The application, base loaded and folder read; what cannot be served is said. Raises InputError."""
    if config.prefixes is not None and not config.prefixes.is_dir():
        raise InputError(f"{config.prefixes} is no folder; give one that holds prefixes.")
    made_for = {"base": {"id": config.model}} if config.model else _header_of_first(config)
    source = made_for["base"]["id"]
    model = PrefixModel(*base_of(made_for))
    model.eval()
    name, metrics = _name_of(source), Metrics()
    library = Library(
        model,
        config.prefixes,
        list(config.directories),
        memory=config.memory << 20,
        context=config.context,
        metrics=metrics,
        taken=name,
    )
    for reason in library.damaged.values():
        say(f"Not served: {reason}")
    say(f"Serving {name} and {len(library.listed)} prefixes on http://{config.host}:{config.port}")
    scheduler = Scheduler(model, library, metrics, rows=config.rows, waiting=config.waiting)
    prompts = Prompts(model.tokenizer, vocabulary_size(model.base))
    generates, parameters = model.kind == "decoder", model.base_parameters
    service = Service(name, generates, parameters, scheduler, library, prompts, metrics, config.deadline)
    return create_app(service, config.keys)


def run(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run or wait then end first, and new ones find the port closed."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    app = build(config, say)
    # uvicorn drains at these signals and then raises them again, for the handlers that it found.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(config.deadline) + 1,
    )


def _header_of_first(config: ServeConfig) -> dict[str, Any]:
    """The header of a prefix, which names its base; where one names none, the next is asked."""
    places = [*config.directories, *(sorted(config.prefixes.iterdir()) if config.prefixes else [])]
    for place in places:
        if place.is_dir():
            try:
                return files.read_header(place)
            except InputError:
                continue
    raise InputError("there is no prefix to serve; give a saved prefix, a folder of them, or a base by --model.")


def _name_of(source: str) -> str:
    """The base's name among the models: the last part of a hub id or path."""
    return source.rstrip("/").split("/")[-1]
