"""The tokenizer of a checkpoint folder: its `tokenizer.json`, run by the `tokenizers` library that wrote it.

The library encodes. Decoding is done here, token by token, because text must come while tokens arrive: of the decoders
that a tokenizer.json may ask for, those are understood that need to know no more than one token and whether it is the
first. Everything in the folder is untrusted and checked before the library sees it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kvik.errors import ModelError
from kvik.files.small_files import folder_error, parse_object, read_object, read_text
from kvik.text.tokenizer import (
    BYTE_OF,
    Tokenizer,
    all_ends,
    byte_level_bytes,
    byte_of,
    check_text,
    check_token_id,
    missing_bytes,
    no_token_for_byte,
)
from kvik.text.tokenizer_config import MAX_TOKENIZER_CONFIG_BYTES, TokenizerConfig

MAX_TOKENIZER_BYTES = 1 << 27  # the largest published tokenizer.json have 35 MB

_DECODERS = "kvik reads ByteLevel, and Replace, ByteFallback, Metaspace, Fuse and Strip of one space at the beginning"
_CONVERT = "let transformers write one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


class FolderTokenizer(Tokenizer):
    """The vocabulary of a checkpoint folder whose model has an embedding of `num_rows` rows.

    Rows without a token are common: they pad the embedding, and their ids decode to no text. Raises ModelError for
    files that are damaged, that do not fit the embedding or that are of a kind that kvik does not know.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        path = folder / "tokenizer.json"
        text = read_text(path, MAX_TOKENIZER_BYTES)
        if text is None:
            raise _no_tokenizer(folder)
        config = TokenizerConfig(folder)
        values = parse_object(text, path)
        if _drop_padding(values, num_rows, ("[PAD]", config.names.get("pad_token"))):
            text = json.dumps(values)
        file = _TokenizerFile(values, path, num_rows)
        self._path = path
        self._num_rows = num_rows
        self._decoding = file.decoding
        self._unencodable = file.unencodable
        self.vocab_size = file.vocab_size
        self._library = file.load(text)
        self._mark_special(config)
        self.special_token_ids = frozenset(
            token_id for token_id, token in self._library.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id, self.eos_token_ids = self._ends(folder, config)

    def _mark_special(self, config: TokenizerConfig) -> None:
        """Make special what the folder calls so, as transformers does; names of no token are left alone."""
        known = self._library.get_added_tokens_decoder()
        special = {token.content for token in known.values() if token.special}
        named = [*config.names.values(), *config.other_names]
        found = [name for name in named if name not in special and self._library.token_to_id(name) is not None]
        self._library.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(found)]
        )

    def _ends(self, folder: Path, config: TokenizerConfig) -> tuple[int | None, frozenset[int]]:
        named = {}
        for role in ("bos_token", "eos_token"):
            name = config.names.get(role)
            named[role] = None if name is None else self._library.token_to_id(name)
            if name is not None and named[role] is None:
                raise folder_error(config.path, f"{role} {name!r:.80} is not in the vocabulary")
        files = [folder / "generation_config.json", folder / "config.json"]
        bos = [self._config_ids(path, "bos_token_id") for path in files]
        eos = [self._config_ids(path, "eos_token_id") for path in files]
        bos_token_id = named["bos_token"]
        if bos_token_id is None:
            bos_token_id = next((ids[0] for ids in bos if ids), None)
        given = [token_id for token_id in (*(eos[0] or eos[1]), named["eos_token"]) if token_id is not None]
        special = {self.token_text(token_id): token_id for token_id in self.special_token_ids}
        return bos_token_id, all_ends(given, special)

    def _config_ids(self, path: Path, key: str) -> list[int]:
        """The ids that are tokens: small models keep their family's defaults, which no token of theirs has."""
        value = (read_object(path, MAX_TOKENIZER_CONFIG_BYTES) or {}).get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in values:
            if type(token_id) is not int:
                raise folder_error(path, f"{key} is {type(token_id).__name__}, not int")
        return [token_id for token_id in values if 0 <= token_id < self.vocab_size]

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """See Tokenizer."""
        check_text(text)
        with _library_errors(self._path, "the text cannot be encoded"):
            library = self._library if parse_special else self._without_control
            token_ids: list[int] = library.encode(text, add_special_tokens=add_special).ids
        if self._unencodable:
            self._check_kept(text, token_ids)
        return token_ids

    def _check_kept(self, text: str, token_ids: list[int]) -> None:
        """Refuse text with bytes that the vocabulary lacks, unless tokens of another kind have them."""
        normalizer = self._library.normalizer
        data = (normalizer.normalize_str(text) if normalizer else text).encode()
        for byte in set(data).intersection(self._unencodable):
            kept = b"".join(self.token_bytes(token_id, skip_special=False) for token_id in token_ids)
            if kept.count(byte) < data.count(byte):
                raise no_token_for_byte(byte)

    @cached_property
    def _without_control(self) -> tokenizers.Tokenizer:
        """The same vocabulary where no text can become a control token.

        That the library shall take their names for text does not suffice: a model may have learnt them as words.
        """
        values = json.loads(self._library.to_str())
        names = {token["content"]: secrets.token_hex(16) + token["content"] for token in _special(values)}
        _rename_in_model(values["model"], names)
        for token in _special(values):
            token["content"] = names[token["content"]]
        library = tokenizers.Tokenizer.from_str(json.dumps(values))
        library.encode_special_tokens = True
        return library

    def token_bytes(self, token_id: int, *, skip_special: bool = True, starts_text: bool = False) -> bytes:
        """See Tokenizer."""
        check_token_id(token_id, self._num_rows)
        if skip_special and token_id in self.special_token_ids:
            return b""
        text = self._library.id_to_token(token_id)
        return b"" if text is None else self._decoding.token_bytes(text, starts_text)


