"""Pieces to OpenAI's answers: whole ones and streamed chunks, of completions and of chats."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .generation import Piece, Scored
from .text import BROKEN


@dataclass
class Usage:
    """Tokens of texts, prefixes not counted."""

    prompt: int
    completion: int = 0

    def to_dict(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass
class Answering:
    """One request's answer in the making, for `choices` texts; `chat` tells whose shape it has."""

    model: str
    chat: bool
    usage: Usage
    choices: int = 1
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self._pieces: list[list[Piece]] = [[] for _ in range(self.choices)]
        self._offsets = [0] * self.choices

    def add(self, index: int, piece: Piece) -> None:
        self._pieces[index].append(piece)
        self.usage.completion += 1

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self._whole_choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        return {**self._frame("chat.completion"), "choices": choices, "usage": self.usage.to_dict()}

    def first(self, index: int) -> str | None:
        """The chunk before the first piece: a chat says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None) if self.chat else None

    def chunk(self, index: int, piece: Piece) -> str:
        """The chunk of one piece, as a server-sent event."""
        self.usage.completion += 1
        scored = [piece.scored] if piece.scored else []
        return self._chunk(index, {"content": piece.text}, self._logprobs(index, scored), piece.finish)

    def last(self, include_usage: bool) -> str:
        """What ends a stream."""
        end = event({**self._frame("chat.completion.chunk"), "choices": [], "usage": self.usage.to_dict()})
        return (end if include_usage else "") + "data: [DONE]\n\n"

    def _frame(self, chat_object: str) -> dict[str, Any]:
        kind = chat_object if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        logprobs = self._logprobs(index, [piece.scored for piece in pieces if piece.scored])
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> str:
        said = {"delta": delta} if self.chat else {"text": delta["content"]}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._frame("chat.completion.chunk"), "choices": [choice]})

    def _logprobs(self, index: int, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not scored:
            return None
        if self.chat:
            return {"content": [_chat_token(s) for s in scored], "refusal": None}
        offsets = []
        for s in scored:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(s.token)
        return {
            "tokens": [s.token for s in scored],
            "token_logprobs": [s.logprob for s in scored],
            "top_logprobs": [dict(s.top) for s in scored],
            "text_offset": offsets,
        }


def _chat_token(scored: Scored) -> dict[str, Any]:
    top = [{"token": t, "logprob": p, "bytes": _bytes(t)} for t, p in scored.top]
    return {"token": scored.token, "logprob": scored.logprob, "bytes": _bytes(scored.token), "top_logprobs": top}


def _bytes(token: str) -> list[int] | None:
    """None where the token is a part of a character, whose bytes the text no longer tells."""
    return None if BROKEN in token else list(token.encode())


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
