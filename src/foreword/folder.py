"""A folder of saved prefixes of which a model holds those that calls name, and no more than fit in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .errors import InputError

if TYPE_CHECKING:
    from .model import PrefixModel


class Folder:
    """Prefixes by the names of their folders in `path`; loaded when first named, they stay until `memory` bytes are
    exceeded, when the least recently named leave, never one that the same call names."""

    def __init__(self, model: PrefixModel, path: str | Path, memory: int) -> None:
        self._path, self._memory = Path(path), memory
        if not self._path.is_dir():
            raise InputError(f"{path} is no folder; give one that holds prefixes.")
        self._model = model
        self._held: OrderedDict[str, int] = OrderedDict()  # bytes by name, least recently named first

    def names(self) -> list[str]:
        """What there is to name."""
        return sorted(p.name for p in self._path.iterdir() if self._holds(p.name))

    def _holds(self, name: str) -> bool:
        return Path(name).name == name and (self._path / name / files.HEADER).is_file()

    def fetch(self, names: Sequence[str]) -> None:
        """See that the model holds these of the folder's prefixes. What is no name of the folder is left alone.

        Raises InputError where one is damaged or belongs to another base.
        """
        active = self._model.active
        for name in names:
            if name not in self._model.forms and self._holds(name):
                self._model.load(self._path / name, name)
                sites = self._model.kv(name).sites.values()
                self._held[name] = sum(t.numel() * t.element_size() for site in sites for t in site)
            if name in self._held:
                self._held.move_to_end(name)
        self._model.active = active
        for name in [name for name in self._held if name not in (*names, active)]:
            if sum(self._held.values()) <= self._memory:
                return
            del self._held[name]
            if name in self._model.forms:  # unless it was removed by hand
                self._model.remove(name)
