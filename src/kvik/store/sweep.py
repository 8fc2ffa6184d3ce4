"""Keep a store's folder within its quota: what was wanted longest ago goes first."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvik.store import disk

KEPT_SHARE = 0.9
"""Of the quota, left by a sweep that had to evict: so that not every one has to."""

STALE_S = 3600.0
"""Age at which a file that is still being written belongs to a process that is gone."""


@dataclass(slots=True)
class Swept:
    """What a sweep found and did."""

    num_files: int = 0
    num_bytes: int = 0  # before
    num_removed: int = 0
    removed_bytes: int = 0


def sweep(version_folder: Path, quota_bytes: int | None) -> Swept | None:
    """Remove blocks beyond the quota, of any model, and files that nobody will finish. Raises `OSError`.

    None: another process sweeps, and nothing was done.
    """
    swept = Swept()
    with disk.only_one(str(version_folder / "sweep.lock")) as is_mine:
        if not is_mine:
            return None
        stale_ns = time.time_ns() - int(STALE_S * 1e9)
        found: list[tuple[int, int, str]] = []  # when it was last wanted, its size, its path
        for scope in disk.folders_in(str(version_folder)):
            for folder in (*disk.folders_in(f"{scope}/blocks"), f"{scope}/quarantine"):
                for entry in disk.files_in(folder):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if entry.name.startswith(disk.PARTIAL):
                            if status.st_mtime_ns < stale_ns:
                                _remove(swept, entry.path, status.st_size)
                            continue
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        swept.num_files = len(found)
        swept.num_bytes = sum(size for _, size, _ in found)
        if quota_bytes is not None and swept.num_bytes > quota_bytes:
            kept_bytes = swept.num_bytes
            for _, size, path in sorted(found):
                if kept_bytes <= quota_bytes * KEPT_SHARE:
                    break
                _remove(swept, path, size)
                kept_bytes -= size
    return swept


def _remove(swept: Swept, path: str, size: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
        swept.num_removed += 1
        swept.removed_bytes += size
