"""How long a run has trained, over all the processes that it took."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Seconds of training and validation; checkpoints carry them on.

    before: seconds of the processes before this one.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before, self._here = before, 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + self.seconds_here

    @property
    def seconds_here(self) -> float:
        return self._here + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._here, self._began = self.seconds_here, None

    def state(self) -> dict[str, Any]:
        return {"args": {"before": self.seconds}, "attributes": {}}
