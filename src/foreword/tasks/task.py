"""What every task shares: a PrefixModel with, perhaps, a trained head; batches; files.

A task says how rows become examples (`examples`), examples a loss (`forward`), texts predictions (`predict`), and
predictions beside their rows figures (`report`). Its settings and its head are saved with the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import files
from ..bases import base_of
from ..data import Data
from ..errors import InputError
from ..lower_layers import LowerLayers
from ..model import ACTIVE, PrefixModel
from ..packing import grouped
from ..schemas import Row, Schema
from .head import Head
from .output import hidden_before_output

IGNORED = -100  # the label of a position that has none, as PyTorch's cross-entropy has it
MEASURED = 64  # rows that a head is measured on before training
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a saved task needs besides tensors. `max_length`: tokens that a row may take, template included."""

    task: ClassVar[str]
    max_length: int

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        known: dict[str, Any] = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        known |= {name: tuple(v) for name, v in known.items() if isinstance(v, list)}
        return cls(**known)


class PrefixTask(nn.Module):
    """A PrefixModel and what a task adds; what the Trainer trains and what `foreword.load` gives back.

    `forward(**batch)` returns {"loss", "logits"}; `predict` takes texts.

    Class attributes that a task sets:
        name: on the command line and in saved files; verb: what it does to a text, for messages.
        schema: how it reads a table. options: settings of a run that it takes in `for_data`.
        head_learning_rate: of a trained head, unless the run has its own.
        rate: what a form's own learning rate is multiplied by. frozen_layers: of a prefix, unless it has its own.
        reads_tokens: a head over every token; an encoder-decoder then reads them off its encoder alone.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    schema: ClassVar[Schema]
    settings_class: ClassVar[type[Settings]]
    options: ClassVar[frozenset[str]]
    head_learning_rate: ClassVar[float] = 3e-2
    rate: ClassVar[float] = 1.0
    frozen_layers: ClassVar[int | None] = None
    reads_tokens: ClassVar[bool] = False

    def __init__(self, model: PrefixModel, settings: Any, head_size: int | None = None) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.head: Head | None = None
        self.cache: LowerLayers | None = None  # of a training run
        # Figures of the logits, for transformers' Trainer during validation.
        self.compute_metrics: Callable[..., dict[str, float]] | None = None
        if head_size is not None:
            output = model.base.get_output_embeddings()
            if output is None:
                raise InputError(f"{type(model.base).__name__} has no output embeddings to {self.verb} with.")
            width = _encoder_width(model) if self.reads_tokens else output.weight.shape[1]
            self.head = Head(width, head_size).to(model.device)

    # ---- what a task says

    @classmethod
    def for_data(cls, model: PrefixModel, data: Data, **options: Any) -> Self:
        """The task on `model` for these rows, at its start."""
        raise NotImplementedError

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        """The text that training starts from, on a base of this kind, when the user writes none."""
        raise NotImplementedError

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        """What `collate` takes, `labels` among it, and which rows were cut to fit."""
        raise NotImplementedError

    def predict(
        self, texts: Sequence[Any], batch_size: int = 32, prefix: Any = ACTIVE, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """One result per text, in order; `cut` in it says that the text was too long to be read whole."""
        raise NotImplementedError

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Figures of `predict`'s results beside the rows: `metrics`, and what else there is to say."""
        raise NotImplementedError

    def check_rows(self, rows: Sequence[Row], source: str) -> None:
        """Raise InputError where rows hold what the prefix was not trained for."""

    @property
    def reads_base(self) -> bool:
        """Whether the base without a prefix can do the task: what is trained is then no head that it lacks."""
        return self.head is None

    def items(self, batch: dict[str, Tensor]) -> int:
        """How many things the loss of a batch is the mean over."""
        return len(batch["input_ids"])

    # ---- inputs

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the texts that a row has."""
        return self.settings.fields

    @property
    def pad(self) -> int:
        return self.model.tokenizer.pad_token_id or 0

    def read_inputs(self, texts: Sequence[Any]) -> list[tuple[str, ...]]:
        """Each row's texts in the fields' order. A row with one is a string, with several a tuple or a dict by field.

        Raises InputError for an empty text or missing ones.
        """
        rows = []
        for i, text in enumerate(texts, 1):
            if isinstance(text, dict):
                text = tuple(text.get(field, "") for field in self.fields)
            row = (text,) if isinstance(text, str) else tuple(text)
            if len(row) != len(self.fields):
                raise InputError(f"text {i} has {len(row)} parts; give {', '.join(self.fields)}.")
            if not all(part.strip() for part in row):
                raise InputError(f"text {i} is empty; there is nothing to {self.verb}.")
            rows.append(row)
        return rows

    def grouped(self, texts: Sequence[str]) -> list[Any]:
        """Texts given one after another as rows of as many as the task has fields."""
        width = len(self.fields)
        if width == 1:
            return list(texts)
        if len(texts) % width:
            raise InputError(f"a row has {width} texts ({', '.join(self.fields)}), and {len(texts)} were given.")
        return [tuple(texts[i : i + width]) for i in range(0, len(texts), width)]

    def named(self, row: Any) -> dict[str, Any]:
        """A row's texts by field, as they stand beside its result."""
        return dict(zip(self.fields, (row,) if isinstance(row, str) else row, strict=True))

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch padded at the end: ids with the padding token, other lists with `IGNORED`."""
        batch: dict[str, Tensor] = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if isinstance(values[0], list):
                longest = max(map(len, values))
                fill = self.pad if name == "input_ids" else IGNORED
                values = [value + [fill] * (longest - len(value)) for value in values]
            batch[name] = torch.tensor(values)
            if name == "input_ids":
                lengths = torch.tensor([len(example[name]) for example in examples])
                batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch

    def batches(
        self, examples: Sequence[dict[str, Any]], batch_size: int, progress: Progress | None = None
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of similar length, the longest first, on the model's device, with the numbers of their examples."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = self.collate([examples[i] for i in chosen])
            yield chosen, {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            if progress:
                progress(min(at + batch_size, len(order)), len(order))

    @torch.inference_mode()
    def logits(
        self, examples: Sequence[dict[str, Any]], batch_size: int, prefix: Any, progress: Progress | None = None
    ) -> list[Tensor]:
        """The logits of each example, in order, on the CPU."""
        self.eval()
        found: list[Any] = [None] * len(examples)
        for chosen, batch in self.batches(examples, batch_size, progress):
            for i, logits in zip(chosen, self(**batch, prefix=prefix)["logits"].cpu(), strict=True):
                found[i] = logits
        return found

    # ---- hidden states, which heads read

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, prefix: Any) -> Tensor:
        """`[B, d]`: the hidden state at the last token (decoders), the first (encoders), or the decoder's start."""
        inputs, starts = self.base_inputs(input_ids, attention_mask, prefix)
        place = starts + self.position(input_ids, attention_mask)
        with self.lower_layers(input_ids, attention_mask, starts, prefix):
            hidden = hidden_before_output(self.model, {**inputs, "read_at": place}, prefix)
        return hidden.flatten(0, 1)[place]

    def every_token(self, input_ids: Tensor, attention_mask: Tensor, prefix: Any, **given: Any) -> Tensor:
        """`[B, n, d]`: the hidden state of every token; an encoder-decoder's are its encoder's. `given` goes to the
        model."""
        if self.model.kind == "encoder-decoder":
            with self.model.reading(prefix):
                encoder: Any = self.model.base.get_encoder()
                return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        inputs, starts = self.base_inputs(input_ids, attention_mask, prefix)
        with self.lower_layers(input_ids, attention_mask, starts, prefix):
            hidden = hidden_before_output(self.model, {**inputs, **given}, prefix)
        if "packed" not in inputs:
            return hidden
        real = attention_mask.bool()
        padded = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        padded[real] = hidden[0, (starts[:, None] + torch.arange(real.shape[1], device=real.device))[real]]
        return padded

    def lower_layers(self, ids: Tensor, mask: Tensor, starts: Tensor, prefix: Any) -> AbstractContextManager[None]:
        """What a call of the base with these rows passes over."""
        return nullcontext() if self.cache is None else self.cache.passed_over(ids, mask, starts, prefix)

    def base_inputs(self, ids: Tensor, mask: Tensor, prefix: Any) -> tuple[dict[str, Any], Tensor]:
        """The arguments of the base's forward, and `[B]`, where each row begins, counted through all rows.

        Rows are packed where the base can, so that little padding is computed (`packing.grouped`); an encoder-decoder's
        decoder reads its start token alone.
        """
        row = torch.arange(len(ids), device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.model.kind == "encoder-decoder":
            start = torch.full_like(ids[:, :1], self.model.config.decoder_start_token_id)
            return {**inputs, "decoder_input_ids": start}, row
        if bool(mask.all()) or not self.model.packs(prefix):
            return inputs, row * ids.shape[1]
        lengths = mask.sum(1).tolist()
        order = list(range(len(ids)))
        if not self.model.by_row(prefix):  # else the prefixes are in the order of the rows
            order, lengths = grouped(lengths, exact=self.model.kind != "decoder")
        packed = torch.cat([ids[i, :length] for i, length in zip(order, lengths, strict=True)])[None]
        ends = torch.tensor(lengths, device=ids.device).cumsum(0)
        starts = torch.empty_like(ends)
        starts[order] = ends - torch.tensor(lengths, device=ids.device)
        return {"input_ids": packed, "packed": lengths}, starts

    def position(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B]`, where in its row `pooled` reads."""
        if self.model.kind == "decoder":
            return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        return torch.zeros_like(ids[:, 0])

    def apply_head(self, hidden: Tensor) -> Tensor:
        """The head's outputs in float32."""
        assert self.head is not None
        return self.head(hidden)

    def measure_head(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], Tensor]:
        """Measure what the head reads on some of the rows to learn from; returns the examples made of them, the longest
        first, and what was read `[N, d]`, in their order."""
        assert self.head is not None
        examples, _ = self.examples(rows[:: -(-len(rows) // MEASURED)])
        examples.sort(key=lambda example: -len(example["input_ids"]))  # as `batches` takes them
        read: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
        try:
            self.logits([{name: value for name, value in e.items() if name != "labels"} for e in examples], 16, ACTIVE)
        finally:
            handle.remove()
        hidden = torch.cat(read)
        with torch.no_grad():
            self.head.measure(hidden)
        return examples, hidden

    @property
    def is_sharded(self) -> bool:
        """Whether several processes hold the base's weights together; transformers' Trainer must not move them."""
        return self.model.is_sharded

    # ---- files

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def save_pretrained(self, directory: str | Path, training: dict[str, Any] | None = None) -> None:
        """The prefix, the task and the head, as one directory."""
        extra = {} if self.head is None else {f"head.{name}": t for name, t in self.head.plain().items()}
        self.model.save_pretrained(directory, task=self.settings.to_dict(), training=training, extra=extra)

    @classmethod
    def from_pretrained(cls, directory: str | Path, model: PrefixModel | None = None, name: str | None = None) -> Self:
        """A saved prefix of this task, on its base (loaded by the id in the file) or on `model`, whose bank it joins as
        `name` (the folder's by default).

        Raises InputError where the prefix is of another task.
        """
        header, tensors = files.read(directory)
        saved = header.get("task")
        if not saved or saved["task"] != cls.name:
            raise InputError(f"{directory} holds no prefix of the task {cls.name}.")
        model = model or PrefixModel(*base_of(header))
        model.load(directory, name)
        task = cls(model, cls.settings_class.from_dict(saved))
        if task.head is not None:
            task.head.load_plain(tensors["head.weight"], tensors["head.bias"])
        return task.eval()


def _encoder_width(model: PrefixModel) -> int:
    """The width of `every_token`'s states."""
    embeddings: Any = model.base.get_input_embeddings()
    output: Any = model.base.get_output_embeddings()
    return embeddings.weight.shape[1] if model.kind == "encoder-decoder" else output.weight.shape[1]
