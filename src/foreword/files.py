"""The saved directory: prefix.json, prefix.safetensors and a model card. No pickle anywhere.

Of a dynamic prefix (`prefix.dynamic` in the header is not null) the sites' tensors are the static part alone and the
tensors named `dynamic.` are what changes it; an engine that takes only keys and values must refuse it.

A directory is written beside its place and renamed into it. `prefix.json` holds the digest of the tensors, so that a
damaged or mixed-up pair is refused. `fingerprint` tells bases apart by a sample of every weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import InputError, RunError
from .kv import KVPrefix, SiteKV

FORMAT = 1
HEADER, TENSORS, CARD = "prefix.json", "prefix.safetensors", "README.md"
LOGS = "tensorboard"  # what was logged of the run; it stays when the finished prefix takes the run's place
REQUIRED = ("format", "base", "prefix", "sites", "digest")


def fingerprint(base: nn.Module) -> str:
    """16 hexadecimal digits that tell one base from another: names, shapes and 16 values of every parameter.

    Values are compared in bfloat16, so a base has one fingerprint in float32 and in bfloat16. Of quantised parameters
    names and shapes are compared: their values differ a little by the machine that quantised them.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters(), key=lambda item: item[0].replace(".base_layer.", ".")):
        if ".lora_" in name:  # PEFT's, on the base and not of it
            continue
        name = name.replace(".base_layer.", ".")
        flat = whole(parameter.detach()).reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.is_floating_point():
            sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16).float()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process holds a shard, put together (they all have to ask); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write(directory: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Save a prefix as `directory`, replacing what was there only once everything is written.

    Raises InputError when the place holds a file, RunError when the disk is full or the place cannot be written.
    """
    with replacing(directory) as beside:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, beside / TENSORS)
        header = {"format": FORMAT, **header, "digest": _digest(beside / TENSORS)}
        (beside / HEADER).write_text(json.dumps(header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (beside / CARD).write_text(_card(header, Path(directory).resolve().name), encoding="utf-8")


@contextmanager
def replacing(directory: str | Path) -> Iterator[Path]:
    """A folder to fill beside `directory`, which takes its place at the end; with an error nothing is changed there.

    Raises as `write` does.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{directory} is a file; a prefix is saved as a directory, so name another place.")
    beside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        yield beside
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"the prefix could not be saved to {target}: {reason}; nothing was changed there.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if (target / LOGS).is_dir():
        shutil.copytree(target / LOGS, beside / LOGS)
    target.rename(old)
    try:
        beside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_free(output: str | Path) -> None:
    """Raise InputError where `output` is a file, or a folder with something in it."""
    place = Path(output)
    if place.exists() and any(place.iterdir() if place.is_dir() else [place]):
        raise InputError(f"{output} exists and is not empty; use another output, or remove it.")


def read_header(directory: str | Path) -> dict[str, Any]:
    """`prefix.json` of a saved prefix. Raises InputError where it is missing, damaged or of another version."""
    path = Path(directory) / HEADER
    if not path.is_file():
        training = " (its training has not finished; resume it with --resume)" if _unfinished(directory) else ""
        raise InputError(f"{directory} holds no saved prefix: {HEADER} is missing{training}.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: it is not valid JSON ({error}); save the prefix again.") from error
    if not isinstance(header, dict) or "format" not in header:
        raise InputError(f"{path} is not the header of a prefix; save the prefix again.")
    if header["format"] != FORMAT:
        raise InputError(
            f"{path} has format version {header['format']} and this foreword reads version {FORMAT}; "
            "use the foreword that wrote it, or train again."
        )
    missing = [key for key in REQUIRED if key not in header]
    if missing:
        raise InputError(f"{path} is damaged: it lacks {', '.join(missing)}; save the prefix again.")
    if not _well_formed(header):
        raise InputError(f"{path} is damaged: its base, prefix or sites are not as foreword writes them.")
    return header


def _well_formed(header: dict[str, Any]) -> bool:
    base, prefix, sites = header["base"], header["prefix"], header["sites"]
    return (
        isinstance(base, dict)
        and {"id", "fingerprint", "parameters"} <= base.keys()
        and isinstance(prefix, dict)
        and {"form", "length", "parameters"} <= prefix.keys()
        and isinstance(sites, list)
        and all(isinstance(site, dict) and {"name", "kind", "keys", "values"} <= site.keys() for site in sites)
    )


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a saved prefix, checked against each other. Raises InputError naming the damage."""
    header = read_header(directory)
    path = Path(directory) / TENSORS
    if not path.is_file():
        raise InputError(f"{directory} is damaged: {TENSORS} is missing; save the prefix again.")
    raw = path.read_bytes()  # not mapped: a file that is overwritten in place would change the prefix in memory
    if hashlib.sha256(raw).hexdigest() != header["digest"]:
        raise InputError(
            f"{path} is damaged or belongs to another {HEADER} (its digest differs); save the prefix again."
        )
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}; save the prefix again.") from error
    for site in header["sites"]:
        for part in ("keys", "values"):
            name = f"{site['name']}.{part}"
            found = list(tensors[name].shape) if name in tensors else None
            if found != site[part]:
                raise InputError(f"{path} is damaged: {name} has shape {found}, the header says {site[part]}.")
    return header, tensors


def size(directory: str | Path) -> int:
    """Bytes of a saved prefix's own files; a report beside them is not counted."""
    return sum((Path(directory) / name).stat().st_size for name in (HEADER, TENSORS, CARD))


def kv_tensors(kv: KVPrefix) -> dict[str, Tensor]:
    """The tensors that `prefix.safetensors` holds for a prefix, float32, by `site.keys` and `site.values`."""
    tensors = {}
    for name, site in kv.sites.items():
        tensors[f"{name}.keys"], tensors[f"{name}.values"] = site.keys[0].float(), site.values[0].float()
    return tensors


def kv_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> KVPrefix:
    """The inverse of `kv_tensors`."""
    names = [site["name"] for site in header["sites"]]
    return KVPrefix({n: SiteKV(tensors[f"{n}.keys"][None], tensors[f"{n}.values"][None]) for n in names})


def generator_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `prefix.safetensors` holds for what makes a prefix dynamic, by `dynamic.name`."""
    return {f"dynamic.{name}": tensor for name, tensor in state.items()}


def generator_from(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `generator_tensors`."""
    return {name.removeprefix("dynamic."): t for name, t in tensors.items() if name.startswith("dynamic.")}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unfinished(directory: str | Path) -> bool:
    return (Path(directory) / "training").is_dir()


def _card(header: dict[str, Any], name: str) -> str:
    base, prefix, task = header["base"], header["prefix"], header.get("task")
    lines = [
        "---",
        "library_name: foreword",
        f"base_model: {base['id']}",
        "tags: [prefix-tuning]",
        "---",
        f"# {name}",
        "",
        f"A prefix of {prefix['length']} virtual tokens (form `{prefix['form']}`, {prefix['parameters']:,} trained "
        f"parameters) for `{base['id']}`.",
    ]
    if task:
        labels = f"; labels: {', '.join(task['labels'])}" if task.get("labels") else ""
        lines += ["", f"Task: {task['task']}{labels}."]
    figures = (header.get("training") or {}).get("test")
    if figures:
        lines += ["", "| test metric | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4f} |" for key, value in figures.items() if isinstance(value, float)]
    lines += ["", "```python", "import foreword", f'model = foreword.load("{name}")', "```", ""]
    return "\n".join(lines)
