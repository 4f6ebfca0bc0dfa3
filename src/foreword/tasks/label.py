"""Token labelling: a tag for every word of a text, by a linear head over the hidden state of its first sub-token.

Tags are BIO (Ramshaw and Marcus 1995, arXiv:cmp-lg/9505040): `B-x` begins an entity of type x, `I-x` goes on with it,
`O` is outside. A decoder's hidden state knows nothing of what follows, so its default template reads the text twice,
and the tags are read off the last reading. An encoder-decoder's are read off its encoder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import InputError
from ..model import ACTIVE, PrefixModel
from ..rows import listed
from ..schemas import Row, Schema, read_string, refuse_strange
from ..sources import Tables
from .encoding import opening_and_closing
from .metrics import entity_metrics
from .task import IGNORED, PrefixTask, Progress, Settings

TOKENS = "{tokens}"


def read_words(row: dict[str, Any], columns: tuple[str, ...], place: str) -> tuple[str, ...]:
    """The words of a row, a list or a text with spaces between them. Raises InputError for none, or an empty one."""
    words = row.get(columns[0])
    words = words.split() if isinstance(words, str) else words
    if not isinstance(words, list | tuple) or not words:
        raise InputError(f"{place} has no list of words in {columns[0]!r}; give one or remove the row.")
    return tuple(read_string({columns[0]: word}, columns[0], place) for word in words)


def read_tags(row: dict[str, Any], column: str, place: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The tags of a row. Raises InputError where they are not as many as the words, or no BIO."""
    tags = row.get(column)
    tags = tags.split() if isinstance(tags, str) else tags
    if not isinstance(tags, list | tuple) or len(tags) != len(words):
        found = len(tags) if isinstance(tags, list | tuple) else "no"
        raise InputError(f"{place} has {len(words)} words and {found} tags; give one tag for each word.")
    before = "O"
    for i, tag in enumerate(tags, 1):
        kind = tag[2:] if isinstance(tag, str) else ""
        if not isinstance(tag, str) or (tag != "O" and (tag[:2] not in ("B-", "I-") or not kind)):
            raise InputError(f"{place}, word {i} has the tag {tag!r}, which is no BIO; write O, B-type or I-type.")
        if tag[:2] == "I-" and before[2:] != kind:
            raise InputError(f"{place}, word {i} has the tag {tag!r} after {before!r}; an entity begins with B-{kind}.")
        before = tag
    return tuple(tags)


def types_of(rows: Sequence[Row]) -> set[str]:
    """The entity types among the tags of these rows."""
    return {tag[2:] for row in rows for tag in row.label if tag != "O"}


def _tags(splits: dict[str, list[Row]], tables: Tables, column: str) -> list[str]:
    """O, then B- and I- of every type among the training rows."""
    types = types_of(splits["train"])
    for split, rows in splits.items():
        refuse_strange(types_of(rows) - types, tables.sources[split])
    if not types:
        raise InputError(f"{tables.sources['train']} has no entity in {column!r}; give rows with tags other than O.")
    return ["O", *(f"{part}-{kind}" for kind in sorted(types) for part in "BI")]


LABEL = Schema("tokens words text sentence", "tags ner_tags labels label", read_words, read_tags, labels=_tags)


@dataclass(frozen=True)
class LabelSettings(Settings):
    """labels: the tags, in the order of the logits. template: holds {tokens}, whose last reading is tagged."""

    task: ClassVar[str] = "label"
    labels: tuple[str, ...]
    template: str

    @property
    def fields(self) -> tuple[str, ...]:
        return ("tokens",)


