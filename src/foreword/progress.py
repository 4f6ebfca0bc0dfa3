"""How far training and validation are: on a terminal a live panel, else a line every ten seconds; to stderr.

It only watches: everything it shows comes from what transformers' callbacks hand it, and it changes nothing.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from foreword.panel import LivePanel

LINE_SECONDS = 10.0
OTHER_FIGURES = 2


@dataclass(frozen=True)
class Metric:
    """The validated figure that chooses the best step, and the first `others` of the last validation."""

    name: str
    last: float
    best: float
    best_step: int
    others: dict[str, float]


@dataclass(frozen=True)
class Facts:
    """What can be said of a run now. `losses` are the logged training losses, oldest first; memory in bytes."""

    losses: list[float]
    metric: Metric | None
    learning_rate: float | None
    rows_per_second: float | None
    left: timedelta | None
    memory: dict[str, int]


class ProgressReport(TrainerCallback):
    """Steps, loss, validation metric, learning rate, rows per second, estimated time left and memory.

    heading: what stands before it all, where a run is one of several; the panel then goes when the run ends.
    """

    def __init__(self, heading: str = "") -> None:
        self.heading = heading
        self._panel: LivePanel | None = None
        self._first_step = 0
        self._began = self._last_line = time.monotonic()
        self._pace: float | None = None  # steps per second, validation left out
        self._predicted = 0  # batches of the validation that runs now
        self._prediction_began = 0.0
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace, self._first_step, self._training = None, state.global_step, True
        self._began = self._last_line = time.monotonic()
        self._show_training(args, state, force=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pace = (state.global_step - self._first_step) / max(time.monotonic() - self._began, 1e-9)
        self._show_training(args, state, force=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training:  # Trainer logs a step after its end
            self._show_training(args, state, force=False)

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
        total = len(eval_dataloader) if has_length(eval_dataloader) else 0
        self._show("validation", args, state, self._predicted, total)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_prediction()
        if self._training:
            self._show_training(args, state, force=state.global_step < state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show_training(args, state, force=True)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        self._end_prediction()

    def notice(self, text: str) -> bool:
        """Show a sentence in the panel; False where there is none to show it in."""
        if self._panel is not None:
            self._panel.notice = text
        return self._panel is not None

    def close(self) -> None:
        """Leave the panel as it stands and end it; also right when none was started."""
        if self._panel is not None:
            self._panel.close()
        self._panel, self._training, self._predicted = None, False, 0

    def _end_prediction(self) -> None:
        if self._predicted:
            self._began += time.monotonic() - self._prediction_began
        self._predicted = 0
        if self._panel is not None:
            self._panel.remove("validation")
        if not self._training:
            self.close()

    def _show_training(self, args: TrainingArguments, state: TrainerState, force: bool) -> None:
        self._show("training", args, state, state.global_step, state.max_steps, force)

    def _show(
        self, what: str, args: TrainingArguments, state: TrainerState, done: int, total: int, force: bool = False
    ) -> None:
        """Bring the panel up to date, or print a line when `force` or when the last one is old."""
        if not state.is_world_process_zero:
            return
        if self._panel is None and sys.stderr.isatty() and not (console := Console(stderr=True)).is_dumb_terminal:
            self._panel = LivePanel(console, self.heading)
        if self._panel is not None:
            self._panel.show(what, done, total, self._facts(args, state))
        elif force or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            heading = f"{self.heading}: " if self.heading else ""
            facts = described(self._facts(args, state)) if what == "training" else []
            print("  ".join([f"{heading}{what} {done}/{total}", *facts]), file=sys.stderr, flush=True)

    def _facts(self, args: TrainingArguments, state: TrainerState) -> Facts:
        """Of the state's log, which a resumed run has from its start."""
        steps = [entry for entry in state.log_history if "loss" in entry]
        pace = self._pace
        rows = args.train_batch_size * args.gradient_accumulation_steps  # of all processes
        return Facts(
            losses=[entry["loss"] for entry in steps],
            metric=_metric(args, state),
            learning_rate=steps[-1]["learning_rate"] if steps else None,
            rows_per_second=pace * rows if pace else None,
            left=timedelta(seconds=round((state.max_steps - state.global_step) / pace)) if pace else None,
            memory=_memory(),
        )


def described(facts: Facts) -> list[str]:
    """The facts as they stand in a line of text."""
    said = []
    if facts.losses:
        said += [f"loss {facts.losses[-1]:.4g}", f"learning rate {facts.learning_rate:.2g}"]
    if facts.metric is not None:
        said.append(f"validation {facts.metric.name} {facts.metric.last:.4g} (best {facts.metric.best:.4g})")
        said += [f"{name} {value:.4g}" for name, value in facts.metric.others.items()]
    if facts.rows_per_second is not None:
        said += [f"{facts.rows_per_second:.1f} rows/s", f"{facts.left} left"]
    return [*said, *(f"{place} {size / 2**30:.2f} GiB" for place, size in facts.memory.items())]


def validations(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Step and figures of each validation, from the log that transformers' Trainer keeps."""
    clock = ("runtime", "per_second", "time")
    return [
        {"step": entry["step"]}
        | {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_") and not k.endswith(clock)}
        for entry in history
        if "eval_loss" in entry
    ]


def _metric(args: TrainingArguments, state: TrainerState) -> Metric | None:
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    found = [entry for entry in validations(state.log_history) if name in entry]
    if not found:
        return None
    sign = 1 if args.greater_is_better else -1
    best = max(found, key=lambda entry: (sign * entry[name], entry["step"]))  # of equal ones the later: PrefixTrainer
    others = sorted(found[-1].keys() - {"step", name})[:OTHER_FIGURES]
    return Metric(
        name, found[-1][name], best[name], int(best["step"]), {figure: found[-1][figure] for figure in others}
    )


def _memory() -> dict[str, int]:
    """Bytes that this process holds, and that PyTorch holds on its GPU."""
    memory = {"memory": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        memory["GPU memory"] = torch.cuda.memory_reserved()
    return memory
