"""Text to token ids and back, by a checkpoint's tokenizer.json and the files beside it that name its special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kvik.errors import ModelError
from kvik.models.config_fields import read_json_object
from kvik.models.tokenizer import (
    END_NAMES,
    SPACE_MARK,
    Tokenizer,
    byte_level_bytes,
    lacking_bytes,
    require_bytes,
    require_unicode,
)

MOST_BYTES = 1 << 27  # published ones have up to 35 MB

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SAVE_AGAIN = "save the checkpoint again by transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"


class JsonTokenizer(Tokenizer):
    """What a folder's tokenizer.json does, run by the library that wrote it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self._path = path
        if not path.exists():
            raise ModelError(f"{folder} has no tokenizer.json", hint=_SAVE_AGAIN)
        described = read_json_object(path, MOST_BYTES)
        self._text = json.dumps(described)
        self._json = self._build()
        vocabulary = self._json.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise self._error("has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > 1 << 24:
            raise self._error(f"has the token id {self.vocab_size - 1:,}")
        self._tokens: dict[int, str] = {token_id: token for token, token_id in vocabulary.items()}
        added = self._json.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        special = {token_id for token_id, token in added.items() if token.special}
        unknown = self._json.model.unk_token if hasattr(self._json.model, "unk_token") else None
        if isinstance(unknown, str) and unknown in vocabulary and unknown in self._added.values():
            special.add(vocabulary[unknown])
        self.special_token_ids = frozenset(special)
        kinds = list(_decoders(described.get("decoder")))
        self._byte_level = any(kind["type"] == "ByteLevel" for kind in kinds)
        marks_spaces = any(
            kind["type"] == "Metaspace" or (kind["type"] == "Replace" and kind.get("content") == " ") for kind in kinds
        )
        if not (self._byte_level or marks_spaces):
            names = ", ".join(kind["type"] for kind in kinds) or "none"
            raise self._error(f"its decoder ({names}) is not one that kvik runs")
        self.add_space_prefix = any(
            (kind["type"] == "Strip" and kind.get("content") == " " and kind.get("start") == 1)
            or (kind["type"] == "Metaspace" and kind.get("prepend_scheme", "always") != "never")
            for kind in kinds
        )
        self._unencodable = lacking_bytes(vocabulary.keys()) if self._byte_level else b""
        if unknown is not None:
            self._unencodable = b""  # it stands for what the vocabulary lacks
        self._name_special_tokens(folder, vocabulary)

    def _name_special_tokens(self, folder: Path, vocabulary: Mapping[str, int]) -> None:
        ends: set[int] = {vocabulary[name] for name in END_NAMES & vocabulary.keys()} & self.special_token_ids
        self.bos_token_id = None
        self.bos_token = self.eos_token = ""
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            fields = _optional_json(folder / name)
            for key in ("bos_token", "eos_token"):
                token = fields.get(key)
                text = token.get("content") if isinstance(token, dict) else token
                if text is None:
                    continue
                if not isinstance(text, str) or text not in vocabulary:
                    raise ModelError(f"{folder / name}: {key} {text!r:.60} is no token", hint=_SAVE_AGAIN)
                if key == "bos_token":
                    self.bos_token, self.bos_token_id = text, vocabulary[text]
                else:
                    self.eos_token = text
                    ends.add(vocabulary[text])
        for name in ("config.json", "generation_config.json"):
            fields = _optional_json(folder / name)
            given = fields.get("eos_token_id")
            for token_id in given if isinstance(given, list) else [given]:
                if token_id is None:
                    continue
                if type(token_id) is not int or token_id < 0:
                    raise ModelError(f"{folder / name}: eos_token_id is {given!r:.60}", hint=_SAVE_AGAIN)
                if token_id in self._tokens:  # a config that was made for another vocabulary names none of this one
                    ends.add(token_id)
        self.eos_token_ids = frozenset(ends)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`, as `Tokenizer.encode` says."""
        require_unicode(text)
        require_bytes(text, self._unencodable)
        chosen = self._json if parse_special else self._plain
        token_ids: list[int] = chosen.encode(text, add_special_tokens=add_special).ids
        return token_ids

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What `token_id` adds to a text, as `Tokenizer.token_bytes` says."""
        self.require_token(token_id)
        if token_id in self.special_token_ids:
            return b"" if skip_special else self._tokens[token_id].encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokens.get(token_id, "")  # an id that no token has
        if self._byte_level:
            return byte_level_bytes(token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes((int(match[1], 16),))
        return token.replace(SPACE_MARK, " ").encode()

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, to which names of control tokens are text."""
        made = self._build()
        made.encode_special_tokens = True
        return made

    def _build(self) -> tokenizers.Tokenizer:
        try:
            made = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
            raise self._error(f"is not one that the tokenizers library reads: {str(error)[:80]}") from None
        made.no_truncation()
        made.no_padding()
        return made

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}", hint=_SAVE_AGAIN)


def read_chat_template(folder: Path) -> str | None:
    """The folder's chat template, or the one called "default" of several; `None`: there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {str(error)[:80]}", hint=_SAVE_AGAIN) from None
    given = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is no text", hint=_SAVE_AGAIN)
    return given or None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, MOST_BYTES) if path.exists() else {}


def _decoders(described: Any) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, those inside of others too."""
    if not isinstance(described, dict) or not isinstance(described.get("type"), str):
        return
    if described["type"] != "Sequence":
        yield described
        return
    for one in described.get("decoders") or []:
        yield from _decoders(one)
