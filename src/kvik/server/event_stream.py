"""A completion as server-sent events: one write for each step, pings while it is silent, an end in any case."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from kvik.engine.output import Piece, Progress, TokenLogprobs
from kvik.engine.token_stream import TokenStream
from kvik.server.errors import ApiError, api_error, client_left
from kvik.server.generation import Running
from kvik.server.origin import TOKENS
from kvik.server.sse import encode, left
from kvik.text.answer_events import AnswerEvent, ArgumentsDelta, CallBegin, CallEnd, TextDelta, ThoughtDelta

log = logging.getLogger(__name__)

PING = b": ping\n\n"


class EventWriter(ABC):
    """One route's form of what is written: each method gives the bytes of whole events."""

    def __init__(self, running: Running) -> None:
        self.running = running

    @abstractmethod
    def begin(self) -> bytes:
        """What comes before all pieces."""

    def progress(self, progress: Progress) -> bytes:
        """How far the prompt is."""
        return b""

    @abstractmethod
    def text(self, index: int, text: str, logprobs: TokenLogprobs | None) -> bytes:
        """More text of a choice, and the logprobs of the token that brought it, where they were asked for."""

    @abstractmethod
    def finish(self, index: int, piece: Piece) -> bytes:
        """A choice is whole."""

    @abstractmethod
    def end(self) -> bytes:
        """All choices are."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """It went wrong after the answer had begun."""

    ping = PING
    shows_ends = False  # whether tokens that only end the text have logprobs

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events of one step's pieces."""
        parts = []
        for piece in pieces:
            logprobs = piece.logprobs
            if (
                logprobs is not None
                and not self.shows_ends
                and ends_text(self.running, piece.token_id, piece.finish_reason)
            ):
                logprobs = None
            parts.append(self.written(piece, logprobs))
            if piece.finish_reason is not None and piece.completion is not None:
                parts.append(self.finish(piece.index, piece))
        return b"".join(parts)

    def written(self, piece: Piece, logprobs: TokenLogprobs | None) -> bytes:
        """The events of one token, its choice's end aside."""
        return self.text(piece.index, piece.text, logprobs) if piece.text or logprobs is not None else b""


class CallWriter(EventWriter):
    """Of a route whose answers may think and call tools."""

    @abstractmethod
    def thought(self, index: int, event: ThoughtDelta) -> bytes:
        """More of what a choice thinks before its answer."""

    @abstractmethod
    def call_begin(self, index: int, event: CallBegin) -> bytes:
        """A choice calls a tool."""

    @abstractmethod
    def call_arguments(self, index: int, event: ArgumentsDelta) -> bytes:
        """More of the arguments of a choice's call."""

    @abstractmethod
    def call_end(self, index: int, event: CallEnd) -> bytes:
        """A choice's call is whole."""

    def written(self, piece: Piece, logprobs: TokenLogprobs | None) -> bytes:
        """The events of one token: text, or parts of thoughts and calls."""
        if self.running.parsers is None:
            return super().written(piece, logprobs)
        parser = self.running.parsers[piece.index]
        events = parser.feed(piece.token_id, piece.text)
        if piece.finish_reason is not None:
            events += parser.finish()
        # The logprobs are those of what may be held back, or a part of a call.
        told = b"" if logprobs is None else self.text(piece.index, "", logprobs)
        return told + b"".join(self._event(piece.index, event) for event in events)

    def _event(self, index: int, event: AnswerEvent) -> bytes:
        match event:
            case TextDelta():
                return self.text(index, event.text, None)
            case ThoughtDelta():
                return self.thought(index, event)
            case CallBegin():
                return self.call_begin(index, event)
            case ArgumentsDelta():
                return self.call_arguments(index, event)
        return self.call_end(index, event)


