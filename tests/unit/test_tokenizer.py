"""The tokenizer against plain Python that does the same slowly, and against vocabularies that are wrong."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import InvalidInput, ModelError
from kvik.text import tokenizer_gguf
from kvik.text.tokenizer import encode_prompt
from kvik.text.tokenizer_gguf import GGUFTokenizer, TokenType
from tiers import examples

CORPUS = (
    "the quick brown fox jumps over the lazy dog; the dog isn't amused, they'll say. It's 2024 or 12345.\n"
    "Æblegrød på øen. 你好,世界! for (int i = 0; i < 10; i++) {\n    total += i;\n}\n\n  aaaa aaaaaaa   \n"
) * 2

# Where Python's \w and \d agree with the Unicode categories that the published patterns name.
TEXT = st.text(alphabet="abcdehilnorst ABIT'_019\n\r\t.,;!<|>-éßø你世🙂\u00a0", max_size=40)
ANY_TEXT = st.text(max_size=40)

LETTERS = r"[^\W\d_]"
OTHERS = r"(?:_|[^\s\w])"
WORD_PATTERNS = {
    "gpt-2": rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTERS}+| ?\d+| ?{OTHERS}+|\s+(?!\S)|\s+",
    "llama-bpe": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:_|[^\w\r\n])?{LETTERS}+|\d{{1,3}}"
    rf"| ?{OTHERS}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
WORD_PATTERNS["qwen2"] = WORD_PATTERNS["llama-bpe"].replace("{1,3}", "")


def words_of(text: str, pre: str) -> list[str]:
    if pre == "smollm":
        return [word for part in re.split(r"(\d)", text) for word in re.findall(WORD_PATTERNS["gpt-2"], part)]
    return re.findall(WORD_PATTERNS[pre], unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


def byte_characters() -> list[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others get the characters from 256 on."""
    characters, spare = [], 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters


ALPHABET = byte_characters()


def join(symbols: list[str], left: str, right: str) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if symbol == right and joined and joined[-1] == left:
            joined[-1] = left + "\0" + right  # not yet to be joined again
        else:
            joined.append(symbol)
    return [symbol.replace("\0", "") for symbol in joined]


def learn_merges(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        merges.append((left, right))
        words = [join(word, left, right) for word in words]
    return merges


def with_types(tokens: dict[str, TokenType], **fields: Any) -> dict[str, Any]:
    fields |= {"tokens": list(tokens), "token_type": [int(kind) for kind in tokens.values()]}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


BYTE_WORDS = [[ALPHABET[byte] for byte in word.encode()] for word in words_of(CORPUS, "gpt-2")]
BYTE_MERGES = learn_merges(BYTE_WORDS, 100)
PIECE_WORDS = [list("\u2581" + word) for word in CORPUS.replace("\n", "").split(" ")]
PIECE_WORDS += [["\u2581"] * length for length in range(1, 9)] * 2
PIECES = [*map("".join, learn_merges(PIECE_WORDS, 100)), *sorted(set("".join(map("".join, PIECE_WORDS))))]


def byte_level(pre: str = "gpt-2", **fields: Any) -> dict[str, Any]:
    tokens = {"<|start|>": TokenType.CONTROL, "<|im_end|>": TokenType.CONTROL, "<unk>": TokenType.UNKNOWN}
    tokens |= dict.fromkeys([*ALPHABET, *map("".join, BYTE_MERGES), "notmerged"], TokenType.NORMAL)
    tokens |= {"<tool>": TokenType.USER_DEFINED, "<tool>\u00e9 x": TokenType.USER_DEFINED}
    usual: dict[str, Any] = {"model": "gpt2", "pre": pre, "merges": list(map(" ".join, BYTE_MERGES))}
    return with_types(tokens, **usual | {"bos_token_id": 0, "eos_token_id": 1} | fields)


def sentencepiece(**fields: Any) -> dict[str, Any]:
    tokens = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    tokens |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    tokens |= dict.fromkeys(PIECES, TokenType.NORMAL)
    tokens |= {"[tool]": TokenType.USER_DEFINED, "\u2581\u2581[x]": TokenType.USER_DEFINED}
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    usual: dict[str, Any] = {"model": "llama", "scores": scores, "bos_token_id": 1, "eos_token_id": 2}
    return with_types(tokens, **usual | fields)


def build(metadata: dict[str, Any]) -> GGUFTokenizer:
    return GGUFTokenizer(metadata, "model.gguf")


def byte_level_oracle(metadata: dict[str, Any]) -> Callable[[str], list[int]]:
    """Byte-level BPE by its definition: in each word, join the pair that comes first in the merges, and again."""
    pre = metadata["tokenizer.ggml.pre"]
    ids = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}

    def encode(text: str) -> list[int]:
        token_ids = []
        for word in words_of(text, pre):
            symbols = [ALPHABET[byte] for byte in word.encode()]
            if pre == "llama-bpe" and "".join(symbols) in ids:
                symbols = ["".join(symbols)]
            while known := [pair for pair in pairwise(symbols) if pair in ranks]:
                symbols = join(symbols, *min(known, key=ranks.__getitem__))
            token_ids += [ids[symbol] for symbol in symbols]
        return token_ids

    return encode


