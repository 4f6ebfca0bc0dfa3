"""Texts that are read and not continued, between two decoding steps: labels for a few, or where attention goes on one.

Runs in the thread that owns the model. A job takes its prefix when its turn comes and holds it until it is answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..model import PrefixModel
from ..shares import token_shares
from .batch import Batch, Row
from .failure import Failure, broken, no_classifier, no_words, reads_no_text
from .jobs import Attention, Classification, Job, Reading, Shares
from .library import Library, Resident
from .metrics import Metrics
from .text import Transcript

TEXTS = 32  # classified between two decoding steps
Answers = list[tuple[Job, Any]]
log = logging.getLogger("foreword.serve")


class Texts:
    """Answers what waits in a line of Classification and Attention jobs."""

    def __init__(self, model: PrefixModel, library: Library, metrics: Metrics) -> None:
        self._model, self._library, self._metrics = model, library, metrics

    def read(self, line: Sequence[Reading]) -> Answers:
        """Work on the first in line, and classify with it texts of later jobs for the same prefix; the jobs that have
        been answered, with their answers."""
        first = line[0]
        held = self._held(first)
        if isinstance(held, Failure):
            return [(first, held)]
        if isinstance(first, Attention):
            return self._tried([first], lambda: [(first, self._attention(first, held))])
        texts = [(job, text) for job in self._alike(line, first, held) for text in job.texts[len(job.results) :]]
        picked = texts[:TEXTS]
        return self._tried([job for job, _ in picked], lambda: self._classify(picked, held))

    def _held(self, job: Reading) -> Resident | Failure:
        """The prefix that a job holds from now on, or why it can have none."""
        assert job.prefix is not None
        try:
            job.held = held = job.held or self._library.take(job.prefix)
        except Failure as failure:
            return failure
        if isinstance(job, Attention) and job.text is None:
            return held
        if held.classifier is None:
            return no_classifier(job.prefix)
        if isinstance(job, Classification) and job.bare and not held.classifier.reads_base:
            return no_words(job.prefix)
        return held

    def _alike(self, line: Sequence[Reading], first: Classification, held: Resident) -> list[Classification]:
        """The jobs that can be classified together with the first."""
        alike = [job for job in line if isinstance(job, Classification) and job.bare == first.bare]
        return [job for job in alike if job.prefix == first.prefix and self._held(job) is held]

    @staticmethod
    def _tried(jobs: Sequence[Job], work: Callable[[], Answers]) -> Answers:
        """What `work` answers; where it fails, all of `jobs` do."""
        try:
            return work()
        except Failure as failure:
            answer = failure
        except Exception:
            log.exception("reading texts failed; the requests in it are answered with an error")
            answer = broken()
        return [(job, answer) for job in dict.fromkeys(jobs)]

    def _classify(self, picked: Sequence[tuple[Classification, str]], held: Resident) -> Answers:
        assert held.classifier is not None
        prefix = None if picked[0][0].bare else held.key
        results = held.classifier.predict([text for _, text in picked], TEXTS, prefix=prefix)
        self._metrics.texts.inc(len(results))
        for (job, _), result in zip(picked, results, strict=True):
            job.results.append(result)
        jobs = dict.fromkeys(job for job, _ in picked)
        return [(job, job.results) for job in jobs if len(job.results) == len(job.texts)]

    def _attention(self, job: Attention, held: Resident) -> Shares:
        ids, cut = job.prompt, False
        if job.text is not None:
            assert held.classifier is not None
            (ids,), (cut,) = held.classifier.encode([job.text])
        else:  # its file may have changed since the request was checked
            self._library.check_room(held.listed, len(ids))
        shares = token_shares(self._model, lambda: self._run(job, held, ids))
        if shares is None:
            raise reads_no_text(held.listed.name)
        self._metrics.texts.inc()
        return Shares(_texts_of(ids, self._model.tokenizer), shares.tolist(), cut)

    def _run(self, job: Attention, held: Resident, ids: list[int]) -> None:
        """One pass over the text: as a classifier reads it, or as the prompt of a completion."""
        if job.text is not None:
            assert held.classifier is not None
            inputs = torch.tensor([ids], device=self._model.device)
            held.classifier(inputs, torch.ones_like(inputs), prefix=held.key)
            return
        alone = Batch(self._model)
        try:
            alone.change([], [Row(ids, held.key)])
        finally:
            alone.clear()


def _texts_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; together they are the text of all. A character of several tokens is the last one's."""
    transcript = Transcript(tokenizer, special=True)
    texts = [transcript.add(token) for token in ids]
    texts[-1] += transcript.end()
    return texts