class EventStream:
    """The ASGI answer that streams.

    What goes wrong before the first event is an ordinary HTTP error, which the gate makes of the exception. The scope's
    state has the `stream` while it is written: once that is done, the server ends the connection of who does not read.
    Its `write` sends parts of a body past the layers that only care for an answer's beginning and its end.
    """

    def __init__(self, running: Running, writer: EventWriter, *, ping_s: float, headers: dict[str, str]) -> None:
        self._running = running
        self._writer = writer
        self._ping_s = ping_s
        self._headers = headers
        self._has_head = False  # whether its status is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until all is written, it goes wrong or the client leaves."""
        scope["state"]["stream"] = self._running.stream
        writing = asyncio.ensure_future(self._write(send, scope["state"]["write"]))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
            elif not self._has_head:
                raise client_left()
        finally:
            leaving.cancel()
            writing.cancel()
            self._running.stream.close()
            del scope["state"]["stream"]
            await asyncio.wait((writing, leaving))
            for told in self._running.generation.on_end:
                told(self._running)

    async def _write(self, send: Send, write: Send) -> None:
        stream, writer = self._running.stream, self._writer
        has_begun = False

        async def send_head() -> None:
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "server-timing": self._running.server_timing(),
                **self._headers,
            }
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            self._has_head = True
            await send({"type": "http.response.start", "status": 200, "headers": raw})

        tokens_of = _tokens if self._running.generation.tells_tokens else _no_tokens
        alarm = _Alarm(stream, self._ping_s)
        try:
            while True:
                pieces = await stream.read()
                if has_begun and not (stream.progress or stream.is_done) and pieces:  # as nearly always
                    alarm.was_heard = True
                    if data := writer.pieces(pieces) + tokens_of(pieces):
                        await write({"type": "http.response.body", "body": data, "more_body": True})
                    continue
                is_over = not pieces and stream.is_done
                if pieces or stream.progress or is_over:
                    data = b"" if has_begun else writer.begin()
                    has_begun = True
                    data += b"".join(map(writer.progress, stream.progress))
                    stream.progress.clear()
                    if stream.is_done:
                        await self._running.settle()
                    data += writer.pieces(pieces) + tokens_of(pieces)
                    if is_over:
                        self._running.completions()  # raises what went wrong
                        data += writer.end()
                else:  # what the first event tells of the cache is not known yet
                    data = writer.ping
                if not self._has_head:
                    await send_head()
                alarm.was_heard = True
                if data:
                    await write({"type": "http.response.body", "body": data, "more_body": True})
                if is_over:
                    break
        except Exception as error:
            told = api_error(error, self._running.generation.fields)
            if not self._has_head:
                raise told from error
            log.warning("%s: a stream ended with %s", self._running.generation.request_id, type(error).__name__)
            await send({"type": "http.response.body", "body": writer.error(told), "more_body": True})
        finally:
            alarm.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _tokens(pieces: Sequence[Piece]) -> bytes:
    """The comment that tells a front what a step's pieces are."""
    return TOKENS + encode([(piece.index, piece.token_id) for piece in pieces]) + b"\n\n" if pieces else b""


def _no_tokens(pieces: Sequence[Piece]) -> bytes:
    return b""


class _Alarm:
    """Wakes who reads a stream that is silent for some seconds."""

    def __init__(self, stream: TokenStream, seconds: float) -> None:
        self.was_heard = True  # set with each write: that costs less than to look at the clock
        self._stream = stream
        self._seconds = seconds / 2
        self._timer = stream.loop.call_later(self._seconds, self._ring)

    def cancel(self) -> None:
        """Never again."""
        self._timer.cancel()

    def _ring(self) -> None:
        if not self.was_heard:
            self._stream.wake()
        self.was_heard = False
        self._timer = self._stream.loop.call_later(self._seconds, self._ring)


def ends_text(running: Running, token_id: int, finish_reason: str | None) -> bool:
    """Whether the token only ended the text, so that its logprobs are not those of any text."""
    return finish_reason == "stop" and not running.served.llm.model.tokenizer.token_bytes(token_id)


def floor(logprob: float) -> float:
    """JSON has no minus infinity."""
    return max(logprob, -9999.0)


def logprobs_entry(running: Running, entry: TokenLogprobs) -> dict[str, Any]:
    """One token's logprobs as chat and Responses have them."""
    tokenizer = running.served.llm.model.tokenizer

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id, skip_special=False)
        return {"token": data.decode(errors="replace"), "logprob": floor(logprob), "bytes": list(data)}

    return {
        **token(entry.token_id, entry.logprob),
        "top_logprobs": [token(token_id, logprob) for token_id, logprob in entry.top.items()],
    }
