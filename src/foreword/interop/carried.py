"""What a plain key-value cache can carry of a saved prefix, told from its header alone.

PEFT and vLLM both hold a prefix as the first P entries of every layer's cache. What does not fit there exactly is
refused with the reason; what is lost beside it (a task, a head) is said. Needs neither torch nor transformers, so that
it runs inside other engines' environments too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError

FIXED_FORMS = ("direct", "projected", "mlp")  # keys and values that are the same for every input


def check_carried(header: dict[str, Any], engine: str) -> None:
    """Raises InputError, naming the reason, when `engine`'s cache cannot hold this prefix exactly."""
    reason = _reason(header)
    if reason:
        raise InputError(f"{engine} cannot carry this prefix: {reason}.")


def _reason(header: dict[str, Any]) -> str | None:
    prefix, sites = header["prefix"], header["sites"]
    changing = prefix.get("dynamic") or (None if prefix["form"] in FIXED_FORMS else prefix["form"])
    if changing:
        return f"its form {changing!r} computes keys and values from each input, and a cache holds them fixed"
    if header.get("combined"):
        return "it was trained with adapters on its base, and the cache holds the prefix alone"
    kinds = sorted({site["kind"] for site in sites} - {"decoder"})
    if kinds:
        return f"it enters {' and '.join(kinds)} attention, and only a decoder's self-attention has such a cache"
    if prefix.get("layers") is not None:
        return f"it enters only layers {prefix['layers']}, and a cache has its P entries in every layer"
    if prefix.get("positions") != "after":
        return "its text keeps positions from 0, and behind a cache text comes at positions P and after"
    if header["base"].get("shared_layers"):
        return f"{header['base']['shared_layers']} layers of its base read another layer's keys and values"
    if prefix.get("window") != "slides":
        return _window_reason(sites)
    return None


def _window_reason(sites: list[dict[str, Any]]) -> str | None:
    if any("window" not in site for site in sites):
        return "its header does not say which layers have sliding windows; load it and save it again"
    windows = sorted({site["window"] for site in sites} - {None})
    if windows:
        return (
            f"it stays visible in sliding windows (of {', '.join(map(str, windows))} tokens), where a cache forgets "
            "its oldest entries; train it with window='slides'"
        )
    return None


def left_behind(header: dict[str, Any], tensors: Iterable[str]) -> list[str]:
    """What a cache does not hold of a prefix, by its header and the names of its tensors, a sentence each."""
    notes = []
    if header.get("task"):
        notes.append(f"The task ({header['task']['task']}) is not carried: write the same template around each text.")
    if any(name.startswith("head.") for name in tensors):
        notes.append("The trained head is not carried: the logits are over the vocabulary.")
    return notes


def check_output(output: str | Path, marker: str) -> None:
    """Raises InputError when `output` is a folder with something in it that `marker` does not tell to be ours."""
    target = Path(output)
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise InputError(f"{output} holds other files; name a new folder.")
