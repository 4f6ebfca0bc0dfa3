"""The settings of a training run, and what of them a killed run leaves behind."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from . import defaults, processes
from .arguments import check_tracker
from .errors import InputError, RunError
from .files import check_free
from .forms import PrefixConfig

SCHEDULES = ("constant_with_warmup", "cosine", "linear")
# Settings that a task reads, and may not know.
TASK_OPTIONS = ("head", "template", "label_words", "max_length", "chat", "max_new_tokens", "beams", "stride")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; what is None is derived.

    model, data: a hub id, a folder (or file), or the embedded default.
    task: what the prefix is for, a name in `foreword.tasks.TASKS`.
    text_column: several with commas between, where a row has several texts.
    start_from: a saved prefix of the same base to go on from, of this task or of one like it, instead of a start of
        `prefix`'s own (Vu et al. 2022, arXiv:2110.07904: prompts transferred between tasks).
    keep: what the drift from the base on the base's own texts (`foreword.drift`) weighs beside the task's loss.
    prefix: what the prefix is made of. Without an instruction or another start, the instruction is the task's.
    lora, adapters: the rank of LoRA and the size of parallel adapters (`foreword.combine`) that are trained with the
        prefix, none at 0; gated: each of them, and the prefix, under a gate from the input.
    prompt_tokens: trainable input embeddings (`foreword.prompt_tuning`) behind the prefix.
    learning_rate: by default that of the form times the task's and the base's (`foreword.rates`).
    head_learning_rate: of a trained head, by default the task's own.
    parts_learning_rate: of LoRA and adapters, by default `foreword.combine.LEARNING_RATE`.
    max_length: tokens of template and text together.
    chat: the base's chat template stands around the prompt (`generate`).
    max_new_tokens: tokens of a completion, in training and when it is generated (`generate`).
    beams: beam search over so many when completions are tested (`generate`).
    stride: tokens that two windows of a long context share (`answer`); by default half of what a window holds.
    schedule: of the learning rate after the warm-up: `constant_with_warmup`, or `cosine` or `linear` to nought.
    average: the average of the parameters over the steps (`foreword.averaging`) is what is validated and saved.
    batch_size: rows of a step (times `gradient_accumulation`), of all processes together.
    activation_cache: GiB of memory for what the layers below the first that learns make of a row, kept from one epoch
        to the next (`foreword.lower_layers`); at 0 they are run every time.
    quantise: the base, by bitsandbytes. shard: its weights over the processes (FSDP2).
    validation_rows, test_rows: how many rows to validate and test on, all by default.
    save_steps: steps between checkpoints and validations; by default a quarter of an epoch.
    report_to: a tracker of transformers. What `tensorboard` logs stays in the output's folder `tensorboard`.
    """

    output: Path
    model: str = defaults.MODEL
    data: str = defaults.DATA
    task: str = "classify"
    text_column: str | None = None
    label_column: str | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    start_from: str | None = None
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    lora: int = 0
    adapters: int = 0
    prompt_tokens: int = 0
    gated: bool = False
    head: Literal["auto", "words", "linear"] = "auto"
    template: str | None = None
    label_words: tuple[str, ...] | None = None
    max_length: int = 128
    chat: bool = False
    max_new_tokens: int = 128
    beams: int = 1
    stride: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    parts_learning_rate: float | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    schedule: str = "constant_with_warmup"
    average: bool = True
    keep: float = 0.0
    patience: int | None = None
    save_steps: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    activation_cache: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["4bit", "8bit"] | None = None
    shard: bool = False
    zero_shot: bool = True
    report_to: str = "none"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainConfig:
        words = saved["label_words"]
        changed = {"output": Path(saved["output"]), "prefix": PrefixConfig.from_dict(saved["prefix"])}
        return cls(**{**saved, **changed, "label_words": tuple(words) if words else None})

    def task_options(self, known: frozenset[str]) -> dict[str, Any]:
        """The settings that the task knows. Raises InputError for one that was given and that it does not know."""
        usual = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        for name in TASK_OPTIONS:
            if name not in known and getattr(self, name) != usual[name]:
                raise InputError(f"the task {self.task} has no setting {name}; leave it out.")
        return {name: getattr(self, name) for name in TASK_OPTIONS if name in known}

    @property
    def changes_base(self) -> bool:
        """Whether something is put on the base, which every prefix of it would read."""
        return bool(self.lora or self.adapters)

    def check(self) -> None:
        """Raise InputError for numbers that cannot be meant."""
        for name in ("epochs", "batch_size", "gradient_accumulation", "max_length", "max_new_tokens", "beams"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}.")
        rates = ("learning_rate", "head_learning_rate", "parts_learning_rate")
        for name in ("max_steps", "train_rows", "validation_rows", "test_rows", "save_steps", *rates):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be above 0, not {value}.")
        for name in ("keep", "lora", "adapters", "prompt_tokens", "activation_cache"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name):g}.")
        if self.gated and not self.changes_base:
            raise InputError("gated is of LoRA and adapters; give lora or adapters, or dynamic='gates' for a prefix.")
        if self.shard and self.changes_base:
            raise InputError("LoRA and adapters cannot be trained on a sharded base; leave out --shard, or them.")
        if self.start_from is not None and self.prefix != PrefixConfig():
            raise InputError(
                f"{self.start_from} brings its own form, length and start; leave out what else is said of the prefix."
            )
        if self.shard and processes.count() == 1:
            raise InputError("there is one process, and nothing to shard the base over; start several with torchrun.")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
        check_tracker(self.report_to)


