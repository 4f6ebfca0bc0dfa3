"""Tokens to pieces of text: nothing given out is taken back, and the pieces add up."""

from __future__ import annotations

import pytest
from conftest import ROWS, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from foreword.serve.text import Transcript

TOKENIZER = make_tokenizer([text for text, _ in ROWS])


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Transcript]:
    transcript = Transcript(TOKENIZER, stop)
    out = []
    for token in ids:
        out.append(transcript.add(token))
        if transcript.stopped:
            return out, transcript
    return [*out, transcript.end()], transcript


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_the_pieces_add_up_to_all_tokens_decoded_at_once(ids: list[int]) -> None:
    out, transcript = pieces(ids)
    assert "".join(out) == transcript.text == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_no_broken_character_is_ever_given_out(text: str) -> None:
    out, _ = pieces(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out) or "\ufffd" in text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    out, transcript = pieces(TOKENIZER(text, add_special_tokens=False)["input_ids"], tuple(stop))
    ends = [text.index(s) for s in stop if s in text]
    assert transcript.stopped == bool(ends)
    assert "".join(out) == transcript.text
    if not ends:
        assert transcript.text == text
    else:
        assert text.startswith(transcript.text) and not any(s in transcript.text for s in stop)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    transcript = Transcript(TOKENIZER, ("xyz",))
    ids = [TOKENIZER(c, add_special_tokens=False)["input_ids"][0] for c in "axyb"]
    assert [transcript.add(i) for i in ids] == ["a", "", "", "xyb"]
    assert transcript.end() == ""


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_a_character_that_breaks_off_is_shown_at_the_end(stop: tuple[str, ...]) -> None:
    ids = TOKENIZER("a🙂", add_special_tokens=False)["input_ids"][:-1]
    out, _ = pieces(ids, stop)
    assert "".join(out) == TOKENIZER.decode(ids) and out[-1].startswith("\ufffd")
