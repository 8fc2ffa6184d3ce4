"""Files that are mapped, not read."""

from __future__ import annotations

import mmap


def drop_pages(mapping: mmap.mmap, start: int, num_bytes: int) -> None:
    """Give back the memory through which some bytes were read; reading them once more brings them from the file."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    whole_pages = (start + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole_pages > 0:
        mapping.madvise(mmap.MADV_DONTNEED, first, whole_pages)