# ---- what a run leaves behind while it runs


class Run(Protocol):
    """Settings of a run, of one task or of several."""

    @property
    def output(self) -> Path: ...

    def to_dict(self) -> dict[str, Any]: ...


def check_output(config: Run, resume: bool) -> None:
    """Refuse an output in use, or with `resume` one that holds no unfinished run of the same settings."""
    output, unfinished = config.output, _unfinished(config.output)
    if resume:
        if unfinished is None:
            raise InputError(f"there is no unfinished run in {output} to resume; leave out --resume.")
        _check_same(unfinished, config)
    elif unfinished is not None:
        raise InputError(f"{output} holds an unfinished run; go on with --resume, or use another output.")
    else:
        check_free(output)


def claim(config: Run, running: Path) -> None:
    """Make the run's folder, now that nothing that was given can be wrong any more."""
    try:
        running.mkdir(parents=True, exist_ok=True)
        write_json(running / "run.json", config.to_dict())
    except OSError as error:
        raise RunError(f"{running} cannot be written: {error.strerror}.") from error


def unfinished_config(output: Path) -> TrainConfig | None:
    """The settings of the run of one task that `output` holds unfinished, if it does. Raises InputError for a run of
    several."""
    saved = _unfinished(output)
    if saved is None:
        return None
    _check_kind(saved, output, several=False)
    return TrainConfig.from_dict(saved)


def _unfinished(output: Path) -> dict[str, Any] | None:
    saved = output / "training" / "run.json"
    return json.loads(saved.read_text()) if saved.is_file() else None


def _check_kind(saved: dict[str, Any], output: Path, several: bool) -> None:
    if several != ("tasks" in saved):
        kind, command = ("one task", "train") if several else ("several tasks", "joint")
        raise InputError(f"{output} holds a run of {kind}; resume it with foreword {command}.")


def _check_same(saved: dict[str, Any], config: Run) -> None:
    asked = json.loads(json.dumps(config.to_dict()))
    _check_kind(saved, config.output, "tasks" in asked)
    differing = [name for name in saved if name != "output" and saved[name] != asked.get(name)]
    if differing:
        raise InputError(
            f"the run in {config.output} was started with another {', '.join(differing)}; resume it unchanged."
        )


def write_json(path: Path, content: Any) -> None:
    """Written beside and renamed."""
    beside = path.with_suffix(f".writing-{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
