"""One training run from settings to a saved, tested prefix; killed at any moment, it goes on where it was.

While it runs, OUTPUT/training holds `run.json` (its settings) and the checkpoints. When it ends, the finished prefix
takes OUTPUT's place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from . import combine, files, processes
from .bases import load_base
from .config import TrainConfig, check_output, claim, unfinished_config, write_json
from .data import Data, load_data
from .drift import keeping, measured_drift, own_texts
from .forms import PrefixConfig
from .lower_layers import LowerLayers
from .model import PrefixModel
from .progress import validations
from .prompt_tuning import add_prompt
from .rates import learning_rate, learning_rates
from .report import mistakes, write_report
from .schemas import Row
from .splits import some_rows
from .tasks import task_class
from .tasks.task import PrefixTask, Progress
from .trainer import PrefixTrainer, Rows, last_checkpoint, training_arguments

__all__ = ["TrainConfig", "TrainResult", "build", "train", "unfinished_config"]

NAME = "prefix"
SPLITS = ("train", "validation", "test")
SECONDS_BETWEEN_LINES = 10.0


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

    `say` gets a line of news now and then, in the first of several processes. Raises InputError for what was given
    wrong, RunError when the run itself fails (a loss that is not a number, an interrupt, a full disk); the state of an
    interrupted run is kept.
    """
    began = time.monotonic()
    config.check()
    running = config.output / "training"
    processes.join()
    if processes.first():
        check_output(config, resume)
    else:
        say = silent
    processes.wait()  # until the output is checked: from here on it fills
    data = load_rows(config)
    say(describe_data(data))
    task = build(config, data)
    say(describe_prefix(task.model, NAME))
    rows, validation, cut = encoded_splits(config, task, data, say)
    if processes.first():
        claim(config, running)
    processes.wait()
    term = _keeping(config, task.model, running) if config.keep else None
    trainer = make_trainer(config, task, rows, validation, term=term)
    zero_shot = zero_shot_figures(config, task, data.test, NAME, running / "zero-shot.json", say)
    trainer.train(resume_from_checkpoint=resume_point(running) if resume else None)
    task.cache = None
    facts = {
        "zero_shot": zero_shot,
        "validation": trainer.state.best_metric,
        "cut": cut,
        "validations": validations(trainer.state.log_history),
    }
    if config.keep:
        facts["drift"] = measured_drift(task.model, config.seed)
    return conclude(config, task, data, trainer, facts, began, say)


