"""transformers' Trainer for a frozen base with a few trainable parameters; PrefixTrainer says what it adds.

The model is any module whose forward(**batch) returns a dict with "loss", the mean over the batch's rows, and
"logits". Where the loss is a mean over something else (tokens), the model's `items(batch)` counts it. Nothing here
knows of prefixes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import recursively_apply
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from foreword import checkpoints, processes
from foreword.arguments import training_arguments
from foreword.averaging import WeightAverage
from foreword.batching import BucketSampler, InterleavedSampler, Rows, longest_first, reordered, reordered_prediction
from foreword.checkpoints import folder_of, is_complete, last_checkpoint
from foreword.clock import Clock
from foreword.errors import DivergedError, InputError, RunError
from foreword.interrupt import Interrupt
from foreword.progress import ProgressReport

__all__ = ["PrefixTrainer", "Rows", "last_checkpoint", "training_arguments"]


class PrefixTrainer(Trainer):
    """transformers' Trainer, with

    - batches of similar length, where a dataset is of `Rows`, results in the rows' order;
    - checkpoints of the trainable parameters alone, from which a killed run goes on to the same bits;
    - the best step by validation at the end, and early stopping after `patience` validations without one;
    - a clear RunError for a loss that is not a number, for Ctrl-C, and for a disk that is full;
    - an accumulated gradient that is the mean over all rows, also where the last batch is smaller;
    - the same batches, gradients and figures on several processes as on one, each computing its share of the rows;
    - `learning_rates` for the parameters whose name contains a key of it, the first that does;
    - of several validation sets (a dict) the mean of their losses as the loss of them all;
    - `term(step)`, added to the loss of every batch in training;
    - with `average`, the average of the parameters over the steps (`foreword.averaging`) as what is validated and ends
      in the model;
    - a live panel, or lines, of how far it is, with `heading` before it.
    """

    model: Any
    loss_is_scaled_for_ga = True  # `compute_loss` does it

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        patience: int | None = None,
        learning_rates: Mapping[str, float] | None = None,
        term: Callable[[int], torch.Tensor] | None = None,
        average: bool = False,
        heading: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("accelerate would shard the prefix too: run without DeepSpeed, and shard with --shard.")
        # Told afterwards: the constructor refuses checkpoints of sharded models, and ours hold nothing of the base.
        # Trainer then averages the gradients of what is not sharded itself.
        self.is_distributed_loading_by_transformers = _is_sharded(model)
        # What is frozen is the same in every process, and stays so: DDP need not send it.
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        self._check_batch()
        self.model_accepts_loss_kwargs = False  # else a forward with **kwargs is asked to scale its loss
        self._run = Path(args.output_dir or ".")
        self.learning_rates, self.term = learning_rates or {}, term
        self._sampler: BucketSampler | InterleavedSampler | None = None
        self._progress = ProgressReport(heading)
        self._interrupt = Interrupt(self._progress.notice)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(self._progress)
        self.add_callback(Clock())
        self._average = WeightAverage(model) if average else None
        if self._average is not None:
            self.add_callback(self._average)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))
        self._enable_gradient_checkpointing()

    def train(  # type: ignore[override]  # without Trainer's two arguments for searches
        self, resume_from_checkpoint: str | bool | None = None
    ) -> TrainOutput:
        """Train, from the start or from a complete checkpoint (True: the last one in the output folder).

        Raises: InputError where there is nothing to resume from, or something that a new run would mix with;
        RunError for a loss that is not a number, an interrupt, or a checkpoint that could not be written.
        """
        resume = self._starting_point(resume_from_checkpoint)
        # So that the run does not depend on what was drawn before it, nor dropout of rows on their process's others.
        set_seed(self.args.seed + self.args.process_index)
        try:
            with self._interrupt:
                output = super().train(resume)
            if self._average is not None and self.state.best_model_checkpoint is None:  # nothing was validated
                self._average.put()
            if processes.anywhere(self._interrupt.asked):  # too late to stop the training, in time to stop what follows
                raise KeyboardInterrupt
            return output
        finally:
            self._progress.close()
            self.is_in_train = False

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C asked the training to stop."""
        return self._interrupt.asked

    @property
    def seconds(self) -> float:
        """Of training and validation, over all the processes that the run took."""
        return self._clock.seconds

    @property
    def seconds_here(self) -> float:
        """Of them, those of this process."""
        return self._clock.seconds_here

    @property
    def _clock(self) -> Clock:  # Trainer puts another in its place when a run is resumed
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, Clock))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not _is_sharded(model):
            super()._move_model_to_device(model, device)

    def _check_batch(self) -> None:
        if self.args.train_batch_size < self.args.world_size:
            raise InputError(
                f"A batch of {self.args.train_batch_size} cannot be shared by {self.args.world_size} processes; "
                "raise the batch size, which counts the rows of all of them."
            )

    def _starting_point(self, resume: str | bool | None) -> str | None:
        last = last_checkpoint(self._run)
        if not resume and last is not None:
            raise InputError(f"{self._run} holds checkpoints of an earlier run: resume it or use another folder.")
        if not resume:
            return None
        found = last if resume is True else Path(str(resume))
        if found is None or not is_complete(found):
            raise InputError(f"There is no complete checkpoint to resume from in {found or self._run}.")
        return str(found)

    def _enable_gradient_checkpointing(self) -> None:
        """Call the model's own switch; Trainer would hand it arguments that only PreTrainedModel takes."""
        if not self.args.activation_checkpointing:
            return
        enable = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise InputError(f"{type(self.model).__name__} cannot use gradient checkpointing.")
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.args.activation_checkpointing = False

    # ---- Data

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, but every process gets the whole batches; `compute_loss` takes its rows of them."""
        loader = super()._get_dataloader(*args, **kwargs)
        batches = loader.batch_sampler
        if isinstance(batches, BatchSamplerShard):
            batches.num_processes, batches.process_index, batches.even_batches = 1, 0, False
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        sampler = getattr(dataset, "sampler", None)
        if sampler is None:
            return super()._get_train_sampler(dataset)
        self._sampler = sampler(self._train_batch_size, self.args.seed)
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        order = longest_first(eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if order is None else order.tolist()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's; of several sets also `eval_loss`, the mean of their losses."""
        average = self._average if self.is_in_train else None
        with average.applied() if average is not None else nullcontext():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(several, dict):
            losses = {key: metrics[key] for key in (f"{metric_key_prefix}_{name}_loss" for name in several)}
            mean = {f"{metric_key_prefix}_loss": sum(losses.values()) / len(losses)}
            self.log({**mean, **losses})
            metrics |= mean
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with everything that it returns or gives to compute_metrics in the dataset's order."""
        if self.args.world_size > 1:
            self.gather_function = self._of_rows
        order, metrics = longest_first(dataloader.dataset), self.compute_metrics
        if order is None or self.args.batch_eval_metrics:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        back = np.argsort(order)
        if metrics is not None:
            self.compute_metrics = lambda prediction: metrics(reordered_prediction(prediction, back))
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = metrics
        predictions, labels = reordered(output.predictions, back), reordered(output.label_ids, back)
        return output._replace(predictions=predictions, label_ids=labels)

    def _of_rows(self, value: Any) -> Any:
        """What `compute_loss` joined, without what Trainer adds to a last batch that is not full."""
        state = self.accelerator.gradient_state
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        return recursively_apply(lambda tensor: tensor[:rows], value)

    # ---- One step

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        """Rows (or what the model counts) of an accumulated batch, of all processes."""
        return sum(self._items(batch) for batch in batch_samples)

    def _items(self, batch: Any) -> int:
        count = getattr(self.model, "items", None)
        return count(batch) if count is not None else find_batch_size(batch) or 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's mean loss; in training its share of the mean over the items of the accumulated batch.

        Of several processes each computes its rows. In training it returns its own part, else what they made together.
        """
        rows = find_batch_size(inputs) or 0
        own, some = (inputs, True) if self.args.world_size == 1 else processes.share(inputs, rows)
        loss, outputs = super().compute_loss(model, own, return_outputs=True)
        items = self._items(own) if some else 0
        if model.training and self.term is not None:
            loss = loss + self.term(self.state.global_step)
        if model.training and num_items_in_batch:
            # The average is taken over the processes, hence the world size.
            loss = loss * (items * self.args.world_size / num_items_in_batch)
        elif not model.training and self.args.world_size > 1:
            loss = processes.total(loss.detach() * items) / self._items(inputs)
            shared = {k: v for k, v in outputs.items() if isinstance(v, torch.Tensor) and v.dim()}
            outputs = {**outputs, **{name: processes.joined(value, rows) for name, value in shared.items()}}
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's AdamW and weight decay, with groups of their own where `learning_rates` names parameters, the name
        as the group's `part`."""
        fresh, optimizer = self.optimizer is None, super().create_optimizer(model)
        if not fresh or not self.learning_rates:
            return optimizer
        named = (model if model is not None else self.model).named_parameters()
        names = {id(p): name for name, p in named if p.requires_grad}
        for key in self.learning_rates:
            if not any(key in name for name in names.values()):
                raise InputError(f"A learning rate for {key} was given, but no trainable parameter is named {key!r}.")
        for group in list(optimizer.param_groups):
            by_part: dict[str | None, list[nn.Parameter]] = {None: []}
            for p in group["params"]:
                part = next((key for key in self.learning_rates if key in names[id(p)]), None)
                by_part.setdefault(part, []).append(p)
            group["params"] = by_part.pop(None)
            for part, params in by_part.items():
                assert part is not None
                own = {"params": params, "lr": self.learning_rates[part], "part": part}
                optimizer.add_param_group({**group, **own})
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Runs between backward pass and optimizer step: the last place where the parameters are good."""
        norm = super()._get_grad_norm(model, grad_norm)
        # Under a float16 gradient scaler infinite gradients are normal: it skips the step.
        probe = self._tr_loss if self.accelerator.scaler is not None else self._tr_loss + norm
        if processes.anywhere(not bool(torch.isfinite(torch.as_tensor(probe)))):
            self._raise_not_finite()
        return norm

    def _raise_not_finite(self) -> None:
        step = self.state.global_step
        kept = "no checkpoint was saved yet"
        if step > 0:
            self._save_checkpoint(self.model, None)
            kept = f"the last good state is kept in {folder_of(self._run, step)}"
        raise DivergedError(
            f"The loss is not a finite number at step {step + 1}, and {kept}; "
            f"use a lower learning rate than {self.args.learning_rate:g}.",
            everywhere=True,
        )

    # ---- The loop

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, unless the checkpoint was the run's last: Trainer would then train one step too many."""
        if self.state.global_step >= self.state.max_steps or self._out_of_patience():
            self.control.should_training_stop = True
            return
        if self._sampler is not None:
            # With several processes, accelerate does not reach the sampler of an epoch that is resumed midway.
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _out_of_patience(self) -> bool:
        stoppers = [cb for cb in self.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback)]
        return any(cb.early_stopping_patience_counter >= cb.early_stopping_patience for cb in stoppers)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._raise_if_interrupted()

    def _raise_if_interrupted(self) -> None:
        if processes.anywhere(self._interrupt.asked):
            self._save_checkpoint(self.model, None)
            at = f"interrupted at step {self.state.global_step}"
            raise RunError(f"{at}; the state is saved; run again with --resume to go on", everywhere=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, but of equal steps the later is the best, having seen more rows; each new best step is saved,
        which otherwise is lost where it is not a saving step."""
        before = self.state.best_metric
        best = super()._determine_best_metric(metrics, trial)
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not best and before is not None and metrics.get(f"eval_{name}") == before:
            self.state.best_global_step, best = self.state.global_step, True
        self.control.should_save |= best and self.args.save_strategy != "no"
        return best

    # ---- Checkpoints: Trainer's hooks, in the formats of foreword.checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = folder_of(self._run, self.state.global_step)
        if is_complete(folder):  # an interrupt at a saving step
            return
        try:
            self._write_checkpoint(folder)
        except checkpoints.WRITE_ERRORS as error:
            checkpoints.discard(folder)
            last = last_checkpoint(self._run)
            kept = f"{last} is kept" if last else "no earlier checkpoint was saved"
            raise RunError(f"The checkpoint {folder} could not be written ({error}); {kept}.") from error
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            checkpoints.rotate(self._run, self.args.save_total_limit, Path(best) if best else None)

    def _write_checkpoint(self, folder: Path) -> None:
        if self.args.should_save:
            checkpoints.discard(folder)
            folder.mkdir(parents=True)
        self.store_flos()  # gathers, so every process takes part
        self.accelerator.wait_for_everyone()
        checkpoints.write_rng(folder, self._rng_name())
        if self.args.should_save:
            checkpoints.write_trainable(folder, self.model)
            if self._average is not None:
                checkpoints.write_average(folder, self._average.tensors())
            checkpoints.write_optimizer(folder, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            exported = [cb for cb in self.callback_handler.callbacks if isinstance(cb, ExportableState)]
            exported_states: Any = {type(cb).__name__: cb.state() for cb in exported}
            # The path is left out, as the folder may be moved; `_init_training_state` makes it from the step.
            state = dataclasses.replace(self.state, best_model_checkpoint=None, stateful_callbacks=exported_states)
            state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.finish(folder)
        self.accelerator.wait_for_everyone()
        self._find_best_checkpoint()

    def _find_best_checkpoint(self) -> None:
        best = folder_of(self._run, self.state.best_global_step or 0)
        self.state.best_model_checkpoint = str(best) if is_complete(best) else None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained = super()._init_training_state(*args, **kwargs)
        self._find_best_checkpoint()
        return trained

    def _rng_name(self) -> str:
        return "rng" if self.args.world_size <= 1 else f"rng-{self.args.process_index}"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What `save_model` calls: the trainable parameters alone."""
        if self.args.should_save:
            folder = Path(output_dir or self._run)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.write_trainable(folder, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.read_trainable(Path(resume_from_checkpoint), model if model is not None else self.model)
        if self._average is not None:
            self._average.load(checkpoints.read_average(Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        if self._average is not None:
            self._average.put()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            scaler = self.accelerator.scaler
            checkpoints.read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, scaler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / f"{self._rng_name()}.json").is_file():
            raise InputError(f"{checkpoint} was written by another number of processes; resume with as many.")
        checkpoints.read_rng(Path(checkpoint), self._rng_name())


def _is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold the model's frozen weights together."""
    return getattr(model, "is_sharded", False)
