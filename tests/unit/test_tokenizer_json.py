"""The tokenizer of a checkpoint folder against the library that wrote its file, and against folders that are wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from kvik.errors import InvalidInput, ModelError
from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import Tokenizer
from kvik.text.tokenizer_gguf import GGUFTokenizer
from kvik.text.tokenizer_json import FolderTokenizer
from random_texts import random_texts
from tiers import examples
from tokenizer_kinds import KINDS, Kind, special

SEED = 20_240_607
NUM_TEXTS = 200
PADDING = 5  # rows of the embedding without a token

every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FolderTokenizer]:
    @cache
    def make(name: str) -> FolderTokenizer:
        kind = KINDS[name]()
        return FolderTokenizer(kind.save(tmp_path_factory.mktemp(name)), kind.num_tokens + PADDING)

    return make


TokenizerOf = Callable[[str], FolderTokenizer]


def texts(kind: Kind) -> list[str]:
    return ["", " ", "  the", "the  ", *random_texts(random.Random(SEED), kind.added_names, NUM_TEXTS)]


# the same ids and the same text as the library


@every_kind
@pytest.mark.parametrize("add_special", [True, False])
def test_text_has_the_librarys_tokens_and_tokens_its_text(
    tokenizer_of: TokenizerOf, name: str, add_special: bool
) -> None:
    kind, tokenizer = KINDS[name](), tokenizer_of(name)
    for text in texts(kind):
        token_ids = tokenizer.encode(text, add_special=add_special)
        assert token_ids == kind.library.encode(text, add_special_tokens=add_special).ids, text
        for skip_special in (True, False):
            expected = kind.library.decode(token_ids, skip_special_tokens=skip_special)
            detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
            streamed = "".join(map(detokenizer.add, token_ids)) + detokenizer.finish()
            assert tokenizer.decode(token_ids, skip_special=skip_special) == streamed == expected, text


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind().lossless])
def test_text_comes_back_as_it_was(tokenizer_of: TokenizerOf, name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in texts(KINDS[name]()):
        marks = KINDS[name]().scores or KINDS[name]().model == "gemma4"  # which stand for spaces
        expected = text.replace("\u2581", " ") if marks else text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == expected


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind().gguf is not None])
@pytest.mark.parametrize("parse_special", [True, False])
def test_the_same_vocabulary_as_gguf_gives_the_same_tokens(
    tokenizer_of: TokenizerOf, name: str, parse_special: bool
) -> None:
    kind, tokenizer = KINDS[name](), tokenizer_of(name)
    gguf = GGUFTokenizer(kind.metadata(), "model.gguf")
    for text in texts(kind):
        token_ids = tokenizer.encode(text, parse_special=parse_special)
        assert gguf.encode(text, parse_special=parse_special) == token_ids, text
        assert gguf.decode(token_ids) == tokenizer.decode(token_ids), text
    assert gguf.eos_token_ids == tokenizer.eos_token_ids
    assert gguf.special_token_ids == tokenizer.special_token_ids
    assert gguf.bos_token_id == tokenizer.bos_token_id


def test_a_space_written_as_a_byte_is_dropped_from_the_start_as_any_other(tokenizer_of: TokenizerOf) -> None:
    kind, tokenizer = KINDS["llama2"](), tokenizer_of("llama2")
    space = kind.library.get_vocab()["<0x20>"]
    letter = kind.library.get_vocab()["<0x61>"]
    for token_ids in ([space, letter], [space, space, letter], [letter, space, letter]):
        expected = kind.library.decode(token_ids)
        assert tokenizer.decode(token_ids) == expected
        assert GGUFTokenizer(kind.metadata(), "model.gguf").decode(token_ids) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "llama2_not_legacy", "gemma", "unigram"])
@given(data=st.data())
@settings(max_examples=examples(60))
def test_any_ids_stream_as_they_decode(tokenizer_of: TokenizerOf, name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + PADDING - 1), max_size=20))
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(map(detokenizer.add, token_ids)) + detokenizer.finish()
    assert streamed == tokenizer.decode(token_ids)


# control tokens


@every_kind
def test_text_cannot_become_a_control_token_unless_parsed(tokenizer_of: TokenizerOf, name: str) -> None:
    kind, tokenizer = KINDS[name](), tokenizer_of(name)
    unknown = {tokenizer_of(name).encode("\U0010fffe", add_special=False)[-1]} if name == "unigram" else set()
    names = [tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids]
    for text in [*texts(kind), *names, *(f"the{each}the {each}{each}" for each in names)]:
        token_ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert not tokenizer.special_token_ids.intersection(token_ids) - unknown, text


def test_a_control_token_that_is_a_word_or_a_merge_is_still_out_of_reach(tmp_path: Path) -> None:
    vocabulary = {text: token_id for token_id, text in enumerate(["s", "<", ">", "<s", "<s>", "</s>", "/", "a"])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")], ignore_merges=True))
    library.model.unk_token = "a"
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(special("<s>", "</s>"))
    kind = Kind(library, {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = FolderTokenizer(kind.save(tmp_path), 8)
    assert library.encode("<s>").ids == tokenizer.encode("<s>") == [4]
    library.encode_special_tokens = True
    assert library.encode("<s>").ids == [4]
    assert tokenizer.encode("<s>", parse_special=False) == [3, 2]
    assert tokenizer.encode("</s>", parse_special=False) == [1, 6, 0, 2]
    assert tokenizer.encode("</s>") == [5]


def test_tokens_that_only_the_config_calls_special_are_so(tmp_path: Path) -> None:
    kind = KINDS["qwen2"]()
    folder = kind.save(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"extra_special_tokens": {"tool": {"content": "<tool_call>"}}, "pad_token": "<absent>"})
    )
    tool = kind.library.token_to_id("<tool_call>")
    assert tool in FolderTokenizer(folder, kind.num_tokens).special_token_ids


# where texts begin and end


def test_names_come_from_the_older_file_where_it_has_the_last_word(tmp_path: Path) -> None:
    kind = KINDS["smollm"]()
    folder = kind.save(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    assert FolderTokenizer(folder, kind.num_tokens).bos_token_id == 0
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    assert FolderTokenizer(folder, kind.num_tokens).bos_token_id == 1


@pytest.mark.parametrize(
    ("generation", "config", "bos", "eos"),
    [
        ({}, {}, None, {0}),
        ({"eos_token_id": 7, "bos_token_id": 4}, {"eos_token_id": 9, "bos_token_id": 5}, 4, {0, 7}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9, "bos_token_id": 5}, 5, {0, 7, 8}),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, None, {0, 9}),
    ],
)
def test_ends_are_of_generation_config_before_config(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], bos: int | None, eos: set[int]
) -> None:
    kind = KINDS["gpt2"]()
    folder = kind.save(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = FolderTokenizer(folder, kind.num_tokens)
    assert tokenizer.bos_token_id == bos
    assert tokenizer.eos_token_ids == eos


def test_a_file_that_truncates_or_pads_does_neither_here(tmp_path: Path) -> None:
    kind = KINDS["gpt2"]()
    folder = kind.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = FolderTokenizer(folder, kind.num_tokens)
    assert tokenizer.encode("the") == kind.library.encode("the").ids
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


# ids and text that are wrong


def test_rows_without_a_token_have_no_text_and_ids_behind_them_are_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer: Tokenizer = tokenizer_of("gpt2")
    assert tokenizer.vocab_size == KINDS["gpt2"]().num_tokens
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + PADDING - 1]) == ""
    for token_id in (-1, tokenizer.vocab_size + PADDING, 2**70):
        with pytest.raises(InvalidInput, match="outside the vocabulary"):
            tokenizer.decode([token_id])


def test_half_a_surrogate_pair_is_refused(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(InvalidInput, match="character 3"):
        tokenizer_of("gpt2").encode("abc\ud83d")


def test_bytes_that_the_vocabulary_lacks_are_refused_rather_than_dropped(tmp_path: Path) -> None:
    values = file_of("gpt2")
    del values["model"]["vocab"]["\u0104"]  # the byte 4
    values["model"]["vocab"]["\u0104\u0104"] = 10_000
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 10_001, "content": "a\x04"})
    # Ids in a row, as the library numbers them.
    for number, text in enumerate(values["model"]["vocab"]):
        values["model"]["vocab"][text] = number
    values["added_tokens"][0]["id"] = values["model"]["vocab"]["<|endoftext|>"]
    values["added_tokens"][1]["id"] = len(values["model"]["vocab"])
    tokenizer = FolderTokenizer(write(tmp_path, values), 1000)
    assert tokenizer.decode(tokenizer.encode("ab\x05")) == "ab\x05"
    assert tokenizer.decode(tokenizer.encode("ba\x04"), skip_special=False) == "ba\x04"
    for text in ("b\x04", "a\x04b\x04"):
        with pytest.raises(InvalidInput, match="0x04"):
            tokenizer.encode(text)


@pytest.mark.parametrize(("text", "config"), [("[PAD]", {}), ("<fill>", {"pad_token": "<fill>"})])
def test_a_padding_token_behind_the_embedding_is_text_like_any_other(
    tmp_path: Path, text: str, config: dict[str, Any]
) -> None:
    values = file_of(GPT2)
    (tmp_path / "plain").mkdir()
    plain = FolderTokenizer(write(tmp_path / "plain", values), 1000)
    added = {"id": 1000, "content": text, "special": True, "normalized": False}
    values["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    write(tmp_path, config, "tokenizer_config.json")
    padded = FolderTokenizer(write(tmp_path, values), 1000)
    assert padded.encode(f"a {text} b") == plain.encode(f"a {text} b")
    assert padded.vocab_size == plain.vocab_size
    assert padded.special_token_ids == plain.special_token_ids
    values["added_tokens"][-1]["content"] = "[OTHER]"
    with pytest.raises(ModelError, match="token 1,000, the embedding 1,000 rows"):
        FolderTokenizer(write(tmp_path, values), 1000)


# folders that are wrong


def file_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(KINDS[name]().library.to_str())
    return values


def write(folder: Path, values: Any, name: str = "tokenizer.json") -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def changed(name: str, *path: str | int, to: Any) -> dict[str, Any]:
    values = file_of(name)
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return values


GPT2, LLAMA2, UNIGRAM = ("gpt2", "llama2", "unigram")
SPLIT = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("nope", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds list"),
        ({}, "has no model"),
        ({"model": 5}, "has no model"),
        (changed(GPT2, "model", "type", to="WordPiece"), "'WordPiece'"),
        (changed(GPT2, "model", "type", to=["BPE"]), "model.type"),
        (changed(GPT2, "model", "dropout", to=0.1), "dropout"),
        (changed(GPT2, "model", "vocab", to={}), "model.vocab"),
        (changed(GPT2, "model", "vocab", to=[1]), "model.vocab"),
        (changed(GPT2, "model", "vocab", "a", to=True), "whole numbers"),
        (changed(GPT2, "model", "vocab", "a", to=1.0), "whole numbers"),
        (changed(GPT2, "model", "vocab", "a", to=-1), "token -1"),
        (changed(GPT2, "model", "vocab", "a", to=1000), r"token 1,000, the embedding 1,000 rows"),
        (changed(GPT2, "model", "vocab", "a", to=1), "the same id"),
        (changed(GPT2, "model", "merges", to=["a b c"]), "not a tokenizer"),
        (changed(GPT2, "model", "merges", to=[["a", "\u4f60"]]), "not a tokenizer"),
        (changed(GPT2, "model", "merges", to=7), "not a tokenizer"),
        (changed(GPT2, "model", "vocab", "\ud800", to=900), "not a tokenizer"),
        (changed(GPT2, "model", "unk_token", to="absent"), "unk_token 'absent'"),
        (changed(GPT2, "pre_tokenizer", to=SPLIT), "not a tokenizer"),
        (changed(GPT2, "pre_tokenizer", to={"type": "Unheard"}), "not a tokenizer"),
        (changed(GPT2, "added_tokens", to=7), "added_tokens"),
        (changed(GPT2, "added_tokens", to=[7]), r"added_tokens\[0\]"),
        (changed(GPT2, "added_tokens", 0, "id", to=2000), "token 2,000"),
        (changed(GPT2, "added_tokens", 0, "id", to="0"), r"added_tokens\[0\]"),
        (changed(GPT2, "added_tokens", 0, "content", to=["a"]), r"added_tokens\[0\]"),
        (changed(GPT2, "added_tokens", 0, "content", to="other"), r"added_tokens\[0\] has the id"),
        (changed(GPT2, "added_tokens", 0, "content", to=""), r"added_tokens\[0\]"),
        (changed("olmo2", "added_tokens", 1, "id", to=900), "behind ids without a token"),
        (changed(GPT2, "decoder", to=None), "decoder has the steps"),
        (changed(GPT2, "decoder", to={"type": "WordPiece", "prefix": "##", "cleanup": True}), "'WordPiece'"),
        (changed(GPT2, "decoder", to={"type": "Sequence"}), "decoder"),
        (changed(GPT2, "decoder", to={"type": "Sequence", "decoders": [7]}), "decoder"),
        (changed(GPT2, "decoder", to={"type": "Sequence", "decoders": []}), "decoder"),
        (changed(GPT2, "decoder", to={"type": "ByteFallback"}), "no token for unknown characters"),
        (changed(LLAMA2, "decoder", to={"type": "Sequence", "decoders": [STRIP]}), "'Strip'"),
        (changed(LLAMA2, "decoder", "decoders", 3, "start", to=2), "'Strip'"),
        (changed(LLAMA2, "decoder", "decoders", 0, to={"type": "ByteLevel"}), "decoder has the steps"),
        (changed(LLAMA2, "decoder", "decoders", 0, "pattern", to={"Regex": "a"}), "'Replace'"),
        (
            changed(LLAMA2, "post_processor", "special_tokens", "<s>", "ids", to=[5000]),
            "post_processor has token 5,000",
        ),
        (changed(LLAMA2, "post_processor", "single", 0, "SpecialToken", "id", to="absent"), "not a tokenizer"),
        (changed(LLAMA2, "post_processor", "special_tokens", to={}), "not a tokenizer"),
        (changed(UNIGRAM, "model", "unk_id", to=None), "unk_id"),
        (changed(UNIGRAM, "model", "unk_id", to=5000), "unk_id"),
        (changed(UNIGRAM, "model", "vocab", 3, to=["a"]), r"model.vocab\[3\]"),
        (changed(UNIGRAM, "model", "vocab", 3, to=["a", "b"]), r"model.vocab\[3\]"),
        (changed(UNIGRAM, "model", "vocab", to={}), "model.vocab"),
    ],
)
def test_a_wrong_tokenizer_json_is_a_model_error_of_one_line(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path}/tokenizer\.json: .*{message}") as caught:
        FolderTokenizer(write(tmp_path, values), 1000)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", [], "holds list"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token names no token"),
        ("tokenizer_config.json", {"bos_token": {"content": None}}, "bos_token names no token"),
        ("tokenizer_config.json", {"eos_token": "absent"}, "eos_token 'absent' is not in the vocabulary"),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, "bos_token is not Unicode"),
        ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens is str"),
        ("tokenizer_config.json", {"extra_special_tokens": [7]}, "extra_special_tokens names no token"),
        ("special_tokens_map.json", {"eos_token": []}, "eos_token names no token"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is str"),
        ("generation_config.json", {"eos_token_id": [1, True]}, "eos_token_id is bool"),
    ],
)
def test_a_wrong_file_beside_it_is_a_model_error_too(tmp_path: Path, name: str, values: Any, message: str) -> None:
    folder = write(KINDS["gpt2"]().save(tmp_path), values, name)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/{name}: .*{message}") as caught:
        FolderTokenizer(folder, 1000)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_ids_that_no_token_has_are_not_looked_for(tmp_path: Path) -> None:
    """transformers saves a family's defaults with a model of any size."""
    folder = write(KINDS["gpt2"]().save(tmp_path), {"eos_token_id": [1, 50256], "bos_token_id": 50256}, "config.json")
    tokenizer = FolderTokenizer(folder, 1000)
    assert 1 in tokenizer.eos_token_ids
    assert max(tokenizer.eos_token_ids) < tokenizer.vocab_size


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = KINDS["gpt2"]().save(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match="not UTF-8 at byte 7"):
        FolderTokenizer(folder, 1000)
    monkeypatch.setattr("kvik.text.tokenizer_json.MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(ModelError, match="more than 100 bytes"):
        FolderTokenizer(folder, 1000)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tokenizer.model", "save_pretrained"), ("vocab.json", "save_pretrained"), ("other", "whole folder")],
)
def test_a_folder_without_tokenizer_json_is_refused_with_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    write(tmp_path, "", name)
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json") as caught:
        FolderTokenizer(tmp_path, 1000)
    assert hint in caught.value.hint


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2000),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 7), max_size=3),
    st.dictionaries(st.sampled_from(["type", "id", "content", "a"]), st.text(max_size=4), max_size=3),
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths into a JSON value; of long lists and objects, the beginning."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    found = [(*path, key) for key, _ in entries[:8]]
    return [*found, *(inner for key, each in entries[:8] for inner in places(each, (*path, key)))]


@pytest.mark.parametrize("name", ["qwen2", "llama2", "unigram"])
@given(data=st.data())
@settings(max_examples=examples(60))
def test_no_file_raises_anything_but_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    values = file_of(name)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(values)))
        place: Any = values
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = data.draw(JUNK)
    folder = tmp_path_factory.mktemp("junk")
    try:
        tokenizer = FolderTokenizer(write(folder, values), 1000)
    except ModelError:
        return
    tokenizer.decode(tokenizer.encode("the quick <tool> 12"))
    tokenizer.encode("the quick <tool> 12", parse_special=False)
