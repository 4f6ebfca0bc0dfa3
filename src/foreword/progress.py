"""How far training and validation are: on a terminal a live bar, else a line every ten seconds; to stderr.

It only watches: it takes what transformers' callbacks hand it and changes nothing.
"""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

LINE_SECONDS = 10.0


class ProgressReport(TrainerCallback):
    """Steps, loss, learning rate, rows per second, estimated time left and the validation metric."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._facts: dict[str, str] = {}
        self._first_step = 0
        self._began = self._last_line = time.monotonic()
        self._predicted = 0  # batches of the validation that runs now
        self._prediction_began = 0.0
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._facts, self._first_step, self._training = {}, state.global_step, True
        self._began = self._last_line = time.monotonic()
        self._show("training", state, state.global_step, state.max_steps, force=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done = state.global_step - self._first_step
        pace = done / max(time.monotonic() - self._began, 1e-9)  # steps per second, validation left out
        rows = args.train_batch_size * args.gradient_accumulation_steps  # of all processes
        left = timedelta(seconds=round((state.max_steps - state.global_step) / pace))
        self._facts |= {"rows": f"{pace * rows:.1f} rows/s", "left": f"{left} left"}
        last = state.global_step >= state.max_steps
        self._show("training", state, state.global_step, state.max_steps, force=last)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._facts["loss"] = f"loss {logs['loss']:.4g}"
            self._facts["lr"] = f"learning rate {logs['learning_rate']:.2g}"

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._predicted == 0:
            self._prediction_began = time.monotonic()
        self._predicted += 1
        self._show("validation", state, self._predicted, len(eval_dataloader) if has_length(eval_dataloader) else 0)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        value = (metrics or {}).get(f"eval_{name}")
        self._end_prediction()
        if self._training and value is not None:
            self._facts["metric"] = f"validation {name} {value:.4g}"
            self._show("training", state, state.global_step, state.max_steps, force=True)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        self._end_prediction()

    def close(self) -> None:
        """End the live bar; also right when none was started."""
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks, self._training, self._predicted = None, {}, False, 0

    def _end_prediction(self) -> None:
        if self._predicted:
            self._began += time.monotonic() - self._prediction_began
        self._predicted = 0
        if self._live is not None and "validation" in self._tasks:
            self._live.remove_task(self._tasks.pop("validation"))
        if not self._training:
            self.close()

    def _show(self, what: str, state: TrainerState, done: int, total: int, force: bool = False) -> None:
        """Bring the bar of `what` up to date, or print a line when `force` or when the last one is old."""
        if not state.is_world_process_zero:
            return
        order = ("loss", "lr", "metric", "rows", "left")
        known = [self._facts[key] for key in order if key in self._facts]
        facts = "  ".join(known) if what == "training" else ""
        if sys.stderr.isatty():
            self._move_bar(what, done, total, facts)
        elif force or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"{what} {done}/{total}  {facts}".rstrip(), file=sys.stderr, flush=True)

    def _move_bar(self, what: str, done: int, total: int, facts: str) -> None:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._live = Progress(*columns, console=Console(stderr=True))
            self._live.start()
        if what not in self._tasks:
            self._tasks[what] = self._live.add_task(what, total=total, facts="")
        self._live.update(self._tasks[what], completed=done, total=total, facts=facts)
