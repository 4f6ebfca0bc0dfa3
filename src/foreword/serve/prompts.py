"""What clients send to token ids, off the event loop and away from the engine's own tokenizer."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from ..forms import opening_ids
from .failure import Failure


class Prompts:
    """A tokenizer of its own, in a thread of its own: long prompts then hold up neither other clients nor the model.

    A prefix opens the sequence, so what is read behind one has no token that does (as `foreword generate` has it).
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = copy.deepcopy(tokenizer), vocabulary
        self._opening = opening_ids(self._tokenizer)
        self._thread = ThreadPoolExecutor(1, "foreword-prompts")

    @property
    def chats(self) -> bool:
        """Whether the base knows how a chat is written."""
        return self._tokenizer.chat_template is not None

    async def of_text(self, prompt: str | list[int], behind_prefix: bool) -> list[int]:
        """The ids of a completion's prompt; ids are taken as they are. Raises Failure."""
        if isinstance(prompt, str):
            return self._checked(await self._run(self._encode, prompt, not behind_prefix))
        if max(prompt) >= self._vocabulary:
            raise Failure(400, f"token {max(prompt)} is not in the vocabulary of {self._vocabulary}.", "bad_token")
        return prompt

    async def of_chat(self, messages: list[dict[str, str]], behind_prefix: bool) -> list[int]:
        """The ids of a chat in the base's own template, up to where the assistant speaks. Raises Failure."""
        if not self.chats:
            raise Failure(400, "this base has no chat template; ask /v1/completions.", "no_chat_template")
        try:
            ids = await self._run(self._chat, messages)
        except TemplateError as error:
            raise Failure(400, f"the base's chat template refuses these messages: {error}.", "bad_messages") from error
        opening = self._opening
        if behind_prefix and opening and ids[: len(opening)] == opening:
            ids = ids[len(opening) :]
        return self._checked(ids)

    def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Any, *arguments: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _encode(self, text: str, opening: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=opening)["input_ids"]

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._encode(text, False)  # the template writes the special tokens itself

    @staticmethod
    def _checked(ids: list[int]) -> list[int]:
        if not ids:
            raise Failure(400, "the prompt is empty; write at least one word.", "empty_prompt")
        return ids
