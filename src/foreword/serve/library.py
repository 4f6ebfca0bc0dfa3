"""The prefixes on disk that the server offers by name, and those of them in memory.

Listing reads headers alone; a prefix is loaded when a request first names it, and the least recently used leave when
memory is short, never one in use. A reload puts a new version beside the old one, which stays until its last request
has ended. A name is looked up among the folders that are there and never made into a path.

Everything that loads or drops is called from the thread that owns the model; `listed` and `damaged` may be read from
any.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from ..model import NAME_PATTERN, PrefixModel
from ..tasks.classify import PrefixClassifier
from .failure import Failure, unknown_model
from .metrics import Metrics
from .schema import About

Kind = tuple[Any, ...]  # prefixes of one kind can be mixed in a batch
# What reading a damaged prefix may raise: what was checked, and fields or tensors that are not as they should be.
DAMAGE = (InputError, OSError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Listed:
    """What a prefix's header tells: its `kind`, and `about` it what clients are told."""

    name: str
    path: Path
    created: int
    moves_text: bool
    kind: Kind
    about: About


@dataclass(eq=False)
class Resident:
    """A prefix in memory, under `key` in the model's bank; `users` counts the requests that hold it."""

    key: str
    listed: Listed
    classifier: PrefixClassifier | None
    size: int
    users: int = 0
    retired: bool = False


