"""The Lark rules of arguments that are written as pairs, from their JSON schema.

What JSON itself says is left to llguidance. A keyword that no rule is made of is refused by its name and the tool's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvik.errors import InvalidInput
from kvik.text.tool_pairs import NUMBERS, ONLY_TEXT, Pairs, json_types, resolve

MAX_DEPTH = 60
MAX_COUNT = 1000  # of characters and items that a schema counts

_NOTES = frozenset({"description", "title", "examples", "default", "$comment", "deprecated", "readOnly", "writeOnly"})
_KNOWN = _NOTES | {"type", "$defs", "definitions", "$schema", "$id"}
_OF_OBJECTS = _KNOWN | {"properties", "required", "additionalProperties"}
_OF_ARRAYS = _KNOWN | {"items", "minItems", "maxItems"}
_OF_TEXTS = _KNOWN | {"minLength", "maxLength", "pattern", "format"}
_OF_CHOICES = ("anyOf", "oneOf", "allOf")

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# Each is a part of what the format allows.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "-".join(f"[0-9A-Fa-f]{{{count}}}" for count in (8, 4, 4, 4, 12)),
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,8}}",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL}){{0,8}}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+",
}
_NAME = r"/[A-Za-z_][A-Za-z0-9_]{0,63}/"


class PairsGrammar:
    """Rules for the arguments of one tool, whose names begin with `prefix`; `lark` writes marked text."""

    def __init__(self, pairs: Pairs, lark: Callable[[str], str], tool: str, schema: Mapping[str, Any], prefix: str):
        self.rules: list[str] = []
        self._pairs = pairs
        self._lark = lark
        self._tool = tool
        self._root = schema
        self._prefix = prefix
        self._of_refs: dict[str, str] = {}
        self._any = ""

    def arguments(self) -> str:
        """The rule of them all."""
        schema, depth = self._root, 0
        while (found := resolve(schema, self._root)) is not None:
            schema, depth = found, depth + 1
            if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
                raise self._refused("$ref")
        pairs = self._pairs

        def pair(key: str | None, value: Any) -> str:
            name = self._new_key(schema) if key is None else ""
            head = (
                f"{self._lark(pairs.before + key + pairs.middle)}"
                if key is not None
                else f"{self._lark(pairs.before)} {name} {self._lark(pairs.middle)}"
            )
            if pairs.kind == "raw":
                return f"{head} {self._raw(value)}"
            return f"{head} {self._value(value, 1)} {self._lark(pairs.after)}"

        return self._rule(self._members(schema, pair, self._lark(pairs.separator)))

    # Rules.

    def _rule(self, body: str, attribute: str = "", *, is_lexeme: bool = False) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        name = name.upper() if is_lexeme else name
        self.rules.append(f"{name}{attribute}: {body}")
        return name

    def _refused(self, keyword: str) -> InvalidInput:
        return InvalidInput(
            f"the parameters of the tool {self._tool!r} cannot be kept to: {keyword}, in the way this model writes"
            " arguments",
            hint="leave this out of the schema, and check it in the tool itself",
        )

    def _check(self, schema: Mapping[str, Any], known: Iterable[str]) -> None:
        for keyword in schema:
            if keyword not in known:
                raise self._refused(keyword)

    def _members(self, schema: Mapping[str, Any], pair: Callable[[str | None, Any], str], separator: str) -> str:
        """The members of an object, in the schema's order."""
        self._check(schema, _OF_OBJECTS)
        properties: dict[str, Any] = dict(schema.get("properties") or {})
        required = set(schema.get("required") or ())
        if unknown := required - set(properties):
            raise self._refused(f"required {min(unknown)!r}, which is none of the properties")
        others = schema.get("additionalProperties", not properties)
        after = other = ""
        if others is not False:
            other = self._rule(pair(None, {} if others is True else others))
            after = f"({separator} {other})*"
        starts: list[str] = [] if not other else [f"{other} {after}"]
        for key in reversed(properties):
            this = self._rule(pair(key, properties[key]))
            start = f"{this} {after}"
            starts = [start] if key in required else [start, *starts]
            after = self._rule(f"{separator} {this} {after}" if key in required else f"({separator} {this})? {after}")
        if not starts:
            return '""'
        return f"({' | '.join(starts)})" + ("" if required else "?")

    def _new_key(self, schema: Mapping[str, Any]) -> str:
        known = " | ".join(json.dumps(key) for key in schema.get("properties") or ())
        return self._rule(_NAME + (f" & ~({known})" if known else ""), is_lexeme=True)

    # Raw values.

    def _raw(self, schema: Any) -> str:
        """A value as it is, and what ends it."""
        end = self._lark(self._pairs.after)
        types = json_types(schema, self._root)
        if types is None:
            return self._text({}, self._pairs.after)
        if "string" not in types:
            return f"{self._json(schema)} {end}"
        options = self._simple(schema, 0)
        texts = [option for option in options if json_types(option, self._root) == ONLY_TEXT]
        if any(not (option.keys() - _KNOWN) for option in texts):
            return self._text({}, self._pairs.after)  # which every other value is too
        rest = [option for option in options if option not in texts]
        values = [self._text(option, self._pairs.after) for option in texts]
        return "(" + " | ".join([*values, *(f"{self._json(option)} {end}" for option in rest)]) + ")"

    def _simple(self, schema: Any, depth: int, *, follow: bool = True) -> list[Mapping[str, Any]]:
        """The schema as ones of a single type, of which a value fits one; references too unless they are followed."""
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            raise self._refused("a schema without a type" if not isinstance(schema, Mapping) else "$ref")
        if (found := resolve(schema, self._root)) is not None:
            return self._simple(found, depth + 1) if follow else [schema]
        for keyword in _OF_CHOICES:
            if keyword in schema:
                self._check(schema, _KNOWN | {keyword})
                if keyword == "allOf" and len(schema[keyword]) > 1:
                    raise self._refused("allOf")
                return [each for one in schema[keyword] for each in self._simple(one, depth + 1, follow=follow)]
        if "const" in schema or "enum" in schema:
            self._check(schema, _KNOWN | {"const", "enum"})
            return [{"const": value} for value in ([schema["const"]] if "const" in schema else schema["enum"])]
        if isinstance(kinds := schema.get("type"), list):
            return [{**schema, "type": kind} for kind in kinds]
        return [schema]

    def _json(self, schema: Any) -> str:
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        defined = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        whole = {"anyOf": [schema]} if not isinstance(schema, Mapping) else schema
        return "%json " + json.dumps({**whole, **defined, "x-guidance": options})

    # Texts.

    def _text(self, schema: Mapping[str, Any], end: str) -> str:
        """A text that goes up to `end`, and that."""
        if "const" in schema:
            return f"{json.dumps(schema['const'], ensure_ascii=False)} {self._lark(end)}"
        self._check(schema, _OF_TEXTS)
        least, most, pattern = schema.get("minLength", 0), schema.get("maxLength"), schema.get("pattern")
        form = schema.get("format")
        if sum((bool(least) or most is not None, pattern is not None, form is not None)) > 1:
            raise self._refused("pattern, format and lengths together")
        if least > MAX_COUNT or (most is not None and most > MAX_COUNT):
            raise self._refused(f"a text of more than {MAX_COUNT:,} counted characters")
        if form is not None and form not in _FORMATS:
            raise self._refused(f"the format {form!r:.80}")
        is_plain = not least and most is None and pattern is None and form is None
        if form is not None:
            body = f"/{_escaped(_FORMATS[form])}/"
        elif pattern is not None:
            body = f"/{_escaped(self._whole(pattern))}/"
        else:
            body = f"/(?s:.{{{least},{'' if most is None else most}}})/"
        literal = re.match("[^\ud800-\udfff]*", end)
        stop = literal[0] if literal else ""
        if not stop:  # a control token, which no text holds
            if is_plain:
                return f"{self._rule('/(?s:.+)/', is_lexeme=True)}? {self._lark(end)}"
            return f"{self._rule(body, is_lexeme=True)} {self._lark(end)}"
        tail = self._lark(stop)
        body = body if is_plain else f"({body} & ~(/(?s:.*)/ {tail} /(?s:.*)/))"
        return f"{self._rule(f'{body} {tail}', '[lazy]')} {self._lark(end[len(stop) :])}"

    def _whole(self, pattern: str) -> str:
        """A pattern that is found anywhere, as one of the whole text."""
        inner = pattern.removeprefix("^").removesuffix("$")
        is_begun, is_ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        if (is_begun or is_ended) and _has_open_choice(inner):
            raise self._refused("a pattern with ^ or $ in one of several alternatives")
        inner = inner if is_ended or not pattern.endswith("$") else pattern.removeprefix("^")
        return ("" if is_begun else "(?s:.*)") + f"({inner})" + ("" if is_ended else "(?s:.*)")

    # Values that tell themselves where they end.

    def _value(self, schema: Any, depth: int) -> str:
        if schema is True or schema == {}:
            return self._any_value()
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            raise self._refused("a schema that allows nothing, or is too deep")
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in self._of_refs:
                name = self._of_refs[reference] = f"{self._prefix}_ref{len(self._of_refs)}"
                self.rules.append(f"{name}: {self._value(resolve(schema, self._root), depth + 1)}")
            return self._of_refs[reference]
        options = self._simple(schema, depth, follow=False)
        if options != [schema]:
            return "(" + " | ".join(self._value(option, depth + 1) for option in options) + ")"
        if "const" in schema:
            return self._lark(self._pairs.value(schema["const"]))
        types = json_types(schema, self._root)
        if types is None:
            self._check(schema, _KNOWN)
            return self._any_value()
        (kind,) = types
        true, false, null = (json.dumps(word) for word in self._pairs.words)
        if kind == "string":
            return self._string(schema)
        if kind in NUMBERS:
            return "%json " + json.dumps(dict(schema))
        if kind in ("boolean", "null"):
            self._check(schema, _KNOWN)
            return null if kind == "null" else f"({true} | {false})"
        return self._array(schema, depth) if kind == "array" else self._object(schema, depth)

    def _string(self, schema: Mapping[str, Any]) -> str:
        if self._pairs.kind == "json":
            return "%json " + json.dumps({**schema, "type": "string"})
        return f"{self._lark(self._pairs.quote)} {self._text(schema, self._pairs.quote)}"

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        self._check(schema, _OF_ARRAYS)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if least > MAX_COUNT or (most is not None and (most > MAX_COUNT or most < least)):
            raise self._refused(f"minItems {least}, maxItems {most}")
        if most == 0:
            return '"[]"'
        item = self._rule(self._value(schema.get("items", True), depth + 1))
        separator = self._lark(self._pairs.item_separator)
        count = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = f"{item} ({separator} {item}){count}"
        return f'"[" {some} "]"' if least else f'"[" ({some})? "]"'

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        pairs = self._pairs

        def pair(key: str | None, value: Any) -> str:
            if key is not None:
                if pairs.bare_keys and not re.fullmatch(_NAME.strip("/"), key):
                    raise self._refused(f"the name {key!r:.80}, which needs quotes")
                written = key if pairs.bare_keys else json.dumps(key, ensure_ascii=False)
                return f"{self._lark(written + pairs.key_separator)} {self._value(value, depth + 1)}"
            name = self._new_key(schema)
            quoted = name if pairs.bare_keys else f'"\\"" {name} "\\""'
            return f"{quoted} {self._lark(pairs.key_separator)} {self._value(value, depth + 1)}"

        return f'"{{" {self._members(schema, pair, self._lark(pairs.item_separator))} "}}"'

    def _any_value(self) -> str:
        if not self._any:
            pairs, name = self._pairs, f"{self._prefix}_any"
            self._any = name
            item, colon = self._lark(pairs.item_separator), self._lark(pairs.key_separator)
            key = self._rule(_NAME, is_lexeme=True)
            member = f"{key if pairs.bare_keys else self._string({})} {colon} {name}"
            words = " | ".join(json.dumps(word) for word in pairs.words)
            self.rules.append(
                f'{name}: {self._string({})} | {words} | %json {{"type": "number"}}'
                f' | "[" ({name} ({item} {name})*)? "]" | "{{" ({member} ({item} {member})*)? "}}"'
            )
        return self._any


def _has_open_choice(pattern: str) -> bool:
    """Whether a pattern has alternatives outside of all brackets."""
    depth, in_class, is_escaped = 0, False, False
    for character in pattern:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            return True
    return False


def _escaped(pattern: str) -> str:
    """A pattern between slashes."""
    return re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
