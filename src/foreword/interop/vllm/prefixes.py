"""A folder of saved prefixes, looked up by name. What cannot be served is refused by its header, before any tensor.

A name is one folder's name and nothing else, so no request reaches another place of the file system.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import files
from ...errors import InputError
from ..carried import check_carried, check_output, left_behind

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Found:
    """A prefix that may be served: its P, the digest of its tensors, its header and where it is."""

    name: str
    length: int
    digest: str
    header: dict[str, Any]
    directory: Path


@dataclass(frozen=True)
class CacheLayer:
    """What the engine keeps of one layer: its key-value heads on one of `ranks` ranks, and their sizes."""

    heads: int
    key_size: int
    value_size: int


class PrefixFolder:
    """The prefixes in `folder`, each read again when its file changes. Raises InputError where there is no folder."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise InputError(f"{folder} is no folder; make one and export prefixes into it.")
        self._known: dict[str, tuple[tuple[int, int, int], Found]] = {}

    def find(self, name: str) -> Found:
        """Raises InputError when there is no such prefix, it is damaged, or a paged cache cannot carry it."""
        directory = self._folder / name
        if not NAME.fullmatch(name) or not directory.is_dir():
            raise InputError(f"there is no prefix {name[:64]!r}.")
        try:
            status = (directory / files.HEADER).stat()
        except OSError:
            raise InputError(f"there is no prefix {name!r}.") from None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            known = self._known[name] = (stamp, self._read(name, directory))
        return known[1]

    @staticmethod
    def _read(name: str, directory: Path) -> Found:
        header = files.read_header(directory)
        check_carried(header, "vLLM")
        return Found(name, int(header["prefix"]["length"]), str(header["digest"]), header, directory)

    def names(self) -> tuple[list[str], dict[str, str]]:
        """Those that can be served, and why the other folders cannot be."""
        served, refused = [], {}
        for directory in sorted(path for path in self._folder.iterdir() if path.is_dir()):
            try:
                served.append(self.find(directory.name).name)
            except InputError as error:
                refused[directory.name] = str(error)
        return served, refused


def check_fits(found: Found, layers: Sequence[CacheLayer], ranks: int, base: str) -> None:
    """Raises InputError unless the prefix was made for the model `base` and each layer's shapes are the engine's."""
    made_for = found.header["base"]["id"]
    if made_for != base:
        raise InputError(f"prefix {found.name!r} was made for {made_for}, and the engine serves {base}.")
    sites = found.header["sites"]
    if len(sites) != len(layers):
        raise InputError(f"prefix {found.name!r} has {len(sites)} layers and the model {len(layers)}.")
    for i, (site, layer) in enumerate(zip(sites, layers, strict=True)):
        (heads, length, key_size), (_, _, value_size) = site["keys"], site["values"]
        own = CacheLayer(max(1, heads // ranks), key_size, value_size)
        if own != layer or length != found.length or site["values"][:2] != site["keys"][:2]:
            raise InputError(f"layer {i} of prefix {found.name!r} has other heads or sizes than the model's.")


def export(directory: str | Path, output: str | Path) -> list[str]:
    """Copy a saved prefix into a served folder under the name of `output`; returns what is left to the reader.

    Raises InputError when a paged cache cannot carry it, the name cannot be requested, or it is damaged.
    """
    header, tensors = files.read(directory)
    check_carried(header, "vLLM")
    name = Path(output).resolve().name
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be requested by name; use letters, digits, - and _, at most 64.")
    check_output(output, files.HEADER)
    with files.replacing(output) as beside:
        for file in (files.HEADER, files.TENSORS, files.CARD):
            if (Path(directory) / file).is_file():
                shutil.copyfile(Path(directory) / file, beside / file)
    return left_behind(header, tensors)
