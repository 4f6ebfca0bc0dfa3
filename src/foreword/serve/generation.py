"""One continuation from its first token to its last: logits in, pieces of text out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .batch import Row
from .text import Transcript

GREEDY_BELOW = 1e-5  # a temperature so small that dividing by it would overflow
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when they end.

    temperature: 0 takes the likeliest token. seed: of the row's own generator, so that an answer does not depend on
    the rows beside it; None draws one. stop: strings that end the text and are not part of it. top: how many
    log-probabilities beside the chosen token's are asked for; None for none at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True)
class Scored:
    """A chosen token as text, its log-probability (of the model, before temperature), and the likeliest tokens."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer; `finish` comes with the last."""

    text: str = ""
    scored: Scored | None = None
    finish: Finish | None = None


class Generation:
    """A row of the batch, and what is made of the tokens that follow it."""

    def __init__(self, row: Row, sampling: Sampling, tokenizer: Any, ends: Collection[int]) -> None:
        self.row, self._sampling, self._tokenizer, self._ends = row, sampling, tokenizer, ends
        self._transcript = Transcript(tokenizer, sampling.stop)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self.greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def greedy(self) -> bool:
        return self._sampling.temperature < GREEDY_BELOW

    def take(self, logits: Tensor, likeliest: int) -> Piece:
        """Choose the next token from `logits` `[V]`, whose largest is at `likeliest`."""
        token = likeliest if self.greedy else self._draw(logits)
        self.row.chosen.append(token)
        scored = self._score(logits, token)
        if token in self._ends:
            return Piece(self._transcript.end(), scored, "stop")
        text = self._transcript.add(token)
        if self._transcript.stopped:
            return Piece(text, scored, "stop")
        if len(self.row.chosen) < self._sampling.max_tokens:
            return Piece(text, scored)
        text += self._transcript.end()
        return Piece(text, scored, "stop" if self._transcript.stopped else "length")

    def _draw(self, logits: Tensor) -> int:
        none_yet = torch.empty(1, 0, dtype=torch.long)
        scores = self._warpers(none_yet, logits[None].cpu())  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))

    def _score(self, logits: Tensor, token: int) -> Scored | None:
        if self._sampling.top is None:
            return None
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(self._sampling.top, len(logprobs)))
        top = tuple((self._tokenizer.decode([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        return Scored(self._tokenizer.decode([token]), float(logprobs[token]), top)