class Library:
    """Prefixes by name. `memory` bounds the bytes of those kept; ones in use stay even above it.

    folder: every folder in it is offered under its own name. directories: single prefixes. context: tokens of text
    that a request may take. taken: the base's own name, which no prefix may have.
    """

    def __init__(
        self,
        model: PrefixModel,
        folder: Path | None,
        directories: list[Path],
        *,
        memory: int,
        context: int,
        metrics: Metrics,
        taken: str,
    ) -> None:
        self._model, self._folder, self._memory, self._metrics = model, folder, memory, metrics
        self._context = context
        self._single = {_name_of(path): path for path in directories}
        if len(self._single) < len(directories):
            raise InputError("two of the prefixes have the same folder name; rename one.")
        self._taken = taken
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._fingerprint = model.fingerprint
        self._keys = itertools.count()
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self.listed: dict[str, Listed] = {}
        self.damaged: dict[str, str] = {}
        for name, path in self._places().items():
            try:
                self.listed[name] = self._read(name, path)
            except DAMAGE as error:
                self.damaged[name] = _said(error)

    # ---- for requests

    def take(self, name: str) -> Resident:
        """The prefix, loaded if it was not; the caller gives it back by `release`. Raises Failure."""
        held = self._resident.get(name)
        if held is None:
            if name not in self.listed:
                raise unknown_model(name)
            self._metrics.prefix_misses.inc()
            try:
                held = self._load(name, self.listed[name].path)
            except DAMAGE as error:
                del self.listed[name]
                self.damaged[name] = _said(error)
                raise Failure(404, f"the prefix {name!r} cannot be loaded; it is damaged.", "model_damaged") from error
        else:
            self._metrics.prefix_hits.inc()
        self._resident.move_to_end(name)
        held.users += 1
        self._make_room()
        return held

    def release(self, held: Resident) -> None:
        """Give back what `take` gave."""
        held.users -= 1
        if held.retired and not held.users:
            self._drop(held)
        self._make_room()

    def check_room(self, listed: Listed | None, tokens: int) -> None:
        """Raises Failure where a request of so many tokens of text does not fit behind a prefix (or behind none)."""
        room = self._context
        if self._positions is not None:
            room = min(room, self._positions - (listed.about.length if listed is not None and listed.moves_text else 0))
        if tokens > room:
            raise Failure(
                400,
                f"prompt and answer would take {tokens} tokens and there is room for {room}; shorten them.",
                "context_length_exceeded",
            )

    # ---- at run time

    def reload(self, name: str) -> Listed:
        """Read a prefix from its folder, new or anew; requests that run keep what they began with.

        Raises Failure where there is none or it is damaged; what was served before is then served on.
        """
        path = self._places().get(name)
        if path is None:
            raise unknown_model(name)
        before = self._resident.get(name)
        try:
            self._load(name, path)
        except DAMAGE as error:
            self.damaged[name] = _said(error)
            raise Failure(409, f"the prefix {name!r} was not loaded; it is damaged.", "model_damaged") from error
        if before is not None:
            self._retire(before)
        self._make_room()
        return self.listed[name]

    def unload(self, name: str) -> None:
        """Offer a prefix no longer; requests that run end as they began. Raises Failure where it is not listed."""
        if self.listed.pop(name, None) is None:
            raise unknown_model(name)
        if (held := self._resident.pop(name, None)) is not None:
            self._retire(held)

    def resident(self) -> list[str]:
        """Names of the prefixes in memory."""
        return list(self._resident)

    # ---- reading

    def _places(self) -> dict[str, Path]:
        """Every folder that may hold a prefix, by name."""
        inside = sorted(self._folder.iterdir()) if self._folder is not None else []
        folders = {path.name: path for path in inside if path.is_dir() and not path.name.startswith(".")}
        return {**folders, **self._single}

    def _read(self, name: str, path: Path) -> Listed:
        if not NAME_PATTERN.fullmatch(name):
            raise InputError(f"{name!r} cannot name a prefix; use letters, digits, - and _, at most 64.")
        if name == self._taken:
            raise InputError(f"{name!r} is the name of the base; rename the folder.")
        header = files.read_header(path)
        if header["base"]["fingerprint"] != self._fingerprint:
            raise InputError(f"{path} was trained for another base ({header['base']['id']}).")
        if not (path / files.TENSORS).is_file():
            raise InputError(f"{path} is damaged: {files.TENSORS} is missing; save the prefix again.")
        prefix = header["prefix"]
        if prefix.get("dynamic") or header.get("combined"):
            kind = "is dynamic" if prefix.get("dynamic") else "comes with adapters on the base"
            raise InputError(f"{path} {kind}, which is not served; use `foreword predict` or `foreword generate`.")
        positions, sites = prefix.get("positions"), tuple(sorted(site["name"] for site in header["sites"]))
        return Listed(
            name,
            path,
            int((path / files.HEADER).stat().st_mtime),
            positions != "kept",
            (positions, prefix.get("window"), sites),
            _about(prefix, header.get("task") or {}),
        )

    def _load(self, name: str, path: Path) -> Resident:
        """Into memory, in the place of what was there under `name`; nothing is changed where it fails."""
        listed, key = self._read(name, path), f"p{next(self._keys)}"
        classifier = None
        try:
            if listed.about.task != PrefixClassifier.name:
                self._model.load(path, key)
            else:
                classifier = PrefixClassifier.from_pretrained(path, self._model, key)
        except DAMAGE:
            if key in self._model.configs:
                self._model.remove(key)
            raise
        sites = self._model.kv(key).sites.values()
        held = Resident(key, listed, classifier, sum(t.numel() * t.element_size() for site in sites for t in site))
        self.listed[name], self._resident[name] = listed, held
        self.damaged.pop(name, None)
        self._count()
        return held

    # ---- leaving

    def _make_room(self) -> None:
        while sum(held.size for held in self._resident.values()) > self._memory:
            idle = next((name for name, held in self._resident.items() if not held.users), None)
            if idle is None:
                return
            self._drop(self._resident.pop(idle))
            self._metrics.prefix_evictions.inc()

    def _retire(self, held: Resident) -> None:
        held.retired = True
        if not held.users:
            self._drop(held)

    def _drop(self, held: Resident) -> None:
        self._model.remove(held.key)
        self._count()

    def _count(self) -> None:
        self._metrics.prefixes.set(len(self._resident))
        self._metrics.prefix_bytes.set(sum(held.size for held in self._resident.values()))


def _about(prefix: dict[str, Any], task: dict[str, Any]) -> About:
    classifies = task.get("task") == PrefixClassifier.name
    return About(
        task=task.get("task"),
        form=prefix["form"],
        length=prefix["length"],
        parameters=prefix["parameters"],
        fields=task.get("fields", ["text"]) if classifies else None,
        labels=task["labels"] if classifies else None,
        multi_label=classifies and task.get("multi_label", False),
        zero_shot=classifies and task["label_words"] is not None,
        template=task.get("template"),
        max_new_tokens=task.get("max_new_tokens"),
    )


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"it is damaged ({type(error).__name__}: {error})."


def _name_of(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.resolve().name)[:64].strip("-_") or "prefix"
