"""Extractive question answering: where in a context the answer begins and ends, by two linear heads over its tokens.

A context that does not fit is read in windows that overlap. Start and end are each a choice among the context tokens
of a window and "not here", whose logit is fixed at 0: scores of different windows can thus be compared, and a window
without the answer has something to learn too. The span of the highest sum of both logits is the answer (Devlin et al.
2018, arXiv:1810.04805, section 4.2, whose "not here" is the first token). An encoder-decoder reads with its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import InputError
from ..model import ACTIVE, PrefixModel
from ..schemas import Row, Schema, read_string, read_strings
from .encoding import check_template, opening_and_closing
from .metrics import answer_metrics
from .task import PrefixTask, Progress, Settings

FIELDS = ("question", "context")
LONGEST = 30  # tokens of an answer


def read_answers(row: dict[str, Any], column: str, place: str, text: Any) -> tuple[tuple[str, int], ...]:
    """The (text, first character) of each answer. Takes a list of {text, start}, SQuAD's {text: [], answer_start: []},
    or texts alone, which are looked up. Raises InputError for none, or one that is not in its context."""
    given, context = row.get(column), text[1]
    if isinstance(given, dict):
        starts = given.get("answer_start") or given.get("start") or []
        given = [{"text": t, "start": s} for t, s in zip(given.get("text") or [], starts, strict=False)]
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list | tuple) or not given:
        raise InputError(f"{place} has no answer in {column!r}; give one or remove the row.")
    answers = []
    for one in given:
        one = one if isinstance(one, dict) else {"text": one}
        answer = read_string(one, "text", place)
        start = one.get("start", one.get("answer_start"))
        start = context.find(answer) if start is None else start
        if not isinstance(start, int) or start < 0 or context[start : start + len(answer)] != answer:
            raise InputError(f"{place} has the answer {answer!r}, which is not there in its context; correct it.")
        answers.append((answer, start))
    return tuple(answers)


ANSWER = Schema("", "answers answer", read_strings, read_answers, groups=(FIELDS,))


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """template: holds {question} and then {context}, the context being what is cut into windows.
    stride: tokens that two windows share."""

    task: ClassVar[str] = "answer"
    template: str
    stride: int | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return FIELDS


@dataclass(frozen=True)
class Window:
    """A part of one context: whose row it is, and the characters of each of its context tokens."""

    row: int
    spans: list[tuple[int, int]]


class PrefixAnswerer(PrefixTask):
    """Finds answers. `forward(input_ids, attention_mask, begins, ends, labels)` returns {"loss", "logits"}."""

    name, verb = "answer", "answer"
    schema, settings_class = ANSWER, AnswerSettings
    options = frozenset({"template", "max_length", "stride"})
    reads_tokens = True

    def __init__(self, model: PrefixModel, settings: AnswerSettings) -> None:
        super().__init__(model, settings, head_size=2)
        check_template(settings.template, FIELDS)
        before, _, rest = settings.template.partition("{question}")
        between, found, after = rest.partition("{context}")
        if not found:
            raise InputError(f"the template must hold {{question}} before {{context}}: {settings.template!r}.")
        opening, closing = ([], []) if model.kind == "decoder" else opening_and_closing(model.tokenizer)
        ids = [
            model.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            for piece in (before, between, after)
        ]
        self._pieces = opening + ids[0], ids[1], ids[2] + closing
        self._limit = min(settings.max_length, model.text_limit() or settings.max_length)

    @classmethod
    def for_data(  # type: ignore[override]
        cls,
        model: PrefixModel,
        data: Data | None = None,
        *,
        template: str | None = None,
        max_length: int = 384,
        stride: int | None = None,
    ) -> Self:
        separator = getattr(model.tokenizer, "sep_token", None)
        default = "Question: {question}\nContext: {context}"
        if model.kind == "encoder" and separator:
            default = f"{{question}} {separator} {{context}}"
        made = cls(model, AnswerSettings(max_length, template or default, stride))
        if data is not None:
            made.measure_head(data.train)
        return made

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        return "Read the question and find its answer in the context.\n\n"

    # ---- rows to windows

    def _windows(self, rows: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[Window]]:
        """Examples without labels, several per row where its context is long. Raises InputError where the question
        leaves no room."""
        examples, windows = [], []
        before, between, after = self._pieces
        for number, (question, context) in enumerate(rows):
            asked = self.model.tokenizer(question, add_special_tokens=False)["input_ids"]
            read = self.model.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
            ids, spans = read["input_ids"], read["offset_mapping"]
            head = before + asked + between
            room = self._limit - len(head) - len(after)
            shared = room // 2 if self.settings.stride is None else self.settings.stride
            if room < 1 or not 0 <= shared < room:
                raise InputError(
                    f"question {number + 1} and the template leave {max(room, 0)} of {self._limit} tokens for the "
                    f"context, and windows share {shared}; raise the maximal length or lower the stride."
                )
            for at in range(0, max(1, len(ids) - shared), room - shared):
                part = ids[at : at + room]
                place = {"begins": len(head), "ends": len(head) + len(part)}
                examples.append({"input_ids": head + part + after, **place})
                windows.append(Window(number, spans[at : at + room]))
        return examples, windows

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        """The targets are those of a row's first answer. Nothing is ever left out, so no row is cut."""
        examples, windows = self._windows([row.text for row in rows])
        for example, window in zip(examples, windows, strict=True):
            answer, start = rows[window.row].label[0]
            example["labels"] = _target(window.spans, start, start + len(answer))
        return examples, [False] * len(rows)

    # ---- windows to answers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        begins: Tensor,
        ends: Tensor,
        labels: Tensor | None = None,
        prefix: Any = ACTIVE,
    ) -> dict[str, Tensor]:
        """Logits `[B, 2, n]` of start and end, minus infinity outside the context at begins .. ends `[B]`; the mean
        cross-entropy of both with labels `[B, 2]`, counted from `begins`, -1 where the answer is not here."""
        logits = self.apply_head(self.every_token(input_ids, attention_mask, prefix)).transpose(1, 2)
        place = torch.arange(logits.shape[2], device=logits.device)
        context = (place >= begins[:, None]) & (place < ends[:, None])
        logits = logits.masked_fill(~context[:, None], -torch.inf)
        if labels is None:
            return {"logits": logits}
        choices = nn.functional.pad(logits, (1, 0))  # "not here" comes first
        wanted = torch.where(labels < 0, 0, labels + begins[:, None] + 1)
        return {"loss": nn.functional.cross_entropy(choices.flatten(0, 1), wanted.flatten()), "logits": logits}

    def predict(
        self, texts: Sequence[Any], batch_size: int = 32, prefix: Any = ACTIVE, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """`{"answer", "start", "score", "cut"}` per (question, context), in order: the answer as it stands in the
        context from character `start` on. Raises InputError for an empty text."""
        rows = self.read_inputs(texts)
        examples, windows = self._windows(rows)  # type: ignore[arg-type]
        found = self.logits(examples, batch_size, prefix, progress)
        best: list[dict[str, Any]] = [{"answer": "", "start": 0, "score": -float("inf"), "cut": False} for _ in rows]
        for example, window, logits in zip(examples, windows, found, strict=True):
            score, first, last = best_span(logits[:, example["begins"] : example["ends"]])
            if score > best[window.row]["score"]:
                start, end = window.spans[first][0], window.spans[last][1]
                text = rows[window.row][1][start:end]
                start += len(text) - len(text.lstrip())  # a sub-token may begin with the space before it
                best[window.row] |= {"answer": text.strip(), "start": start, "score": score}
        return best

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Exact match and F1 by the official normalisation, against the closest of a row's answers."""
        truth = [[answer for answer, _ in row.label] for row in rows]
        return {"metrics": answer_metrics(truth, [result["answer"] for result in results])}


def _target(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """First and last token of the characters start .. end; -1, -1 where the window does not hold all of them."""
    touching = [i for i, (begin, stop) in enumerate(spans) if begin < end and stop > start]
    if not touching or spans[touching[0]][0] > start or spans[touching[-1]][1] < end:
        return [-1, -1]
    return [touching[0], touching[-1]]


def best_span(logits: Tensor) -> tuple[float, int, int]:
    """The highest start + end of `[2, n]` with the end not before the start nor `LONGEST` tokens after it, and both."""
    sums = logits[0][:, None] + logits[1][None, :]
    allowed = torch.ones_like(sums).triu().tril(LONGEST - 1).bool()
    sums = sums.masked_fill(~allowed, -torch.inf)
    at = int(sums.argmax())
    return float(sums.flatten()[at]), at // sums.shape[1], at % sums.shape[1]
