"""What the scheduler is asked for: a continuation, the labels of texts, or where attention goes on one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from .generation import Sampling
from .library import Resident


@dataclass(eq=False)
class Job:
    """Something to answer with a prefix (or None): parts of the answer, or a Failure, are put in `out` with `index`.

    deadline: on the clock of `time.monotonic`. Whoever asked sets `cancelled` when nobody waits any more.
    """

    prefix: str | None
    deadline: float
    out: asyncio.Queue[tuple[int, Any]]
    index: int = 0
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    held: Resident | None = None


@dataclass(eq=False)
class Completion(Job):
    """Answers Pieces, the last of which has a `finish`."""

    prompt: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=lambda: Sampling(1))


@dataclass(eq=False)
class Classification(Job):
    """Answers one list, of what PrefixClassifier.predict says of each text. bare: the base alone reads them, with the
    template and the label words of `prefix`."""

    texts: list[str] = field(default_factory=list)
    bare: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Attention(Job):
    """Answers one Shares. text: what a classifier's template is put around; or `prompt`, ids that are read as they
    are."""

    text: str | None = None
    prompt: list[int] = field(default_factory=list)


Reading = Classification | Attention


@dataclass(frozen=True)
class Shares:
    """The text of each token and the share of its attention that goes to the prefix; `cut` as in classification."""

    tokens: list[str]
    shares: list[float]
    cut: bool
