"""Text as it comes: whole characters, nothing that a stop string may yet swallow, nothing lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import tiny_vocabulary
from kvik.engine.output import Stats, TextStream
from kvik.text.tokenizer_gguf import GGUFTokenizer

TOKENIZER = GGUFTokenizer(tiny_vocabulary(400), "tiny")
BYTE_TOKENS = {TOKENIZER.token_bytes(i): i for i in range(400) if len(TOKENIZER.token_bytes(i)) == 1}


def tokens_of(data: bytes) -> list[int]:
    """One token a byte."""
    return [BYTE_TOKENS[bytes([byte])] for byte in data]


def streamed(token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str]]:
    """Feed tokens until the stream stops or they end; also the certain text after each."""
    stream = TextStream(TOKENIZER, stop)
    seen = []
    for token_id in token_ids:
        stream.add(token_id)
        seen.append(stream.text)
        if stream.stopped:
            break
    stream.finish()
    seen.append(stream.text)
    return stream, seen


def test_every_byte_has_a_token() -> None:
    assert len(BYTE_TOKENS) == 256


def test_without_stop_strings_text_comes_at_once() -> None:
    assert streamed(tokens_of(b"abc"))[1] == ["a", "ab", "abc", "abc"]


def test_a_character_comes_when_it_is_whole() -> None:
    _, seen = streamed(tokens_of("aé😀".encode()))
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé😀", "aé😀"]


def test_a_character_that_never_becomes_whole() -> None:
    stream, _ = streamed(tokens_of("a😀".encode()[:3]))
    assert stream.text == "a\ufffd"


@pytest.mark.parametrize(
    ("stop", "seen"),
    [
        (("XYZ",), ["a", "a", "aXa", "aXa", "aXa", "aXa", "aXa"]),
        (("X",), ["a", "a", "a"]),
        (("b", "YZ"), ["a", "aX", "aXa", "aXaX", "aXaX", "aXaX", "aXaX"]),
        (("b",), ["a", "aX", "aXa", "aXaX", "aXaXY", "aXaXYZ", "aXaXYZ", "aXaXYZ"]),
        (("bc",), ["a", "aX", "aXa", "aXaX", "aXaXY", "aXaXYZ", "aXaXYZ", "aXaXYZb"]),
        (("aXaXYZb",), ["", "", "", "", "", "", "", ""]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop: tuple[str, ...], seen: list[str]) -> None:
    stream, texts = streamed(tokens_of(b"aXaXYZb"), stop)
    assert texts == seen
    assert stream.stopped == (stop != ("bc",))


def test_a_stop_string_inside_one_token() -> None:
    (token_id,) = TOKENIZER.encode("ing")
    stream, _ = streamed([*tokens_of(b"go"), token_id], ("n",))
    assert stream.stopped
    assert stream.text == "goi"


def test_a_stop_string_of_several_bytes_a_character() -> None:
    stream, seen = streamed(tokens_of("süß!".encode()), ("ß",))
    assert stream.stopped
    assert seen[-1] == "sü"


def test_text_that_must_not_stop_yet_is_text() -> None:
    """Below min_tokens a stop string is text like any other, and later text does not complete it."""
    stream = TextStream(TOKENIZER, ("ab",))
    for token_id in tokens_of(b"xaba"):
        stream.add(token_id, may_stop=False)
    assert (stream.text, stream.stopped) == ("xaba", False)
    for token_id in tokens_of(b"ba"):
        stream.add(token_id)
    assert (stream.text, stream.stopped) == ("xabab", False)
    stream.add(*tokens_of(b"b"))
    assert (stream.text, stream.stopped) == ("xabab", True)


def test_control_tokens_have_no_text() -> None:
    stream, _ = streamed([*tokens_of(b"a"), 1, *tokens_of(b"b"), 2])
    assert stream.text == "ab"


letters = st.text(alphabet="abé ", max_size=30)


@settings(deadline=None, max_examples=300)
@given(text=letters, stop=st.text(alphabet="abé ", min_size=1, max_size=4))
def test_one_stop_string_cuts_the_text_where_it_first_stands(text: str, stop: str) -> None:
    stream, seen = streamed(tokens_of(text.encode()), (stop,))
    assert stream.text == text.split(stop)[0]
    assert stream.stopped == (stop in text)
    for earlier, later in pairwise(seen):
        assert later.startswith(earlier), "what was given out is never taken back"


@settings(deadline=None, max_examples=300)
@given(text=letters, stops=st.lists(st.text(alphabet="abé ", min_size=1, max_size=5), max_size=4))
def test_several_stop_strings(text: str, stops: list[str]) -> None:
    stream, seen = streamed(tokens_of(text.encode()), tuple(stops))
    assert text.startswith(stream.text)
    assert not any(stop in stream.text for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert stream.stopped or stream.text == text
    if stream.stopped:
        assert any(text[len(stream.text) :].startswith(stop) for stop in stops)
    for earlier, later in pairwise(seen):
        assert later.startswith(earlier)


@settings(deadline=None)
@given(text=letters, stop=st.text(alphabet="abé ", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_the_stop_string(text: str, stop: str) -> None:
    stream = TextStream(TOKENIZER, (stop,))
    fed = ""
    for character in text:
        for token_id in tokens_of(character.encode()):
            stream.add(token_id)
        fed += character
        if stream.stopped:
            return
        held = fed.removeprefix(stream.text)
        assert stream.text + held == fed
        assert stop.startswith(held)


def stats(num_completion_tokens: int, decode_s: float) -> Stats:
    return Stats(
        num_prompt_tokens=10,
        num_cached_tokens=0,
        num_computed_tokens=10 + num_completion_tokens - 1,
        num_completion_tokens=num_completion_tokens,
        time_to_first_token_s=0.5,
        decode_s=decode_s,
        kv_bytes=0,
        weight_bytes=0,
    )


def test_speed_counts_the_tokens_after_the_first() -> None:
    several = stats(5, 2.0)
    assert several.time_per_output_token_s == 0.5
    assert several.tokens_per_s == 2.0
    assert several.total_s == 2.5


@pytest.mark.parametrize("num_completion_tokens", [0, 1])
def test_speed_of_nothing_is_zero(num_completion_tokens: int) -> None:
    one = stats(num_completion_tokens, 0.0)
    assert (one.time_per_output_token_s, one.tokens_per_s, one.total_s) == (0.0, 0.0, 0.5)
