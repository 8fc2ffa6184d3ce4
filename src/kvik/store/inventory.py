"""What lies in a store's folder, whoever wrote it: for `kvik cache`."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvik.cache.digest import DIGEST_BYTES
from kvik.store import disk
from kvik.store.base import Fault
from kvik.store.entry import HEADER_BYTES, BadEntry, decode
from kvik.store.files import ABOUT, BLOCKS, QUARANTINE, SESSIONS, VERSION_FOLDER, put_aside

MAX_ABOUT_BYTES = 1 << 16
MAX_ENTRY_BYTES = 1 << 31

NUM_VERIFIERS = 2


@dataclass(frozen=True, slots=True)
class ScopeView:
    """The blocks of one model in one format."""

    scope: str  # in hex
    about: dict[str, Any]  # as its engine wrote it; nobody vouches for it
    num_blocks: int
    num_bytes: int
    first_used_s: float | None  # when the block was last wanted that was wanted longest ago
    last_used_s: float | None
    num_sessions: int
    num_quarantined: int

    @property
    def model(self) -> str:
        """The name of its model's file, as far as it is known."""
        name = self.about.get("model")
        return Path(name).name if isinstance(name, str) else "unknown"


@dataclass(slots=True)
class Verified:
    """What reading every block again has shown."""

    num_blocks: int = 0
    num_bytes: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)


def scopes(root: Path) -> list[ScopeView]:
    """All that is stored in a folder. Raises `OSError`."""
    return [_view(folder) for folder in disk.folders_in(str(root / VERSION_FOLDER)) if _is_scope(folder)]


def block_files(root: Path, scope: str) -> Iterator[str]:
    """Paths of a scope's blocks."""
    for folder in disk.folders_in(f"{root / VERSION_FOLDER}/{scope}/{BLOCKS}"):
        yield from (entry.path for entry in disk.files_in(folder) if not entry.name.startswith(disk.PARTIAL))


def verify(root: Path, scope: str, key: bytes, advance: Callable[[int], None] = lambda num_bytes: None) -> Verified:
    """Read each block of a scope and check all of it; what is bad is put aside."""
    verified = Verified()

    def check(path: str) -> tuple[int, Fault | None]:
        try:
            data = disk.read_whole(path, HEADER_BYTES, MAX_ENTRY_BYTES)
            decode(data, bytes.fromhex(scope), _digest_of(path), key)
        except BadEntry as error:
            return 0, error.fault
        except FileNotFoundError:
            return 0, None  # evicted meanwhile
        except OSError:
            return 0, Fault.UNREADABLE
        return len(data), None

    with ThreadPoolExecutor(NUM_VERIFIERS) as pool:
        paths = list(block_files(root, scope))
        for path, (num_bytes, fault) in zip(paths, pool.map(check, paths), strict=True):
            verified.num_blocks += 1
            verified.num_bytes += num_bytes
            advance(num_bytes)
            if fault is not None:
                verified.faults[fault] += 1
                # Another secret's blocks are good to those who know it.
                if fault not in (Fault.UNREADABLE, Fault.ALGORITHM) and not (key and fault is Fault.TAG):
                    put_aside(path, root / VERSION_FOLDER / scope / QUARANTINE, fault)
    return verified


def remove_scope(root: Path, scope: str) -> None:
    """Forget all of a model's blocks and sessions. Raises `OSError`."""
    shutil.rmtree(root / VERSION_FOLDER / scope)


def _view(folder: str) -> ScopeView:
    statuses = []
    for shard in disk.folders_in(f"{folder}/{BLOCKS}"):
        for entry in disk.files_in(shard):
            if not entry.name.startswith(disk.PARTIAL):
                statuses.append(entry.stat(follow_symlinks=False))
    times = [status.st_mtime for status in statuses]
    return ScopeView(
        scope=os.path.basename(folder),
        about=_about(f"{folder}/{ABOUT}"),
        num_blocks=len(statuses),
        num_bytes=sum(status.st_size for status in statuses),
        first_used_s=min(times, default=None),
        last_used_s=max(times, default=None),
        num_sessions=sum(1 for owner in disk.folders_in(f"{folder}/{SESSIONS}") for _ in disk.files_in(owner)),
        num_quarantined=sum(1 for _ in disk.files_in(f"{folder}/{QUARANTINE}")),
    )


def _about(path: str) -> dict[str, Any]:
    try:
        found = json.loads(disk.read_whole(path, 0, MAX_ABOUT_BYTES))
    except (OSError, BadEntry, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_scope(folder: str) -> bool:
    name = os.path.basename(folder)
    return len(name) == 2 * DIGEST_BYTES and all(letter in "0123456789abcdef" for letter in name)


def _digest_of(path: str) -> bytes:
    try:
        return bytes.fromhex(os.path.basename(path))
    except ValueError:
        raise BadEntry(Fault.FIELDS) from None
