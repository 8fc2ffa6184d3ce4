"""Where the arguments of a call end that are an object of JSON."""

from __future__ import annotations

from kvik.text.marked_text import MARKS


class JsonArguments:
    """Arguments that are an object of JSON, up to its end."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, text: str) -> tuple[int, str, bool]:
        """How much of the text belongs to the object, without marks, and whether it ends there."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self._escaped = character == "\\"
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1, MARKS.sub("", text[: at + 1]), True
        return len(text), MARKS.sub("", text), False
