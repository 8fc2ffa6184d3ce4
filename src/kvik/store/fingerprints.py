"""What weights are called: a digest of their files, remembered for as long as the files stay as they are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from kvik.errors import ModelError
from kvik.store import disk
from kvik.store.entry import BadEntry

MEMORY = "fingerprints.json"
MAX_MEMORY_BYTES = 1 << 20
MAX_REMEMBERED = 1000

CHUNK_BYTES = 1 << 20


SETTLED_S = 2.0
"""A file changed a shorter time ago may change again and keep its times: some disks keep them that coarsely."""

Advance = Callable[[int], None]


def states_of(files: Sequence[Path]) -> list[str]:
    """What tells that files are as they were, unread: place, size, times and inode of each. Raises `OSError`."""
    states = []
    for path in files:
        found = path.stat()
        times = f"{found.st_mtime_ns}|{found.st_ctime_ns}"
        states.append(f"{os.path.realpath(path)}|{found.st_size}|{times}|{found.st_ino}|{found.st_dev}")
    return states


def are_settled(files: Sequence[Path]) -> bool:
    """Whether all of them have been as they are for a while. Raises `OSError`."""
    newest_s = max(max(found.st_mtime, found.st_ctime) for found in map(os.stat, files))
    return time.time() - newest_s >= SETTLED_S


def remembered_fingerprint(states: Sequence[str], folder: Path) -> bytes | None:
    """The digest of files in these states; None where one of them is not remembered."""
    remembered = _remembered(folder)
    return _joined([remembered[state] for state in states]) if all(state in remembered for state in states) else None


def fingerprint_of(files: Sequence[Path], folder: Path, advance: Advance = lambda num_bytes: None) -> bytes:
    """The digest of these files' bytes, in this order. Raises `ModelError`.

    Reading gigabytes at each start would cost what a store saves: a file of the same place, size and times is taken for
    the one that it was. `advance` is told of bytes as they are read.
    """
    remembered = _remembered(folder)
    before = dict(remembered)
    digests = []
    for path in files:
        try:
            (state,) = states_of([path])
            digest = remembered.get(state) or _of_this_process.get(state)
            if digest is None:
                digest = _of_this_process[state] = _sha256_of(path, advance)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}", hint="make the file readable") from None
        remembered[state] = digest
        digests.append(digest)
    if remembered != before:
        kept = dict(list(remembered.items())[-MAX_REMEMBERED:])
        with suppress(OSError):
            disk.write_whole(str(folder / MEMORY), [json.dumps(kept).encode()])
    return _joined(digests)


_of_this_process: dict[str, str] = {}  # what packed weights have read need not be read once more for the store


def _joined(digests: Sequence[str]) -> bytes:
    return sha256(b"".join(map(bytes.fromhex, digests))).digest()


def _sha256_of(path: Path, advance: Advance) -> str:
    state = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
            advance(len(chunk))
    return state.hexdigest()


def _remembered(version_folder: Path) -> dict[str, str]:
    try:
        found = json.loads(disk.read_whole(str(version_folder / MEMORY), 0, MAX_MEMORY_BYTES))
    except (OSError, BadEntry, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    is_digest = "0123456789abcdef".__contains__
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, str) and len(value) == 64 and all(map(is_digest, value))
    }
