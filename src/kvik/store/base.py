"""What every store is, and what is kept in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from kvik.cache.digest import Digest


class Fault(StrEnum):
    """Why a stored block is not used."""

    MISSING = "it is not stored"
    UNREADABLE = "it cannot be read"
    NO_FILE = "it is no regular file"
    SIZE = "it is of another size"
    MAGIC = "it is no stored block"
    VERSION = "it is of another version"
    ALGORITHM = "it is sealed in another way"
    SCOPE = "it is of another model or format"
    FIELDS = "it is another block"
    TAG = "its bytes have changed"


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One sealed block: its name, what the name was made of, and its keys and values."""

    digest: Digest
    parent: Digest  # the block before it, or the root
    first_position: int  # of its tokens; 0: the parent is the root
    tokens: bytes  # an int32 each
    payload: bytes | memoryview  # the block's bytes in each group of layers, in the groups' order


@dataclass(slots=True)
class StoreStats:
    """What a store was asked and what it did, since it was opened."""

    num_hits: int = 0
    num_written: int = 0
    num_evicted: int = 0  # for the quota
    num_errors: int = 0  # of the file system or the network
    read_bytes: int = 0
    written_bytes: int = 0
    num_kept: int | None = None  # blocks of all models in the same place; None: not yet counted
    kept_bytes: int | None = None
    faults: Counter[Fault] = field(default_factory=Counter)  # of what was asked for and not given


class Store(Protocol):
    """Where blocks of one model, in one format, outlive the process. Threads may share it; no call raises `OSError`.

    What `get` gives is whole, of the name that was asked for, and checked after it was copied from where others could
    change it.
    """

    stats: StoreStats

    def get(self, digest: Digest) -> StoredBlock | Fault:
        """A block, or why there is none."""

    def read(self, digests: Sequence[Digest], seconds: float | None) -> Generator[StoredBlock | Fault, None, None]:
        """Blocks of a path in order; where one cannot be given, its fault, and that is the last.

        A store that may be slow spends so many seconds at most; None: nobody knows how long would be too long.
        """

    def put(self, block: StoredBlock) -> bool:
        """Keep a block; False where the store cannot now. One that is there already is left as it is."""

    def exists(self, digest: Digest) -> bool:
        """Whether something may go by this name, as far as can be known at once; `get` says whether it is any good."""

    def exists_many(self, digests: Sequence[Digest]) -> int:
        """How many of them exist, up to the first that does not; where the store must be asked, this waits."""

    def delete(self, digest: Digest) -> bool:
        """Forget a block; False where there is none."""

    def tidy(self) -> None:
        """Do what is due beside: called now and then, where waiting for it harms nobody."""

    def used(self, digests: Sequence[Digest]) -> None:
        """These blocks, a path from its beginning, were wanted: they are evicted later, the last of them first."""

    def close(self) -> None:
        """Nothing more will be asked of it but what is under way."""


def read_each(store: Store, digests: Sequence[Digest]) -> Generator[StoredBlock | Fault, None, None]:
    """`Store.read` of a store that is never slow."""
    for digest in digests:
        found = store.get(digest)
        yield found
        if isinstance(found, Fault):
            return
