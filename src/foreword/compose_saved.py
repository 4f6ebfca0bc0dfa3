"""Saved prefixes composed into a saved prefix: directories in, a directory out, as `foreword.compose` computes them.

The result does what the first of its parts does, by its task and its head. Its header says what it was made of, and on
which data the first was trained, so that it can be measured there; figures of its parts are not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, lerp

from . import files
from .bases import base_of
from .compose import concatenate, furthest, interpolate, worth
from .compose import cut as cut_kv
from .errors import InputError
from .examine import mean_loss, validation_batches
from .kv import KVPrefix
from .model import PrefixModel
from .tasks import task_class

Say = Callable[[str], None]
Progress = Callable[[int, int], None]
Saved = tuple[dict[str, Any], dict[str, Tensor]]  # header and tensors

COMPOSED = "composed"  # the result's name in the bank
MEANING = ("task", "labels", "multi_label", "mean", "deviation")  # what in a task's settings a head's outputs depend on
BATCH_SIZE = 16


def compose(
    directories: Sequence[str | Path],
    output: str | Path,
    weight: float | None = None,
    *,
    say: Say = lambda line: None,
) -> None:
    """Save prefixes of one base one behind the other, or with `weight` the point between two, (1 - weight) of the first
    and weight of the second, their heads too where both are for the same task and labels.

    Raises InputError for what cannot be composed, and where `output` is in use.
    """
    files.check_free(output)
    if len(directories) < 2:
        raise InputError(f"compose takes two prefixes or more, not {len(directories)}; name another.")
    if weight is not None and (len(directories) > 2 or not 0 <= weight <= 1):
        raise InputError(
            f"a weight from 0 to 1 says where between two prefixes the result lies, not {weight} among "
            f"{len(directories)}; correct it, or leave it out to put them one behind the other."
        )
    saved = [files.read(directory) for directory in directories]
    headers = [header for header, _ in saved]
    for directory, header in zip(directories, headers, strict=True):
        _check_base(directories[0], headers[0], directory, header)
        if header.get("combined"):
            raise InputError(
                f"{directory} was trained with LoRA or adapters on its base, which cannot be composed; name prefixes "
                "that were trained alone."
            )
        _say_static(directory, header, say)
    lengths = [header["prefix"]["length"] for header in headers]
    if weight is not None and lengths[0] != lengths[1]:
        raise InputError(
            f"{directories[0]} has {lengths[0]} tokens and {directories[1]} {lengths[1]}, so nothing lies between them."
        )
    model = PrefixModel(*base_of(headers[0]))
    names = [f"part-{i}" for i in range(1, len(directories) + 1)]
    for directory, name in zip(directories, names, strict=True):
        model.load(directory, name)
    kv = concatenate(model, names) if weight is None else interpolate(model, names[0], names[1], weight)
    _put(model, kv, names[0])
    room = model.text_limit(COMPOSED)
    if room is not None and room < 1:
        raise InputError(f"{kv.length} tokens together leave no room for text in the base's positions; cut some first.")
    made: dict[str, Any] = {"how": "concatenated"} if weight is None else {"how": "interpolated", "weight": weight}
    training = _training(made, directories, headers)
    settings = headers[0].get("task")
    if settings is None:
        model.save_pretrained(output, training=training)
        return
    cls = task_class(settings["task"])
    task = cls(model, cls.settings_class.from_dict(settings))
    if task.head is not None:
        task.head.load_plain(*(_head(saved[0]) if weight is None else _head_between(saved, weight, say)))
    task.save_pretrained(output, training=training)


def cut(
    directory: str | Path,
    length: int,
    output: str | Path,
    data: str | None = None,
    *,
    rows: int = 48,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Save a prefix with those `length` of its tokens alone whose absence changes the task's loss most, up or down, on
    `rows` validation rows of `data` (a single file: of all of it; by default the data that it was trained on).

    Returns `worth` of every token, the tokens `kept`, and the losses `loss` of the whole and `loss_cut` of what is
    kept. `progress(done, total)` counts passes over the rows.
    Raises InputError for a prefix without a task, a length that leaves nothing or all, and where `output` is in use.
    """
    files.check_free(output)
    header = files.read_header(directory)
    settings, tokens = header.get("task"), header["prefix"]["length"]
    if settings is None:
        raise InputError(f"{directory} was saved without a task, so there is nothing to measure its tokens by.")
    if tokens == 1:
        raise InputError(f"{directory} has one token, so there is nothing to cut.")
    if not 1 <= length < tokens:
        raise InputError(f"{directory} has {tokens} tokens and cannot be cut to {length}; keep 1 to {tokens - 1}.")
    task = task_class(settings["task"]).from_pretrained(directory, name="saved")
    batches = validation_batches(task, data, rows, BATCH_SIZE)
    model, done = task.model, 0
    _say_static(directory, header, say)
    model.put("whole", model.kv("saved"), like="saved")  # of a dynamic prefix what is cut is also what is measured

    def loss() -> float:
        nonlocal done
        found = mean_loss(task, batches)
        done += 1
        if progress is not None:
            progress(done, tokens + 3)  # one for each token, one for what is kept, and the whole is measured twice
        return found

    worths, before = worth(model, "whole", loss), loss()
    kept = furthest(worths, length)
    _put(model, cut_kv(model, "whole", kept), "whole")
    after = loss()
    task.save_pretrained(output, training=_training({"how": "cut", "kept": kept}, [directory], [header]))
    return {"worth": worths, "kept": kept, "loss": before, "loss_cut": after}


def _check_base(first: str | Path, header: dict[str, Any], second: str | Path, other: dict[str, Any]) -> None:
    a, b = header["base"], other["base"]
    if a["fingerprint"] != b["fingerprint"]:
        raise InputError(
            f"{first} is of the base {a['id']} (fingerprint {a['fingerprint']}) and {second} of {b['id']} "
            f"(fingerprint {b['fingerprint']}); name prefixes of one base."
        )


def _say_static(directory: str | Path, header: dict[str, Any], say: Say) -> None:
    if header["prefix"].get("dynamic"):
        say(f"{directory} is dynamic; what is taken of it is its static part, the same for every text.")


def _put(model: PrefixModel, kv: KVPrefix, like: str) -> None:
    model.put(COMPOSED, kv, like)
    model.headers[COMPOSED] = {"prefix": {"parameters": kv.numel()}}


def _training(
    made: dict[str, Any], directories: Sequence[str | Path], headers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What stands in the result's header in place of a run."""
    parts = {
        "of": [Path(directory).resolve().name for directory in directories],
        "digests": [header["digest"] for header in headers],
    }
    told = (headers[0].get("training") or {}).get("settings") or {}
    data = {key: told[key] for key in ("data", "text_column", "label_column") if key in told}
    return {"composed": {**made, **parts}, **({"settings": data} if data else {})}


def _head(saved: Saved) -> tuple[Tensor, Tensor]:
    return saved[1]["head.weight"], saved[1]["head.bias"]


def _head_between(saved: Sequence[Saved], weight: float, say: Say) -> tuple[Tensor, Tensor]:
    """The first's head, or the point between both where they say the same."""
    meant = [{key: (header.get("task") or {}).get(key) for key in MEANING} for header, _ in saved]
    first, second = saved
    if meant[0] != meant[1] or "head.weight" not in second[1]:
        say("The head is the first's: the second has none for the same task and labels.")
        return _head(first)
    (w, b), (v, c) = _head(first), _head(second)
    return lerp(w, v, weight), lerp(b, c, weight)
