"""Regression: a number read off a text, or off several texts, by a linear head over the hidden state at one position.

The head learns targets of mean 0 and deviation 1; the mean and deviation of the training rows are saved with it. The
loss is the squared error in these units, predictions are in the table's own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..data import Data
from ..errors import InputError
from ..model import ACTIVE, PrefixModel
from ..schemas import PAIRS, TEXT_NAMES, Row, Schema, read_strings
from .encoding import Template
from .metrics import regression_metrics
from .task import PrefixTask, Progress, Settings
from .template import default_template


def read_number(row: dict[str, Any], column: str, place: str, text: Any) -> float:
    """The target. Raises InputError where it is missing or no finite number."""
    value = row.get(column)
    if value is None or value == "":
        raise InputError(f"{place} has no score; fill it or remove the row.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{place} has {value!r} in {column!r} where a number belongs; correct it.") from None
    if not math.isfinite(number):
        raise InputError(f"{place} has {number} in {column!r}; give a finite number.")
    return number


REGRESS = Schema(
    TEXT_NAMES, "score similarity similarity_score rating stars label target value y", read_strings, read_number, PAIRS
)


@dataclass(frozen=True)
class RegressSettings(Settings):
    """template: what stands around the texts, named by `fields`. mean, deviation: of the training rows' scores."""

    task: ClassVar[str] = "regress"
    template: str
    mean: float
    deviation: float
    fields: tuple[str, ...] = ("text",)


class PrefixRegressor(PrefixTask):
    """Scores texts. `forward(input_ids, attention_mask, labels)` returns {"loss", "logits"}, logits the scores."""

    name, verb = "regress", "score"
    schema, settings_class = REGRESS, RegressSettings
    options = frozenset({"template", "max_length"})

    def __init__(self, model: PrefixModel, settings: RegressSettings) -> None:
        super().__init__(model, settings, head_size=1)
        self._template = Template(model, settings.template, settings.fields, settings.max_length)

    @classmethod
    def for_data(  # type: ignore[override]
        cls, model: PrefixModel, data: Data, *, template: str | None = None, max_length: int = 128
    ) -> Self:
        """Raises InputError where every training row has the same score."""
        scores = [row.label for row in data.train]
        deviation = statistics.pstdev(scores)
        if deviation == 0:
            raise InputError(f"every training row of {data.name} has the score {scores[0]:g}; give rows that differ.")
        fields = data.fields if len(data.fields) > 1 else ("text",)
        separator = getattr(model.tokenizer, "sep_token", None)
        template = template or default_template(model.kind, False, fields, separator).replace("Category:", "Score:")
        made = cls(model, RegressSettings(max_length, template, statistics.fmean(scores), deviation, fields))
        made.measure_head(data.train)
        return made

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        what = "two texts and say how close they are" if len(data.fields) > 1 else "text and give it a score"
        low, high = min(row.label for row in data.train), max(row.label for row in data.train)
        return f"Read the {what}, from {low:g} to {high:g}.\n\n"

    def _encode(self, texts: Sequence[Any]) -> tuple[list[list[int]], list[bool]]:
        return self._template([(text,) if isinstance(text, str) else tuple(text) for text in texts])

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        encoded, cut = self._encode([row.text for row in rows])
        return [{"input_ids": ids, "labels": row.label} for ids, row in zip(encoded, rows, strict=True)], cut

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, prefix: Any = ACTIVE
    ) -> dict[str, Tensor]:
        """Scores `[B]` in the table's units, and the squared error in deviations when labels `[B]` are given."""
        standard = self.apply_head(self.pooled(input_ids, attention_mask, prefix))[:, 0]
        mean, deviation = self.settings.mean, self.settings.deviation
        scores = standard * deviation + mean
        if labels is None:
            return {"logits": scores}
        return {"loss": nn.functional.mse_loss(standard, (labels.float() - mean) / deviation), "logits": scores}

    def predict(
        self, texts: Sequence[Any], batch_size: int = 32, prefix: Any = ACTIVE, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """`{"score", "cut"}` per text (or tuple of texts), in order. Raises InputError for an empty text."""
        encoded, cut = self._encode(self.read_inputs(texts))
        scores = self.logits([{"input_ids": ids} for ids in encoded], batch_size, prefix, progress)
        return [{"score": float(score), "cut": was_cut} for score, was_cut in zip(scores, cut, strict=True)]

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pearson's and Spearman's correlation and the mean squared error, in the table's units."""
        return {"metrics": regression_metrics([row.label for row in rows], [result["score"] for result in results])}
