"""One request on its way through the front: to a replica, and where that dies to another one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from starlette.types import Message, Scope, Send

from kvik.client.http import Address, Connection, Response
from kvik.cluster import Replica, RoutedRequest, Ticket
from kvik.errors import RemoteError
from kvik.server.errors import ApiError, is_anthropic_path
from kvik.server.front.relay import Broken, Differs, Relay
from kvik.server.origin import HEADER, Origin, encode_tokens
from kvik.server.sse import event

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 << 20
"""Of one that is no stream: it is kept until it is whole, so that another replica can be asked."""

WAIT_S, LOOK_S = 30.0, 0.1
"""How long a request whose replica has died waits for another one, and how often it looks."""

MAX_DEATHS = 4
"""Replicas that may die one after the other without a new token of a request: it might be what kills them."""

_DROPPED = frozenset(
    {"host", "origin", "connection", "content-length", "transfer-encoding", "accept-encoding", "keep-alive", "te"}
    | {"upgrade", "trailer", "x-request-id", "expect", "proxy-connection", HEADER}
)
_ENDS = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive", "x-request-id"})


class Replicas(Protocol):
    """What a request asks of the front."""

    def choose(self, request: RoutedRequest, tried: Sequence[Replica]) -> tuple[Ticket, Address]:
        """The replica for a request, which is counted there. Raises `ApiError` 503."""

    def connection_to(self, address: Address) -> Connection:
        """One that nobody uses."""

    def give_back(self, connection: Connection) -> None:
        """Nobody uses it any more."""


def no_replica() -> ApiError:
    """Nobody is there who could answer."""
    return ApiError(503, "no replica takes requests now (hint: /health tells how they are)", code="no_replica")


class Job:
    """Asks one replica after the other until one has answered.

    All are told the same origin, so that they write the same; of a stream they are told the tokens that are known.
    """

    def __init__(
        self, replicas: Replicas, scope: Scope, send: Send, request: RoutedRequest, body: bytes, *, is_stream: bool
    ) -> None:
        self._replicas = replicas
        self._send = send
        self._write: Send = scope["state"]["write"]  # past what only cares for beginning and end
        self._request = request
        self._body = body
        self._path: str = scope["path"]
        self._method: str = scope["method"]
        self._name: str = scope["state"]["request_id"]
        query = scope["query_string"].decode("latin-1")
        self._target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        named = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        self._headers = {name: value for name, value in named if name not in _DROPPED} | {"x-request-id": self._name}
        self._origin = Origin()
        self._relay = Relay() if is_stream else None
        self.has_head = False  # whether the client has the answer's
        self._give_up_s = 0.0  # until when it waits for a replica: not at all, before it has lost one

    async def run(self) -> None:
        """Until it is answered. Raises `ApiError` before the answer has begun."""
        tried: list[Replica] = []
        num_deaths, num_events = 0, 0
        try:
            while True:
                ticket, address = await self._choose(tried)
                try:
                    if await self._ask(address, ticket):
                        return
                except (RemoteError, Broken) as error:
                    log.warning("%s: %s has failed: %s", self._name, ticket.replica.id, error)
                    if self._relay is not None and self._relay.num_events > num_events:
                        num_deaths, num_events, self._give_up_s = 0, self._relay.num_events, 0.0
                    self._give_up_s = self._give_up_s or time.monotonic() + WAIT_S
                    num_deaths += not (isinstance(error, RemoteError) and error.kind == "connect")
                    if num_deaths == MAX_DEATHS:
                        raise
                finally:
                    ticket.end()
                tried.append(ticket.replica)
                if self._relay is not None:
                    self._relay.restart()
        except (ApiError, RemoteError, Broken, Differs) as error:
            if not self.has_head:
                raise error if isinstance(error, ApiError) else _failed() from error
            log.error("%s: a stream ends early: %s", self._name, error)
            await self._part(self._failure())
            await self._part(b"", is_last=True)

    async def _choose(self, tried: list[Replica]) -> tuple[Ticket, Address]:
        """A replica; who has lost one waits for another, and then asks again those that took nothing.

        Raises `ApiError` 503.
        """
        while True:
            try:
                return self._replicas.choose(self._request, tried)
            except ApiError:
                if time.monotonic() >= self._give_up_s:
                    raise
            await asyncio.sleep(LOOK_S)
            tried.clear()

    async def _ask(self, address: Address, ticket: Ticket) -> bool:
        """Whether the replica has answered; False where it takes nothing. Raises `RemoteError`, `Broken`, `Differs`."""
        headers, body = self._headers, self._body
        if self._method == "POST":
            tokens = b"" if self._relay is None else encode_tokens(self._relay.written)
            headers, body = headers | {HEADER: self._origin.header(len(tokens))}, body + tokens
        connection = self._replicas.connection_to(address)
        try:
            answer = await connection.request(self._method, self._target, headers, body)
            takes_nothing = answer.status == 503 or (answer.status == 429 and self.has_head)
            if takes_nothing:
                await answer.read(MAX_ANSWER_BYTES)
            elif answer.headers.get("content-type", "").startswith("text/event-stream"):
                await self._copy_stream(answer, ticket)
            else:
                await self._copy_whole(answer, ticket)
        except BaseException:
            connection.close()
            raise
        self._replicas.give_back(connection)
        return not takes_nothing

    async def _copy_whole(self, answer: Response, ticket: Ticket) -> None:
        body = await answer.read(MAX_ANSWER_BYTES)
        if self.has_head:
            raise Differs(f"the answer had begun elsewhere, and here it is refused with {answer.status}")
        ticket.first_token(time.monotonic())
        headers = _passed_on(answer)
        if self._method == "HEAD":
            body = b""
        else:
            headers["content-length"] = str(len(body))
        await self._begin(answer.status, headers)
        await self._part(body, is_last=True)

    async def _copy_stream(self, answer: Response, ticket: Ticket) -> None:
        relay = self._relay
        if relay is None:
            raise Broken("it streams what was not to be streamed")
        while (data := await answer.next_data()) is not None:
            ticket.first_token(time.monotonic())
            data = relay.feed(data)
            if not self.has_head:
                await self._begin(answer.status, _passed_on(answer))
            if data:
                await self._part(data)
            if relay.failure is not None:
                raise relay.failure
        if not relay.is_over:
            raise Broken("it has ended its stream early")
        await self._part(b"", is_last=True)

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.has_head = True
        await self._send(head(status, headers))

    async def _part(self, data: bytes, *, is_last: bool = False) -> None:
        send = self._send if is_last else self._write
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    def _failure(self) -> bytes:
        """The last event of a stream that nobody can go on with."""
        error = _failed()
        if is_anthropic_path(self._path):
            return event(error.anthropic(), "error")
        if self._path.startswith("/v1/responses"):
            return event({"type": "error", "code": error.code, "message": error.message, "param": None}, "error")
        return event(error.openai()) + b"data: [DONE]\n\n"


def head(status: int, headers: dict[str, str]) -> Message:
    """The beginning of an answer."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _passed_on(answer: Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in _ENDS}


def _failed() -> ApiError:
    return ApiError(
        503,
        "the replicas that had this request have failed, and no other can go on with it (hint: send it again)",
        code="replica_failed",
    )