class PrefixLabeller(PrefixTask):
    """Tags words. `forward(input_ids, attention_mask, first, labels)` returns {"loss", "logits" `[B, words, tags]`}."""

    name, verb = "label", "label"
    schema, settings_class = LABEL, LabelSettings
    options = frozenset({"template", "max_length"})
    reads_tokens = True
    head_learning_rate = 1e-1  # most tags are rare: at 3e-2 every word is still O after 60 steps of WNUT-17

    def __init__(self, model: PrefixModel, settings: LabelSettings) -> None:
        super().__init__(model, settings, head_size=len(settings.labels))
        if TOKENS not in settings.template:
            raise InputError(f"the template must hold {TOKENS}: {settings.template!r}.")
        opening, closing = ([], []) if model.kind == "decoder" else opening_and_closing(model.tokenizer)
        pieces = [
            model.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            for piece in settings.template.split(TOKENS)
        ]
        self._pieces = [opening + pieces[0], *pieces[1:-1], pieces[-1] + closing]
        limit = min(settings.max_length, model.text_limit() or settings.max_length)
        self._room = (limit - sum(map(len, self._pieces))) // (len(pieces) - 1)
        if self._room < 1:
            raise InputError(f"the template leaves none of {limit} tokens for the words; raise the maximal length.")

    @classmethod
    def for_data(  # type: ignore[override]
        cls, model: PrefixModel, data: Data, *, template: str | None = None, max_length: int = 128
    ) -> Self:
        """By default a decoder reads the words twice."""
        default = f"{TOKENS}\n{TOKENS}" if model.kind == "decoder" else TOKENS
        made = cls(model, LabelSettings(max_length, tuple(data.labels), template or default))
        made.measure_head(data.train)
        return made

    @classmethod
    def instruction(cls, data: Data, kind: str) -> str:
        types = ", ".join(dict.fromkeys(tag[2:] for tag in data.labels if tag != "O"))
        return f"Read the text and mark every {types} in it.\n\n"

    # ---- rows to inputs

    def _encode(self, rows: Sequence[Sequence[str]]) -> tuple[list[dict[str, Any]], list[bool]]:
        """`first`: the place of each word's first sub-token that was read, the words in order; and which were cut."""
        texts = [" ".join(words) for words in rows]
        kwargs = {"add_special_tokens": False, "return_offsets_mapping": True}
        encoded = self.model.tokenizer(texts, **kwargs) if texts else {"input_ids": [], "offset_mapping": []}
        examples, cut = [], []
        for words, ids, spans in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            kept = ids[: self._room]
            made = list(self._pieces[0])
            for piece in self._pieces[1:]:
                begins = len(made)
                made += kept + piece
            first = _first_tokens(words, spans[: self._room])
            examples.append({"input_ids": made, "first": [i if i == IGNORED else begins + i for i in first]})
            cut.append(len(ids) > self._room)
        return examples, cut

    def examples(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[bool]]:
        examples, cut = self._encode([row.text for row in rows])
        number = {tag: i for i, tag in enumerate(self.settings.labels)}
        for example, row in zip(examples, rows, strict=True):
            places = zip(example["first"], row.label, strict=True)
            example["labels"] = [IGNORED if place == IGNORED else number[tag] for place, tag in places]
        return examples, cut

    def check_rows(self, rows: Sequence[Row], source: str) -> None:
        known = {tag[2:] for tag in self.settings.labels}
        if unknown := sorted(types_of(rows) - known):
            raise InputError(f"{source} has entities that the prefix was not trained for: {listed(unknown[:5])}.")

    def read_inputs(self, texts: Sequence[Any]) -> list[tuple[str, ...]]:
        """The words of each text: a list of them, or a string with spaces between."""
        rows = [text.split() if isinstance(text, str) else list(text) for text in texts]
        for i, words in enumerate(rows, 1):
            if not words or not all(word.strip() for word in words):
                raise InputError(f"text {i} is empty; there is nothing to label.")
        return [tuple(words) for words in rows]

    def named(self, row: Any) -> dict[str, Any]:
        return {"tokens": row.split() if isinstance(row, str) else list(row)}

    # ---- inputs to tags

    def items(self, batch: dict[str, Tensor]) -> int:
        """Words: what the loss is the mean over."""
        return int((batch["labels"] != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        first: Tensor,
        labels: Tensor | None = None,
        prefix: Any = ACTIVE,
    ) -> dict[str, Tensor]:
        """Logits `[B, words, tags]` at the places `first` `[B, words]`, and the cross-entropy with labels `[B, words]`
        of the words that were read."""
        hidden = self.every_token(input_ids, attention_mask, prefix)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        logits = self.apply_head(hidden[rows, first.clamp(min=0)])
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}

    def predict(
        self, texts: Sequence[Any], batch_size: int = 32, prefix: Any = ACTIVE, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """`{"tags", "entities", "cut"}` per text, in order; words beyond what fits are tagged O."""
        rows = self.read_inputs(texts)
        examples, cut = self._encode(rows)
        found = self.logits(examples, batch_size, prefix, progress)
        results = []
        for words, example, logits, was_cut in zip(rows, examples, found, cut, strict=True):
            best = logits.argmax(-1).tolist()
            tags = ["O" if p == IGNORED else self.settings.labels[best[i]] for i, p in enumerate(example["first"])]
            results.append({"tags": tags, "entities": entities_of(words, tags), "cut": was_cut})
        return results

    def report(self, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """F1 over entities."""
        return {"metrics": entity_metrics([row.label for row in rows], [result["tags"] for result in results])}


def _first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The number of each word's first sub-token, of the text with a space between words; `IGNORED` where none was read.

    spans: the characters of each sub-token; a space before a word may be its sub-token's first character.
    """
    starts, at = [], 0
    for text in words:
        starts.append(at)
        at += len(text) + 1
    first = [IGNORED] * len(words)
    for place, (_, end) in enumerate(spans):
        word = bisect_right(starts, end - 1) - 1
        if end > 0 and first[word] == IGNORED and end <= starts[word] + len(words[word]):
            first[word] = place
    return first


def entities_of(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, str]]:
    """`{"type", "text"}` of each entity; an I- without its B- begins one, as seqeval counts it."""
    found: list[dict[str, str]] = []
    before = "O"
    for word, tag in zip(words, tags, strict=True):
        if tag[:2] == "I-" and before[2:] == tag[2:]:
            found[-1]["text"] += f" {word}"
        elif tag != "O":
            found.append({"type": tag[2:], "text": word})
        before = tag
    return found
