"""Classification: a template around the texts, and a label read off one position, or several labels.

Two heads. `words`: each label has a word, and the logits are the base's own for the first token of each word at one
position; only that position and those rows of the output matrix are ever multiplied. `linear`: a trained layer over
the hidden state there. The position is the last token (decoders), the mask token or the first (encoders), or the
decoder's start token (encoder-decoders). Beside a linear head there may be words, for the base without a prefix, which
no head was trained for.

A linear head starts from the labels' names: a label's row is the sum of the output embeddings of its name's tokens over
the root of their number, less the mean of all labels' rows, scaled to what fits some of the rows best; nought where the
names say nothing of them.

Where a table has lists of labels, each label is a decision of its own: a linear head, the binary cross-entropy, and
every label of probability above one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import InputError
from ..files import whole
from ..model import ACTIVE, PrefixModel
from ..schemas import CLASSIFY, Row, label_names
from . import metrics
from .encoding import Template
from .head import Head
from .metrics import classification_metrics, confusion, multi_label_metrics, per_label
from .output import output_layer
from .task import PrefixTask, Progress
from .template import ClassifySettings, default_instruction, first_token, make_settings

SCALES = torch.linspace(0, 3, 13)  # of its logits at the start, in their deviation


class PrefixClassifier(PrefixTask):
    """A PrefixModel and a head; what the Trainer trains and what `foreword.load` gives back.

    `forward(input_ids, attention_mask, labels)` returns {"loss", "logits"}; `predict` takes texts.
    """

    name, verb = "classify", "classify"
    schema, settings_class = CLASSIFY, ClassifySettings
    options = frozenset({"head", "template", "label_words", "max_length"})

    def __init__(self, model: PrefixModel, settings: ClassifySettings) -> None:
        super().__init__(model, settings, len(settings.labels) if settings.is_linear else None)
        if settings.label_words is not None:
            if model.base.get_output_embeddings() is None:
                raise InputError(f"{type(model.base).__name__} has no output embeddings to classify with.")
            self.word_ids = torch.tensor([first_token(word, model.tokenizer) for word in settings.label_words])
        self.compute_metrics = None if settings.multi_label else metrics.compute_metrics
        self._encoder = Template(model, settings.template, settings.fields, settings.max_length)

    @classmethod
    def for_labels(
        cls, model: PrefixModel, labels: Sequence[str], *, rows: Sequence[Row] = (), **settings: Any
    ) -> Self:
        """A classifier of `labels`; what is not given is derived from their names, as `make_settings` says.

        rows: those to learn from; a linear head then starts from the labels' names, and else at nought.
        """
        classifier = cls(model, make_settings(model, labels, **settings))
        if rows and classifier.head is not None:
            classifier._start_from_names(rows)
        return classifier

    @classmethod
    def for_data(cls, model: PrefixModel, data: Data, **options: Any) -> Self:
        many = isinstance(data.train[0].label, tuple)
        fields = data.fields if len(data.fields) > 1 else ("text",)
        return cls.for_labels(model, data.labels, rows=data.train, fields=fields, multi_label=many, **options)

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        return default_instruction(data.labels, data.train, kind, data.fields)

    # ---- rows to inputs

    def encode(self, texts: Sequence[Any]) -> tuple[list[list[int]], list[bool]]:
        """Token ids per text, template included, and which texts were cut to fit."""
        return self._encoder([(text,) if isinstance(text, str) else tuple(text) for text in texts])

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        encoded, cut = self.encode([row.text for row in rows])
        return [{"input_ids": ids, "labels": self._target(row)} for ids, row in zip(encoded, rows, strict=True)], cut

    def _target(self, row: Row) -> Any:
        if self.settings.multi_label:
            return [float(label in row.label) for label in self.settings.labels]
        return self.settings.labels.index(row.label)

    def check_rows(self, rows: Sequence[Row], source: str) -> None:
        if any(isinstance(row.label, tuple) != self.settings.multi_label for row in rows):
            held = "lists of labels" if not self.settings.multi_label else "one label a row"
            raise InputError(f"{source} has {held}, and the prefix was not trained for that; give other rows.")
        unknown = sorted(label_names(rows) - set(self.settings.labels))
        if unknown:
            raise InputError(f"{source} has labels that the prefix was not trained for: {', '.join(unknown[:5])}.")

    # ---- inputs to logits

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, prefix: Any = ACTIVE
    ) -> dict[str, Tensor]:
        """Logits `[B, labels]` in float32, and the cross-entropy when labels `[B]` (`[B, labels]`) are given."""
        if self.head is not None and (self.settings.label_words is None or self.model.reads(prefix)):
            logits = self.apply_head(self.pooled(input_ids, attention_mask, prefix))
        else:
            logits = self._word_logits(input_ids, attention_mask, prefix)
        return {"logits": logits} if labels is None else {"loss": self._loss(logits, labels), "logits": logits}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.settings.multi_label:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return nn.functional.cross_entropy(logits, labels)

    @torch.no_grad()
    def _start_from_names(self, rows: Sequence[Row]) -> None:
        """What the module says of a linear head; measured from their mean, the rows prefer no label."""
        head, output = cast(Head, self.head), cast(Any, self.model.base).get_output_embeddings()
        (examples, hidden), embeddings = self.measure_head(rows), whole(output.weight)
        names = [f" {label.replace('_', ' ')}" for label in self.settings.labels]
        ids = self.model.tokenizer(names, add_special_tokens=False)["input_ids"]
        start = torch.stack([embeddings[name].float().sum(0) / max(1, len(name)) ** 0.5 for name in ids])
        head.weight.copy_((start - start.mean(0)) * head.deviation)
        logits = head(hidden).cpu()
        deviation = max(float(logits.std(correction=0)), 1e-6)
        targets = torch.tensor([example["labels"] for example in examples])
        losses = [float(self._loss(scale / deviation * logits, targets)) for scale in SCALES]
        head.weight.mul_(float(SCALES[losses.index(min(losses))]) / deviation)

    @property
    def reads_base(self) -> bool:
        return self.settings.label_words is not None

    def position(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B]`, the position in its row that each label is read off."""
        if self.model.kind == "encoder" and self.head is None:
            return (ids == self.model.tokenizer.mask_token_id).long().argmax(-1)
        return super().position(ids, mask)

    def _word_logits(self, ids: Tensor, mask: Tensor, prefix: Any) -> Tensor:
        """`[B, labels]`: the base's own logits at `position`, of the label words alone."""
        base: Any = self.model.base
        output = base.get_output_embeddings()
        words = self.word_ids.to(output.weight.device)
        weight = whole(output.weight)[words]
        bias = whole(output.bias)[words] if getattr(output, "bias", None) is not None else None
        final = getattr(base, "final_logits_bias", None)
        inputs, starts = self.base_inputs(ids, mask, prefix)
        place = starts + self.position(ids, mask)

        def at_place(hidden: Tensor) -> Tensor:  # [B, n, d] -> [B, 1, labels]
            # Two dimensions: a frozen layer over sliced hidden states would expand its weight for every row.
            return nn.functional.linear(hidden.flatten(0, 1)[place].to(weight.dtype), weight, bias)[:, None].clone()

        at_words = output_layer(base, at_place, None if final is None else final[:, words])
        with self.lower_layers(ids, mask, starts, prefix), at_words:
            return self.model(**inputs, prefix=prefix, read_at=place).logits[:, 0].float()

    # ---- predictions

    def predict(
        self, texts: Sequence[Any], batch_size: int = 32, prefix: Any = ACTIVE, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores", "cut"}` per text, in order; `score` is the label's probability, and `cut` says
        that the text was too long to be read whole. With lists of labels `labels` takes the place of the first two.

        Raises InputError for an empty text. `progress(done, total)` is called after every batch.
        """
        encoded, cut = self.encode(self.read_inputs(texts))
        logits = self.logits([{"input_ids": ids} for ids in encoded], batch_size, prefix, progress)
        return [{**self._named(row), "cut": was_cut} for row, was_cut in zip(logits, cut, strict=True)]

    def _named(self, logits: Tensor) -> dict[str, Any]:
        labels = self.settings.labels
        scores = (logits.sigmoid() if self.settings.multi_label else logits.softmax(-1)).tolist()
        named = dict(zip(labels, scores, strict=True))
        if self.settings.multi_label:
            return {"labels": [label for label, score in named.items() if score > 0.5], "scores": named}
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"label": labels[best], "score": scores[best], "scores": named}

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Metrics, figures per label and, where there is one label a row, the confusion."""
        labels = list(self.settings.labels)
        if self.settings.multi_label:
            truth = np.array([[label in row.label for label in labels] for row in rows], dtype=int)
            decided = np.array([[label in result["labels"] for label in labels] for result in results], dtype=int)
            return {"metrics": multi_label_metrics(truth, decided), "per_label": per_label(truth, decided, labels)}
        true = [labels.index(row.label) for row in rows]
        predicted = [labels.index(result["label"]) for result in results]
        return {
            "metrics": classification_metrics(true, predicted),
            "per_label": per_label(true, predicted, labels),
            "confusion": confusion(true, predicted, labels),
        }
