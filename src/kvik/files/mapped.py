"""Model files as arrays: mapped, not read, and given back once they were used."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError, ModelNotFound

ASK_BYTES = 1 << 18
"""That the system is asked for at once: of more, Linux reads no more than a disk takes in one go."""


@dataclass(frozen=True, slots=True, eq=False)
class MappedFile:
    """The bytes of a file, read-only."""

    path: Path
    data: npt.NDArray[np.uint8]
    mapping: mmap.mmap | None = None  # None: nothing can be mapped of an empty file

    def ask_for(self, start: int, num_bytes: int) -> None:
        """Have the system begin to read these bytes, as far as the file has them."""
        num_bytes = min(num_bytes, len(self.data) - start)
        if self.mapping is None or not hasattr(mmap, "MADV_WILLNEED") or num_bytes <= 0:
            return
        for at in range(start // mmap.PAGESIZE * mmap.PAGESIZE, start + num_bytes, ASK_BYTES):
            self.mapping.madvise(mmap.MADV_WILLNEED, at, min(ASK_BYTES, start + num_bytes - at))

    def expect_jumps(self, start: int, num_bytes: int) -> None:
        """Tell the system that these bytes will be read here and there: it need not read ahead."""
        if self.mapping is None or not hasattr(mmap, "MADV_RANDOM") or num_bytes <= 0:
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_RANDOM, first, start + num_bytes - first)

    def drop_pages(self, start: int, num_bytes: int) -> None:
        """Give back the memory through which these bytes were read; reading them once more brings it back."""
        if self.mapping is None or not hasattr(mmap, "MADV_DONTNEED") or num_bytes <= 0:
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)


def map_file(path: Path, hint: str) -> MappedFile:
    """Map the file at `path`; ModelNotFound, with this hint, where no file is."""
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise ModelNotFound(f"{path} {problem}", hint=hint)
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            mapping = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) if num_bytes else None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="check the file's permissions and its disk") from error
    return MappedFile(path, np.frombuffer(b"" if mapping is None else mapping, dtype=np.uint8), mapping)