@contextmanager
def _library_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what the library raises into ModelError.

    Rust panics surface as PanicException, a BaseException, so they are caught by name.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise folder_error(path, f"{what}: {' '.join(str(error).split()):.200}") from error


def _no_tokenizer(folder: Path) -> ModelError:
    others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
    if others:
        return folder_error(folder, f"there is no tokenizer.json beside {others[0]}", _CONVERT)
    return folder_error(folder, "there is no tokenizer.json", "fetch the model's whole folder")


def _special(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (token for token in values["added_tokens"] if token["special"])


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give tokens names that no text can have, and leave out the merges that would make them."""
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        return
    model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def _drop_padding(values: dict[str, Any], num_rows: int, names: Sequence[str | None]) -> bool:
    """Take off padding tokens without a row in the embedding, which a model that was trained further may have.

    Nothing is ever padded here, and a text that has such a name in it is read as any other text.
    """
    added = values.get("added_tokens")
    if not isinstance(added, list):
        return False
    kept = [
        token
        for token in added
        if not isinstance(token, dict)
        or token.get("content") not in names
        or not isinstance(token.get("id"), int)
        or token["id"] < num_rows
    ]
    values["added_tokens"] = kept
    return len(kept) < len(added)


class _TokenizerFile:
    """A tokenizer.json as far as it must be known before the library reads it."""

    def __init__(self, values: Mapping[str, Any], path: Path, num_rows: int) -> None:
        self._path = path
        self._num_rows = num_rows
        model = values.get("model")
        if not isinstance(model, dict):
            raise folder_error(path, "has no model")
        self._model = model
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind not in ("BPE", "Unigram"):
            raise folder_error(path, f"model.type is {kind!r:.40}", "kvik reads the models 'BPE' and 'Unigram'")
        if model.get("dropout"):
            raise folder_error(path, "model.dropout makes the tokens of a text a matter of chance", "set it to null")
        self._vocabulary = self._bpe_vocabulary() if kind == "BPE" else self._unigram_vocabulary()
        self._added: list[dict[str, Any]] = self._added_tokens(values.get("added_tokens") or [])
        self.decoding = _Decoding.of(values.get("decoder"), path)
        self.unencodable = self._unencodable(kind)
        self.vocab_size = 1 + max(*self._vocabulary.values(), *(token["id"] for token in self._added), 0)

    def _bpe_vocabulary(self) -> dict[str, int]:
        vocabulary = self._model.get("vocab")
        if not isinstance(vocabulary, dict) or not vocabulary:
            raise folder_error(self._path, "model.vocab is missing, empty or not an object")
        if set(map(type, vocabulary.values())) != {int}:
            raise folder_error(self._path, "model.vocab has ids that are not whole numbers")
        self._check_ids("model.vocab", min(vocabulary.values()), max(vocabulary.values()))
        if len(set(vocabulary.values())) < len(vocabulary):
            raise folder_error(self._path, "model.vocab gives several tokens the same id")
        return vocabulary

    def _unigram_vocabulary(self) -> dict[str, int]:
        entries = self._model.get("vocab")
        if not isinstance(entries, list) or not entries:
            raise folder_error(self._path, "model.vocab is missing, empty or not a list")
        for index, entry in enumerate(entries):
            well_formed = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str
            if not well_formed or type(entry[1]) not in (int, float):
                raise folder_error(self._path, f"model.vocab[{index}] is not a piece and its score")
        self._check_ids("model.vocab", 0, len(entries) - 1)
        return {text: token_id for token_id, (text, _) in enumerate(entries)}

    def _check_ids(self, where: str, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self._num_rows:
            token_id = lowest if lowest < 0 else highest
            raise folder_error(
                self._path,
                f"{where} has token {token_id:,}, the embedding {self._num_rows:,} rows",
                "the folder's files do not belong together; fetch the model again",
            )

    def _added_tokens(self, added: object) -> list[dict[str, Any]]:
        if not isinstance(added, list):
            raise folder_error(self._path, "added_tokens is not a list")
        texts = {token_id: text for text, token_id in self._vocabulary.items()}
        for index, token in enumerate(added):
            token_id, text = (token.get("id"), token.get("content")) if isinstance(token, dict) else (None, None)
            if type(token_id) is not int or not isinstance(text, str) or not text:
                raise folder_error(self._path, f"added_tokens[{index}] has no id and content")
            self._check_ids(f"added_tokens[{index}]", token_id, token_id)
            if texts.setdefault(token_id, text) != text:
                raise folder_error(
                    self._path, f"added_tokens[{index}] has the id of {texts[token_id]!r:.80}, {token_id:,}"
                )
        return added

    def _unencodable(self, kind: str) -> bytes:
        """The bytes that the library would leave out of a text without a word."""
        if kind == "Unigram":
            unk_id = self._model.get("unk_id")
            if type(unk_id) is not int or not 0 <= unk_id < len(self._vocabulary):
                raise folder_error(self._path, "model.unk_id is no piece's number")
            return b""
        unknown = self._model.get("unk_token")
        if unknown is not None:
            if not isinstance(unknown, str) or unknown not in self._vocabulary:
                raise folder_error(self._path, f"model.unk_token {unknown!r:.80} is not in the vocabulary")
            return b""
        if self.decoding.byte_level:
            return missing_bytes(BYTE_OF.keys() & self._vocabulary.keys())
        byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
        if not self._model.get("byte_fallback") or not byte_tokens <= self._vocabulary.keys():
            raise folder_error(self._path, "the vocabulary has no token for unknown characters, nor one for each byte")
        return b""

    def load(self, text: str) -> tokenizers.Tokenizer:
        """Let the library read the file."""
        with _library_errors(self._path, "not a tokenizer"):
            library = tokenizers.Tokenizer.from_str(text)
            library.no_truncation()
            library.no_padding()
            around = library.encode("").ids
        for token_id in around:
            self._check_ids("post_processor", token_id, token_id)
        for token in self._added:
            if library.token_to_id(token["content"]) != token["id"]:
                raise folder_error(
                    self._path,
                    f"added token {token['content']!r:.80} has id {token['id']:,}, behind ids without a token",
                )
        return library


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What becomes of one token's text, which is all that the library's decoders of these kinds look at."""

    byte_level: bool = False
    byte_tokens: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    drops_first_space: bool = False  # of a text
    drops_marks: str = ""  # a character that stands for a space, left out of a text's first token

    @classmethod
    def of(cls, decoder: object, path: Path) -> _Decoding:
        """Read `decoder` of the file `path`. Raises ModelError for one that kvik does not know."""
        values: dict[str, Any] = {}
        replacements: list[tuple[str, str]] = []
        fused = False
        kinds = []
        for step in _steps(decoder, path):
            kinds.append(step["type"])
            match step:
                case {"type": "ByteLevel"}:
                    values["byte_level"] = True
                case {"type": "ByteFallback"}:
                    values["byte_tokens"] = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and not fused:
                    replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                    values["drops_first_space"] = start == 1
                case {"type": "Metaspace", "replacement": str(mark)} if len(mark) == 1 and not fused:
                    replacements.append((mark, " "))
                    usual = "always" if step.get("add_prefix_space", True) else "never"
                    if step.get("prepend_scheme", usual) != "never":
                        values["drops_marks"] = mark
                case _:
                    raise folder_error(path, f"decoder has a step {step!r:.120}", _DECODERS)
        if not kinds or (values.get("byte_level") and set(kinds) - {"ByteLevel", "Fuse"}):
            raise folder_error(path, f"decoder has the steps {kinds!r:.120}", _DECODERS)
        return cls(replacements=tuple(replacements), **values)

    def token_bytes(self, text: str, starts_text: bool) -> bytes:
        """The bytes of the token that the vocabulary writes as `text`."""
        if self.byte_level:
            return byte_level_bytes(text)
        data = byte_of(text) if self.byte_tokens else None
        if data is None:
            if starts_text and self.drops_marks:
                text = text.replace(self.drops_marks, "")
            for old, new in self.replacements:
                text = text.replace(old, new)
            data = text.encode()
        return data.removeprefix(b" ") if starts_text and self.drops_first_space else data


def _steps(decoder: object, path: Path) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if not isinstance(decoder, dict) or not isinstance(decoder.get("type"), str):
        raise folder_error(path, "decoder has a step without a type")
    if decoder["type"] != "Sequence":
        yield decoder
        return
    inner = decoder.get("decoders")
    if not isinstance(inner, list):
        raise folder_error(path, "decoder is a sequence without steps")
    for step in inner:
        yield from _steps(step, path)
