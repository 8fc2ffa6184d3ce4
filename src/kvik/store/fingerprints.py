"""What weights are called: a digest of their files, remembered for as long as the files stay as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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


def fingerprint_of(files: Sequence[Path], version_folder: Path) -> bytes:
    """The digest of these files' bytes, in this order. Raises `ModelError`.

    Reading gigabytes at each start would cost what a store saves: a file of the same place, size and times is taken for
    the one that it was.
    """
    remembered = _remembered(version_folder)
    before = dict(remembered)
    state = sha256()
    for path in files:
        try:
            found = path.stat()
            place = os.path.realpath(path)
            key = f"{place}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}|{found.st_dev}"
            digest = remembered.get(key)
            if digest is None:
                digest = remembered[key] = _sha256_of(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}", hint="make the file readable") from None
        state.update(bytes.fromhex(digest))
    if remembered != before:
        kept = dict(list(remembered.items())[-MAX_REMEMBERED:])
        with suppress(OSError):
            disk.write_whole(str(version_folder / MEMORY), [json.dumps(kept).encode()])
    return state.digest()


def _sha256_of(path: Path) -> str:
    state = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
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
