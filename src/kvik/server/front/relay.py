"""A stream of events on its way to a client: another replica may write its end, and the client sees no difference."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from kvik.server.origin import TOKENS

MAX_EVENT_BYTES = 16 << 20

_DONE = b"data: [DONE]"
_LASTS = (b"event: message_stop\n", b"event: response.completed\n", b"event: response.incomplete\n")
_CHOICE = re.compile(rb'\[\{"index":(\d+)')
_FAILURES = frozenset({"shutting_down", "engine_dead", "engine_hung", "overloaded_error"})
"""Errors of the replica's, not of the request's."""

_VOLATILE = frozenset({"usage", "timings", "completed_at", "diagnostics", "prompt_cache_breakpoints"})
"""What two runs of one request may tell differently: times, and what was found in the cache."""


class Broken(Exception):
    """The replica will not write the end."""


class Differs(Exception):
    """Another replica writes something else: that cannot be, and the client must not see it."""


class _Chunk(msgspec.Struct):
    """An event of chats and completions."""

    choices: msgspec.Raw = msgspec.Raw()
    prompt_progress: msgspec.Raw = msgspec.Raw()
    error: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode, _encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
_decode_tokens = msgspec.json.Decoder(list[tuple[int, int]]).decode


class Relay:
    """What came of one answer, and how far the client has it.

    Whoever takes the answer up writes it from its beginning, the tokens that are known without computing them one by
    one. Events that the client has are compared and left out. They are counted by choice, for two runs may mix those of
    several choices differently.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.failure: Broken | Differs | None = None  # behind what the client has
        self._rest = b""  # of an event that has no end yet
        self._seen: defaultdict[int, list[bytes]] = defaultdict(list)  # by choice, digests of what the client has
        self._num_again: Counter[int] = Counter()  # by choice, events that came from who writes now
        self._tokens: defaultdict[int, list[int]] = defaultdict(list)  # by choice
        self._num_told: Counter[int] = Counter()  # by choice, tokens that came from who writes now

    @property
    def num_events(self) -> int:
        """That the client has, comments aside."""
        return sum(map(len, self._seen.values()))

    @property
    def written(self) -> Sequence[Sequence[int]]:
        """The tokens that are known, by choice."""
        return [self._tokens[choice] for choice in range(max(self._tokens, default=-1) + 1)]

    def restart(self) -> None:
        """Another replica writes the whole answer again."""
        self._rest, self.failure = b"", None
        self._num_again.clear()
        self._num_told.clear()

    def feed(self, data: bytes) -> bytes:
        """The events for the client in what the replica sent, up to the one that was its `failure`."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        news: list[bytes] = []
        try:
            for each in events:
                if self._is_news(each):
                    news += (each, b"\n\n")
            if len(self._rest) > MAX_EVENT_BYTES:
                raise Broken("it sends an event without an end")
        except (Broken, Differs) as error:
            self.failure = error
        except (msgspec.MsgspecError, ValueError, LookupError):
            self.failure = Broken("it sends what is no event")
        return b"".join(news)

    def _is_news(self, event: bytes) -> bool:
        """Whether the client gets an event."""
        if event.startswith(TOKENS):
            self._note_tokens(event[len(TOKENS) :])
            return False
        if event.startswith(b"data: {"):
            chunk = _decode_chunk(event[6:])
            if chunk.error is not None:
                self._check_error(chunk.error)
                return True
            if bytes(chunk.prompt_progress):
                return self._is_all_again
            choices = bytes(chunk.choices)
            found = _CHOICE.match(choices)
            # What it cost in the end is of no choice.
            return self._is_new_part(int(found[1]) if found else -1, blake2b(choices, digest_size=16).digest())
        if not event.startswith(b"event: "):
            self.is_over |= event == _DONE
            return True  # a comment, which says that somebody works on it; or the end
        if event == b'event: ping\ndata: {"type":"ping"}':
            return self._is_all_again
        self.is_over |= event.startswith(_LASTS)
        fields = _decode(event[event.index(b"\ndata: ") + 7 :])
        if fields["type"] == "error":
            self._check_error(fields if "code" in fields else fields["error"])
            self.is_over = True
            return True
        return self._is_new_part(0, blake2b(_encode(_lasting(fields)), digest_size=16).digest())

    def _note_tokens(self, told: bytes) -> None:
        for choice, token_id in _decode_tokens(told):
            self._num_told[choice] += 1
            if self._num_told[choice] > len(self._tokens[choice]):
                self._tokens[choice].append(token_id)

    def _is_new_part(self, choice: int, digest: bytes) -> bool:
        seen, at = self._seen[choice], self._num_again[choice]
        self._num_again[choice] += 1
        if at == len(seen):
            seen.append(digest)
            return True
        if seen[at] != digest:
            raise Differs(f"event {at} of choice {choice} is another one")
        return False

    @property
    def _is_all_again(self) -> bool:
        """Whether who writes now has come as far as the client."""
        return all(self._num_again[choice] >= len(seen) for choice, seen in self._seen.items())

    @staticmethod
    def _check_error(error: dict[str, Any]) -> None:
        if _FAILURES & {error.get("code"), error.get("type")}:
            raise Broken(str(error.get("message")))


def _lasting(fields: dict[str, Any]) -> dict[str, Any]:
    """An event's fields, without those that are volatile."""
    for each in (fields, fields.get("message"), fields.get("response")):
        if isinstance(each, dict):
            for name in _VOLATILE & each.keys():
                del each[name]
    return fields