def conclude(
    config: TrainConfig,
    task: PrefixTask,
    data: Data,
    trainer: PrefixTrainer,
    facts: dict[str, Any],
    began: float,
    say: Say,
) -> TrainResult:
    """Test the active prefix, and save it to the output with `facts` and what the trainer knows of the run.

    began: when this process did, by the monotonic clock.
    """
    say(f"Testing on {len(data.test)} rows.")
    if task.head is not None:
        task.head.become_plain()  # what is tested is what is saved, to the bit
    results = _predictions(config, task, data.test, say)
    report = task.report(data.test, results)
    summary = {
        "test": report.pop("metrics"),
        **report,
        **facts,
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "parameters": task.model.count(),
        "combined_parameters": combine.count(task.model),
        "learning_rate": learning_rate(config, task.model),
        "rows": {name: len(getattr(data, name)) for name in SPLITS},
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": {
            "training": round(trainer.seconds, 1),
            "total": round(time.monotonic() - began + trainer.seconds - trainer.seconds_here, 1),
        },
        "settings": {key: value for key, value in config.to_dict().items() if key != "output"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if processes.first():
        task.save_pretrained(config.output, training=summary)
        wrong = mistakes([row.text for row in data.test], [row.label for row in data.test], results)
        write_report(config.output, wrong)
    processes.wait()
    return TrainResult(config.output, summary["test"], facts["zero_shot"], summary)


def build(config: TrainConfig, data: Data, model: PrefixModel | None = None, name: str = NAME) -> PrefixTask:
    """The task that `config` trains, at its start, its prefix by this name; on `model`, the base of an earlier run,
    where it is given and nothing was put on it."""
    cls = task_class(config.task)
    options = config.task_options(cls.options)
    if model is None or model.combined:
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        shards = processes.count() if config.shard else 1
        model = PrefixModel(*load_base(config.model, dtype, quantise=config.quantise, shards=shards))
    elif name in model.configs:
        model.remove(name)
    set_seed(config.seed)
    if config.start_from is not None:
        model.load(config.start_from, name, trainable=True)
    else:
        model.add(name, _with_start(config, data, model), seed=config.seed)
    if config.prompt_tokens:
        add_prompt(model, name, config.prompt_tokens)
    if config.lora:
        combine.add_lora(model, r=config.lora, lora_alpha=2 * config.lora, gated=config.gated)
    if config.adapters:
        combine.add_adapters(model, size=config.adapters, gated=config.gated)
    task = cls.for_data(model, data, **options)
    if config.activation_cache:
        task.cache = LowerLayers(model, name, config.activation_cache * 2**30)
    return task


def _with_start(config: TrainConfig, data: Data, model: PrefixModel) -> PrefixConfig:
    """The prefix that is asked for, with what the task adds where nothing is said."""
    cls, prefix = task_class(config.task), config.prefix
    if prefix.instruction is None and prefix.start in (None, "instruction"):
        prefix = replace(prefix, instruction=cls.instruction(data, model.kind))
    if prefix.frozen_layers is None:
        prefix = replace(prefix, frozen_layers=cls.frozen_layers)
    if cls.reads_tokens and model.kind == "encoder-decoder" and prefix.sites is None:
        prefix = replace(prefix, sites=("encoder",))  # its decoder is not run
    if config.gated and prefix.dynamic is None:
        prefix = replace(prefix, dynamic="gates")
    return prefix


def make_trainer(
    config: TrainConfig, task: PrefixTask, rows: Rows, validation: Rows, logs: Path | None = None, **settings: Any
) -> PrefixTrainer:
    """The trainer of a run; `logs` is TensorBoard's folder, in the output by default, `settings` PrefixTrainer's."""
    batches = -(-len(rows) // config.batch_size)
    args = run_arguments(config, task.model, batches, config.output / "training")
    trainer = PrefixTrainer(
        task,
        args,
        patience=config.patience,
        average=config.average,
        learning_rates=learning_rates(config, task),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=task.collate,
        compute_metrics=task.compute_metrics,
        **settings,
    )
    log_to(trainer, logs or config.output / files.LOGS)
    return trainer


def run_arguments(config: TrainConfig, model: PrefixModel, batches: int, running: Path) -> TrainingArguments:
    """Of a run whose epoch has so many batches and whose checkpoints go to `running`."""
    steps = -(-batches // config.gradient_accumulation)
    every = config.save_steps or max(1, min(steps, config.max_steps or steps) // 4)
    return training_arguments(
        running,
        epochs=config.epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=learning_rate(config, model),
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


def log_to(trainer: PrefixTrainer, folder: Path) -> None:
    """TensorBoard's own place would be within the checkpoints, which go when the run ends."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def encoded_splits(config: TrainConfig, task: PrefixTask, data: Data, say: Say) -> tuple[Rows, Rows, dict[str, int]]:
    """Examples to train on and to validate with, and how many rows of each split were cut, which is said."""
    rows, train_cut = encoded(task, data.train)
    validation, validation_cut = encoded(task, data.validation)
    cut = dict(zip(SPLITS, (train_cut, validation_cut, sum(task.examples(data.test)[1])), strict=True))
    cut = {name: number for name, number in cut.items() if number}
    if cut:
        counts = ", ".join(f"{number} {name}" for name, number in cut.items())
        say(f"Texts cut to fit {config.max_length} tokens: {counts} rows.")
    return rows, validation, cut


def encoded(task: PrefixTask, rows: Sequence[Row]) -> tuple[Rows, int]:
    """Examples of these rows, and how many rows were cut."""
    examples, cut = task.examples(rows)
    return Rows(examples, [len(example["input_ids"]) for example in examples]), sum(cut)


def _predictions(config: TrainConfig, task: PrefixTask, rows: Sequence[Row], say: Say) -> list[dict[str, Any]]:
    """What the active prefix makes of these rows.

    Of several processes each takes some of them; with a sharded base all of them, since every layer that one runs has
    to be run by all.
    """
    texts, progress = [row.text for row in rows], _saying(say)
    if processes.count() == 1 or task.is_sharded:
        return task.predict(texts, config.batch_size, progress=progress)
    own = texts[processes.index() :: processes.count()]
    return processes.interleaved(task.predict(own, config.batch_size, progress=progress) if own else [])


def _saying(say: Say) -> Progress:
    """A line of news every ten seconds."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"testing {done}/{total}")

    return progress


def zero_shot_figures(
    config: TrainConfig, task: PrefixTask, test: Sequence[Row], name: str, kept: Path, say: Say
) -> dict[str, float] | None:
    """The bare base on the same rows and template, unless the run is not to; kept, so that a resumed run need not
    repeat it. A task that needs a trained head has no zero-shot figures. `name` is active afterwards."""
    task.model.activate(name)
    if not config.zero_shot or not task.reads_base:
        return None
    if kept.is_file():
        return json.loads(kept.read_text())
    say(f"Zero-shot: the base without a prefix on the {len(test)} test rows.")
    task.model.activate(None)
    try:
        figures = task.report(test, _predictions(config, task, test, say))["metrics"]
    finally:
        task.model.activate(name)
    if processes.first():
        write_json(kept, figures)
    return figures


def _keeping(config: TrainConfig, model: PrefixModel, running: Path) -> Callable[[int], Tensor]:
    """The term that keeps the prefix near the base; its texts stay beside the checkpoints."""
    kept = running / "own-texts.json"
    if kept.is_file():
        texts = torch.tensor(json.loads(kept.read_text()), device=model.device)
    else:
        texts = own_texts(model, config.seed)
        if processes.first():
            write_json(kept, texts.tolist())
    return keeping(model, texts, config.keep)


def resume_point(running: Path) -> str | None:
    """The last checkpoint of a run, None where it has not saved one."""
    last = last_checkpoint(running)
    return None if last is None else str(last)


def load_rows(config: TrainConfig) -> Data:
    """The data, cut to the rows asked for; splits and cuts are the same for every seed of training."""
    schema = task_class(config.task).schema
    data = load_data(
        config.data,
        schema,
        text_column=config.text_column,
        label_column=config.label_column,
        train_rows=config.train_rows,
    )
    validation = some_rows(data.validation, config.validation_rows, 0, "validation", schema.stratified)
    test = some_rows(data.test, config.test_rows, 0, "test", schema.stratified)
    return replace(data, validation=validation, test=test)


def silent(line: str) -> None:
    """The news of a process that is not the first."""


def describe_data(data: Data) -> str:
    labels = f"; {len(data.labels)} labels" if data.labels else ""
    return (
        f"Data: {data.name}, {len(data.train)} rows to train on, {len(data.validation)} to validate, {len(data.test)} "
        f"to test{labels}."
    )


def describe_prefix(model: PrefixModel, name: str) -> str:
    count, more = model.count(name), combine.count(model)
    beside = f" With it on the base: {' and '.join(model.combined)}, {more:,} more." if more else ""
    return (
        f"Prefix: {model.form(name).length} tokens, form {model.configs[name].form}, {count:,} trained parameters "
        f"({count / model.base_parameters:.2%} of {model.base_id}'s).{beside}"
    )
