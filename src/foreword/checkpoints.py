"""What a run needs to go on after it was stopped: one folder per saved step, no pickle, nothing of the base.

    checkpoint-120/
      trainable.safetensors                  parameters with requires_grad, by name, in their own dtype
      average.safetensors                    their averages over the steps, where a run takes them
      optimizer.safetensors, optimizer.json  moments by "index.name"; groups, schedule, gradient scaler
      rng.safetensors, rng.json              torch, CUDA, numpy and Python random states
      trainer_state.json                     transformers' TrainerState
      complete                               written last: a folder without it was killed half-way

Nothing here knows of the training loop.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foreword.errors import InputError

COMPLETE = "complete"
TRAINABLE = "trainable.safetensors"
AVERAGE = "average.safetensors"
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk with an error of its own

_NAME = re.compile(r"checkpoint-(\d+)")


def folder_of(run: Path, step: int) -> Path:
    """The checkpoint folder of `step` in the folder of a run."""
    return run / f"checkpoint-{step}"


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return (folder / COMPLETE).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    return [folder for folder in _folders(run) if is_complete(folder)]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder, or None; removes those that were killed half-way."""
    for half in _folders(Path(folder)):
        if not is_complete(half):
            discard(half)
    return next(reversed(complete_checkpoints(Path(folder))), None)


def discard(folder: Path) -> None:
    """Remove a checkpoint, its mark first: being killed meanwhile leaves nothing that looks complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path) -> None:
    """Mark a checkpoint as complete, once its files are on the disk itself."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    (folder / COMPLETE).touch()


def rotate(run: Path, limit: int | None, best: Path | None) -> None:
    """Remove the oldest complete checkpoints beyond `limit`, never the newest one nor `best`."""
    found = complete_checkpoints(run)
    old = [folder for folder in found[:-1] if folder != best]
    for folder in old[: max(0, len(found) - limit) if limit else 0]:
        discard(folder)


def write_trainable(folder: Path, model: nn.Module) -> None:
    """Write the parameters that have requires_grad."""
    save_file({name: _copy(p) for name, p in _trainable(model).items()}, folder / TRAINABLE)


def read_trainable(folder: Path, model: nn.Module) -> None:
    """Put the saved parameters into `model`; the frozen ones stay as they are.

    Raises: InputError where the file cannot be read or its names, shapes or dtypes are not the model's.
    """
    saved, current = _load(folder / TRAINABLE), _trainable(model)
    for name in sorted(saved.keys() | current.keys()):
        here, there = _kind(current.get(name)), _kind(saved.get(name))
        if here != there:
            raise InputError(f"{folder} does not fit this model: '{name}' is {there} there and {here} here.")
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])


def write_average(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the state of a `foreword.averaging.WeightAverage`."""
    save_file({name: _copy(tensor) for name, tensor in tensors.items()}, folder / AVERAGE)


def read_average(folder: Path) -> dict[str, Tensor]:
    """What `write_average` wrote. Raises: InputError where the file cannot be read."""
    return _load(folder / AVERAGE)


def write_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Write the states of an optimizer, its schedule and, with float16, its gradient scaler (else None)."""
    state = optimizer.state_dict()
    items = {f"{i}.{key}": value for i, values in state["state"].items() for key, value in values.items()}
    tensors = {key: _copy(value) for key, value in items.items() if isinstance(value, Tensor)}
    scalars = {
        "state": {key: value for key, value in items.items() if key not in tensors},
        "groups": state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    _write(folder, "optimizer", tensors, scalars)


def read_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Restore what `write_optimizer` wrote.

    Peak learning rates stay those that optimizer and scheduler were made with: who resumes after a loss that
    was not a number has lowered them.
    """
    tensors, scalars = _read(folder, "optimizer")
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | scalars["state"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for group, own in zip(scalars["groups"], optimizer.param_groups, strict=True):
        # JSON has no tuples: betas come back as a list.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(own.get(k), tuple)})
    peaks = list(scheduler.base_lrs)
    optimizer.load_state_dict({"state": state, "param_groups": scalars["groups"]})
    scheduler.load_state_dict(scalars["scheduler"])
    if peaks != scheduler.base_lrs:
        _set_peaks(optimizer, scheduler, peaks)
    if scaler is not None and scalars["scaler"]:
        scaler.load_state_dict(scalars["scaler"])


def write_rng(folder: Path, name: str = "rng") -> None:
    """Write every random state that training draws from."""
    version, words, gauss = random.getstate()
    kind, keys, *position = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _write(folder, name, tensors, {"python": [version, gauss], "numpy": [kind, *position]})


def read_rng(folder: Path, name: str = "rng") -> None:
    """Set the random states that `write_rng` wrote; states of GPUs that are not here are left out."""
    tensors, scalars = _read(folder, name)
    version, gauss = scalars["python"]
    kind, *position = scalars["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *position))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


def _folders(run: Path) -> list[Path]:
    """Folders named checkpoint-N, smallest N first."""
    found = [(_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copy(tensor: Tensor) -> Tensor:
    """An own, contiguous copy on the CPU: safetensors refuses tensors that share storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _kind(tensor: Tensor | None) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}" if tensor is not None else "missing"


def _set_peaks(optimizer: Any, scheduler: Any, peaks: list[float]) -> None:
    """Give every parameter group a new peak learning rate at the same point of the schedule."""
    for group, old, new in zip(optimizer.param_groups, scheduler.base_lrs, peaks, strict=True):
        group["lr"] *= new / old if old else 0.0
        group["initial_lr"] = new
    scheduler.base_lrs = peaks
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _write(folder: Path, name: str, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(scalars, indent=1) + "\n")


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = _load(folder / f"{name}.safetensors")
    try:
        return tensors, json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name}.json cannot be read: {error}.") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
