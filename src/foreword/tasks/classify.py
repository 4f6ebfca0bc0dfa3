"""Classification: a template around the text, and a label read off one position.

Two heads. `words`: each label has a word, and the logits are the base's own for the first token of each word at one
position; only that position and those rows of the output matrix are ever multiplied. `linear`: a trained layer over
the hidden state there. The position is the last token (decoders), the mask token or the first (encoders), or the
decoder's start token (encoder-decoders).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..bases import load_base
from ..errors import InputError
from ..model import ACTIVE, PrefixModel
from .template import ClassifySettings, Encoder, first_token, make_settings


class PrefixClassifier(nn.Module):
    """A PrefixModel and a head; what the Trainer trains and what `foreword.load` gives back.

    `forward(input_ids, attention_mask, labels)` returns {"loss", "logits"}; `predict` takes texts.
    """

    def __init__(self, model: PrefixModel, settings: ClassifySettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        output = model.base.get_output_embeddings()
        if output is None:
            raise InputError(f"{type(model.base).__name__} has no output embeddings to classify with.")
        self.head: nn.Linear | None = None
        if settings.label_words is None:
            self.head = nn.Linear(output.weight.shape[1], len(settings.labels)).to(model.device)
            nn.init.zeros_(self.head.weight)  # every label alike at first, whatever the scale of the hidden states
            nn.init.zeros_(self.head.bias)
        else:
            tokens = [first_token(word, model.tokenizer) for word in settings.label_words]
            self.word_ids = torch.tensor(tokens)
        self._encoder = Encoder(model, settings)

    @classmethod
    def for_labels(cls, model: PrefixModel, labels: Sequence[str], **settings: Any) -> PrefixClassifier:
        """A classifier of `labels`; what is not given is derived from their names, as `make_settings` says."""
        return cls(model, make_settings(model, labels, **settings))

    # ---- rows to inputs

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids per text, template included, and which texts were cut to fit."""
        return self._encoder(texts)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch padded at the end: rows hold `input_ids` and, for a loss, `labels`."""
        longest = max(len(row["input_ids"]) for row in rows)
        pad = self.model.tokenizer.pad_token_id or 0
        ids = [row["input_ids"] + [pad] * (longest - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    # ---- inputs to logits

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, prefix: Any = ACTIVE
    ) -> dict[str, Tensor]:
        """Logits `[B, labels]` in float32, and the cross-entropy when labels `[B]` are given."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.model.kind == "encoder-decoder":
            start = self.model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full_like(input_ids[:, :1], start)
        with self._reading_off(self._position(input_ids, attention_mask)):
            logits = self.model(**inputs, prefix=prefix).logits[:, 0].float()
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def _position(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B]`, the position that the label is read off."""
        if self.model.kind == "encoder-decoder":
            return torch.zeros_like(ids[:, 0])
        if self.model.kind == "decoder":
            return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        if self.head is not None:
            return torch.zeros_like(ids[:, 0])
        return (ids == self.model.tokenizer.mask_token_id).long().argmax(-1)

    @contextmanager
    def _reading_off(self, position: Tensor) -> Iterator[None]:
        """While open, the base's output layer gives `[B, 1, labels]` at `position`; all around it stays the base's own.

        The input is gathered to two dimensions first: a frozen layer over sliced hidden states would expand its
        weight for every row.
        """
        output = self.model.base.get_output_embeddings()
        weight: Tensor
        bias: Tensor | None
        if self.head is not None:
            weight, bias = self.head.weight, self.head.bias
        else:
            weight = output.weight[self.word_ids.to(output.weight.device)]
            bias = output.bias[self.word_ids] if getattr(output, "bias", None) is not None else None

        def at_position(hidden: Tensor) -> Tensor:  # [B, n, d] -> [B, 1, labels]
            picked = hidden[torch.arange(hidden.shape[0], device=hidden.device), position]
            return nn.functional.linear(picked.to(weight.dtype), weight, bias)[:, None]

        base = self.model.base
        final_bias = getattr(base, "final_logits_bias", None)  # BART adds one over the whole vocabulary
        output.forward = at_position
        try:
            if final_bias is not None:
                picked = final_bias[:, self.word_ids] if self.head is None else final_bias.new_zeros(1, len(weight))
                base.final_logits_bias = picked
            yield
        finally:
            del output.forward
            if final_bias is not None:
                base.final_logits_bias = final_bias

    @torch.inference_mode()
    def predict(
        self, texts: Sequence[str], batch_size: int = 32, prefix: Any = ACTIVE, progress: Any = None
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores", "cut"}` per text, in order; `score` is the label's probability, and `cut` says
        that the text was too long to be read whole.

        Raises InputError for an empty text. `progress(done, total)` is called after every batch.
        """
        for i, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"text {i + 1} is empty; there is nothing to classify.")
        encoded, cut = self.encode(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
        results: list[dict[str, Any]] = [{} for _ in texts]
        self.eval()
        for at in range(0, len(order), batch_size):
            chunk = order[at : at + batch_size]
            batch = {
                k: v.to(self.model.device) for k, v in self.collate([{"input_ids": encoded[i]} for i in chunk]).items()
            }
            for i, scores in zip(chunk, self(**batch, prefix=prefix)["logits"].softmax(-1).tolist(), strict=True):
                best = max(range(len(scores)), key=scores.__getitem__)
                named = dict(zip(self.settings.labels, scores, strict=True))
                results[i] = {
                    "label": self.settings.labels[best],
                    "score": scores[best],
                    "scores": named,
                    "cut": cut[i],
                }
            if progress:
                progress(min(at + batch_size, len(order)), len(order))
        return results

    # ---- files

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def save_pretrained(self, directory: str | Path, training: dict[str, Any] | None = None) -> None:
        """The prefix, the task and the head, as one directory."""
        extra = {} if self.head is None else {"head.weight": self.head.weight, "head.bias": self.head.bias}
        self.model.save_pretrained(directory, task=self.settings.to_dict(), training=training, extra=extra)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, model: PrefixModel | None = None, name: str | None = None
    ) -> PrefixClassifier:
        """A saved classifier, on its base (loaded by the id in the file) or on `model`, whose bank it joins as `name`
        (the folder's by default)."""
        header, tensors = files.read(directory)
        if not header.get("task") or header["task"]["task"] != "classify":
            raise InputError(f"{directory} holds no classification prefix.")
        model = model or PrefixModel(*load_base(header["base"]["id"]))
        model.load(directory, name)
        classifier = cls(model, ClassifySettings.from_dict(header["task"]))
        if classifier.head is not None:
            classifier.head.load_state_dict({"weight": tensors["head.weight"], "bias": tensors["head.bias"]})
        return classifier.eval()
