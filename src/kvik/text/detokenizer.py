"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs

from kvik.text.tokenizer import Tokenizer


class Detokenizer:
    """Give each token's text as soon as its characters are whole.

    All that `add` and `finish` return, joined, is `tokenizer.decode` of the same ids. A character that is spread over
    several tokens comes with the last of them; `finish` returns U+FFFD for one that never became whole. With
    `continues_text` the tokens follow others, so that a space at their beginning is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._starts_text = not continues_text

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes, often all of its own, sometimes none."""
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if self._starts_text and data:
            data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special, starts_text=True)
            self._starts_text = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._decoder.decode(b"", final=True)
