"""A template around texts, to token ids. Only the texts are ever cut to fit, never the template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..forms import opening_ids
from ..model import PrefixModel

MASK = "{mask}"


class Template:
    """Texts to token ids: what stands around them is encoded once; the longest texts are cut first.

    Arguments:
        template: holds the name of each field once, in braces.
        fields: names of the texts that a row has.
        max_length: tokens of template and texts; less where the base takes less.
        reserved: tokens that must stay free after them, for an answer.

    Raises InputError for a field that is not in the template once, or a template that leaves no room.
    """

    def __init__(
        self, model: PrefixModel, template: str, fields: Sequence[str], max_length: int, reserved: int = 0
    ) -> None:
        check_template(template, fields)
        self.tokenizer = model.tokenizer
        pattern = "|".join(re.escape(f"{{{field}}}") for field in fields)
        self.order = [fields.index(place[1:-1]) for place in re.findall(pattern, template)]
        opening, closing = ([], []) if model.kind == "decoder" else opening_and_closing(self.tokenizer)
        mask = self.tokenizer.mask_token or MASK
        pieces = [self._ids(piece.replace(MASK, mask)) for piece in re.split(pattern, template)]
        self.pieces = [opening + pieces[0], *pieces[1:-1], pieces[-1] + closing]
        limit = model.text_limit()
        longest = max_length if limit is None else min(max_length, limit - reserved)
        fixed = sum(map(len, self.pieces))
        self.room = longest - fixed
        if self.room < len(fields):
            raise InputError(
                f"the template takes {fixed} tokens and leaves none of {longest} for the text; "
                "raise the maximal length."
            )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def __call__(self, texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each row of texts (in the fields' order), and which rows were cut."""
        flat = [text for row in texts for text in row]
        ids = self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
        made, cut, width = [], [], len(self.order)
        for at in range(0, len(ids), width):
            row = ids[at : at + width]
            kept = fitted([len(own) for own in row], self.room)
            cut.append(any(len(own) > n for own, n in zip(row, kept, strict=True)))
            made.append(list(self.pieces[0]))
            for field, piece in zip(self.order, self.pieces[1:], strict=True):
                made[-1] += row[field][: kept[field]] + piece
        return made, cut


def check_template(template: str, fields: Sequence[str]) -> None:
    """Raise InputError unless the template holds each field once."""
    for field in fields:
        if template.count(f"{{{field}}}") != 1:
            raise InputError(f"the template must hold {{{field}}} once: {template!r}.")


def fitted(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each of these lengths is kept, so that the sum fits; the longest give first."""
    kept = [0] * len(lengths)
    for rank, i in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        kept[i] = min(lengths[i], (room - sum(kept)) // (len(lengths) - rank))
    return kept


def opening_and_closing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    opening = opening_ids(tokenizer)
    whole = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    return opening, whole[len(opening) + len(inner) :]
