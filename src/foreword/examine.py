"""What a saved prefix does, found by running it: where attention goes, what its tokens resemble, how far it moved from
its start, and what each token and layer is worth. All plain data, for a page or for JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .attention import listening
from .errors import InputError
from .evaluate import rows_of
from .forms import make_form
from .inspect import describe
from .kv import KVPrefix
from .model import PrefixModel
from .shares import Batch, attention_shares
from .sites import Site, routed, run_inputs, vocabulary_size
from .splits import some_rows
from .tasks import load_task
from .tasks.task import PrefixTask
from .worth import reading_instead, site_worth, token_worth

Progress = Callable[[int, int], None]


def examine(
    directory: str | Path,
    data: str | None = None,
    *,
    rows: int = 32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a saved prefix on `rows` validation rows of `data` (a single file: of all of it; by default the data that it
    was trained on) and say what it does.

    Returns `about` (as `describe`), `sites`, `shares` ([H][P] by site), `moved` and `words` (see those functions),
    `loss` and `worth` (rises of the loss, by `tokens` and by `sites`). A prefix without a task has no rows: its
    `shares`, `loss` and `worth` are None. `progress(done, total)` counts passes over the rows.
    """
    header = files.read_header(directory)
    if header.get("task"):
        return _with_rows(directory, load_task(directory), data, rows, batch_size, progress)
    if data is not None:
        raise InputError(f"{directory} was saved without a task, so it cannot be run on {data}; leave out the data.")
    return _still(directory, PrefixModel.from_pretrained(directory))


def _still(directory: str | Path, model: PrefixModel) -> dict[str, Any]:
    """What can be said without rows."""
    assert model.active is not None
    return {
        "about": {"directory": str(directory), **describe(directory)},
        "sites": list(model.kv(model.active).sites),
        "shares": None,
        "moved": moved(model, model.active),
        "words": nearest_words(model, model.active),
        "loss": None,
        "worth": None,
    }


def _with_rows(
    directory: str | Path,
    task: PrefixTask,
    data: str | None,
    rows: int,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Any]:
    model, name = task.model, task.model.active
    assert name is not None
    batches = validation_batches(task, data, rows, batch_size)
    kv = model.kv(name)
    total = 4 + kv.length + len(kv.sites)  # one for the shares, and the whole prefix is measured three times
    done = 0

    def ran(*_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def loss(cut: KVPrefix) -> float:
        ran()
        with reading_instead(model, name, cut):
            return mean_loss(task, batches)

    ran()
    shares = attention_shares(model, lambda batch: task(**batch, prefix=name), batches)
    worth = {"tokens": token_worth(kv, loss), "sites": site_worth(kv, loss)}
    found = {"shares": {site: share.tolist() for site, share in shares.items()}, "loss": loss(kv), "worth": worth}
    return _still(directory, model) | found


@torch.inference_mode()
def mean_loss(task: Callable[..., dict[str, Tensor]], batches: Sequence[Batch]) -> float:
    """The mean over rows of the loss that `task(**batch)` gives as the mean of each batch."""
    sums = [float(task(**batch)["loss"]) * len(batch["input_ids"]) for batch in batches]
    return sum(sums) / sum(len(batch["input_ids"]) for batch in batches)


def validation_batches(task: PrefixTask, data: str | None, rows: int, batch_size: int) -> list[Batch]:
    """As many validation rows, or all where there are fewer, as batches for `mean_loss`; of the data that the prefix
    was trained on by default.

    Raises InputError for rows that do not fit the task, and for less than one.
    """
    if rows < 1:
        raise InputError(f"rows must be at least 1, not {rows}.")
    _, found = rows_of(task, data, "validation")
    chosen = some_rows(found, min(rows, len(found)), 0, "validation", task.schema.stratified)
    return [batch for _, batch in task.batches(task.examples(chosen)[0], batch_size)]


@torch.no_grad()
def moved(model: PrefixModel, name: str) -> dict[str, dict[str, float]] | None:
    """How far keys and values are from their start, by site: the root mean square of their change, in deviations of
    the start, its frozen tokens apart (the unit that `direct` and `mlp` train in).

    None where the start is not known any more: a prefix that was cut or composed.
    """
    kv = model.kv(name)
    if "composed" in (model.headers.get(name, {}).get("training") or {}):
        return None
    start = make_form(model.configs[name], model.base, model.sites, model.tokenizer)()
    if start.length != kv.length or start.sites.keys() != kv.sites.keys():
        return None
    frozen = min(model.configs[name].frozen_tokens, kv.length - 1)
    found = {}
    for site, (keys, values) in kv.sites.items():
        pairs = {"keys": (keys, start.sites[site].keys), "values": (values, start.sites[site].values)}
        found[site] = {
            part: float((now - then).float().square().mean().sqrt() / _deviation(then[:, :, frozen:]))
            for part, (now, then) in pairs.items()
        }
    return found


def _deviation(start: Tensor) -> Tensor:
    return start.float().std(correction=0).clamp(min=1e-6)


@torch.no_grad()
def nearest_words(model: PrefixModel, name: str, count: int = 4) -> list[list[tuple[str, float]]] | None:
    """For each prefix token the words of the vocabulary whose values at the first site are nearest, with the cosine.

    At the first site a word's values depend on the word alone, so this serves every form; a prefix that starts from
    text is that text at step 0. None where the prefix does not enter the first site, or without a tokenizer.
    """
    site, kv = model.sites[0], model.kv(name)
    if site.name not in kv.sites or model.tokenizer is None:
        return None
    words = _unit(vocabulary_values(model, site)[: len(model.tokenizer)])  # [V, H_kv d_v]
    own = _unit(kv.sites[site.name].values[0].transpose(0, 1).flatten(1).float())  # [P, H_kv d_v]
    best = (own @ words.T).topk(min(count, len(words)))
    return [
        [(model.tokenizer.decode([i]), round(cosine, 4)) for i, cosine in zip(ids, cosines, strict=True)]
        for ids, cosines in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


class _ReachedError(Exception):
    """Ends a forward pass once the first site has been heard."""


@torch.no_grad()
def vocabulary_values(model: PrefixModel, site: Site, rows: int = 1024) -> Tensor:
    """The values `[V, H_kv d_v]`, float32, that each word of the vocabulary alone has at `site`, the first one."""
    found: list[Tensor] = []

    def listener(module: torch.nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        if module is site.module:
            found.append(value[:, :, 0].flatten(1).float())
            raise _ReachedError

    base = model.base.eval()
    for ids in torch.arange(vocabulary_size(base), device=base.device).split(rows):
        with suppress(_ReachedError), routed(base), listening(listener):
            base(**run_inputs(base, ids[:, None]))
    return torch.cat(found)
