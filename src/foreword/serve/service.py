"""Requests to jobs and back: what the routes ask of the scheduler, the library and the tokenizer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from .answers import Answering, Usage, event
from .failure import Failure, empty_text, no_classifier, no_prefix, not_served, unknown_model
from .generation import Piece
from .jobs import Attention, Classification, Completion, Job, Shares
from .library import Library, Listed
from .metrics import Metrics
from .prompts import Prompts
from .scheduler import Scheduler
from .schema import AttentionRequest, ChatRequest, ClassifyRequest, CompletionRequest


@dataclass
class Service:
    """One base with its prefixes. `base` is its name among the models; `generates` is false for encoders;
    `parameters` counts the base's.

    deadline: seconds that a request may take.
    """

    base: str
    generates: bool
    parameters: int
    scheduler: Scheduler
    library: Library
    prompts: Prompts
    metrics: Metrics
    deadline: float

    def listed(self, model: str) -> Listed | None:
        """The prefix of that name; None for the base. Raises Failure."""
        if model == self.base:
            return None
        if model not in self.library.listed:
            raise unknown_model(model)
        return self.library.listed[model]

    async def begin(
        self, asked: CompletionRequest | ChatRequest, request: Request
    ) -> tuple[Answering, AsyncGenerator[tuple[int, Any]]]:
        """Queue a request for text; its answer in the making, and the pieces to make it of. Raises Failure."""
        listed = self.listed(asked.model)
        if not self.generates:
            raise Failure(400, f"{self.base} generates no text; ask /v1/classify.", "no_generation")
        if isinstance(asked, ChatRequest):
            ids = [await self.prompts.of_chat([m.flat() for m in asked.messages], listed is not None)]
        else:
            ids = [await self.prompts.of_text(prompt, listed is not None) for prompt in asked.prompts()]
        for prompt in ids:
            self.library.check_room(listed, len(prompt) + asked.tokens)
        out, deadline = asyncio.Queue[tuple[int, Any]](), self._end()
        name, sampling = listed.name if listed else None, asked.sampling(asked.tokens, asked.top)
        jobs = [Completion(name, deadline, out, i, prompt=p, sampling=sampling) for i, p in enumerate(ids)]
        self.scheduler.submit(jobs)
        usage = Usage(sum(map(len, ids)))
        return Answering(asked.model, isinstance(asked, ChatRequest), usage, len(ids)), _answers(jobs, out, request)

    async def complete(self, asked: CompletionRequest | ChatRequest, request: Request) -> dict[str, Any]:
        """A whole answer."""
        answering, pieces = await self.begin(asked, request)
        async with aclosing(pieces):
            async for index, piece in pieces:
                answering.add(index, piece)
        return answering.whole()

    async def stream(self, asked: CompletionRequest | ChatRequest, request: Request) -> AsyncGenerator[str]:
        """A streamed answer, begun: the first piece is there, so what went wrong until then has been raised."""
        answering, pieces = await self.begin(asked, request)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _events(answering, first, pieces, include_usage)

    def routes(self, listed: Listed | None) -> list[str]:
        """Those that answer for a prefix, or for the base."""
        names = ["classify"] if listed is not None and _classifies(listed) else []
        if self.generates:
            names += ["completions"] + ["chat/completions"] * self.prompts.chats
        if listed is not None and names:
            names.append("attention")
        return [f"/v1/{name}" for name in names]

    async def classify(self, asked: ClassifyRequest, request: Request) -> list[dict[str, Any]]:
        """What PrefixClassifier.predict says of each text. Raises Failure."""
        listed, bare = self.listed(asked.model), asked.model == self.base
        if asked.like is not None:
            if not bare:
                raise Failure(400, f"like: {asked.model!r} is no base; leave it out, or ask {self.base}.", "bad_like")
            listed = self.listed(asked.like)
        if listed is None or listed.about.labels is None:
            raise no_classifier(asked.like or asked.model)
        if not _classifies(listed):
            raise not_served(listed.name)
        for number, text in enumerate(asked.texts(), 1):
            if not text.strip():
                raise empty_text(number)
        job = Classification(listed.name, self._end(), asyncio.Queue(), texts=asked.texts(), bare=bare)
        return await self._answer(job, request)

    async def attention(self, asked: AttentionRequest, request: Request) -> Shares:
        """Where the attention of each token of a text goes. Raises Failure."""
        listed = self.listed(asked.model)
        if listed is None:
            raise no_prefix(asked.model)
        job = Attention(listed.name, self._end(), asyncio.Queue())
        if isinstance(asked.input, str) and _classifies(listed):
            if not asked.input.strip():
                raise empty_text(1)
            job.text = asked.input
        elif not self.generates:
            raise Failure(400, f"{self.base} generates no text, so it reads no prompt.", "no_generation")
        elif isinstance(asked.input, str):
            job.prompt = await self.prompts.of_text(asked.input, True)
        else:
            job.prompt = await self.prompts.of_chat([m.flat() for m in asked.input], True)
        self.library.check_room(listed, len(job.prompt))
        return await self._answer(job, request)

    async def _answer(self, job: Job, request: Request) -> Any:
        """The only answer of a job, once it is there. Raises Failure."""
        self.scheduler.submit([job])
        async with aclosing(_answers([job], job.out, request)) as answers:
            async for _, answer in answers:
                return answer
        raise AssertionError("a job always answers")

    def _end(self) -> float:
        return time.monotonic() + self.deadline


def _classifies(listed: Listed) -> bool:
    """Whether a prefix gives one label to one text."""
    about = listed.about
    return about.labels is not None and len(about.fields or ()) == 1 and not about.multi_label


async def _answers(
    jobs: Sequence[Job], out: asyncio.Queue[tuple[int, Any]], request: Request
) -> AsyncGenerator[tuple[int, Any]]:
    """What the jobs answer, until each has ended; they are cancelled when the client goes or nobody listens."""
    watching = asyncio.create_task(_cancel_when_gone(jobs, request))
    open_jobs = len(jobs)
    try:
        while open_jobs:
            index, answer = await out.get()
            if isinstance(answer, Failure):
                raise answer
            open_jobs -= not isinstance(answer, Piece) or answer.finish is not None
            yield index, answer
    finally:
        watching.cancel()
        for job in jobs:
            job.cancelled = True


async def _cancel_when_gone(jobs: Sequence[Job], request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancelled = True


async def _events(
    answering: Answering, first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Any]], include_usage: bool
) -> AsyncGenerator[str]:
    """Server-sent events; a failure midway is one too, since the status has been sent."""
    async with aclosing(pieces):
        for index in range(answering.choices):
            if (opening := answering.first(index)) is not None:
                yield opening
        yield answering.chunk(*first)
        try:
            async for index, piece in pieces:
                yield answering.chunk(index, piece)
        except Failure as failure:
            yield event(failure.body())
        else:
            yield answering.last(include_usage)
