"""OpenAI's chat and text completions as a client sees them: requests, streamed answers, what a server says of costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvik.client.http import MAX_EVENT_BYTES, Connection, EventParser, EventTooLarge, Response
from kvik.errors import InvalidInput, RemoteError

MAX_ERROR_BYTES = 1 << 16
MAX_MODELS_BYTES = 4 << 20
MAX_ANSWER_BYTES = 64 << 20  # of all events of one answer
MAX_KEY_LENGTH = 4096
MAX_COUNT = 2**53
POLL_S = 0.05

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

HINTS = {
    400: "the server does not take the request as it is; its message says why",
    401: "give the server's key: set KVIK_API_KEY, or --api-key",
    403: "the server does not allow this; see its key and its allowed hosts",
    404: "see what the server has at /v1/models, and choose by -m; or see the path in --url",
    413: "the request is larger than the server takes; give a shorter prompt",
    422: "the server does not take the request as it is; its message says why",
    429: "the server has too many requests; try again later, or with fewer at once",
    503: "the server is loading, draining or full; try again later",
}


class Delta(msgspec.Struct):
    """What is new in a chunk of a chat."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name of it


class Choice(msgspec.Struct):
    """A chunk's part of the one completion."""

    delta: Delta | None = None
    text: str | None = None  # of /v1/completions
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class Chunk(msgspec.Struct):
    """One event; fields that are not named here are skipped without building them."""

    choices: list[Choice] | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None  # of llama.cpp
    error: Any = None


class ModelName(msgspec.Struct):
    """An entry of /v1/models."""

    id: str


class ModelList(msgspec.Struct):
    """What /v1/models answers."""

    data: list[ModelName]


DECODE_CHUNK = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class Reply:
    """An answer as it came so far; times are those of `time.perf_counter`."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    text_times_s: list[float] = field(default_factory=list)  # of each chunk with text, reasoning included
    logprobs: list[Any] = field(default_factory=list)  # as the server sent them, one a chunk that has some
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    server_timing: str | None = None  # the header

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def num_prompt_tokens(self) -> int | None:
        """As the server counted them; None where it did not say."""
        found = _count(self.usage, "prompt_tokens")
        computed, cached = _count(self.timings, "prompt_n"), _count(self.timings, "cache_n")
        return found if found is not None or computed is None else computed + (cached or 0)

    @property
    def num_cached_tokens(self) -> int | None:
        """Of the prompt, found in the server's cache; None where it did not say."""
        details = (self.usage or {}).get("prompt_tokens_details")
        found = _count(details if isinstance(details, dict) else None, "cached_tokens")
        return found if found is not None else _count(self.timings, "cache_n")

    @property
    def num_completion_tokens(self) -> int | None:
        """As the server counted them; None where it did not say."""
        found = _count(self.usage, "completion_tokens")
        return found if found is not None else _count(self.timings, "predicted_n")

    @property
    def time_per_token_s(self) -> float | None:
        """Seconds of each token after the first; chunks stand for tokens where the server did not count."""
        count = self.num_completion_tokens or len(self.text_times_s)
        if count < 2 or len(self.text_times_s) < 2:
            return None
        return (self.text_times_s[-1] - self.text_times_s[0]) / (count - 1)

    def take(self, chunk: Chunk, now_s: float) -> str:
        """Add what came; returns its text."""
        self.usage = chunk.usage or self.usage
        self.timings = chunk.timings or self.timings
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = choice.delta
        text = choice.text if delta is None else delta.content
        thought = None if delta is None else delta.reasoning_content or delta.reasoning
        if choice.logprobs != b"null":
            self.logprobs.append(msgspec.json.decode(choice.logprobs))
        if thought:
            self.reasoning.append(thought)
        if text:
            self.texts.append(text)
        if text or thought:
            self.text_times_s.append(now_s)
        return text or ""


