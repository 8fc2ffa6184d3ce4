"""Blocks to be stored, and a store in a dictionary."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from kvik.cache import Digest, Identity
from kvik.cache.digest import next_digest
from kvik.cache.tables import packed
from kvik.store import Fault, StoredBlock, StoreStats
from kvik.store.base import read_each
from kvik.store.files import FileStore

IDENTITY = Identity(b"weights", "native 1")
SCOPE = IDENTITY.scope("f16")
PAYLOAD = 1000


def a_path(count: int, seed: int = 0, root: Digest | None = None) -> list[StoredBlock]:
    """Blocks of 32 random tokens with random bytes, each behind the one before it."""
    chance = random.Random(seed)
    parent = IDENTITY.root("f16") if root is None else root
    blocks = []
    for index in range(count):
        tokens = packed([chance.randrange(50_000) for _ in range(32)])
        digest = next_digest(parent, tokens)
        blocks.append(StoredBlock(digest, parent, 32 * index, tokens, chance.randbytes(PAYLOAD)))
        parent = digest
    return blocks


def open_store(root: Path, **options: Any) -> FileStore:
    settings: dict[str, Any] = {"scope": SCOPE, "num_tokens": 32, "payload_bytes": PAYLOAD}
    return FileStore(root, **(settings | options))


def same(found: StoredBlock | Fault, block: StoredBlock) -> bool:
    """Whether a block came back as it was put."""
    assert isinstance(found, StoredBlock), found
    names = ("digest", "parent", "first_position", "tokens")
    return bytes(found.payload) == bytes(block.payload) and all(getattr(found, n) == getattr(block, n) for n in names)


class DictStore:
    """A store that keeps blocks as they are, and can be told to be slow to answer, to forget and to lie."""

    def __init__(self) -> None:
        self.stats = StoreStats()
        self.blocks: dict[Digest, StoredBlock] = {}
        self.is_full = False
        self.num_gets = 0

    def get(self, digest: Digest) -> StoredBlock | Fault:
        self.num_gets += 1
        return self.blocks.get(digest, Fault.MISSING)

    def read(self, digests: Sequence[Digest], seconds: float | None) -> Generator[StoredBlock | Fault, None, None]:
        return read_each(self, digests)

    def put(self, block: StoredBlock) -> bool:
        if not self.is_full:
            self.blocks.setdefault(block.digest, block)
        return not self.is_full

    def exists(self, digest: Digest) -> bool:
        return digest in self.blocks

    def exists_many(self, digests: Sequence[Digest]) -> int:
        return next((index for index, digest in enumerate(digests) if digest not in self.blocks), len(digests))

    def delete(self, digest: Digest) -> bool:
        return self.blocks.pop(digest, None) is not None

    def used(self, digests: Sequence[Digest]) -> None:
        """Nothing is evicted."""

    def tidy(self) -> None:
        """Nor is anything to tidy."""

    def close(self) -> None:
        """Nor to close."""
