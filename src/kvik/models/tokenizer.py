"""Text to token ids and back, whatever file the vocabulary comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from kvik.errors import InvalidInput

END_NAMES = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        *("</s>", "<|end|>", "<end_of_turn>", "<EOT>"),
    )
)
"""Control tokens that end a turn or a text by their name, where the file names no other."""

SPACE_MARK = "\u2581"
"""What a SentencePiece vocabulary writes for a space."""


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def lacking_bytes(vocabulary: Iterable[str]) -> bytes:
    """Bytes that text may have and for which a byte-level vocabulary has no token."""
    return bytes({byte for character, byte in BYTE_OF.items() if character not in vocabulary} - _NEVER_IN_UTF8)


def byte_level_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one outside the byte alphabet stands for itself."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def require_unicode(text: str) -> None:
    """Raise InvalidInput for text that has half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the text has half a surrogate pair, {text[error.start]!r}, at character {error.start:,}",
            hint="send well-formed Unicode",
        ) from error


def require_bytes(text: str, unencodable: bytes) -> None:
    """Raise InvalidInput for text with bytes that the BPE library would leave out without a word."""
    data = text.encode()
    if unencodable and len(data.translate(None, unencodable)) != len(data):
        byte = next(byte for byte in data if byte in unencodable)
        raise InvalidInput(
            f"the model's vocabulary has no token for byte 0x{byte:02X} of the text",
            hint="remove control characters and unassigned code points from the text",
        )


class Tokenizer(ABC):
    """One model's vocabulary: exact, immutable and safe to share between threads."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: frozenset[int]  # every token that ends a turn or a text
    add_space_prefix: bool  # SentencePiece: each stretch of text starts with a space that decoding takes off again
    special_token_ids: frozenset[int]  # control and unknown tokens: no text of their own

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        `add_special` puts BOS before and EOS after where the model's file says so. `parse_special` reads the names of
        control tokens in the text as those tokens; without it they are text like any other, which no user can break
        out of. User-defined tokens are found either way. Raises InvalidInput for text that the vocabulary cannot hold.
        """

    @abstractmethod
    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What `token_id` adds to a text: UTF-8, perhaps only a part of a character; nothing for a control token."""

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in token_ids)
        if self.add_space_prefix:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token for display: on one line, control tokens by name, stray bytes and control characters escaped."""
        text = self.token_bytes(token_id, skip_special=False).decode(errors="backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def require_token(self, token_id: int) -> None:
        """Raise InvalidInput for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise InvalidInput(
                f"token id {token_id:,} is outside the vocabulary of {self.vocab_size:,}",
                hint="use the token ids of this model's own tokenizer",
            )
