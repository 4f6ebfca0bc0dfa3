"""One training run from settings to a saved, tested prefix; killed at any moment, it goes on where it was.

While it runs, OUTPUT/training holds `run.json` (its settings) and the checkpoints. When it ends, the finished prefix
takes OUTPUT's place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import set_seed
from transformers.trainer_utils import PredictionOutput

from . import defaults
from .bases import load_base
from .data import ClassificationData, Row, load_classification, some_rows
from .errors import InputError, RunError
from .evaluate import compute_metrics, confusion, per_label
from .forms import PrefixConfig
from .model import PrefixModel
from .report import mistakes, validations, write_report
from .tasks.classify import PrefixClassifier
from .tasks.template import default_instruction, make_settings
from .trainer import PrefixTrainer, Rows, last_checkpoint, training_arguments

LEARNING_RATES = {"direct": 1e-2, "projected": 5e-3, "mlp": 3e-4}
NAME = "prefix"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; what is None is derived.

    model, data: a hub id, a folder (or file), or the embedded default.
    prefix: what the prefix is made of. Without an instruction or another start, the instruction is derived from the
        label names.
    learning_rate: by default that of the form (`LEARNING_RATES`); a linear head learns at `head_learning_rate`.
    max_length: tokens of template and text together.
    validation_rows, test_rows: how many rows to validate and test on, all by default.
    save_steps: steps between checkpoints and validations; by default a quarter of an epoch.
    """

    output: Path
    model: str = defaults.MODEL
    data: str = defaults.DATA
    text_column: str | None = None
    label_column: str | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    head: Literal["auto", "words", "linear"] = "auto"
    template: str | None = None
    label_words: tuple[str, ...] | None = None
    max_length: int = 128
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    schedule: str = "cosine"
    patience: int | None = None
    save_steps: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    zero_shot: bool = True
    report_to: str = "none"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainConfig:
        prefix = {**saved["prefix"], "layers": tuple(saved["prefix"]["layers"] or ()) or None}
        words = saved["label_words"]
        changed = {"output": Path(saved["output"]), "prefix": PrefixConfig(**prefix)}
        return cls(**{**saved, **changed, "label_words": tuple(words) if words else None})


@dataclass(frozen=True)
class TrainResult:
    """What a run found: figures on the test rows, what the files hold, and how long it took."""

    output: Path
    test: dict[str, float]
    zero_shot: dict[str, float] | None
    summary: dict[str, Any]


Say = Callable[[str], None]


