"""What a completion shall look like, bounded before anybody compiles it; `grammar_compiler` does that.

A grammar is text from strangers. How long its compilation takes does not follow from its length, so what is counted
here (bytes, nodes, depth) stands before the compiler's own limits.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvik.errors import InvalidGrammar

Kind = Literal["json_schema", "regex", "lark"]
Code = Literal["invalid_json_schema", "invalid_grammar", "grammar_too_complex"]

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_SCHEMA_NODES = 2000
"""Objects, arrays and values of a JSON schema."""

MAX_COUNTED_NODES = 100_000
"""A document with so many is not taken for a schema at all."""

MAX_SCHEMA_DEPTH = 60
MAX_CHOICES = 2000
MAX_INT_BITS = 1024

_FEWER_NODES = f"give at most {MAX_SCHEMA_NODES:,} objects, arrays and values"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion must look like; made by one of the class methods, which check the size of its text.

    They raise `InvalidGrammar`. Other errors in the grammar show when it is compiled.
    """

    kind: Kind
    text: str
    before: str | None = None  # Lark whose rule `@answer` is this grammar; `after` sets it

    @property
    def num_bytes(self) -> int:
        """Bytes of its text."""
        return len(self.text.encode()) + len((self.before or "").encode())

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that is valid by a schema, its properties in the schema's order."""
        if not isinstance(schema, Mapping | bool):
            raise _invalid("invalid_json_schema", f"the schema is {reprlib.repr(schema)}", "give an object or a bool")
        schema = schema if isinstance(schema, bool) else dict(schema)
        _check_nodes(schema)
        if isinstance(schema, dict) and "x-guidance" in schema:
            raise _invalid("invalid_json_schema", "the schema has x-guidance, which would weaken it", "leave it out")
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValueError as error:
            raise _invalid("invalid_json_schema", f"the schema is not JSON: {error}", "give plain JSON") from None
        return cls._checked("json_schema", "the schema", text, "invalid_json_schema")

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole: Rust's syntax, no look-around, no back references."""
        return cls._checked("regex", "the pattern", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of these texts."""
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not all(isinstance(each, str) for each in texts)
        ):
            raise _invalid("invalid_grammar", f"choice is {reprlib.repr(texts)}", "give a list of texts")
        if not texts or not all(texts):
            raise _invalid("invalid_grammar", "choice has an empty text, or none at all", "give at least one character")
        if len(texts) > MAX_CHOICES:
            raise _too_complex(f"choice has {len(texts):,} texts", f"give at most {MAX_CHOICES:,}")
        literals = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
        return cls._checked("lark", "choice", f"start: {' | '.join(literals)}")

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Text of a context-free grammar in llguidance's variant of Lark; special tokens are written as `<name>`."""
        return cls._checked("lark", "the grammar", grammar)

    def after(self, rules: str) -> Grammar:
        """The same behind other text: rules in Lark, of which `@answer` is this grammar."""
        return replace(self, before=rules)

    @classmethod
    def _checked(cls, kind: Kind, name: str, text: str, code: Code = "invalid_grammar") -> Grammar:
        if not isinstance(text, str):
            raise _invalid(code, f"{name} is {reprlib.repr(text)}", "give text")
        if len(text) > MAX_GRAMMAR_BYTES:  # at least as many bytes, which need not be made
            raise _too_long(name, len(text))
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise _invalid(code, f"{name} has half a surrogate pair", "send well-formed Unicode") from None
        if size > MAX_GRAMMAR_BYTES:
            raise _too_long(name, size)
        return cls(kind, text)


def _check_nodes(schema: Any) -> None:
    """Raise `InvalidGrammar` for what is too large or no JSON, before anything walks it without a bound."""
    num_nodes = depth = 0
    level = [schema]
    while level and num_nodes < MAX_COUNTED_NODES:
        num_nodes += len(level)
        depth += 1
        below: list[Any] = []
        for node in level:
            below += _children(node)
            if len(below) >= MAX_COUNTED_NODES:
                break
        level = below
    if num_nodes >= MAX_COUNTED_NODES:
        raise _invalid("invalid_json_schema", f"the schema has {MAX_COUNTED_NODES:,} nodes or more", _FEWER_NODES)
    if num_nodes > MAX_SCHEMA_NODES:
        raise _too_complex(f"the schema has {num_nodes:,} nodes", _FEWER_NODES)
    if depth > MAX_SCHEMA_DEPTH:
        raise _too_complex(f"the schema is {depth:,} levels deep", f"nest at most {MAX_SCHEMA_DEPTH}")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        if not all(isinstance(key, str) for key in node):
            raise _invalid("invalid_json_schema", "a key of the schema is no text", "give plain JSON")
        return node.values()
    if isinstance(node, list | tuple):
        return node
    # Python refuses to write out integers of thousands of digits.
    if node is None or isinstance(node, str | float | bool) or (isinstance(node, int) and abs(node) < 2**MAX_INT_BITS):
        return ()
    raise _invalid("invalid_json_schema", f"the schema holds a {type(node).__name__}", "give plain JSON")


def _invalid(code: Code, message: str, hint: str) -> InvalidGrammar:
    return InvalidGrammar(message, hint=hint, code=code)


def _too_complex(message: str, hint: str) -> InvalidGrammar:
    return _invalid("grammar_too_complex", message, hint)


def _too_long(name: str, size: int) -> InvalidGrammar:
    return _too_complex(f"{name} has {size:,} bytes or more", f"give at most {MAX_GRAMMAR_BYTES:,}")
