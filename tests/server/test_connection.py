"""Chunks that the server frames itself are h11's, byte for byte, and nothing else is touched."""

from __future__ import annotations

import h11
import pytest

from kvik.server.connection import ChunkedConnection

pytestmark = pytest.mark.tiny

PARTS = [b"data: 1\n\n", b"", b"x" * 70_000, b"\r\n0\r\n\r\n", bytes(range(256))]


def written(
    connection: h11.Connection, request: bytes, headers: list[tuple[bytes, bytes]], parts: list[bytes]
) -> bytes:
    """The answer to a request, which is read first."""
    connection.receive_data(request)
    while type(connection.next_event()) is not h11.EndOfMessage:
        pass
    events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=part) for part in parts)]
    return b"".join(connection.send(event) or b"" for event in (*events, h11.EndOfMessage()))


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("has_length", [False, True])
def test_every_framing_is_that_of_h11(method: bytes, version: bytes, has_length: bool) -> None:
    request = method + b" / HTTP/" + version + b"\r\nHost: a\r\n\r\n"
    headers = [(b"Content-Length", b"%d" % sum(map(len, PARTS)))] if has_length else []
    parts = [b""] if method == b"HEAD" else PARTS  # uvicorn sends no body to a HEAD
    answers = [written(each(h11.SERVER), request, headers, parts) for each in (h11.Connection, ChunkedConnection)]
    assert answers[0] == answers[1]
    assert (b"chunked" in answers[1]) == (version == b"1.1" and not has_length)


def test_answers_on_one_connection_are_framed_each_in_its_way() -> None:
    """A chunked one, one with a length, a chunked one again; what comes too late is refused as ever."""
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    answers = []
    for make in (h11.Connection, ChunkedConnection):
        connection, found = make(h11.SERVER), b""
        for headers in ([], [(b"content-length", b"3")], [(b"x-text", b"transfer-encoding: chunked")]):
            found += written(connection, request, headers, [b"abc"])
            connection.start_next_cycle()
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(data=b"late"))
        answers.append(found)
    assert answers[0] == answers[1]
