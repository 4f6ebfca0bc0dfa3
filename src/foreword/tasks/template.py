"""The template around a text, the word of each label, and token ids from both.

Only the text is ever cut to fit, never the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..forms import opening_ids
from ..model import PrefixModel

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

    candidates = [[w for w in _words(label) if first_token(w, tokenizer) is not None] for label in labels]
    tokens = list(dict.fromkeys(first_token(w, tokenizer) for words in candidates for w in words))
    cost = np.full((len(labels), len(tokens)), 1e6)
    for row, words in enumerate(candidates):
        for rank, word in enumerate(words):
            column = tokens.index(first_token(word, tokenizer))
            cost[row, column] = min(cost[row, column], rank)
    if len(tokens) < len(labels):
        return None
    rows, columns = linear_sum_assignment(cost)
    if cost[rows, columns].max() >= 1e6:
        return None
    return tuple(
        next(w for w in candidates[row] if first_token(w, tokenizer) == tokens[column])
        for row, column in zip(rows, columns, strict=True)
    )


def _words(label: str) -> list[str]:
    """The label's name as a whole, then its parts: "Sci/Tech" gives Sci/Tech, Tech."""
    parts = label.replace("/", " ").replace("_", " ").replace("-", " ").split()
    return list(dict.fromkeys([label.replace("_", " "), *parts[1:]]))


def first_token(word: str, tokenizer: Any) -> int | None:
    """The first token of the word as it follows a text, with its space; None where it has no visible one."""
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
    first = [first_token(word, model.tokenizer) for word in words]
    for i, token in enumerate(first):
        if token is None or token in first[:i]:
            other = f" as {words[first.index(token)]!r}" if token in first[:i] else ""
            raise InputError(f"the label word {words[i]!r} begins with the same token{other}; choose distinct words.")
    if model.kind == "encoder" and settings.template.count(MASK) != 1:
        raise InputError(f"label words of an encoder need {MASK} once in the template: {settings.template!r}.")


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