def train(config: TrainConfig, *, resume: bool = False, say: Say = lambda line: None) -> TrainResult:
    """Run `config` from data to a saved prefix; with `resume`, go on from the last checkpoint in its output.

    `say` gets a line of news now and then. Raises InputError for what was given wrong, RunError when the run itself
    fails (a loss that is not a number, an interrupt, a full disk); the state of an interrupted run is kept.
    """
    began = time.monotonic()
    _check(config)
    running = config.output / "training"
    _check_output(config, running, resume)
    data = _load(config)
    say(_describe_data(data))
    classifier = build(config, data)
    say(_describe_prefix(classifier.model, config.prefix.form))
    splits = {name: _rows(classifier, getattr(data, name), data.labels) for name in ("train", "validation", "test")}
    cut = {name: number for name, (_, number) in splits.items() if number}
    if cut:
        counts = ", ".join(f"{number} {name}" for name, number in cut.items())
        say(f"Texts cut to fit {config.max_length} tokens: {counts} rows.")
    _claim(config, running)
    rows, validation, test = (splits[name][0] for name in ("train", "validation", "test"))
    trainer = _trainer(config, classifier, rows, validation)
    zero_shot = _zero_shot(trainer, classifier, test, running, say) if config.zero_shot else None
    output = trainer.train(resume_from_checkpoint=_last(running) if resume else None)
    say(f"Testing on {len(test)} rows.")
    tested, truth = trainer.predict(test), [row["labels"] for row in test.rows]
    summary = {
        **_figures(tested, truth, data.labels),
        "zero_shot": zero_shot,
        "validation": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "parameters": classifier.model.count(),
        "learning_rate": trainer.args.learning_rate,
        "rows": {name: len(split) for name, (split, _) in splits.items()},
        "cut": cut,
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "validations": validations(trainer.state.log_history),
        "seconds": {
            "training": round(output.metrics["train_runtime"], 1),
            "total": round(time.monotonic() - began, 1),
        },
        "settings": {key: value for key, value in config.to_dict().items() if key != "output"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    classifier.save_pretrained(config.output, training=summary)
    texts = [row.text for row in data.test]
    write_report(config.output, mistakes(texts, truth, tested.predictions, data.labels))
    return TrainResult(config.output, summary["test"], zero_shot, summary)


def _figures(tested: PredictionOutput, truth: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Metrics, figures per label and confusion on the test rows."""
    predicted = np.argmax(tested.predictions, axis=-1).tolist()
    return {
        "test": compute_metrics(tested),
        "per_label": per_label(truth, predicted, labels),
        "confusion": confusion(truth, predicted, labels),
    }


def build(config: TrainConfig, data: ClassificationData) -> PrefixClassifier:
    """The classifier that `config` trains, at its start."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = PrefixModel(*load_base(config.model, dtype))
    prefix = config.prefix
    if prefix.instruction is None and prefix.start in (None, "instruction"):
        prefix = replace(prefix, instruction=default_instruction(data.labels))
    set_seed(config.seed)
    model.add(NAME, prefix, seed=config.seed)
    settings = make_settings(
        model,
        data.labels,
        head=config.head,
        template=config.template,
        label_words=config.label_words,
        max_length=config.max_length,
    )
    return PrefixClassifier(model, settings)


def _trainer(config: TrainConfig, classifier: PrefixClassifier, rows: Rows, validation: Rows) -> PrefixTrainer:
    steps = -(-len(rows) // (config.batch_size * config.gradient_accumulation))
    every = config.save_steps or max(1, min(steps, config.max_steps or steps) // 4)
    args = training_arguments(
        config.output / "training",
        epochs=config.epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate or LEARNING_RATES[config.prefix.form],
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        eval_steps=every,
        save_steps=every,
        seed=config.seed,
        bf16=False,  # the base itself is loaded in bfloat16 where that is fast; the prefix stays float32
        gradient_accumulation=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        schedule=config.schedule,
        report_to=config.report_to,
        metric="loss",
    )
    return PrefixTrainer(
        classifier,
        args,
        patience=config.patience,
        head_learning_rate=config.head_learning_rate if classifier.head is not None else None,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=classifier.collate,
        compute_metrics=compute_metrics,
    )


def _rows(classifier: PrefixClassifier, rows: Sequence[Row], labels: Sequence[str]) -> tuple[Rows, int]:
    """Encoded rows, and how many texts were cut."""
    encoded, cut = classifier.encode([row.text for row in rows])
    numbers = {label: i for i, label in enumerate(labels)}
    examples = [{"input_ids": ids, "labels": numbers[row.label]} for ids, row in zip(encoded, rows, strict=True)]
    return Rows(examples, [len(ids) for ids in encoded]), sum(cut)


def _zero_shot(
    trainer: PrefixTrainer, classifier: PrefixClassifier, test: Rows, running: Path, say: Say
) -> dict[str, float] | None:
    """The bare base on the same rows, template and label words; kept, so that a resumed run need not repeat it."""
    if classifier.head is not None:
        return None
    kept = running / "zero-shot.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    say(f"Zero-shot: the base without a prefix on the {len(test)} test rows.")
    classifier.model.activate(None)
    try:
        figures = compute_metrics(trainer.predict(test))
    finally:
        classifier.model.activate(NAME)
    _write_json(kept, figures)
    return figures


# ---- what a run leaves behind while it runs


def _check(config: TrainConfig) -> None:
    for name in ("epochs", "batch_size", "gradient_accumulation", "max_length"):
        if getattr(config, name) <= 0:
            raise InputError(f"{name} must be above 0, not {getattr(config, name)}.")
    for name in ("max_steps", "train_rows", "validation_rows", "test_rows", "save_steps", "learning_rate"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InputError(f"{name} must be above 0, not {value}.")


def _check_output(config: TrainConfig, running: Path, resume: bool) -> None:
    """Refuse an output in use, or with `resume` one that holds no unfinished run of the same settings."""
    unfinished = unfinished_config(config.output)
    if resume:
        if unfinished is None:
            raise InputError(f"there is no unfinished run in {config.output} to resume; leave out --resume.")
        _check_same(unfinished, config)
    elif unfinished is not None:
        raise InputError(f"{config.output} holds an unfinished run; go on with --resume, or use another output.")
    elif config.output.exists() and any(config.output.iterdir() if config.output.is_dir() else [config.output]):
        raise InputError(f"{config.output} exists and is not empty; use another output, or remove it.")


def _claim(config: TrainConfig, running: Path) -> None:
    """Make the run's folder, now that nothing that was given can be wrong any more."""
    try:
        running.mkdir(parents=True, exist_ok=True)
        _write_json(running / "run.json", config.to_dict())
    except OSError as error:
        raise RunError(f"{running} cannot be written: {error.strerror}.") from error


def unfinished_config(output: Path) -> TrainConfig | None:
    """The settings of the run that `output` holds unfinished, if it does."""
    saved = output / "training" / "run.json"
    return TrainConfig.from_dict(json.loads(saved.read_text())) if saved.is_file() else None


def _check_same(saved: TrainConfig, config: TrainConfig) -> None:
    differing = [f.name for f in fields(config) if getattr(saved, f.name) != getattr(config, f.name)]
    differing = [name for name in differing if name != "output"]
    if differing:
        raise InputError(
            f"the run in {config.output} was started with another {', '.join(differing)}; resume it unchanged."
        )


def _last(running: Path) -> str | None:
    last = last_checkpoint(running)
    return None if last is None else str(last)


def _write_json(path: Path, content: Any) -> None:
    beside = path.with_suffix(f".writing-{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def _load(config: TrainConfig) -> ClassificationData:
    """The data, cut to the rows asked for; splits and cuts are the same for every seed of training."""
    data = load_classification(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        train_rows=config.train_rows,
    )
    validation = some_rows(data.validation, config.validation_rows, 0, "validation")
    return replace(data, validation=validation, test=some_rows(data.test, config.test_rows, 0, "test"))


def _describe_data(data: ClassificationData) -> str:
    return (
        f"Data: {data.name}, {len(data.train)} rows to train on, {len(data.validation)} to validate, {len(data.test)} "
        f"to test; {len(data.labels)} labels."
    )


def _describe_prefix(model: PrefixModel, form: str) -> str:
    share = model.count() / sum(p.numel() for p in model.base.parameters())
    return (
        f"Prefix: {model.form(NAME).length} tokens, form {form}, {model.count():,} trained parameters "
        f"({share:.2%} of {model.base_id}'s)."
    )
