"""Chunked bodies, however they are cut on their way, and what is none."""

from __future__ import annotations

import pytest

from kvik.client.chunks import MAX_CHUNK_BYTES, BadChunk, ChunkedBody

pytestmark = pytest.mark.tiny

BODY = b"3\r\nabc\r\n0A;name=value\r\n0123456789\r\n1\r\n\n\r\n0\r\ntrailer: x\r\n\r\n"
WHOLE = b"abc0123456789\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
def test_it_is_the_same_however_it_is_cut(size: int) -> None:
    body, parts = ChunkedBody(b""), list[bytes]()
    for at in range(0, len(BODY), size):
        assert not body.is_over
        body.receive(BODY[at : at + size])
        while data := body.take():
            parts.append(data)
    assert b"".join(parts) == WHOLE
    assert body.is_over
    assert size < len(BODY) or parts == [b"abc", b"0123456789", b"\n"]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"-1\r\n",
        b"0x3\r\nabc\r\n",
        b"1_0\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n\n",
        b"x" * 300,
        b"1;" + b"x" * 300 + b"\r\n",
        b"%x\r\n" % (MAX_CHUNK_BYTES + 1),
        b"f" * 40 + b"\r\n",
        b"0\r\n" + b"t" * 300,
        b"0\r\n" + b"t: x\r\n" * 200,
    ],
)
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    body = ChunkedBody(data)

    def take_all() -> None:
        while body.take():
            pass

    with pytest.raises(BadChunk):
        take_all()
