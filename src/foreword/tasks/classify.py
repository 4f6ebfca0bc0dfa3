"""Classification: a template around the text, and a label read off one position.

Two heads. `words`: each label has a word, and the logits are the base's own for the first token of each word at one
position; only that position and those rows of the output matrix are ever multiplied. `linear`: a trained layer over
the hidden state there. The position is the last token (decoders), the mask token or the first (encoders), or the
decoder's start token (encoder-decoders).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import files
from ..bases import load_base
from ..errors import InputError
from ..forms import opening_ids
from ..model import ACTIVE, PrefixModel

TEXT = "{text}"
MASK = "{mask}"


@dataclass(frozen=True)
class ClassifySettings:
    """How rows become inputs and logits become labels.

    labels: their names, in the order of the logits.
    template: what stands around the text; holds {text}, and for label words of an encoder {mask}.
    label_words: one word per label (`words` head), or None (`linear` head).
    max_length: tokens of template and text together; longer texts are cut, the template never.
    """

    labels: tuple[str, ...]
    template: str
    label_words: tuple[str, ...] | None
    max_length: int

    def to_dict(self) -> dict[str, Any]:
        return {"task": "classify", **asdict(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ClassifySettings:
        words = saved["label_words"]
        return cls(tuple(saved["labels"]), saved["template"], tuple(words) if words else None, saved["max_length"])


def default_instruction(labels: Sequence[str]) -> str:
    """The instruction that training starts from when the user writes none."""
    return f"Read the text and say which category it belongs to: {', '.join(labels)}.\n\n"


def default_template(kind: str, words: bool) -> str:
    if kind == "encoder" and words:
        return f"{TEXT} Category: {MASK}."
    return f"Text: {TEXT}\nCategory:" if kind == "decoder" else TEXT


def derive_label_words(labels: Sequence[str], tokenizer: Any) -> tuple[str, ...] | None:
    """A word per label whose first tokens all differ, chosen among the words of the label's own name.

    None where the names do not offer one for each (77 intents that begin alike): a linear head serves there.
    """
    from scipy.optimize import linear_sum_assignment

    candidates = [[w for w in _words(label) if _first_token(w, tokenizer) is not None] for label in labels]
    tokens = list(dict.fromkeys(_first_token(w, tokenizer) for words in candidates for w in words))
    cost = np.full((len(labels), len(tokens)), 1e6)
    for row, words in enumerate(candidates):
        for rank, word in enumerate(words):
            column = tokens.index(_first_token(word, tokenizer))
            cost[row, column] = min(cost[row, column], rank)
    if len(tokens) < len(labels):
        return None
    rows, columns = linear_sum_assignment(cost)
    if cost[rows, columns].max() >= 1e6:
        return None
    return tuple(
        next(w for w in candidates[row] if _first_token(w, tokenizer) == tokens[column])
        for row, column in zip(rows, columns, strict=True)
    )


def _words(label: str) -> list[str]:
    """The label's name as a whole, then its parts: "Sci/Tech" gives Sci/Tech, Tech."""
    parts = label.replace("/", " ").replace("_", " ").replace("-", " ").split()
    return list(dict.fromkeys([label.replace("_", " "), *parts[1:]]))


def _first_token(word: str, tokenizer: Any) -> int | None:
    ids = tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
    return next((i for i in ids if tokenizer.decode([i]).strip()), None)


def make_settings(
    model: PrefixModel,
    labels: Sequence[str],
    *,
    head: str = "auto",
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    max_length: int = 128,
) -> ClassifySettings:
    """Settings for `labels` on a base, what is not given derived from the labels' names.

    head: `words`, `linear`, or `auto` (words where every label has one, else linear).
    Raises InputError for a template without {text}, words that begin alike, or too few or many of them.
    """
    if head not in ("auto", "words", "linear"):
        raise InputError(f"head {head!r} is unknown; choose auto, words or linear.")
    if head == "linear" and label_words:
        raise InputError("a linear head has no label words; leave out one of the two.")
    words = tuple(label_words) if label_words else None
    if head != "linear" and words is None:
        words = derive_label_words(labels, model.tokenizer)
        if words is None and head == "words":
            raise InputError("no distinct label words follow from the label names; give them, or use a linear head.")
    template = template or default_template(model.kind, words is not None)
    if template.count(TEXT) != 1:
        raise InputError(f"the template must hold {TEXT} once: {template!r}.")
    settings = ClassifySettings(tuple(labels), template, words, max_length)
    _check_words(settings, model)
    return settings


def _check_words(settings: ClassifySettings, model: PrefixModel) -> None:
    words = settings.label_words
    if words is None:
        return
    if len(words) != len(settings.labels):
        raise InputError(f"there are {len(settings.labels)} labels and {len(words)} label words; give one for each.")
    first = [_first_token(word, model.tokenizer) for word in words]
    for i, token in enumerate(first):
        if token is None or token in first[:i]:
            other = f" as {words[first.index(token)]!r}" if token in first[:i] else ""
            raise InputError(f"the label word {words[i]!r} begins with the same token{other}; choose distinct words.")
    if model.kind == "encoder" and settings.template.count(MASK) != 1:
        raise InputError(f"label words of an encoder need {MASK} once in the template: {settings.template!r}.")


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
            tokens = [_first_token(word, model.tokenizer) for word in settings.label_words]
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
    def from_pretrained(cls, directory: str | Path, model: PrefixModel | None = None) -> PrefixClassifier:
        """A saved classifier, on its base (loaded by the id in the file) or on `model`, whose bank it joins."""
        header, tensors = files.read(directory)
        if not header.get("task") or header["task"]["task"] != "classify":
            raise InputError(f"{directory} holds no classification prefix.")
        model = model or PrefixModel(*load_base(header["base"]["id"]))
        model.load(directory)
        classifier = cls(model, ClassifySettings.from_dict(header["task"]))
        if classifier.head is not None:
            classifier.head.load_state_dict({"weight": tensors["head.weight"], "bias": tensors["head.bias"]})
        return classifier.eval()


class Encoder:
    """Texts to token ids: the template's two sides are encoded once, and only the text between them is cut."""

    def __init__(self, model: PrefixModel, settings: ClassifySettings) -> None:
        self.tokenizer = model.tokenizer
        before, after = settings.template.split(TEXT)
        opening, closing = ([], []) if model.kind == "decoder" else _opening_and_closing(self.tokenizer)
        mask = self.tokenizer.mask_token or MASK
        self.before = opening + self._ids(before.replace(MASK, mask))
        self.after = self._ids(after.replace(MASK, mask)) + closing
        limit = model.text_limit()
        self.room = min(settings.max_length, limit or settings.max_length) - len(self.before) - len(self.after)
        if self.room < 1:
            raise InputError(
                f"the template takes {len(self.before) + len(self.after)} tokens and leaves none of "
                f"{min(settings.max_length, limit or settings.max_length)} for the text; raise the maximal length."
            )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        cut = [len(ids) > self.room for ids in encoded]
        return [self.before + ids[: self.room] + self.after for ids in encoded], cut


def _opening_and_closing(tokenizer: Any) -> tuple[list[int], list[int]]:
    opening = opening_ids(tokenizer)
    whole = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    return opening, whole[len(opening) + len(inner) :]
