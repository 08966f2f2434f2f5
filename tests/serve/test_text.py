# SPDX-License-Identifier: Apache-2.0
"""Text comes in whole characters, never past a stop string, and adds up to the text of all tokens."""

from __future__ import annotations

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import UsageError
from tunesmith.serve.text import Writer

TOKENIZER = byte_tokenizer()


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_pieces_add_up_and_hold_whole_characters(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    writer = Writer(TOKENIZER)
    pieces = [writer.push(i) for i in ids]
    assert not any("\ufffd" in p for p in pieces) or "\ufffd" in text
    assert "".join(pieces) + writer.finish() == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_comes_out(text: str, stops: list[str]) -> None:
    writer, out = Writer(TOKENIZER, stops), ""
    for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        out += writer.push(i)
        assert not any(s in out for s in stops)
    out += writer.finish()
    at = min((text.find(s) for s in stops if s in text), default=None)
    assert writer.stopped == (at is not None)
    assert out == (text if at is None else text[:at])


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    writer = Writer(TOKENIZER, ["###"])
    pieces = [writer.push(i) for c in "a##b" for i in TOKENIZER(c, add_special_tokens=False)["input_ids"]]
    assert pieces == ["a", "", "", "##b"] and not writer.stopped


def test_odd_stop_strings_are_refused() -> None:
    for bad in ([""], ["x" * 300], ["a"] * 9):
        with pytest.raises(UsageError, match="stop strings"):
            Writer(TOKENIZER, bad)
