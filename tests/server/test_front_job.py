"""One request on its way through the front, past replicas that do what none should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvik.client.http import Address, Connection
from kvik.cluster import Cost, Replica, RoutedRequest, Router, Ticket
from kvik.server.errors import ApiError
from kvik.server.front import job as job_module
from kvik.server.front.job import Job, no_replica
from kvik.server.origin import HEADER

pytestmark = pytest.mark.tiny

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"stream":true}'


def part(text: str) -> bytes:
    data = b'data: {"choices":[{"index":0,"text":"%b"}]}\n\n' % text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


END = whole(b"data: [DONE]\n\n")
REFUSAL = b'{"error":{"code":"x"}}'


def plain(status: str) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(REFUSAL), REFUSAL)


class Fakes:
    """Replicas on sockets, each of which answers everything with the same bytes and closes."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.router = Router(Cost())
        self.answers = answers
        self.asked: list[bytes] = []
        self.addresses: dict[str, Address] = {}

    async def begin(self) -> list[asyncio.Server]:
        servers = []
        for at, answer in enumerate(self.answers):
            server = await asyncio.start_server(self._handler(answer), "127.0.0.1", 0)
            self.addresses[self.router.add(str(at), prefill_tokens_s=1.0, max_guessed=10).id] = Address(
                "127.0.0.1", server.sockets[0].getsockname()[1]
            )
            servers.append(server)
        return servers

    def choose(self, request: RoutedRequest, tried: Sequence[Replica]) -> tuple[Ticket, Address]:
        replica = self.router.choose(request, tried)
        if replica is None:
            raise no_replica()
        return self.router.send(request, replica, 0.0), self.addresses[replica.id]

    def connection_to(self, address: Address) -> Connection:
        return Connection(address, timeout_s=5.0)

    def give_back(self, connection: Connection) -> None:
        connection.close()

    def _handler(self, answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.asked.append(head + await reader.readexactly(length))
            writer.write(answer)
            await writer.drain()
            writer.close()

        return handle


def run(*answers: bytes, path: str = "/v1/completions", body: bytes = BODY) -> tuple[list[dict[str, Any]], Fakes]:
    """The messages of a job, and what its replicas were asked."""
    fakes = Fakes(answers)
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def main() -> None:
        servers = await fakes.begin()
        state = {"request_id": "req-1", "write": send}
        headers = [(b"x-kvik-answer", b"forged"), (b"authorization", b"Bearer secret")]
        scope = {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        request = RoutedRequest([], 10, 1)
        try:
            await Job(fakes, {**scope, "state": state}, send, request, body, is_stream=b"true" in body).run()
        finally:
            for server in servers:
                server.close()

    asyncio.run(main())
    assert all(replica.num_in_flight == 0 for replica in fakes.router.replicas)
    return messages, fakes


def text_of(messages: list[dict[str, Any]]) -> bytes:
    assert messages[0]["status"] == 200
    assert not messages[-1]["more_body"]
    return b"".join(each["body"] for each in messages[1:])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "WAIT_S", 0.2)
    monkeypatch.setattr(job_module, "LOOK_S", 0.01)


def test_the_second_replica_is_told_what_is_known() -> None:
    marker = whole(b": tokens [[0,5]]\n\n")[:-5]
    messages, fakes = run(STREAM + part("a") + marker, STREAM + part("a") + part("b") + END)
    assert text_of(messages).count(b"data: ") == 3
    first, second = fakes.asked
    assert first.endswith(BODY)
    assert second.endswith(BODY + b"[[5]]")
    origins = [each.partition(HEADER.encode())[2].split(b"\r\n")[0].rpartition(b":")[0] for each in fakes.asked]
    assert origins[0] == origins[1]
    assert b"forged" not in first
    assert b"Bearer secret" in first


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(
    "second",
    [STREAM + part("x") + END, plain("400 Bad Request"), plain("503 Busy"), plain("429 Full"), STREAM, b"no HTTP"],
    ids=["differs", "refused", "busy", "full", "empty", "garbage"],
)
def test_what_cannot_be_resumed_ends_in_an_error(path: str, second: bytes) -> None:
    messages, _ = run(STREAM + part("a"), second, path=path)
    told = text_of(messages)
    assert b"data: [DONE]" not in told.partition(b"error")[0]
    (error,) = [json.loads(line[6:]) for line in told.split(b"\n") if line.startswith(b"data: {") and b"error" in line]
    assert "failed" in json.dumps(error)


def test_a_request_that_kills_replicas_is_given_up() -> None:
    with pytest.raises(ApiError) as refused:
        run(*[b""] * 8)
    assert (refused.value.status, refused.value.code) == (503, "replica_failed")
    assert "retry-after" in refused.value.headers
    with pytest.raises(ApiError):
        run(*[b""] * 8, body=b"{}")


def test_refusals_of_the_request_are_the_clients() -> None:
    messages, fakes = run(plain("400 Bad Request"))
    assert messages[0]["status"] == 400
    assert messages[1]["body"] == REFUSAL
    assert len(fakes.asked) == 1


def test_a_replica_that_takes_nothing_is_passed_over() -> None:
    messages, fakes = run(plain("503 Busy"), plain("200 OK"), body=b"{}")
    assert messages[0]["status"] == 200
    assert len(fakes.asked) == 2
    with pytest.raises(ApiError, match="no replica"):
        run(plain("503 Busy"))
