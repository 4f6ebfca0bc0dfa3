"""What classification derives from the labels' names: the template around the texts, the word of each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from ..model import PrefixModel
from ..schemas import Row
from .encoding import MASK, check_template
from .task import Settings

NAMED_LABELS = 20  # beyond so many an instruction does not name them, and words that tell them apart say little of them
# Where labels are many, training starts from the shortest of some rows, if they have no more words than this together.
LOOKED_AT, SHOWN_ROWS, SHOWN_WORDS = 64, 2, 30


@dataclass(frozen=True)
class ClassifySettings(Settings):
    """How rows become inputs and logits become labels.

    labels: their names, in the order of the logits.
    template: what stands around the text; holds {text}, and for label words of an encoder {mask}.
    label_words: one word per label, or None. A `words` head reads them; beside a `linear` one the bare base does.
    max_length: tokens of template and text together; longer texts are cut, the template never.
    fields: names of the texts that a row has, in the template's braces.
    multi_label: a row has any number of labels.
    head: `words` or `linear`; by default words where there are some.
    """

    task: ClassVar[str] = "classify"
    labels: tuple[str, ...]
    template: str
    label_words: tuple[str, ...] | None
    fields: tuple[str, ...] = ("text",)
    multi_label: bool = False
    head: str | None = None

    @property
    def is_linear(self) -> bool:
        return self.head == "linear" or self.label_words is None


def default_instruction(
    labels: Sequence[str], rows: Sequence[Row] = (), kind: str = "decoder", fields: Sequence[str] = ("text",)
) -> str:
    """The instruction that training starts from when the user writes none: it names the labels, unless they are so many
    that their names would make the prefix long and every step slow. Then it shows a decoder the two shortest of the
    first 64 rows, and says how many labels there are to others, and where those rows are long."""
    if len(labels) <= NAMED_LABELS:
        return f"Read the text and say which category it belongs to: {', '.join(labels)}.\n\n"
    if kind == "decoder" and rows:
        examples = sorted((_example(fields, row) for row in rows[:LOOKED_AT]), key=_words_of)
        shown = "".join(examples[:SHOWN_ROWS])
        if _words_of(shown) <= SHOWN_WORDS:
            return shown
    return f"Read the text and say which of {len(labels)} categories it belongs to.\n\n"


def default_template(kind: str, words: bool, fields: Sequence[str] = ("text",), separator: str | None = None) -> str:
    """Texts one below the other, and what the label follows; an encoder's `separator` stands between its texts."""
    if kind == "decoder":
        return _asked(fields, [f"{{{field}}}" for field in fields])
    between = f" {separator} " if kind == "encoder" and separator else "\n"
    texts = between.join(f"{{{field}}}" for field in fields)
    return f"{texts} Category: {MASK}." if kind == "encoder" and words else texts


def _asked(fields: Sequence[str], texts: Sequence[str]) -> str:
    """What a decoder reads of a row, up to where the label follows."""
    return "".join(f"{_title(f)}: {text}\n" for f, text in zip(fields, texts, strict=True)) + "Category:"


def _example(fields: Sequence[str], row: Row) -> str:
    """A row with its label, as a decoder reads it."""
    label = row.label if isinstance(row.label, str) else ", ".join(row.label)
    texts = (row.text,) if isinstance(row.text, str) else row.text
    return f"{_asked(fields, texts)} {label.replace('_', ' ')}\n\n"


def _words_of(text: str) -> int:
    return len(text.split())


def _title(field: str) -> str:
    return field[:1].upper() + field[1:].replace("_", " ")


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
    fields: Sequence[str] = ("text",),
    multi_label: bool = False,
) -> ClassifySettings:
    """Settings for `labels` on a base, what is not given derived from the labels' names.

    head: `words`, `linear`, or `auto`: linear for decoders, beside words for the base alone where labels are few and
        every one has one; for others words where there are such, else linear. `label_words` given are read as they are.
    fields, multi_label: as in ClassifySettings.
    Raises InputError for a template without {text}, words that begin alike, or too few or many of them.
    """
    if head not in ("auto", "words", "linear"):
        raise InputError(f"head {head!r} is unknown; choose auto, words or linear.")
    if head == "linear" and label_words:
        raise InputError("a linear head has no label words; leave out one of the two.")
    if multi_label and (head == "words" or label_words):
        raise InputError("rows with lists of labels need a linear head; leave out the label words.")
    head = "linear" if multi_label else head
    words = tuple(label_words) if label_words else None
    if words is None and (head == "words" or (head == "auto" and len(labels) <= NAMED_LABELS)):
        words = derive_label_words(labels, model.tokenizer)
        if words is None and head == "words":
            raise InputError("no distinct label words follow from the label names; give them, or use a linear head.")
    if head == "auto":
        head = "words" if label_words or (words is not None and model.kind != "decoder") else "linear"
    separator = getattr(model.tokenizer, "sep_token", None)
    template = template or default_template(model.kind, head == "words", fields, separator)
    check_template(template, fields)
    settings = ClassifySettings(max_length, tuple(labels), template, words, tuple(fields), multi_label, head)
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
    if model.kind == "encoder" and not settings.is_linear and settings.template.count(MASK) != 1:
        raise InputError(f"label words of an encoder need {MASK} once in the template: {settings.template!r}.")
