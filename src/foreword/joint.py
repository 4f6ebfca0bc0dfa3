"""Several tasks trained at once on one base: each has a prefix of its own, behind a part that all share if asked for.

Every step is a batch of one task, and the tasks' batches are evenly spaced. Each task sees its rows in the order that
it would alone, and what it does not share gets a gradient, and moves, in its own steps alone, at the learning rate that
such a step would have alone: but for a shared part, a task ends where it would by itself. While it runs,
OUTPUT/training holds its state; at the end OUTPUT holds a finished prefix per task, which is a folder that
`foreword serve --prefixes` takes.

A shared part before the tasks' own is the decomposition of Wang et al. 2023 (arXiv:2303.02861, section 3.1) with the
two put one behind the other instead of multiplied.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from . import files, processes
from .batching import Rows, SeveralRows
from .compose import turns
from .config import TrainConfig, check_output, claim
from .data import Data
from .errors import InputError
from .forms import Form, PrefixConfig, make_form
from .kv import KVPrefix, SiteKV, joined
from .model import NAME_PATTERN, PrefixModel
from .progress import validations
from .rates import head_learning_rate, learning_rate
from .tasks.task import PrefixTask
from .train import (
    Say,
    TrainResult,
    build,
    conclude,
    describe_data,
    describe_prefix,
    encoded_splits,
    load_rows,
    log_to,
    resume_point,
    run_arguments,
    zero_shot_figures,
)
from .trainer import PrefixTrainer

# Settings of the run, which its tasks cannot differ in.
OF_THE_RUN = (
    *("model", "epochs", "max_steps", "batch_size", "warmup_ratio", "weight_decay", "schedule", "average"),
    *("save_steps", "gradient_accumulation", "gradient_checkpointing", "dtype", "quantise", "report_to", "seed"),
)
SHARED = "shared"


@dataclass(frozen=True)
class JointConfig:
    """Settings of a run over several tasks.

    tasks: each task's own settings, by the name of its prefix; its output is a folder in that of the run.
    ratios: how many epochs of a task's rows make one of the run; 1 where it is not named.
    shared: what all prefixes begin with, if anything; the tasks' own parts follow it.
    """

    output: Path
    tasks: Mapping[str, TrainConfig]
    ratios: Mapping[str, float]
    shared: PrefixConfig | None = None

    @property
    def of_the_run(self) -> TrainConfig:
        """A task's settings, for those in which no two tasks differ."""
        return next(iter(self.tasks.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "ratios": dict(self.ratios),
            "shared": self.shared and self.shared.to_dict(),
        }

    def check(self) -> None:
        """Raise InputError for settings that cannot be meant."""
        if len(self.tasks) < 2:
            raise InputError(f"joint training takes two tasks or more, not {len(self.tasks)}; for one use train.")
        first = self.of_the_run
        for name, task in self.tasks.items():
            task.check()
            if not NAME_PATTERN.fullmatch(name) or name in (SHARED, "training"):
                raise InputError(f"{name!r} cannot name a task; use letters, digits, - and _, but not {SHARED!r}.")
            differing = [setting for setting in OF_THE_RUN if getattr(task, setting) != getattr(first, setting)]
            if differing:
                raise InputError(f"the tasks differ in {', '.join(differing)}; give one for the whole run.")
            if task.patience is not None or task.shard or task.keep or task.activation_cache:
                raise InputError("patience, shard, keep, activation_cache are of a single task's run; leave them out.")
            if task.changes_base or task.prompt_tokens:
                raise InputError("LoRA, adapters and prompt tokens are of a single task's run; leave them out.")
        for name, ratio in self.ratios.items():
            if name not in self.tasks:
                raise InputError(f"there is a ratio for {name!r}, which is no task of this run; name one of its tasks.")
            if not 0 < ratio < float("inf"):
                raise InputError(f"the ratio of {name} must be above 0, not {ratio:g}.")


@dataclass(frozen=True)
class JointResult:
    """What each task's prefix found, by its name."""

    output: Path
    tasks: dict[str, TrainResult]


class JointTask(nn.Module):
    """Tasks over one PrefixModel, by the names of their prefixes; a batch's `task` is the number of the task it is of.

    `forward(task, **batch)` returns what that task does.
    """

    def __init__(self, tasks: Mapping[str, PrefixTask]) -> None:
        super().__init__()
        self.names, self.tasks = list(tasks), nn.ModuleList(tasks.values())

    @property
    def by_name(self) -> dict[str, PrefixTask]:
        return {name: self._task(i) for i, name in enumerate(self.names)}

    @property
    def model(self) -> PrefixModel:
        return self._task(0).model

    def _task(self, number: int) -> PrefixTask:
        return cast(PrefixTask, self.tasks[number])

    def forward(self, task: int, **batch: Any) -> dict[str, Tensor]:
        return self.tasks[task](**batch, prefix=self.names[task])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of examples of one task, which each names."""
        task = examples[0]["task"]
        return {"task": task, **self._task(task).collate([_without_task(example) for example in examples])}

    def items(self, batch: dict[str, Any]) -> int:
        """How many things the loss of a batch is the mean over."""
        return self._task(batch["task"]).items(_without_task(batch))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


def _without_task(named: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != "task"}


class Behind(Form):
    """A task's own prefix behind a shared one, its keys turned to their new positions; the shared one is trained by
    all that stand behind it."""

    def __init__(self, shared: Form, own: Form, turns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shared, self.own, self.length = shared, own, shared.length + own.length
        self._sites = list(turns)
        for i, turn in enumerate(turns.values()):
            self.register_buffer(f"turn_{i}", turn)

    def forward(self) -> KVPrefix:
        shared, own = self.shared(), dict(self.own().sites)
        for i, name in enumerate(self._sites):
            if name in own:
                keys, turn = own[name].keys, getattr(self, f"turn_{i}")
                own[name] = SiteKV((keys.float() @ turn).to(keys.dtype), own[name].values)
        if shared.sites.keys() != own.keys():
            raise InputError("the shared prefix enters other layers than a task's own; give both the same.")
        return joined([shared, KVPrefix(own)])


def train_jointly(config: JointConfig, *, resume: bool = False, say: Say = lambda line: None) -> JointResult:
    """Run `config` from data to a saved prefix per task; with `resume`, go on from its last checkpoint.

    Raises as `train` does.
    """
    began = time.monotonic()
    config.check()
    if processes.count() > 1:
        raise InputError("tasks are trained jointly by one process; start foreword joint without torchrun.")
    check_output(config, resume)
    running = config.output / "training"
    data = {name: load_rows(task) for name, task in config.tasks.items()}
    for name, rows_of in data.items():
        say(f"{name}: {describe_data(rows_of)}")
    joint = build_jointly(config, data)
    model = joint.model
    rows, validation, cut = [], {}, {}
    for i, (name, task) in enumerate(joint.by_name.items()):
        say(f"{name}: {describe_prefix(model, name)}")
        train_rows, validation_rows, cut[name] = encoded_splits(config.tasks[name], task, data[name], say)
        rows.append(_of_task(i, train_rows))
        validation[name] = _of_task(i, validation_rows)
    claim(config, running)
    trainer = make_trainer(config, joint, rows, validation)
    zero_shot = {}
    for name, task in joint.by_name.items():
        kept = running / f"zero-shot-{name}.json"
        zero_shot[name] = zero_shot_figures(config.tasks[name], task, data[name].test, name, kept, say)
    trainer.train(resume_from_checkpoint=resume_point(running) if resume else None)
    results: dict[str, TrainResult] = {}
    for name, task in joint.by_name.items():
        model.activate(name)
        losses = [{"step": v["step"], "loss": v[f"{name}_loss"]} for v in validations(trainer.state.log_history)]
        facts = {
            "zero_shot": zero_shot[name],
            "validation": next(v["loss"] for v in losses if v["step"] == trainer.state.best_global_step),
            "cut": cut[name],
            "validations": losses,
            "trained_with": [other for other in joint.names if other != name],
            SHARED: config.shared and config.shared.to_dict(),
        }
        say(f"{name}:")
        own = replace(config.tasks[name], output=config.output / name)
        results[name] = conclude(own, task, data[name], trainer, facts, began, say)
    shutil.rmtree(running)
    return JointResult(config.output, results)


def _of_task(number: int, rows: Rows) -> Rows:
    return Rows([{"task": number, **row} for row in rows.rows], rows.lengths)


def build_jointly(config: JointConfig, data: Mapping[str, Data]) -> JointTask:
    """The tasks at their start, over one base."""
    tasks: dict[str, PrefixTask] = {}
    shared: Form | None = None
    turned: dict[str, Tensor] = {}
    model: PrefixModel | None = None
    for name, task in config.tasks.items():
        tasks[name] = build(task, data[name], model, name)
        model = tasks[name].model
        if config.shared is None:
            continue
        if model.configs[name].dynamic:
            raise InputError("a dynamic prefix cannot stand behind a shared one; leave one of them out.")
        if shared is None:
            shared = make_form(config.shared, model.base, model.sites, model.tokenizer)
        after = model.configs[name].positions == "after"
        if after and not turned:
            turned = {site: turn.float() for site, turn in turns(model, shared.length).items()}
        own, own_config = model.form(name), model.configs[name]
        model.remove(name)
        model.hold(name, Behind(shared, own, turned if after else {}).to(model.device), own_config)
        with torch.no_grad():
            model.kv(name)  # raises where the two do not fit
    return JointTask(tasks)


class JointTrainer(PrefixTrainer):
    """PrefixTrainer in which what belongs to one task follows the schedule by that task's own steps.

    owners: the number of the task that each key of `learning_rates` belongs to; none for what several share.
    """

    def __init__(self, *args: Any, owners: Mapping[str, int], **kwargs: Any) -> None:
        self.owners = owners
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        rows, size = cast(SeveralRows, self.train_dataset), self.args.gradient_accumulation_steps
        order = rows.sampler(self.args.train_batch_size, self.args.seed).order
        # How many of the first batches of an epoch are a task's.
        counts = {task: [0, *accumulate(i == task for i in order)] for task in set(self.owners.values())}

        def done(task: int, step: int) -> float:
            """Of a task, after so many steps of the run: its own steps."""
            epochs, rest = divmod(step * size, len(order))
            return (epochs * counts[task][-1] + counts[task][rest]) / size

        for i, group in enumerate(scheduler.optimizer.param_groups):
            task = self.owners.get(group.get("part", ""))
            if task is None or not hasattr(scheduler, "lr_lambdas"):
                continue
            steps = math.ceil(done(task, num_training_steps))
            alone = get_scheduler(
                self.args.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)]),
                num_warmup_steps=self.args.get_warmup_steps(steps),
                num_training_steps=steps,
            )
            scheduler.lr_lambdas[i] = lambda step, task=task, rate=alone.lr_lambdas[0]: rate(done(task, step))
        return scheduler


def make_trainer(
    config: JointConfig, joint: JointTask, rows: Sequence[Rows], validation: dict[str, Rows]
) -> PrefixTrainer:
    """The trainer of a run over these rows of each task; each task has the learning rate that it would have alone."""
    run = config.of_the_run
    together = SeveralRows(rows, [config.ratios.get(name, 1.0) for name in joint.names])
    rates: dict[str, float] = {}
    owners: dict[str, int] = {}
    for i, (name, task) in enumerate(joint.by_name.items()):
        head, form = f"tasks.{i}.head.", f".forms.{name}."
        if task.head is not None:
            rates[head] = head_learning_rate(config.tasks[name], task)
        if config.shared is not None and i == 0:  # a parameter of several modules is named in the first
            shared = replace(run, prefix=config.shared, learning_rate=None)
            rates[f"{form}shared."] = learning_rate(shared, joint.model)
        rates[form] = learning_rate(config.tasks[name], joint.model)
        owners |= {head: i, form: i}
    batches = len(together.sampler(run.batch_size, run.seed)) // run.batch_size
    trainer = JointTrainer(
        joint,
        run_arguments(run, joint.model, batches, config.output / "training"),
        average=run.average,
        learning_rates=rates,
        owners=owners,
        train_dataset=together,
        eval_dataset=validation,
        data_collator=joint.collate,
    )
    log_to(trainer, config.output / files.LOGS)
    return trainer
