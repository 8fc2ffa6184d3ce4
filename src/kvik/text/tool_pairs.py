"""Arguments of calls that a model writes as pairs of name and value, not as one JSON object, and the JSON they become.

Three manners are known: values as they are between tags (XML), values as in a call of Python, and values in a notation
of JSON's shape whose texts stand between marks of their own and whose names have no quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvik.text.marked_text import MARKS, overlap

JSON_WORDS, PYTHON_WORDS = ("true", "false", "null"), ("True", "False", "None")
ONLY_TEXT = frozenset({"string"})
NUMBERS = frozenset({"integer", "number"})
_WORD_CHARACTER = re.compile(r"[\w.+-]")
_AS_JSON = dict(zip(PYTHON_WORDS, JSON_WORDS, strict=True))


@dataclass(frozen=True)
class Pairs:
    """Arguments are `before`, name, `middle`, value, `after` for each, with a `separator` between them; marked text.

    Of `raw` values a text stands as it is, any other value as JSON. Others are in quotes: those of JSON, with its
    escapes, or any `quote` that no text can hold.
    """

    before: str
    middle: str
    after: str
    separator: str
    quote: str  # around texts; none where values are raw
    words: tuple[str, str, str] = JSON_WORDS  # true, false and null
    bare_keys: bool = False  # names inside a value have no quotes
    item_separator: str = ", "
    key_separator: str = ": "

    @property
    def kind(self) -> Literal["raw", "json", "quoted"]:
        """What texts are."""
        if not self.quote:
            return "raw"
        return "json" if self.quote == '"' else "quoted"

    def write(self, arguments: Mapping[str, Any]) -> str:
        """The arguments of a call."""
        return self.separator.join(
            self.before + key + self.middle + self.value(value, is_whole=True) + self.after
            for key, value in arguments.items()
        )

    def value(self, value: Any, *, is_whole: bool = False) -> str:
        """A value, whole or inside another."""
        if isinstance(value, str):
            if self.kind == "raw" and is_whole:
                return value
            if self.kind == "quoted":
                return self.quote + value + self.quote
        if isinstance(value, bool) or value is None:
            return self.words[2] if value is None else self.words[not value]
        if isinstance(value, list):
            return "[" + self.item_separator.join(map(self.value, value)) + "]"
        if isinstance(value, dict):
            items = (
                (key if self.bare_keys else json.dumps(key, ensure_ascii=False)) + self.key_separator + self.value(each)
                for key, each in value.items()
            )
            return "{" + self.item_separator.join(items) + "}"
        return json.dumps(value, ensure_ascii=False)


def json_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str] | None:
    """The types that a value may have; None where the schema does not tell."""
    if not isinstance(schema, Mapping) or depth > 16:
        return None
    if (resolved := resolve(schema, root)) is not None:
        return json_types(resolved, root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(each := schema.get(key), list) and each:
            found = [json_types(one, root, depth + 1) for one in each]
            known = [types for types in found if types is not None]
            return frozenset().union(*known) if len(known) == len(found) else None
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(type_of(value) for value in values)
    given = schema.get("type")
    if given is None:
        inferred = [kind for key, kind in (("properties", "object"), ("items", "array")) if key in schema]
        return frozenset(inferred) or None
    return frozenset([given] if isinstance(given, str) else given)


def resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """What a `$ref` within the same schema means; None where there is none."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any) -> str:
    """JSON's name of its type."""
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")


