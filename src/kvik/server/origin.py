"""What an answer's ids, its time and its draws follow from, so that another process can write the same answer again."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

import msgspec
from starlette.requests import Request

from kvik.server.errors import ApiError

HEADER = "x-kvik-answer"
"""Of a front's requests to its replicas: key in hexadecimal, time, and how many bytes of the body are tokens."""

KEY_BYTES = 16
MAX_TOKENS_BYTES = 8 << 20
"""Of the tokens behind a body, which a replica takes beside its largest body."""

TOKENS = b": tokens "
"""Begins the comment behind a step's events that tells a front which tokens they are of: [[choice, token id], ...]."""

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Origin:
    """Made for each answer; the same one gives the same ids and draws."""

    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    created: int = field(default_factory=lambda: int(time.time()))
    written: Sequence[Sequence[int]] = ()  # by choice: tokens that another process has sampled
    is_told: bool = False  # by a front, which wants to know the tokens

    def new_ids(self) -> Callable[[str], str]:
        """Gives one id after the other, which begin as they are told to."""
        numbers = count()
        return lambda prefix: prefix + self._digest(f"id {next(numbers)}").hex()[:24]

    def new_call_ids(self, choice: int) -> Callable[[int], str]:
        """Gives one id after the other of a choice's calls, of so many letters and digits."""
        numbers = count()

        def new_id(length: int) -> str:
            number = next(numbers)
            drawn = b"".join(self._digest(f"call {choice} {number} {part}") for part in range(-(-length // 32)))
            return "".join(_LETTERS[byte % len(_LETTERS)] for byte in drawn[:length])

        return new_id

    def seed(self, prompt: int) -> int:
        """That a prompt's completions are drawn with, where the request has none."""
        return int.from_bytes(self._digest(f"seed {prompt}")[:8])

    def header(self, num_token_bytes: int) -> str:
        """The value of `HEADER`."""
        return f"{self.key.hex()}:{self.created}:{num_token_bytes}"

    def _digest(self, name: str) -> bytes:
        return blake2b(name.encode(), key=self.key, digest_size=32).digest()


def told_origin(request: Request, body: bytes) -> tuple[Origin, bytes]:
    """What a front says of an answer, and the body without it. Raises `ApiError`."""
    told = request.headers.get(HEADER)
    if told is None:
        return Origin(), body
    try:
        key, created, num_bytes = told.split(":")
        at = len(body) - int(num_bytes)
        written = msgspec.json.decode(body[at:], type=list[list[int]]) if at < len(body) else ()
        return Origin(bytes.fromhex(key), int(created), written, is_told=True), body[:at]
    except (ValueError, msgspec.MsgspecError):
        raise ApiError(400, f"the header {HEADER} is malformed", code="invalid_value") from None


def encode_tokens(written: Sequence[Sequence[int]]) -> bytes:
    """What a front puts behind the body; nothing where there are no tokens."""
    return msgspec.json.encode(written) if any(written) else b""
