"""Text to token ids and back: what every tokenizer offers, whichever file its vocabulary came from.

`tokenizer_gguf` builds one from the metadata of a GGUF file, `tokenizer_json` from a checkpoint folder.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from kvik.errors import InvalidInput

log = logging.getLogger(__name__)

# Text is found to end with one of these, if it is a control token, whether or not the files say so.
END_NAMES = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        *("</s>", "<|end|>", "<end_of_turn>", "<EOT>", "<turn|>", "<|tool_response>"),
    )
)
HARMONY_ENDS = frozenset(("<|return|>", "<|call|>"))
"""What ends a turn of the harmony format, in which `<|end|>` stands between its messages."""


def all_ends(given: Iterable[int], special: Mapping[str, int]) -> frozenset[int]:
    """The tokens that end a text: those that the files give, and those of the control tokens that do by their names."""
    names = END_NAMES
    if special.keys() >= HARMONY_ENDS:
        names = END_NAMES - {"<|end|>"} | HARMONY_ENDS
        given = [token_id for token_id in given if token_id != special.get("<|end|>")]
    return frozenset(given) | {special[name] for name in names if name in special}


class Tokenizer(ABC):
    """One model's vocabulary: exact, immutable and safe to share between threads."""

    vocab_size: int  # every token's id is below it
    bos_token_id: int | None
    eos_token_ids: frozenset[int]  # every token that ends a turn or a text
    chat_bos_token_id: int | None = None  # that a conversation begins with even where its template forgot it
    special_token_ids: frozenset[int]  # control and unknown tokens: no text of their own

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        `add_special` puts BOS before and EOS after where the model's file says so. `parse_special` reads the names of
        control tokens in the text as those tokens; without it they are text like any other, which no user can break
        out of. User-defined tokens are found either way. Raises InvalidInput for text that the vocabulary cannot hold.
        """

    @abstractmethod
    def token_bytes(self, token_id: int, *, skip_special: bool = True, starts_text: bool = False) -> bytes:
        """What `token_id` adds to a text: UTF-8, perhaps only a part of a character; nothing for a control token.

        `starts_text` says that nothing came before it: some vocabularies start each text with a space that decoding
        takes off again.
        """

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        parts = [self.token_bytes(token_id, skip_special=skip_special) for token_id in token_ids]
        first = next((index for index, part in enumerate(parts) if part), None)
        if first is not None:
            parts[first] = self.token_bytes(token_ids[first], skip_special=skip_special, starts_text=True)
        return b"".join(parts).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token for display: on one line, control tokens by name, stray bytes and control characters escaped."""
        text = self.token_bytes(token_id, skip_special=False).decode(errors="backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_text(text: str) -> None:
    """Raise InvalidInput for text that is not well-formed Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the text has half a surrogate pair, {text[error.start]!r}, at character {error.start:,}",
            hint="send well-formed Unicode",
        ) from error


def check_token_id(token_id: int, vocab_size: int) -> None:
    """Raise InvalidInput for an id that no token can have."""
    if not 0 <= token_id < vocab_size:
        raise InvalidInput(
            f"token id {token_id:,} is outside the vocabulary of {vocab_size:,}",
            hint="use the token ids of this model's own tokenizer",
        )


def no_token_for_byte(byte: int) -> InvalidInput:
    """The error for text with a byte that the vocabulary lacks, which the library would leave out without a word."""
    return InvalidInput(
        f"the model's vocabulary has no token for byte 0x{byte:02X} of the text",
        hint="remove control characters and unassigned code points from the text",
    )


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, backwards)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = byte_alphabet()
NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def byte_level_bytes(text: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; one outside the byte alphabet stands for itself."""
    try:
        return bytes([BYTE_OF[character] for character in text])
    except KeyError:
        return text.encode()


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(text: str) -> bytes | None:
    """The byte that a token is for by its name, as `<0x0A>`; None for any other name."""
    match = _BYTE_TOKEN.fullmatch(text)
    return None if match is None else bytes.fromhex(match[1])


def missing_bytes(characters: set[str]) -> bytes:
    """The bytes that UTF-8 may hold and that none of a byte-level vocabulary's single characters stands for."""
    return bytes({byte for character, byte in BYTE_OF.items() if character not in characters} - NEVER_IN_UTF8)


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_special: bool = True) -> list[int]:
    """Token ids of a prompt; the log warns where it begins with two BOS tokens, which no model was trained on."""
    token_ids = tokenizer.encode(text, add_special=add_special)
    bos = tokenizer.bos_token_id
    if bos is not None and token_ids[:2] == [bos, bos]:
        name = tokenizer.token_bytes(bos, skip_special=False).decode(errors="replace")
        log.warning("the prompt begins with %s twice: the model's file puts one there; leave it out of the text", name)
    return token_ids
