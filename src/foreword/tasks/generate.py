"""Generation: a prompt and its completion. The loss is the completion's alone.

A decoder reads template, prompt and completion in one; an encoder-decoder reads the prompt and writes the completion.
Logits are computed at the completion's positions only, in chunks (`output.OutputLayer`). The completion ends with the
tokenizer's end of text, so that the model learns to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..data import Data
from ..errors import InputError
from ..forms import opening_ids
from ..generate import check_generates, continued
from ..model import ACTIVE, PrefixModel
from ..schemas import Row, Schema, read_string, read_strings
from .encoding import Template, opening_and_closing
from .metrics import generation_metrics
from .output import OutputLayer, hidden_before_output
from .task import IGNORED, PrefixTask, Progress, Settings

PROMPT = "{prompt}"
SHOWN_WORDS = 120  # of the rows that training starts from, at most; two or three of E2E


def read_completion(row: dict[str, Any], column: str, place: str, text: Any) -> Any:
    """The completion, or a tuple of them where the table has a list of references. Raises InputError."""
    value = row.get(column)
    if not isinstance(value, list | tuple):
        return read_string(row, column, place)
    if not value:
        raise InputError(f"{place} has no reference in {column!r}; give one or remove the row.")
    return tuple(read_string({column: one}, column, place) for one in value)


def completion(row: Row) -> str:
    """What a row teaches: of several references the first."""
    return row.label if isinstance(row.label, str) else row.label[0]


GENERATE = Schema(
    "prompt input question instruction source table text context document article dialogue meaning_representation",
    "completion response answer output target summary highlights human_reference references reference label",
    read_strings,
    read_completion,
    also="references",
)


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """template: what stands around {prompt}. max_length: tokens of both together.
    max_new_tokens, beams: of completions that are generated; a training completion is cut to the first too."""

    task: ClassVar[str] = "generate"
    template: str
    max_new_tokens: int
    beams: int = 1

    @property
    def fields(self) -> tuple[str, ...]:
        return ("prompt",)


class PrefixGenerator(PrefixTask):
    """Completes prompts. `forward(input_ids, attention_mask, labels)` returns {"loss"}, the mean over tokens."""

    name, verb = "generate", "continue"
    schema, settings_class = GENERATE, GenerateSettings
    options = frozenset({"template", "max_length", "chat", "max_new_tokens", "beams"})
    rate, frozen_layers = 3.0, 0  # what E2E takes to come near LoRA (docs/log.md)

    def __init__(self, model: PrefixModel, settings: GenerateSettings) -> None:
        super().__init__(model, settings)
        check_generates(model)
        reserved = settings.max_new_tokens if model.kind == "decoder" else 0
        self._template = Template(model, settings.template, self.fields, settings.max_length, reserved)
        self._output = OutputLayer(model)

    @classmethod
    def for_data(  # type: ignore[override]
        cls,
        model: PrefixModel,
        data: Data | None = None,
        *,
        template: str | None = None,
        max_length: int = 128,
        chat: bool = False,
        max_new_tokens: int = 128,
        beams: int = 1,
    ) -> Self:
        """By default the completion follows the prompt on a new line; with `chat` in the base's own chat template.

        Raises InputError for a template beside `chat`, or a tokenizer without a chat template.
        """
        if template and chat:
            raise InputError("a template and the chat template cannot both stand around the prompt; leave out one.")
        default = f"{PROMPT}\n" if model.kind == "decoder" else PROMPT
        template = chat_template(model.tokenizer) if chat else template or default
        return cls(model, GenerateSettings(max_length, template, max_new_tokens, beams))

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        """On a decoder the first training rows; else, and where the first of them is too long, a sentence."""
        shown, words = "", 0
        for row in data.train if kind == "decoder" else ():
            example = f"{row.text}\n{completion(row)}\n\n"
            words += len(example.split())
            if words > SHOWN_WORDS:
                break
            shown += example
        return shown or (
            "Below is a text. Read all of it, then write what belongs after it, complete, with nothing left out and "
            "nothing added.\n\n"
        )

    # ---- rows to inputs

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        """Where a row has several references, the loss is of the first."""
        prompts, cut = self._template([(row.text,) for row in rows])
        completions = [completion(row) for row in rows]
        tokenizer = self.model.tokenizer
        answers = tokenizer(completions, add_special_tokens=False)["input_ids"] if rows else []
        decoder = self.model.kind == "decoder"
        opening, closing = ([], []) if decoder else opening_and_closing(tokenizer)
        closing = closing or [tokenizer.eos_token_id]
        room = self.settings.max_new_tokens
        examples = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            answer = opening + answer + closing
            cut[i] |= len(answer) > room
            answer = answer[:room]
            ids, labels = (prompt + answer, [IGNORED] * len(prompt) + answer) if decoder else (prompt, answer)
            examples.append({"input_ids": ids, "labels": labels})
        return examples, cut

    def items(self, batch: dict[str, Tensor]) -> int:
        """Completion tokens: what the loss is the mean over."""
        return int((batch["labels"] != IGNORED).sum())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Any = ACTIVE
    ) -> dict[str, Tensor]:
        """The cross-entropy of the tokens in `labels` `[B, n]` (encoder-decoders: `[B, m]`) that are not `IGNORED`."""
        if self.model.kind == "encoder-decoder":
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            inputs["decoder_input_ids"] = self._shifted(labels)
            hidden, targets = hidden_before_output(self.model, inputs, prefix), labels
        else:
            prompt = (labels != IGNORED).cumsum(1) == 0  # a dynamic prefix must not see the answer
            hidden = self.every_token(input_ids, attention_mask, prefix, prompt_mask=prompt)[:, :-1]
            targets = labels[:, 1:]
        wanted = targets != IGNORED
        return {"loss": self._output.cross_entropy(hidden[wanted], targets[wanted])}

    def _shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads: its start token, then every token but the last."""
        start = torch.full_like(labels[:, :1], self.model.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.pad)], dim=1)

    # ---- predictions

    def predict(
        self,
        texts: Sequence[Any],
        batch_size: int = 32,
        prefix: Any = ACTIVE,
        progress: Progress | None = None,
        *,
        max_new_tokens: int | None = None,
        beams: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """`{"completion", "cut"}` per prompt, in order: by beam search (greedy with one beam), or sampled above
        temperature 0. Raises InputError for an empty prompt."""
        ids, cut = self._template(self.read_inputs(texts))
        self.eval()
        made = continued(
            self.model,
            ids,
            max_new_tokens=max_new_tokens or self.settings.max_new_tokens,
            beams=beams or self.settings.beams,
            temperature=temperature,
            seed=seed,
            prefix=prefix,
            batch_size=batch_size,
            progress=progress,
        )
        return [{"completion": text.strip(), "cut": was_cut} for text, was_cut in zip(made, cut, strict=True)]

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """BLEU, ROUGE and exact matches, against all references of a row."""
        references = [(row.label,) if isinstance(row.label, str) else row.label for row in rows]
        return {"metrics": generation_metrics([result["completion"] for result in results], references)}


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template around one message of the user, up to where the answer begins.

    A token that the tokenizer opens every text with is left out: the prefix holds it. Raises InputError where there is
    no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the base has no chat template; leave out the setting chat, or give a template.")
    messages = [{"role": "user", "content": PROMPT}]
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return made.removeprefix(tokenizer.decode(opening_ids(tokenizer)))
