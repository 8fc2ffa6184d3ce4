"""Many short strings in little memory behave as a list of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.files.texts import Texts

# With the separator among them, and characters of one to four bytes.
TEXTS = st.lists(st.text(alphabet="a\nĠé\U0001fad0", max_size=4), max_size=6)


def texts_of(values: list[str]) -> Texts:
    return Texts([value.encode() for value in values])


@given(values=TEXTS, other=TEXTS)
def test_a_list_of_strings(values: list[str], other: list[str]) -> None:
    texts = texts_of(values)
    assert len(texts) == len(values)
    assert list(texts) == values
    assert [texts[index] for index in range(-len(values), len(values))] == values + values
    assert (texts[1:], texts[::-2]) == (values[1:], values[::-2])
    assert (texts == other) == (values == other)
    assert repr(texts) == repr(values)


def test_what_is_not_there() -> None:
    for index in (2, -3):
        with pytest.raises(IndexError):
            texts_of(["a", "b"])[index]
    assert texts_of(["a", "b"]) != "ab"


def test_a_character_cut_in_two_is_none() -> None:
    first, second = b"\xc3", b"\xa9"
    assert (first + second).decode() == "é"
    with pytest.raises(UnicodeDecodeError):
        Texts([first, second])