def sentencepiece_oracle(metadata: dict[str, Any]) -> Callable[[str], list[int]]:
    """SentencePiece BPE by its definition: join the neighbours with the best score, leftmost first, and again."""
    scores = metadata["tokenizer.ggml.scores"]
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    ids = {token: token_id for token_id, token in enumerate(tokens) if kinds[token_id] == TokenType.NORMAL}

    def encode(text: str) -> list[int]:
        symbols = list("\u2581" + text.replace(" ", "\u2581")) if text else []
        while True:
            found = [
                (-scores[ids[left + right]], place)
                for place, (left, right) in enumerate(pairwise(symbols))
                if left + right in ids
            ]
            if not found:
                break
            _, place = min(found)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        byte_id = tokens.index("<0x00>")
        return [
            token_id
            for symbol in symbols
            for token_id in ([ids[symbol]] if symbol in ids else [byte_id + byte for byte in symbol.encode()])
        ]

    return encode


BYTE_LEVEL = {pre: byte_level(pre) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
BYTE_LEVEL_TOKENIZERS = {pre: build(metadata) for pre, metadata in BYTE_LEVEL.items()}
SENTENCEPIECE = sentencepiece()
SENTENCEPIECE_TOKENIZER = build(SENTENCEPIECE)
ALL = [*BYTE_LEVEL_TOKENIZERS.values(), SENTENCEPIECE_TOKENIZER]
ALL_IDS = [*BYTE_LEVEL, "sentencepiece"]


# encoding


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@given(text=TEXT)
@settings(max_examples=examples(150))
def test_byte_level_encoding_equals_the_definition(pre: str, text: str) -> None:
    expected = byte_level_oracle(BYTE_LEVEL[pre])(text)
    assert BYTE_LEVEL_TOKENIZERS[pre].encode(text, add_special=False, parse_special=False) == expected


@given(text=st.one_of(TEXT, ANY_TEXT, st.text(alphabet=" aeth\u2581", max_size=60)))
@settings(max_examples=examples(300))
def test_sentencepiece_encoding_equals_the_definition(text: str) -> None:
    expected = sentencepiece_oracle(SENTENCEPIECE)(text)
    assert SENTENCEPIECE_TOKENIZER.encode(text, add_special=False, parse_special=False) == expected


@pytest.mark.parametrize("length", range(1, 40))
def test_runs_of_spaces_are_joined_from_the_left(length: int) -> None:
    text = " " * length + "the" + " " * length
    assert SENTENCEPIECE_TOKENIZER.encode(text, add_special=False) == sentencepiece_oracle(SENTENCEPIECE)(text)


@pytest.mark.parametrize("tokenizer", ALL, ids=ALL_IDS)
@given(text=ANY_TEXT)
@settings(max_examples=examples(150))
def test_what_was_encoded_decodes_to_itself(tokenizer: GGUFTokenizer, text: str) -> None:
    # Qwen2 normalises; a space mark is a space to SentencePiece.
    expected = unicodedata.normalize("NFC", text) if tokenizer is BYTE_LEVEL_TOKENIZERS["qwen2"] else text
    expected = expected.replace("\u2581", " ") if tokenizer is SENTENCEPIECE_TOKENIZER else expected
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == expected


def test_each_digit_is_a_word_where_the_family_says_so() -> None:
    smollm, llama = BYTE_LEVEL_TOKENIZERS["smollm"], BYTE_LEVEL_TOKENIZERS["llama-bpe"]
    assert [smollm.token_text(i) for i in smollm.encode("12345")] == list("12345")
    assert llama.encode("12345", add_special=False) == [
        *llama.encode("123", add_special=False),
        *llama.encode("45", add_special=False),
    ]


def test_a_word_that_is_a_token_stays_whole_only_where_the_family_says_so() -> None:
    llama, gpt2 = BYTE_LEVEL_TOKENIZERS["llama-bpe"], BYTE_LEVEL_TOKENIZERS["gpt-2"]
    assert len(llama.encode("notmerged", add_special=False)) == 1
    assert len(gpt2.encode("notmerged", add_special=False)) > 1


def test_qwen2_normalises_to_nfc() -> None:
    qwen2, gpt2 = BYTE_LEVEL_TOKENIZERS["qwen2"], BYTE_LEVEL_TOKENIZERS["gpt-2"]
    assert qwen2.encode("e\u0301") == qwen2.encode("\u00e9")
    assert gpt2.encode("e\u0301") != gpt2.encode("\u00e9")


# special tokens


@pytest.mark.parametrize("tokenizer", ALL, ids=ALL_IDS)
@given(data=st.data())
@settings(max_examples=examples(150))
def test_text_cannot_become_a_control_token_unless_parsed(tokenizer: GGUFTokenizer, data: st.DataObject) -> None:
    names = [tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids]
    text = "".join(data.draw(st.lists(st.one_of(TEXT, st.sampled_from(names)), max_size=6)))
    token_ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not tokenizer.special_token_ids.intersection(token_ids)
    assert tokenizer.decode(token_ids) == text


def test_control_tokens_are_parsed_when_asked() -> None:
    tokenizer = BYTE_LEVEL_TOKENIZERS["gpt-2"]
    token_ids = tokenizer.encode("<|start|>the<|im_end|><unk>")
    assert [token_id for token_id in token_ids if token_id in tokenizer.special_token_ids] == [0, 1, 2]
    assert tokenizer.decode(token_ids) == "the"
    assert tokenizer.decode(token_ids, skip_special=False) == "<|start|>the<|im_end|><unk>"


@pytest.mark.parametrize("parse_special", [True, False])
def test_user_defined_tokens_are_always_found_and_the_longest_first(parse_special: bool) -> None:
    tokenizer = BYTE_LEVEL_TOKENIZERS["gpt-2"]
    short, long = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.encode("<tool>\u00e9 x<tool>", parse_special=parse_special) == [long, short]
    assert tokenizer.decode([long, short]) == "<tool>\u00e9 x<tool>"


def test_a_user_defined_space_mark_matches_a_space() -> None:
    tokenizer = SENTENCEPIECE_TOKENIZER
    assert tokenizer.encode("  [x]", add_special=False) == [tokenizer.vocab_size - 1]
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == b"  [x]"


@pytest.mark.parametrize("base", [tokenizer_gguf._HASH_BASE, 1])
@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_those_of_the_definition(seed: int, base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With base 1 all texts of the same letters share a hash."""
    monkeypatch.setattr(tokenizer_gguf, "_HASH_BASE", base)
    rng = random.Random(seed)
    texts = sorted({"".join(rng.choices("ab\u2581😀", k=rng.randint(0, 6))) for _ in range(60)})
    vocabulary = dict(zip(texts, rng.sample(range(100), len(texts)), strict=True))
    scores = [rng.choice([0.0, -1.0, -2.0, rng.random()]) for _ in range(100)]
    wanted = sorted(
        (-scores[token_id], -len(text), -cut, text[:cut], text[cut:])
        for text, token_id in vocabulary.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    )
    assert tokenizer_gguf._pairs_by_score(vocabulary, scores) == [(left, right) for *_, left, right in wanted]


def test_each_stretch_of_sentencepiece_text_begins_with_a_space() -> None:
    tokenizer = SENTENCEPIECE_TOKENIZER
    the = tokenizer.encode("the", add_special=False)
    assert tokenizer.encode("</s>the[tool]the") == [1, 2, *the, tokenizer.vocab_size - 2, *the]
    assert tokenizer.token_bytes(the[0]).startswith(b" ")
    assert tokenizer.decode(the) == "the"
    assert build(sentencepiece(add_space_prefix=False)).decode(the) == " the"


def test_merges_that_would_make_a_control_token_are_left_out() -> None:
    tokens = dict.fromkeys(ALPHABET, TokenType.NORMAL) | {"ab": TokenType.CONTROL, "cd": TokenType.NORMAL}
    tokenizer = build(with_types(tokens, model="gpt2", pre="llama-bpe", merges=["a b", "c d"]))
    encode = tokenizer.encode
    assert encode("cd", parse_special=False) == [257]
    assert encode("ab", parse_special=False) == [ALPHABET.index("a"), ALPHABET.index("b")]
    assert encode("ab") == [256]


@pytest.mark.parametrize(
    ("fields", "add_special", "expected"),
    [
        ({}, True, [0]),
        ({}, False, []),
        ({"add_bos_token": False}, True, []),
        ({"add_bos_token": True, "add_eos_token": True}, True, [0, 1]),
        ({"add_eos_token": True}, True, [0, 1]),
        ({"add_eos_token": True}, False, []),
    ],
)
def test_bos_and_eos_come_as_the_file_says(fields: dict[str, Any], add_special: bool, expected: list[int]) -> None:
    tokenizer = build(byte_level("llama-bpe", **fields))
    assert tokenizer.encode("", add_special=add_special) == expected


def test_a_prompt_that_writes_bos_itself_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build(byte_level("llama-bpe"))
    bos = tokenizer.token_bytes(0, skip_special=False).decode()
    assert encode_prompt(tokenizer, "") == encode_prompt(tokenizer, bos, add_special=False) == [0]
    assert caplog.messages == []
    assert encode_prompt(tokenizer, bos) == [0, 0]
    assert [f"begins with {bos} twice" in message for message in caplog.messages] == [True]


def test_bos_by_default_is_the_familys_custom() -> None:
    assert BYTE_LEVEL_TOKENIZERS["llama-bpe"].add_bos
    assert SENTENCEPIECE_TOKENIZER.add_bos
    assert not BYTE_LEVEL_TOKENIZERS["smollm"].add_bos
    metadata = byte_level("llama-bpe")
    del metadata["tokenizer.ggml.bos_token_id"]
    assert not build(metadata).add_bos


def test_every_end_token_is_known() -> None:
    assert BYTE_LEVEL_TOKENIZERS["gpt-2"].eos_token_ids == {1}
    assert build(byte_level(eos_token_id=5, eot_token_id=7, eom_token_id=9)).eos_token_ids == {1, 5, 7, 9}
    assert SENTENCEPIECE_TOKENIZER.eos_token_ids == {2}


@pytest.mark.parametrize("given", ["eos", "eot"])
def test_what_ends_a_message_of_harmony_ends_no_answer(given: str) -> None:
    """Even where a file says so; with other control tokens it does."""
    metadata = byte_level()
    for name in ("<|end|>", "<|return|>", "<|call|>"):
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.token_type"].append(int(TokenType.CONTROL))
    end = len(metadata["tokenizer.ggml.tokens"]) - 3
    metadata[f"tokenizer.ggml.{given}_token_id"] = end
    assert build(metadata).eos_token_ids == {1, end + 1, end + 2}
    metadata["tokenizer.ggml.tokens"][-1] = "<|other|>"
    assert build(metadata).eos_token_ids == {1, end}


# decoding


@pytest.mark.parametrize("tokenizer", ALL, ids=ALL_IDS)
@given(data=st.data())
@settings(max_examples=examples(150))
def test_any_ids_decode_by_their_bytes(tokenizer: GGUFTokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    text = b"".join(map(tokenizer.token_bytes, token_ids))
    assert tokenizer.decode(token_ids) == text[tokenizer.add_space_prefix and text[:1] == b" " :].decode(
        errors="replace"
    )


def test_token_text_is_fit_to_print() -> None:
    tokenizer = BYTE_LEVEL_TOKENIZERS["gpt-2"]
    assert tokenizer.token_text(0) == "<|start|>"
    assert tokenizer.token_text(3 + 0x0A) == "\\n"
    assert tokenizer.token_text(3 + 0xE4) == "\\xe4"
    assert all(tokenizer.token_text(token_id).isprintable() for token_id in range(tokenizer.vocab_size))


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**70])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(InvalidInput, match="outside the vocabulary"):
        BYTE_LEVEL_TOKENIZERS["gpt-2"].decode([token_id])


# text that cannot be encoded


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidInput, match="character 3"):
        BYTE_LEVEL_TOKENIZERS["gpt-2"].encode("abc\ud83d")


def test_bytes_that_the_vocabulary_lacks_are_refused_rather_than_dropped() -> None:
    tokens = dict.fromkeys((c for byte, c in enumerate(ALPHABET) if byte != 4), TokenType.NORMAL)
    tokens |= {"ab": TokenType.NORMAL, "\x04": TokenType.CONTROL}
    tokenizer = build(with_types(tokens, model="gpt2", pre="gpt-2", merges=["a b"]))
    assert tokenizer.decode(tokenizer.encode("ab\x05")) == "ab\x05"
    assert tokenizer.encode("ab\x04") == [255, 256]
    with pytest.raises(InvalidInput, match="0x04"):
        tokenizer.encode("ab\x04", parse_special=False)


# files that are wrong


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "model"),
        (byte_level() | {"tokenizer.ggml.model": "bert"}, "'bert'"),
        (byte_level() | {"tokenizer.ggml.model": 5}, "int"),
        (byte_level(pre="bloom"), "'bloom'"),
        (without(byte_level(), "tokens"), "tokens"),
        (without(byte_level(), "merges"), "merges"),
        (byte_level(merges=[]), "merges"),
        (byte_level(merges=["a b", "ab"]), r"merges\[1\]"),
        (byte_level(merges=["a b c"]), r"merges\[0\]"),
        (byte_level(merges=[" ".join(BYTE_MERGES[0]), "x y"]), r"merges\[1\]"),
        (byte_level(merges=["a b", 3]), "merges"),
        (byte_level() | {"tokenizer.ggml.tokens": ["a", 2]}, "tokens"),
        (byte_level() | {"tokenizer.ggml.tokens": []}, "tokens"),
        (byte_level() | {"tokenizer.ggml.tokens": ["\ud800"], "tokenizer.ggml.token_type": [1]}, "Unicode"),
        (byte_level() | {"tokenizer.ggml.token_type": [1, 2]}, "2 entries"),
        (byte_level() | {"tokenizer.ggml.token_type": [9] * len(byte_level()["tokenizer.ggml.tokens"])}, "1 to 6"),
        (byte_level(eot_token_id="2"), "eot_token_id"),
        (byte_level(add_bos_token=1), "add_bos_token"),
        (byte_level(add_space_prefix=True), "add_space_prefix"),
        (without(byte_level(add_bos_token=True), "bos_token_id"), "bos_token_id"),
        (without(byte_level(add_eos_token=True), "eos_token_id"), "eos_token_id"),
        (without(sentencepiece(), "scores"), "scores"),
        (sentencepiece(scores=[0.0]), "1 entries"),
        (sentencepiece(scores=[float("nan")] * len(SENTENCEPIECE["tokenizer.ggml.tokens"])), "scores"),
        (with_types({"a": TokenType.NORMAL}, model="llama", scores=[0.0]), "0 byte tokens"),
    ],
)
def test_a_wrong_vocabulary_is_a_model_error_that_says_what_is_wrong(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{message}") as caught:
        build(metadata)
    assert caught.value.hint


def test_pieces_too_long_to_split_are_refused() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"][-1] = "x" * 5000
    with pytest.raises(ModelError, match="5,000 characters"):
        build(metadata)


def test_of_tokens_with_the_same_text_the_first_is_used() -> None:
    metadata = byte_level()
    the = build(metadata).encode("the")
    metadata["tokenizer.ggml.tokens"][-1] = metadata["tokenizer.ggml.tokens"][the[0]]
    metadata["tokenizer.ggml.token_type"][-1] = int(TokenType.NORMAL)
    tokenizer = build(metadata)
    assert tokenizer.encode("the") == the
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == tokenizer.token_bytes(the[0])


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 7), max_size=5),
    st.lists(st.text(max_size=5), max_size=5),
    st.lists(st.floats(), max_size=5),
)


@pytest.mark.parametrize("metadata", [BYTE_LEVEL["gpt-2"], SENTENCEPIECE], ids=["gpt2", "llama"])
@given(data=st.data())
@settings(max_examples=examples(150))
def test_no_metadata_raises_anything_but_a_model_error(metadata: dict[str, Any], data: st.DataObject) -> None:
    keys = [*metadata, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id"]
    damaged = dict(metadata)
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        value = damaged.get(key)
        if isinstance(value, list) and data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(value) - 1)) if value else 0
            damaged[key] = [*value[:place], data.draw(JUNK), *value[place + 1 :]]
        else:
            damaged[key] = data.draw(JUNK)
    try:
        tokenizer = build(damaged)
    except ModelError:
        return
    tokenizer.decode(tokenizer.encode("the quick <tool> 12"))


def test_optional_keys_may_be_missing_or_out_of_place() -> None:
    whole = build(byte_level())
    assert not whole.notes
    metadata = without(byte_level(), "token_type")
    bare = build(metadata)
    assert any("token_type is missing" in note for note in bare.notes)
    assert bare.encode("the end") == whole.encode("the end")
    assert {whole.bos_token_id, *whole.eos_token_ids} - {None} <= bare.special_token_ids
    assert any("pre is missing" in note for note in build(without(byte_level(), "pre")).notes)
    for key in ("bos", "eos", "eot"):
        tokenizer = build(byte_level() | {f"tokenizer.ggml.{key}_token_id": 10**6})
        assert tokenizer.notes == (
            f"tokenizer.ggml.{key}_token_id is 1000000, outside the vocabulary of {tokenizer.vocab_size:,}: ignored",
        )
    several = build(byte_level() | {"tokenizer.ggml.eos_token_ids": [1, 2, 10**6]})
    assert several.eos_token_ids >= {1, 2}
    assert "eos_token_ids has 1000000" in several.notes[0]
