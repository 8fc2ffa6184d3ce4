"""What the chunks of chats and of completions have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from kvik.engine.output import Piece, Progress
from kvik.server.errors import ApiError
from kvik.server.event_stream import EventWriter
from kvik.server.fields import StreamOptions
from kvik.server.generation import Running
from kvik.server.sse import encode, event

DONE = b"data: [DONE]\n\n"


class OpenAIWriter(EventWriter):
    """Chunks with `choices`; the parts that do not change are encoded once."""

    def __init__(
        self,
        running: Running,
        options: StreamOptions | None,
        *,
        prefix: str,
        kind: str,
        with_token_ids: bool | None,
    ) -> None:
        super().__init__(running)
        # Of each choice, those that no chunk has told yet.
        self._token_ids: list[list[int]] | None = [[] for _ in running.branches] if with_token_ids else None
        self._is_continuous = options is not None and options.continuous_usage_stats
        self._ends_with_usage = options is not None and options.include_usage
        self._num_unfinished = len(running.branches)
        self._head: dict[str, Any] = {
            "id": running.new_id(prefix),
            "object": kind,
            "created": running.created,
            "model": running.served.id,
            "system_fingerprint": running.served.fingerprint,
        }
        running.response_id = self._head["id"]
        self._before = b"data: " + encode(self._head)[:-1] + b',"choices":['
        self._after = b',"usage":null}\n\n' if self._ends_with_usage else b"}\n\n"

    def chunk(self, choice: bytes, others: bytes = b"") -> bytes:
        """One event with one choice, or none, and further fields."""
        return self._before + choice + b"]" + others + self._tail()

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events of one step's pieces; with token ids, each choice's next chunk has those that came up to it."""
        if self._token_ids is None:
            return super().pieces(pieces)
        parts = []
        for piece in pieces:
            self._token_ids[piece.index].append(piece.token_id)
            parts.append(super().pieces([piece]))
        return b"".join(parts)

    def new_token_ids(self, index: int) -> dict[str, Sequence[int]]:
        """The field with the token ids that a choice has not told yet, where they are asked for."""
        if self._token_ids is None:
            return {}
        found, self._token_ids[index] = self._token_ids[index], []
        return {"token_ids": found}

    def encoded_token_ids(self, index: int) -> bytes:
        """The same, to follow other fields in JSON."""
        fields = self.new_token_ids(index)
        return b"," + encode(fields)[1:-1] if fields else b""

    def progress(self, progress: Progress) -> bytes:
        """llama.cpp's `prompt_progress`."""
        report = {
            "total": progress.num_total,
            "cache": progress.num_cached,
            "processed": progress.num_processed,
            "time_ms": round(progress.elapsed_s * 1000),
        }
        return self.chunk(b"", b',"prompt_progress":' + encode(report))

    @abstractmethod
    def finished_choice(self, index: int) -> dict[str, Any]:
        """The last of a choice: its finish reason, and no text."""

    def finish(self, index: int, piece: Piece) -> bytes:
        """A choice's last chunk; the last one of all also has what `end` tells, unless a chunk with usage follows."""
        chunk: dict[str, Any] = self._head | {"choices": [self.finished_choice(index) | self.new_token_ids(index)]}
        if self._is_continuous or self._ends_with_usage:
            chunk["usage"] = self.running.usage().openai() if self._is_continuous else None
        self._num_unfinished -= 1
        if not self._num_unfinished and not self._ends_with_usage:
            chunk |= self._last()
        return event(chunk)

    def end(self) -> bytes:
        """Usage where it is asked for, and the end."""
        if not self._ends_with_usage:
            return DONE
        return event(self._head | {"choices": [], "usage": self.running.usage().openai(), **self._last()}) + DONE

    def error(self, error: ApiError) -> bytes:
        """The error as an event, and the end."""
        return event(error.openai()) + DONE

    def _last(self) -> dict[str, Any]:
        return {"timings": self.running.timings(), **self.running.extras()}

    def _tail(self) -> bytes:
        if not self._is_continuous:
            return self._after
        return b',"usage":' + encode(self.running.usage().openai()) + b"}\n\n"
