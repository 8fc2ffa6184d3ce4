"""The chunks of a body, taken apart (RFC 9112, 7.1): a token is a chunk, and h11 takes longer for one than all else."""

from __future__ import annotations

MAX_LINE_BYTES = 256
MAX_TRAILERS = 100
MAX_CHUNK_BYTES = 64 << 20

_DIGITS = frozenset(b"0123456789abcdefABCDEF")


class BadChunk(Exception):
    """What came is no chunk; the message goes on from "sent"."""


class ChunkedBody:
    """A body from bytes as they come. Extensions of chunks and trailers are skipped."""

    def __init__(self, data: bytes) -> None:
        self.is_over = False  # all of it has come
        self._rest = bytearray(data)
        self._num_left = 0  # bytes of the chunk that is being read, its line end included
        self._has_last = False  # the chunk of no bytes has come, and trailers may
        self._num_trailers = 0

    def receive(self, data: bytes) -> None:
        """Take more bytes."""
        self._rest += data

    def take(self) -> bytes:
        """What has come of the next chunk; nothing where more must come, or all has. Raises `BadChunk`."""
        while not self.is_over:
            if self._num_left:
                if not self._rest:
                    break
                if data := self._take_data():
                    return data
                continue
            line = self._take_line()
            if line is None:
                break
            if self._has_last:
                self.is_over = not line
                self._num_trailers += 1
                if self._num_trailers > MAX_TRAILERS:
                    raise BadChunk("trailers without an end")
                continue
            self._num_left = _size(line) + 2
            if self._num_left == 2:
                self._has_last, self._num_left = True, 0
        return b""

    def _take_data(self) -> bytes:
        """Some of the chunk that is being read."""
        found = bytes(self._rest[: self._num_left])
        del self._rest[: self._num_left]
        num_data = max(0, self._num_left - 2)
        self._num_left -= len(found)
        data, end = found[:num_data], found[num_data:]
        is_right = b"\r\n".startswith(end) if self._num_left else b"\r\n".endswith(end)
        if not is_right:
            raise BadChunk("a chunk that is longer than it says")
        return data

    def _take_line(self) -> bytes | None:
        at = self._rest.find(b"\r\n")
        if at > MAX_LINE_BYTES or (at < 0 and len(self._rest) > MAX_LINE_BYTES):
            raise BadChunk("a chunk's head without an end")
        if at < 0:
            return None
        line = bytes(self._rest[:at])
        del self._rest[: at + 2]
        return line


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or len(digits) > 16 or not _DIGITS.issuperset(digits):
        raise BadChunk("a chunk without a size")
    size = int(digits, 16)
    if size > MAX_CHUNK_BYTES:
        raise BadChunk(f"a chunk of {size:,} bytes")
    return size
