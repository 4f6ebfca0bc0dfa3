"""Tokens to text, piece by piece: what a client may see already, and where a stop string ends it.

The pieces of a text, put together, are what the tokenizer makes of all its tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer shows of a character whose bytes have not all come


class Transcript:
    """The text of one continuation as it grows. `text` is what has been given out; nothing of it is taken back.

    special: show special tokens too.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), special: bool = False) -> None:
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._ids: list[int] = []  # a window: tokens given out already, for context, and those after them
        self._given = 0  # how many of the window have been given out
        self._held = ""  # text that may yet turn out to begin a stop string
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that `token` lets out. After a stop string `stopped` is set, and nothing from it on comes out."""
        self._ids.append(token)
        before, after = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if after.endswith(BROKEN):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return self._let_out(after[len(before) :])

    def end(self) -> str:
        """What was held back, once no further token comes; a character that broke off comes out as the tokenizer
        shows it."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._given])) :]
        piece = self._let_out(rest)
        if self.stopped:
            return piece
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not self._special)

    def _let_out(self, piece: str) -> str:
        whole = self._held + piece
        found = [at for at in (whole.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = whole[: min(found)]
        else:
            keep = max((_overlap(whole, stop) for stop in self._stop), default=0)
            out, self._held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
