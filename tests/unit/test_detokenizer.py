"""Text that comes token by token is the text that comes at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import Tokenizer
from kvik.text.tokenizer_gguf import GGUFTokenizer, TokenType
from tiers import examples


def metadata(tokens: dict[str, TokenType], **fields: Any) -> dict[str, Any]:
    fields |= {"tokens": list(tokens), "token_type": [int(kind) for kind in tokens.values()]}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def byte_level() -> Tokenizer:
    spare = iter(range(256, 512))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    merge = alphabet[0xF0] + " " + alphabet[0x9F]
    tokens = dict.fromkeys([*alphabet, merge.replace(" ", "")], TokenType.NORMAL)
    tokens |= {"<end>": TokenType.CONTROL, "<tool>": TokenType.USER_DEFINED}
    return GGUFTokenizer(metadata(tokens, model="gpt2", pre="gpt-2", merges=[merge]), "model.gguf")


def sentencepiece() -> Tokenizer:
    tokens = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    tokens |= dict.fromkeys(["\u2581", "a", "\u2581a", "\u4f60", "\u2581\u2581"], TokenType.NORMAL)
    tokens |= {"<end>": TokenType.CONTROL, "<tool>": TokenType.USER_DEFINED}
    scores = [-float(rank) for rank in range(len(tokens))]
    return GGUFTokenizer(metadata(tokens, model="llama", scores=scores), "model.gguf")


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
both = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])


def pieces(tokenizer: Tokenizer, token_ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.finish()]


@both
@given(data=st.data(), skip_special=st.booleans())
@settings(max_examples=examples(400))
def test_random_ids_give_the_text_of_a_whole_decode(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool
) -> None:
    # Mostly the bytes that begin or continue characters, so that sequences come out nearly right.
    token_ids = data.draw(
        st.lists(st.one_of(st.integers(0x80, 0xFF), st.integers(0, tokenizer.vocab_size - 1)), max_size=30)
    )
    expected = tokenizer.decode(token_ids, skip_special=skip_special)
    assert "".join(pieces(tokenizer, token_ids, skip_special)) == expected


@both
@given(text=st.text(max_size=30))
@settings(max_examples=examples(200))
def test_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\u2581", "")
    parts = pieces(tokenizer, tokenizer.encode(text, add_special=False))
    assert "".join(parts) == text
    assert parts[-1] == ""


@both
@pytest.mark.parametrize("character", ["\u00e9", "\u4f60", "\U0001f642", "\U0001f469\u200d\U0001f680", "e\u0301"])
def test_nothing_comes_before_the_last_byte_of_a_character(tokenizer: Tokenizer, character: str) -> None:
    data = character[0].encode()
    detokenizer = Detokenizer(tokenizer)
    detokenizer.add(ord("x"))
    # Both vocabularies have byte b at id b.
    assert [detokenizer.add(byte) for byte in data] == [""] * (len(data) - 1) + [character[0]]


@both
def test_half_a_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, [ord("x"), 0xF0, 0x9F]) == ["x", "", "", "\ufffd"]


@both
def test_control_tokens_do_not_break_a_character(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("<end>", add_special=False)
    assert pieces(tokenizer, [0xC3, *end, 0xA9]) == ["", "", "\u00e9", ""]
    assert pieces(tokenizer, [0xC3, *end], skip_special=False) == ["", "\ufffd<end>", ""]


def test_one_leading_space_of_a_sentencepiece_text_is_left_out() -> None:
    token_ids = SENTENCEPIECE.encode("  a a", add_special=False)
    end = SENTENCEPIECE.encode("<end>", add_special=False)
    assert "".join(pieces(SENTENCEPIECE, [*end, *token_ids])) == "  a a"
    assert b"".join(map(SENTENCEPIECE.token_bytes, token_ids)) == b"   a a"
