"""The tokenizer that a GGUF file's metadata describes.

The keys are those of the GGUF specification (`tokenizer.ggml.*`). Three kinds of vocabulary are understood:

    gpt2    byte-level BPE with a list of merges (Radford et al. 2019); `tokenizer.ggml.pre` names the rule that cuts
            text into words first, as each family's published tokenizer.json states it
    llama   SentencePiece BPE (Kudo and Richardson 2018): scores in place of merges, U+2581 for a space, bytes for
            characters that the vocabulary lacks
    gemma4  both: a list of merges over whole stretches of text, U+2581 for a space, bytes for missing characters

Control tokens are found in the text here and are no part of the BPE vocabulary, so ordinary text can never become one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, normalizers

from kvik.errors import ModelError
from kvik.files.texts import Texts
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
from kvik.text.word_rules import WORD_RULES


class TokenType(IntEnum):
    """What a vocabulary entry is for (`tokenizer.ggml.token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# UNKNOWN stands for text that the vocabulary lacks: a model may emit it, but no text should turn into it.
_SPECIAL_TYPES = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})

# Phi-3's control tokens take the white space behind them away, all but these; no key in the file says so.
_PHI3_KEEPS_SPACE = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

_SPACE_MARK = "\u2581"
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MAX_PIECE_CHARACTERS = 256  # all its splits are tried; published vocabularies stay under 50

_BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
_SPECIAL_IDS = tuple(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding"))


class _Metadata:
    """The `tokenizer.ggml.*` values of one file, checked for type, length and range as they are read."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata = metadata
        self._name = name
        self.notes: list[str] = []  # what was missing or out of place, and what was made of it

    def error(
        self, what: str, hint: str = "the file is damaged or badly converted; fetch or convert it again"
    ) -> ModelError:
        return ModelError(f"{self._name}: {what}", hint=hint)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if type(value) is not kind:
            raise self.error(f"tokenizer.ggml.{key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def items(self, key: str, kinds: set[type], length: int | None = None) -> list[Any]:
        values: list[Any] = self.get(key, list, [])
        if not values:
            raise self.error(f"tokenizer.ggml.{key} is missing or empty")
        if not set(map(type, values)) <= kinds:
            raise self.error(f"tokenizer.ggml.{key} holds values of the wrong type")
        if length is not None and len(values) != length:
            raise self.error(f"tokenizer.ggml.{key} has {len(values)} entries for {length} tokens")
        return values

    def texts(self, key: str) -> Texts:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, Texts) and value:
            return value
        try:
            return Texts([text.encode() for text in self.items(key, {str})])
        except UnicodeEncodeError as error:
            raise self.error(f"tokenizer.ggml.{key} has text that is not Unicode") from error

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value: int | None = self.get(key, int)
        if value is not None and not 0 <= value < vocab_size:
            self.notes.append(f"tokenizer.ggml.{key} is {value}, outside the vocabulary of {vocab_size:,}: ignored")
            return None
        return value

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """A list of tokens, which may be missing."""
        if f"tokenizer.ggml.{key}" not in self._metadata:
            return []
        found: list[int] = self.items(key, {int})
        strange = [one for one in found if not 0 <= one < vocab_size]
        if strange:
            self.notes.append(
                f"tokenizer.ggml.{key} has {strange[0]}, outside the vocabulary of {vocab_size:,}: ignored"
            )
        return [one for one in found if 0 <= one < vocab_size]

    def token_types(self, tokens: Texts) -> list[int]:
        """Of each token what it is for; where the file does not say, special ids are control tokens."""
        if "tokenizer.ggml.token_type" in self._metadata:
            return self.items("token_type", {int}, len(tokens))
        self.notes.append("tokenizer.ggml.token_type is missing: tokens named as special are control tokens")
        types = [int(TokenType.BYTE if _BYTE_NAME.fullmatch(one) else TokenType.NORMAL) for one in tokens]
        for key in _SPECIAL_IDS:
            if (found := self.token_id(key, len(tokens))) is not None:
                types[found] = int(TokenType.UNKNOWN if key == "unknown_token_id" else TokenType.CONTROL)
        return types


class GGUFTokenizer(Tokenizer):
    """The vocabulary inside a GGUF file; `name` is the file, for errors.

    Raises ModelError for a vocabulary that is damaged or of a kind that kvik does not know.
    """

    add_bos: bool
    notes: tuple[str, ...]  # on keys that are missing or out of place
    add_space_prefix: bool  # SentencePiece: each stretch of text starts with a space that decoding takes off again

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        fields = _Metadata(metadata, name)
        model = fields.get("model", str, "")
        set_up = {
            "gpt2": self._set_up_byte_level,
            "llama": self._set_up_sentencepiece,
            "gemma4": self._set_up_merges_of_characters,
        }.get(model)
        if set_up is None:
            raise fields.error(
                f"tokenizer.ggml.model is {model!r}", hint="kvik reads the models 'gpt2', 'llama' and 'gemma4'"
            )
        self._tokens = fields.texts("tokens")
        self.vocab_size = len(self._tokens)
        types = fields.token_types(self._tokens)
        if not set(types) <= set(TokenType):
            raise fields.error("tokenizer.ggml.token_type has values outside 1 to 6")
        self._types = bytes(types)
        self.special_token_ids = frozenset(
            token_id for token_id, kind in enumerate(self._types) if kind in _SPECIAL_TYPES
        )
        texts = list(self._tokens)
        self._takes_space = model == "llama" and metadata.get("general.architecture") == "phi3"
        set_up(fields, texts)

        self.bos_token_id = fields.token_id("bos_token_id", self.vocab_size)
        self._eos_token_id = fields.token_id("eos_token_id", self.vocab_size)
        given = [
            self._eos_token_id,
            *fields.token_ids("eos_token_ids", self.vocab_size),
            *(fields.token_id(f"{key}_token_id", self.vocab_size) for key in ("eot", "eom")),
        ]
        named = self.special_token_ids
        if model == "gemma4":  # whose marks are shown, those that end a turn among them
            named |= {token_id for token_id, kind in enumerate(self._types) if kind == TokenType.USER_DEFINED}
        special = {self._tokens[token_id]: token_id for token_id in named}
        self.eos_token_ids = all_ends([token_id for token_id in given if token_id is not None], special)
        self._add_eos: bool = fields.get("add_eos_token", bool, False)
        begins = fields.get("add_bos_token", bool, self._bos_by_default)
        if model == "gemma4" and not begins:  # as the first files said, wrongly; llama.cpp does not believe them either
            fields.notes.append(
                "tokenizer.ggml.add_bos_token is false, but Gemma 4's texts begin with BOS all the same"
            )
            begins = True
        self.notes = tuple(dict.fromkeys(fields.notes))
        if fields.get("add_bos_token", bool, False) and self.bos_token_id is None:
            raise fields.error("tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
        if self._add_eos and self._eos_token_id is None:
            raise fields.error("tokenizer.ggml.add_eos_token is set, but there is no eos_token_id")
        self.add_bos = begins and self.bos_token_id is not None
        self.chat_bos_token_id = self.bos_token_id if self.add_bos else None  # as llama.cpp does

    def _set_up_byte_level(self, fields: _Metadata, texts: list[str]) -> None:
        rule_name = fields.get("pre", str)
        if rule_name is None:
            rule_name = "default"
            fields.notes.append("tokenizer.ggml.pre is missing: text is cut into words by the rule 'default'")
        rule = WORD_RULES.get(rule_name)
        if rule is None:
            known = ", ".join(sorted(WORD_RULES))
            raise fields.error(f"tokenizer.ggml.pre is {rule_name!r}", hint=f"kvik knows the pre-tokenizers {known}")
        if fields.get("add_space_prefix", bool, False):
            raise fields.error(
                "tokenizer.ggml.add_space_prefix is set for a byte-level vocabulary",
                hint="kvik supports it for the model 'llama' only",
            )
        vocabulary = self._ordinary_tokens(texts)
        self._bpe = tokenizers.Tokenizer(self._merging(fields, vocabulary, ignore_merges=rule.whole_words))
        self._bpe.pre_tokenizer = rule.pre_tokenizer()
        self._prepare: Callable[[str], str] = normalizers.NFC().normalize_str if rule.nfc else str
        self._byte_level = True
        self._bos_by_default = rule.add_bos
        self.add_space_prefix = False
        self._unencodable = missing_bytes(BYTE_OF.keys() & vocabulary.keys())

    def _set_up_sentencepiece(self, fields: _Metadata, texts: list[str]) -> None:
        byte_ids = self._byte_ids(fields, texts)
        longest = max(map(len, texts))
        if longest > _MAX_PIECE_CHARACTERS:
            raise fields.error(
                f"the vocabulary has a piece of {longest:,} characters, more than {_MAX_PIECE_CHARACTERS}"
            )
        scores = fields.items("scores", {float, int}, self.vocab_size)
        if any(map(math.isnan, scores)):
            raise fields.error("tokenizer.ggml.scores has values that are not numbers")
        vocabulary = self._ordinary_tokens(texts)
        pairs = _pairs_by_score(vocabulary, scores)
        self._bpe = tokenizers.Tokenizer(models.BPE(vocabulary | byte_ids, pairs, byte_fallback=True))
        self._set_up_characters(add_space_prefix=fields.get("add_space_prefix", bool, True))

    def _set_up_merges_of_characters(self, fields: _Metadata, texts: list[str]) -> None:
        vocabulary = self._ordinary_tokens(texts) | self._byte_ids(fields, texts)
        self._bpe = tokenizers.Tokenizer(self._merging(fields, vocabulary, byte_fallback=True))
        self._set_up_characters(add_space_prefix=fields.get("add_space_prefix", bool, False))

    def _set_up_characters(self, *, add_space_prefix: bool) -> None:
        self._prepare = self._mark_spaces
        self._byte_level = False
        self._bos_by_default = True
        self.add_space_prefix = add_space_prefix
        self._unencodable = b""

    def _byte_ids(self, fields: _Metadata, texts: list[str]) -> dict[str, int]:
        byte_ids = {texts[token_id]: token_id for token_id, kind in enumerate(self._types) if kind == TokenType.BYTE}
        if byte_ids.keys() != {f"<0x{byte:02X}>" for byte in range(256)}:  # so the library asks for them
            raise fields.error(f"the vocabulary has {len(byte_ids)} byte tokens that kvik can read, not 256")
        return byte_ids

    def _ordinary_tokens(self, texts: list[str]) -> dict[str, int]:
        """What BPE may produce; of entries with the same text, the first."""
        ordinary = bytes(kind not in _SPECIAL_TYPES | {TokenType.BYTE} for kind in range(256))
        chosen = self._types.translate(ordinary)[::-1]
        return dict(
            zip(compress(reversed(texts), chosen), compress(reversed(range(self.vocab_size)), chosen), strict=True)
        )

    def _merging(self, fields: _Metadata, vocabulary: dict[str, int], **options: bool) -> models.BPE:
        merges = fields.texts("merges")
        try:
            pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
            return models.BPE(vocabulary, pairs, **options)
        except Exception:  # the library has no narrower one for a merge that is not made of the vocabulary
            pairs = self._some_merges(fields, list(merges), vocabulary)
            if len(pairs) == len(merges):
                raise  # it was not the merges
            return models.BPE(vocabulary, pairs, **options)

    def _some_merges(self, fields: _Metadata, merges: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """Of merges that are not all made of ordinary tokens, those that are."""
        for index, merge in enumerate(merges):
            if merge.count(" ") != 1:
                raise fields.error(f"tokenizer.ggml.merges[{index}] is {merge!r:.80}, not two tokens")
        parts = " ".join(merges).split(" ")
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        known = set(self._tokens)
        for index, (left, right) in enumerate(pairs):
            if not {left, right, left + right} <= known:
                raise fields.error(f"tokenizer.ggml.merges[{index}], {merges[index]!r:.80}, is not made of tokens")
        # What is left over would make a control token out of ordinary text.
        return [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """See Tokenizer."""
        check_text(text)
        added = self._all_added if parse_special else self._user_defined
        token_ids = [self.bos_token_id] if add_special and self.add_bos and self.bos_token_id is not None else []
        takes_space = False
        for index, segment in enumerate(added.splitter.split(text)):
            if index % 2:
                token_ids.append(added.token_ids[segment])
                takes_space = self._takes_space and segment not in _PHI3_KEEPS_SPACE
            elif segment := segment.lstrip(_WHITE_SPACE) if takes_space else segment:
                token_ids += self._encode_ordinary(segment)
        if add_special and self._add_eos and self._eos_token_id is not None:
            token_ids.append(self._eos_token_id)
        return token_ids

    def _encode_ordinary(self, segment: str) -> list[int]:
        segment = self._prepare(segment)
        if self._unencodable:
            data = segment.encode()
            # The BPE library would leave such bytes out without a word.
            if len(data.translate(None, self._unencodable)) != len(data):
                raise no_token_for_byte(next(byte for byte in data if byte in self._unencodable))
        token_ids: list[int] = self._bpe.encode(segment, add_special_tokens=False).ids
        return token_ids

    def _mark_spaces(self, segment: str) -> str:
        marked = segment.replace(" ", _SPACE_MARK)
        return _SPACE_MARK + marked if self.add_space_prefix else marked

    @cached_property
    def _user_defined(self) -> _AddedTokens:
        return self._added_tokens(frozenset({TokenType.USER_DEFINED}))

    @cached_property
    def _all_added(self) -> _AddedTokens:
        return self._added_tokens(_SPECIAL_TYPES | {TokenType.USER_DEFINED})

    def _added_tokens(self, kinds: frozenset[TokenType]) -> _AddedTokens:
        token_ids: dict[str, int] = {}
        for token_id, kind in enumerate(self._types):
            if kind in kinds:
                token_ids.setdefault(self._literal(self._tokens[token_id]), token_id)
        token_ids.pop("", None)
        longest_first = sorted(token_ids, key=len, reverse=True)
        # Without any token: a pattern that matches nowhere.
        return _AddedTokens(re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})"), token_ids)

    def _literal(self, text: str) -> str:
        return text if self._byte_level else text.replace(_SPACE_MARK, " ")

    def token_bytes(self, token_id: int, *, skip_special: bool = True, starts_text: bool = False) -> bytes:
        """See Tokenizer."""
        check_token_id(token_id, self.vocab_size)
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind in _SPECIAL_TYPES:
            return b"" if skip_special else text.encode()
        byte = byte_of(text) if kind == TokenType.BYTE else None
        if byte is not None:
            data = byte
        elif self._byte_level and kind != TokenType.USER_DEFINED:
            data = byte_level_bytes(text)
        else:
            data = self._literal(text).encode()
        return data.removeprefix(b" ") if starts_text and self.add_space_prefix else data


@dataclass(frozen=True, slots=True)
class _AddedTokens:
    """Tokens that are found in text by their whole name, the longest first, before BPE sees the rest."""

    splitter: re.Pattern[str]  # one group, so that `split` gives text and names in turn
    token_ids: Mapping[str, int]


def _pairs_by_score(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies, best first.

    SentencePiece joins the neighbours whose joint piece has the best score, the leftmost of equals. A list of merges
    has no leftmost: of equal scores the longer piece and the longer left part go first, which gives the same where
    such ties occur in published vocabularies, in runs of spaces that earlier merges have halved from the left.
    """
    texts = sorted(vocabulary)  # what is left of ties goes by the text
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    lefts, rights, wholes = _halves(texts, lengths)
    cuts = lengths[lefts]
    ranks = -np.asarray(scores, np.float64)[[vocabulary[text] for text in texts]]
    order = np.lexsort((wholes, -cuts, -lengths[wholes], ranks[wholes]))
    return [
        (texts[left], texts[right]) for left, right in zip(lefts[order].tolist(), rights[order].tolist(), strict=True)
    ]


def _halves(texts: list[str], lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.intp], ...]:
    """All ways to put a text together from two others: the indices of the left ones, the right ones and the whole ones.

    Parts are looked up by a hash of their characters, a polynomial modulo 2**64, and compared where one is found.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    characters = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64)
    powers = np.cumprod(np.full(len(characters), _HASH_BASE, np.uint64))
    inverse_powers = np.cumprod(np.full(len(characters) + 1, pow(_HASH_BASE, -1, 1 << 64), np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((characters + np.uint64(1)) * powers)])

    def hashes(begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        found: npt.NDArray[np.uint64] = (sums[end] - sums[begin]) * inverse_powers[begin]
        return found

    whole_hashes = hashes(starts, ends)
    by_hash = np.argsort(whole_hashes)
    sorted_hashes = whole_hashes[by_hash]

    def find(begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        """The text that stands there; -1: none."""
        wanted = hashes(begin, end)
        places = np.minimum(np.searchsorted(sorted_hashes, wanted), len(texts) - 1)
        return np.where(sorted_hashes[places] == wanted, by_hash[places], -1)

    wholes = np.repeat(np.arange(len(texts)), np.maximum(lengths - 1, 0))
    counts = np.cumsum(np.maximum(lengths - 1, 0))
    cuts = starts[wholes] + 1 + np.arange(len(wholes)) - np.concatenate([np.zeros(1, np.int64), counts])[wholes]
    lefts = find(starts[wholes], cuts)
    wholes, cuts, lefts = (found[lefts >= 0] for found in (wholes, cuts, lefts))
    rights = find(cuts, ends[wholes])
    wholes, lefts, rights = (found[rights >= 0] for found in (wholes, lefts, rights))
    same = [
        texts[left] + texts[right] == texts[whole]
        for left, right, whole in zip(lefts.tolist(), rights.tolist(), wholes.tolist(), strict=True)
    ]
    if all(same) and (sorted_hashes[1:] != sorted_hashes[:-1]).all():
        return lefts, rights, wholes
    places = {text: index for index, text in enumerate(texts)}  # two texts share a hash: a file made to do so
    found = [
        (places[text[:cut]], places[text[cut:]], index)
        for index, text in enumerate(texts)
        for cut in range(1, len(text))
        if text[:cut] in places and text[cut:] in places
    ]
    return tuple(np.asarray(found, np.intp).reshape(-1, 3).T)
