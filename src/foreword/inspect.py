"""What is in a saved prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import files


def describe(directory: str | Path) -> dict[str, Any]:
    """Base, form, length, parameters and their share of the base's, size on disk, task and figures. No model is loaded.

    Raises InputError when the directory holds no prefix or a damaged one.
    """
    header, tensors = files.read(directory)
    base, prefix, training = header["base"], header["prefix"], header.get("training") or {}
    kinds = [site["kind"] for site in header["sites"]]
    return {
        "base": base["id"],
        "fingerprint": base["fingerprint"],
        "form": prefix["form"],
        "length": prefix["length"],
        "start": prefix["start"],
        "instruction": prefix["instruction"],
        "positions": prefix["positions"],
        "window": prefix["window"],
        "sites": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "parameters": prefix["parameters"],
        "share_of_base": prefix["parameters"] / base["parameters"],
        "numbers_stored": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": files.size(directory),
        "combined": header.get("combined"),
        "composed": training.get("composed"),
        "task": header.get("task"),
        "test": training.get("test"),
        "zero_shot": training.get("zero_shot"),
        "digest": header["digest"],
    }
