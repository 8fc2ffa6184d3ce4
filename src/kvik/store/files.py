"""A store in a folder: one file a block, named by its digest. Any number of processes may share the folder."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvik.cache.digest import Digest
from kvik.store import disk
from kvik.store.base import Fault, StoredBlock, StoreStats, read_each
from kvik.store.entry import BadEntry, decode, encode, entry_bytes
from kvik.store.sweep import sweep

log = logging.getLogger(__name__)

VERSION_FOLDER = "v1"
BLOCKS, QUARANTINE, SESSIONS, ABOUT = "blocks", "quarantine", "sessions", "about.json"

MAX_QUARANTINED = 32
"""Files that were found bad and are kept to be looked at; more are removed."""

PAUSE_S = 30.0
"""After a write has failed, before the next is tried."""

SWEEPS_PER_QUOTA = 32
"""Sweeps while as many bytes are written as the quota allows."""


class FileStore:
    """Blocks of one model and format in `<root>/v1/<scope>/blocks/<two digits>/<digest>`; see docs/store.md.

    Nothing is synced: a process that is killed loses what it was writing, a machine that loses power perhaps more, and
    what is torn is found out by its tag. Without a key anybody who may write to the folder may change answers.
    """

    def __init__(
        self,
        root: Path,
        scope: Digest,
        *,
        num_tokens: int,
        payload_bytes: int,
        key: bytes = b"",
        quota_bytes: int | None = None,
        about: Mapping[str, object] | None = None,
    ) -> None:
        self.stats = StoreStats()
        self.version_folder = root / VERSION_FOLDER
        self.scope = scope
        self.key = key
        self.quota_bytes = quota_bytes
        self.entry_bytes = entry_bytes(num_tokens, payload_bytes)
        self.is_paused = False  # writes have failed of late
        self._resumes_s = 0.0
        self._has_warned_of_reading = False
        self._num_unswept_bytes = 0
        disk.make_private(self.version_folder)
        self.folder = self.version_folder / scope.hex()
        self._blocks = str(self.folder / BLOCKS)
        try:
            os.makedirs(self._blocks, 0o700, exist_ok=True)
            if about is not None:
                disk.write_whole(str(self.folder / ABOUT), [json.dumps(about, sort_keys=True).encode()])
        except OSError as error:
            self._pause(error)

    def get(self, digest: Digest) -> StoredBlock | Fault:
        """A block, or why there is none; see `Store`. One that is bad is put aside."""
        path = self.path_of(digest)
        try:
            data = disk.read_whole(path, self.entry_bytes, self.entry_bytes)
            block = decode(data, self.scope, digest, self.key)
        except BadEntry as error:
            if not put_aside(path, self.folder / QUARANTINE, error.fault):
                self.stats.num_errors += 1
            return self._missed(error.fault)
        except FileNotFoundError:
            return self._missed(Fault.MISSING)
        except OSError as error:
            self.stats.num_errors += 1
            if not self._has_warned_of_reading:
                self._has_warned_of_reading = True
                log.warning("%s: a stored block cannot be read (%s): it is computed again", path, error.strerror)
            return self._missed(Fault.UNREADABLE)
        self.stats.num_hits += 1
        self.stats.read_bytes += len(data)
        return block

    def read(self, digests: Sequence[Digest], seconds: float | None) -> Generator[StoredBlock | Fault, None, None]:
        """One after the other; see `Store`."""
        return read_each(self, digests)

    def put(self, block: StoredBlock) -> bool:
        """Keep a block; see `Store`. After an error nothing is written for `PAUSE_S`."""
        if self.is_paused and time.monotonic() < self._resumes_s:
            return False
        path = self.path_of(block.digest)
        try:
            if not os.path.lexists(path):
                parts = encode(block, self.scope, self.key)
                try:
                    disk.write_whole(path, parts)
                except FileNotFoundError:  # the first of its folder
                    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                    disk.write_whole(path, parts)
                num_bytes = sum(map(len, parts))
                self.stats.num_written += 1
                self.stats.written_bytes += num_bytes
                self._num_unswept_bytes += num_bytes
                if self.stats.num_kept is not None and self.stats.kept_bytes is not None:
                    self.stats.num_kept += 1
                    self.stats.kept_bytes += num_bytes
        except OSError as error:
            self._pause(error)
            return False
        if self.is_paused:
            self.is_paused = False
            log.info("%s: blocks can be stored again", self.version_folder)
        return True

    def exists(self, digest: Digest) -> bool:
        """Whether there is a file of this name; see `Store`."""
        return os.path.lexists(self.path_of(digest))

    def exists_many(self, digests: Sequence[Digest]) -> int:
        """How many of the first ones exist; see `Store`."""
        return next((index for index, digest in enumerate(digests) if not self.exists(digest)), len(digests))

    def delete(self, digest: Digest) -> bool:
        """Remove a block's file; see `Store`."""
        try:
            return disk.remove(self.path_of(digest))
        except OSError:
            self.stats.num_errors += 1
            return False

    def used(self, digests: Sequence[Digest]) -> None:
        """Note the time with the files, the last block's as the oldest; see `Store`."""
        now_ns = time.time_ns()
        for index, digest in enumerate(digests):
            with suppress(OSError):
                os.utime(self.path_of(digest), ns=(now_ns, now_ns - index), follow_symlinks=False)

    def tidy(self) -> None:
        """Count what is there, and evict what is beyond the quota, where enough was written since the last time."""
        stats, quota_bytes = self.stats, self.quota_bytes
        is_due = quota_bytes is not None and self._num_unswept_bytes >= quota_bytes // SWEEPS_PER_QUOTA
        if stats.num_kept is not None and not is_due:
            return
        self._num_unswept_bytes = 0
        with suppress(OSError):
            swept = sweep(self.version_folder, quota_bytes)
            if swept is not None:
                stats.num_evicted += swept.num_removed
                stats.num_kept = swept.num_files - swept.num_removed
                stats.kept_bytes = swept.num_bytes - swept.removed_bytes

    def close(self) -> None:
        """Nothing is open; see `Store`."""

    def path_of(self, digest: Digest) -> str:
        """Where a block's file is."""
        name = digest.hex()
        return f"{self._blocks}/{name[:2]}/{name}"

    def _missed(self, fault: Fault) -> Fault:
        self.stats.faults[fault] += 1
        return fault

    def _pause(self, error: OSError) -> None:
        """Write nothing for a while; who reads the log hears of it once."""
        self.stats.num_errors += 1
        if not self.is_paused:
            log.warning("%s: no blocks are stored for now: %s", self.version_folder, error.strerror)
        self.is_paused = True
        self._resumes_s = time.monotonic() + PAUSE_S


def put_aside(path: str, quarantine: Path, fault: Fault) -> bool:
    """Get a bad file out of the way of a good one, to where it can be looked at; False where that fails."""
    log.warning("%s: %s, so it is not used", path, fault)
    try:
        os.makedirs(quarantine, 0o700, exist_ok=True)
        if sum(1 for _ in disk.files_in(str(quarantine))) < MAX_QUARANTINED:
            os.replace(path, quarantine / f"{os.path.basename(path)}.{fault.name.lower()}")
        else:
            disk.remove(path)
    except OSError:
        return False
    return True