class PairsReader:
    """The JSON text of one call's arguments, in pieces, while they are written.

    `end` is what follows the arguments.
    """

    def __init__(self, pairs: Pairs, end: str, schema: Mapping[str, Any]) -> None:
        self._pairs = pairs
        self._end = end
        self._schema = schema
        self._text = ""
        self._out: list[str] = []
        self._num_pairs = 0
        self._types: frozenset[str] | None = None  # of the value that is read
        self._state: Callable[[], bool] = self._between  # takes what it can of the text: whether it took any
        self._is_over = False

    def read(self, text: str) -> tuple[int, str, bool]:
        """How much of the text is read, the JSON it means, and whether the arguments end there.

        What is not read is to be given again, with more behind it.
        """
        self._text, self._out = text, []
        while not self._is_over and self._state():
            pass
        return len(text) - len(self._text), "".join(self._out), self._is_over

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _between(self) -> bool:
        literal = (self._pairs.separator if self._num_pairs else "") + self._pairs.before
        if len(self._text) < len(self._end) and self._end.startswith(self._text):
            return False
        if self._text.startswith(self._end):
            return self._finish()
        if not self._text.startswith(literal):
            return False if literal.startswith(self._text) else self._finish()
        self._take(len(literal))
        self._state = self._key
        return True

    def _finish(self) -> bool:
        self._out.append("}")
        self._is_over = True
        return True

    def _key(self) -> bool:
        at = self._text.find(self._pairs.middle)
        if at < 0:
            return False
        key = MARKS.sub("", self._take(at))
        self._take(len(self._pairs.middle))
        self._out.append((", " if self._num_pairs else "") + json.dumps(key, ensure_ascii=False) + ": ")
        self._num_pairs += 1
        properties = self._schema.get("properties")
        known = properties.get(key) if isinstance(properties, Mapping) else None
        self._types = json_types(self._schema.get("additionalProperties") if known is None else known, self._schema)
        if self._pairs.kind != "raw":
            self._scanner = _Scanner(self._pairs)
            self._state = self._scanned
        elif self._types == ONLY_TEXT:
            self._out.append('"')
            self._state = self._raw_text
        else:
            self._state = self._raw_value
        return True

    def _raw_text(self) -> bool:
        at = self._text.find(self._pairs.after)
        taken = self._take(len(self._text) - overlap(self._text, self._pairs.after) if at < 0 else at)
        self._out.append(json.dumps(MARKS.sub("", taken), ensure_ascii=False)[1:-1])
        if at < 0:
            return False
        self._out.append('"')
        self._take(len(self._pairs.after))
        self._state = self._between
        return True

    def _raw_value(self) -> bool:
        at = self._text.find(self._pairs.after)
        if at < 0:
            return False
        self._out.append(_as_json(MARKS.sub("", self._take(at)), self._types))
        self._take(len(self._pairs.after))
        self._state = self._between
        return True

    def _scanned(self) -> bool:
        found = self._scanner.scan(self._text)
        self._take(found.num_read)
        self._out.append(MARKS.sub("", found.text))
        if not found.is_over:
            return False
        if not self._text.startswith(self._pairs.after):
            return False if self._pairs.after.startswith(self._text) else self._finish()
        self._take(len(self._pairs.after))
        self._state = self._between
        return True


def _as_json(text: str, types: frozenset[str] | None) -> str:
    """A raw value whose schema does not say that it is a text."""
    stripped = text.strip()
    as_json = _AS_JSON.get(stripped, stripped)
    try:
        kind = type_of(json.loads(as_json))
    except (ValueError, RecursionError):
        kind = "string"
    fits = types is None or kind in types or (kind == "integer" and "number" in types)
    return as_json if kind != "string" and fits else json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Scanned:
    num_read: int
    text: str
    is_over: bool


class _Scanner:
    """Makes JSON of one value that tells itself where it ends."""

    def __init__(self, pairs: Pairs) -> None:
        self._quote = pairs.quote
        self._has_escapes = pairs.kind == "json"
        self._depth = 0
        self._in_text = self._is_escaped = self._has_begun = False
        self._word = ""

    def scan(self, text: str) -> _Scanned:
        """What is read of the text; what is not comes again."""
        out: list[str] = []
        at = 0
        while at < len(text):
            if self._in_text:
                at = self._scan_text(text, at, out)
                if self._in_text:
                    break
                if not self._depth:
                    return _Scanned(at, "".join(out), is_over=True)
                continue
            character = text[at]
            if _WORD_CHARACTER.match(character) and not text.startswith(self._quote, at):
                self._word += character
                self._has_begun = True
                at += 1
                continue
            if self._word:
                is_key = self._depth > 0 and character == ":"
                out.append(json.dumps(self._word) if is_key else _AS_JSON.get(self._word, self._word))
                self._word = ""
                if not self._depth:
                    return _Scanned(at, "".join(out), is_over=True)
            if text.startswith(self._quote, at):
                self._in_text = self._has_begun = True
                out.append('"')
                at += len(self._quote)
                continue
            if self._quote.startswith(text[at:]):
                break
            if not self._depth and (self._has_begun or character in ")}]"):
                return _Scanned(at, "".join(out), is_over=True)
            at += 1
            out.append(character)
            self._depth += (character in "[{") - (character in "]}")
            if character in "]}" and not self._depth:
                return _Scanned(at, "".join(out), is_over=True)
        return _Scanned(at, "".join(out), is_over=False)

    def _scan_text(self, text: str, at: int, out: list[str]) -> int:
        """Read on in a text of the value, up to its end."""
        if not self._has_escapes:
            end = text.find(self._quote, at)
            stop = len(text) - overlap(text[at:], self._quote) if end < 0 else end
            out.append(json.dumps(MARKS.sub("", text[at:stop]), ensure_ascii=False)[1:-1])
            if end < 0:
                return stop
            out.append('"')
            self._in_text = False
            return stop + len(self._quote)
        while at < len(text):
            character = text[at]
            out.append(character)
            at += 1
            if self._is_escaped:
                self._is_escaped = False
            elif character == self._quote:
                self._in_text = False
                break
            else:
                self._is_escaped = character == "\\"
        return at


def manners(pairs: Pairs) -> Iterator[Pairs]:
    """The ways in which what is inside of values may be written, where texts and pairs are written so."""
    for words in (JSON_WORDS, PYTHON_WORDS):
        for bare_keys in (False, True):
            for item, key in ((", ", ": "), (",", ":")):
                yield Pairs(
                    pairs.before, pairs.middle, pairs.after, pairs.separator, pairs.quote, words, bare_keys, item, key
                )
