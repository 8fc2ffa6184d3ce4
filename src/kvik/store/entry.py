"""The bytes of one stored block, as docs/store.md describes them."""

from __future__ import annotations

import hmac
from hashlib import sha256
from struct import Struct

from kvik.cache.digest import DIGEST_BYTES, Digest, next_digest
from kvik.store.base import Fault, StoredBlock

MAGIC = b"KVIKBLK\n"
VERSION = 1
CHECKSUM, MAC = 1, 2
"""Algorithms of the tag: SHA-256, and HMAC-SHA-256 of a key that the server's secret gives."""

# magic, version, algorithm, number of tokens, scope, digest, parent, first position, bytes of payload, reserved; tag.
_FIELDS = Struct(f"<8sHHI{DIGEST_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}sQQ16x")
TAG_BYTES = 32
HEADER_BYTES = _FIELDS.size + TAG_BYTES


class BadEntry(Exception):
    """What was read is not the block that was asked for."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


def entry_bytes(num_tokens: int, payload_bytes: int) -> int:
    """The length of a block's file."""
    return HEADER_BYTES + 4 * num_tokens + payload_bytes


def encode(block: StoredBlock, scope: Digest, key: bytes) -> list[bytes | memoryview]:
    """The file of a block in parts, in order; tagged with the key, or with a checksum where there is none."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        MAC if key else CHECKSUM,
        len(block.tokens) // 4,
        scope,
        block.digest,
        block.parent,
        block.first_position,
        len(block.payload),
    )
    return [fields, tag_of(key, fields, block.tokens, block.payload), block.tokens, block.payload]


def decode(data: bytes, scope: Digest, digest: Digest, key: bytes) -> StoredBlock:
    """The block of a file that was copied whole. Raises `BadEntry`.

    Every field is compared with what it must be before the tag is; nothing in the file decides how much work is done.
    """
    view = memoryview(data)
    if len(data) < HEADER_BYTES:
        raise BadEntry(Fault.SIZE)
    magic, version, algorithm, num_tokens, of_scope, of_digest, parent, first_position, payload_bytes = (
        _FIELDS.unpack_from(data)
    )
    if magic != MAGIC:
        raise BadEntry(Fault.MAGIC)
    if version != VERSION:
        raise BadEntry(Fault.VERSION)
    if algorithm != (MAC if key else CHECKSUM):
        raise BadEntry(Fault.ALGORITHM)
    if len(data) != entry_bytes(num_tokens, payload_bytes):
        raise BadEntry(Fault.SIZE)
    if of_scope != scope:
        raise BadEntry(Fault.SCOPE)
    payload_at = HEADER_BYTES + 4 * num_tokens
    tokens = data[HEADER_BYTES:payload_at]
    if of_digest != digest or next_digest(parent, tokens) != digest:
        raise BadEntry(Fault.FIELDS)
    fields, tag = view[: _FIELDS.size], view[_FIELDS.size : HEADER_BYTES]
    if not hmac.compare_digest(tag_of(key, fields, view[HEADER_BYTES:]), tag):
        raise BadEntry(Fault.TAG)
    return StoredBlock(digest, parent, first_position, tokens, view[payload_at:])


def tag_of(key: bytes, *parts: bytes | memoryview) -> bytes:
    """What shows that bytes are those that were written: a checksum, or with a key what nobody else can make."""
    state = hmac.new(key, digestmod=sha256) if key else sha256()
    for part in parts:
        state.update(part)
    return state.digest()