class Server:
    """What is asked of one server, whatever the connection: its paths, the key, and errors in plain words."""

    def __init__(self, api_key: str | None = None) -> None:
        self._headers = {"content-type": "application/json", "user-agent": "kvik"}
        if api_key:
            if len(api_key) > MAX_KEY_LENGTH or not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
                raise InvalidInput("the API key has characters that no key has", hint="see KVIK_API_KEY and --api-key")
            self._headers["authorization"] = f"Bearer {api_key}"

    async def get(self, connection: Connection, path: str) -> Response:
        """An answer that is none of errors, not yet read. Raises `RemoteError`."""
        response = await connection.request("GET", path, self._headers)
        await _check_status(connection, response)
        return response

    async def first_model(self, connection: Connection) -> str:
        """The first of the server's models. Raises `RemoteError`."""
        response = await self.get(connection, "/v1/models")
        try:
            models = msgspec.json.decode(await response.read(MAX_MODELS_BYTES), type=ModelList).data
        except (msgspec.DecodeError, RecursionError) as error:
            raise connection.error("not JSON", f"has a list of models that is none: {error}") from None
        if not models:
            raise connection.error("no model", "has no model", "load one in the server, or name one with -m")
        return models[0].id

    async def ask(
        self,
        connection: Connection,
        path: str,
        body: Mapping[str, Any],
        reply: Reply,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Send the request and fill `reply` as its answer comes, which begins empty. Raises `RemoteError`."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        response = await connection.request("POST", path, self._headers, msgspec.json.encode({**body, **stream}))
        await _check_status(connection, response)
        reply.server_timing = response.headers.get("server-timing")
        kind = response.headers.get("content-type", "text/event-stream")
        if not kind.startswith("text/event-stream"):
            connection.close()
            raise connection.error("no stream", f"answers with {kind!r:.60} where a stream of events was asked for")
        try:
            await self._read(connection, response, reply, on_text)
        except BaseException:
            connection.close()
            raise

    async def _read(
        self, connection: Connection, response: Response, reply: Reply, on_text: Callable[[str], None] | None
    ) -> None:
        parser, num_bytes, is_done = EventParser(), 0, False
        while (data := await response.next_data()) is not None:
            now_s = time.perf_counter()
            num_bytes += len(data)
            if num_bytes > MAX_ANSWER_BYTES:
                raise connection.error("too large", f"sent an answer of more than {MAX_ANSWER_BYTES:,} bytes")
            try:
                for event in parser.feed(data):
                    if event == b"[DONE]":
                        is_done = True
                        continue
                    chunk = DECODE_CHUNK(event)
                    if chunk.error:
                        message = _message_of(chunk.error)
                        hint = "see the server's own log for why"
                        raise connection.error("error event", f"ended the stream with an error: {message}", hint)
                    text = reply.take(chunk, now_s)
                    if text and on_text is not None:
                        on_text(text)
            except (msgspec.DecodeError, RecursionError) as error:
                raise connection.error("not JSON", f"sent an event that is no chunk of an answer: {error}") from None
            except EventTooLarge:
                raise connection.error("too large", f"sent an event of more than {MAX_EVENT_BYTES:,} bytes") from None
        if not is_done and reply.finish_reason is None:
            raise connection.error("disconnected", "ended the stream before its answer was whole")


async def until_stopped(work: Coroutine[Any, Any, None], should_stop: Callable[[], bool]) -> bool:
    """Do the work, and tell whether it came to its end; where `should_stop` says so it is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if should_stop():
                task.cancel()
            await asyncio.wait({task}, timeout=POLL_S)
    finally:
        task.cancel()
    if task.cancelled():
        return False
    task.result()
    return True


async def _check_status(connection: Connection, response: Response) -> None:
    """Raise `RemoteError` with the server's own message for an answer that is none."""
    status = response.status
    if status == 200:
        return
    body = await response.read(MAX_ERROR_BYTES)
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        said = body.decode("utf-8", "replace").strip()[:200]
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
    wait = response.headers.get("retry-after")
    where = response.headers.get("location")
    hint = HINTS.get(status, "see the server's own log for why" if status >= 500 else "see that --url is right")
    hint = f"give this --url: {where:.200}" if where else hint
    raise RemoteError(
        f"{connection.address} answers {status}" + (f": {_message_of(said)}" if said else ""),
        hint=hint + (f" (Retry-After: {wait:.40} s)" if wait else ""),
        kind=f"HTTP {status}",
        status=status,
    )


def _message_of(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return message[:1000] if isinstance(message, str) else str(error)[:1000]


def _count(values: Mapping[str, Any] | None, name: str) -> int | None:
    number = (values or {}).get(name)
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MAX_COUNT else None
