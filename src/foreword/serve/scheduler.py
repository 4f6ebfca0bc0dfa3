"""The one thread that owns the model: what waits, what decodes, what is read.

Every turn it lets go of rows that ended or whose client went away, admits newcomers first come first served while
there is room, runs one decoding step of all rows, and reads a few texts (`texts`). Requests for different prefixes and
for none share the batch. Prefixes that differ in positions, windows or layers cannot be mixed: the next in line then
waits for the batch to end, and nobody overtakes it.

Jobs come from an event loop and answer into asyncio queues there; how they are asked for is not known here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from ..model import PrefixModel
from .batch import Batch, Row
from .failure import Failure, broken, stopping, too_late
from .generation import Generation, Piece
from .jobs import Completion, Job, Reading
from .library import Library
from .metrics import Metrics
from .texts import Texts

PROMPT_TOKENS = 4096  # prompts run together hold at most so many, padding included, or a single one
RETRY_AFTER = 1
log = logging.getLogger("foreword.serve")
T = TypeVar("T")


class Scheduler:
    """Runs jobs over one model. rows: that decode at once; waiting: jobs that may wait."""

    def __init__(self, model: PrefixModel, library: Library, metrics: Metrics, *, rows: int, waiting: int) -> None:
        self._model, self._library, self._metrics = model, library, metrics
        self._rows, self._limit = rows, waiting
        self._batch = Batch(model)
        self._texts = Texts(model, library, metrics)
        self._ends = _end_ids(model)
        self._changed = threading.Condition()
        self._waiting: deque[Completion] = deque()
        self._reading: deque[Reading] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[Row, tuple[Completion, Generation]] = {}
        self._gone: set[Row] = set()  # rows that ended and are still in the batch
        self._outbox: list[tuple[Job, Any]] = []
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="foreword-engine", daemon=True)
        metrics.waiting.set_function(lambda: len(self._waiting) + len(self._reading))
        metrics.running.set_function(lambda: len(self._running))

    # ---- from the event loop

    def start(self) -> None:
        """Begin; answers go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of `jobs` or none. Raises Failure when too many wait or the server is stopping."""
        with self._changed:
            if not self.alive:
                raise stopping()
            if len(self._waiting) + len(self._reading) + len(jobs) > self._limit:
                raise Failure(429, "too many requests wait; come again shortly.", "overloaded", RETRY_AFTER)
            for job in jobs:
                (self._waiting if isinstance(job, Completion) else self._reading).append(job)  # type: ignore
            self._changed.notify()

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread that owns the model, between two turns."""
        future: Future[T] = Future()
        with self._changed:
            if not self.alive:
                raise stopping()
            self._calls.append((work, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the thread; whatever has not been answered by now fails. Blocks until it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        finally:
            self._fail_everything(stopping())

    def _wait(self) -> bool:
        with self._changed:
            busy = self._calls, self._waiting, self._reading, self._running, self._gone
            while not self._stopping and not any(busy):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        try:
            self._do_calls()
            self._drop_the_gone()
            self._change(self._admitted())
            if self._running:
                self._metrics.batch.observe(len(self._running))
                self._take(list(self._batch.rows), self._batch.step())
            self._read()
        except Exception:
            log.exception("a turn of the engine failed; every request in it is answered with an error")
            self._fail_everything(broken(), waiting=False)
        self._send()

    def _do_calls(self) -> None:
        while self._calls:
            work, future = self._calls.popleft()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _drop_the_gone(self) -> None:
        """End what was cancelled or took too long, waiting or running."""
        now = time.monotonic()
        with self._changed:
            for queue in (self._waiting, self._reading):
                late: list[Job] = [job for job in queue if job.cancelled or job.deadline < now]
                for job in late:
                    queue.remove(job)  # type: ignore[arg-type]
                    self._end(job, _verdict(job))
        for row, (job, _) in list(self._running.items()):
            if job.cancelled or job.deadline < now:
                self._end(job, _verdict(job), row)

    def _admitted(self) -> list[Row]:
        """Rows of the jobs that join now."""
        joining: list[Row] = []
        longest = 0
        while self._waiting and len(self._running) < self._rows:
            job = self._waiting[0]
            longest = max(longest, len(job.prompt))
            if joining and longest * (len(joining) + 1) > PROMPT_TOKENS:
                break
            try:
                if not self._holds(job):
                    break
            except Failure as failure:
                self._waiting.popleft()
                self._end(job, failure)
                continue
            self._waiting.popleft()
            row = Row(job.prompt, job.held.key if job.held else None)
            self._running[row] = job, Generation(row, job.sampling, self._model.tokenizer, self._ends)
            self._metrics.prompt_tokens.inc(len(job.prompt))
            joining.append(row)
        return joining

    def _holds(self, job: Completion) -> bool:
        """Take the job's prefix for it, unless it cannot be mixed with those that run. Raises Failure."""
        kinds = {other.held.listed.kind for other, _ in self._running.values() if other.held is not None}
        if job.prefix is None:
            return True
        listed = self._library.listed.get(job.prefix)
        if listed is not None and not kinds <= {listed.kind}:
            return False
        job.held = held = self._library.take(job.prefix)
        if held.listed is listed:
            return True
        # It was read just now, and its file may have changed since the request was checked.
        self._library.check_room(held.listed, len(job.prompt) + job.sampling.max_tokens)
        if not kinds <= {held.listed.kind}:
            job.held = None
            self._library.release(held)
            return False
        return True

    def _change(self, joining: list[Row]) -> None:
        """Make the batch the rows that run: out with those that ended, in with those that join."""
        if not joining and not self._gone:
            return
        staying = [row for row in self._batch.rows if row not in self._gone]
        self._gone.clear()
        logits = self._batch.change(staying, joining)
        if logits is not None:
            now = time.monotonic()
            for row in joining:
                self._metrics.first_token.observe(now - self._running[row][0].arrived)
            self._take(joining, logits)

    def _take(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose the next token of every row that has not ended."""
        likeliest = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            if row in self._gone:
                continue
            job, generation = self._running[row]
            piece = generation.take(logits[i], likeliest[i])
            self._metrics.generated_tokens.inc()
            if piece.finish is None:
                self._outbox.append((job, piece))
            else:
                self._end(job, piece, row)

    def _read(self) -> None:
        """Work on the next of the texts that are read and not continued."""
        with self._changed:
            line = list(self._reading)
        if not line:
            return
        for job, answer in self._texts.read(line):
            with self._changed:
                self._reading.remove(job)  # type: ignore[arg-type]
            self._end(job, answer)

    # ---- answers

    def _end(self, job: Job, answer: Any, row: Row | None = None) -> None:
        """The last answer of a job; its row leaves the batch at the next change."""
        self._outbox.append((job, answer))
        if job.cancelled:
            self._metrics.cancelled.inc()
        if row is not None:
            del self._running[row]
            self._gone.add(row)
        if job.held is not None:
            self._library.release(job.held)
            job.held = None

    def _send(self) -> None:
        if self._outbox and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, self._outbox)
            self._outbox = []

    def _fail_everything(self, failure: Failure, waiting: bool = True) -> None:
        for row, (job, _) in list(self._running.items()):
            self._end(job, failure, row)
        self._gone.clear()
        self._batch.clear()
        with self._changed:
            while waiting and (self._waiting or self._reading):
                self._end((self._waiting or self._reading).popleft(), failure)
            while waiting and self._calls:
                self._calls.popleft()[1].set_exception(failure)
        self._send()


def _deliver(outbox: list[tuple[Job, Any]]) -> None:
    for job, answer in outbox:
        job.out.put_nowait((job.index, answer))


def _verdict(job: Job) -> Any:
    return Piece(finish="cancelled") if job.cancelled else too_late()


def _end_ids(model: PrefixModel) -> set[int]:
    """The tokens that end a text, as `generate` takes them."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if ends is not None else model.tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
