"""Files of a store: written whole or not at all, read once, never followed to where a link leads."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvik.errors import InvalidInput
from kvik.store.base import Fault
from kvik.store.entry import BadEntry

PARTIAL = "."
"""What names of files that are still being written begin with."""

_numbers = itertools.count()


def make_private(folder: Path) -> None:
    """Make a folder that nobody else can look into, or see that it is one. Raises `InvalidInput`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError as error:
        raise InvalidInput(f"{folder}: {error.strerror}", hint="name a folder that can be written to") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise InvalidInput(
            f"{folder}: others than its owner may read stored keys and values, which reveal prompts",
            hint=f"chmod 700 {folder}, and let it be a folder of your own",
        )


def write_whole(path: str, parts: Iterable[bytes | memoryview], beginning: Callable[[], bytes] | None = None) -> None:
    """Write a file; whoever reads meanwhile finds what was there before. Raises `OSError`.

    `beginning` is asked when all parts are written, and takes the place of the first bytes.
    """
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f"{PARTIAL}{name}.{os.getpid()}.{next(_numbers)}")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            for part in parts:
                _write(file, part)
            if beginning is not None:
                os.lseek(file, 0, os.SEEK_SET)
                _write(file, beginning())
        finally:
            os.close(file)
        os.rename(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _write(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while len(left):
        left = left[os.write(file, left) :]


def open_regular(path: str) -> int:
    """A descriptor of a regular file, to read from. Raises `OSError`, `BadEntry`."""
    # Without O_NONBLOCK, opening a named pipe that somebody put there would never end.
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise BadEntry(Fault.NO_FILE) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise BadEntry(Fault.NO_FILE)
    return file


def read_whole(path: str, min_bytes: int, max_bytes: int) -> bytes:
    """A copy of a file of so many bytes. Raises `OSError`, `BadEntry`."""
    file = open_regular(path)
    try:
        num_missing = os.fstat(file).st_size
        if not min_bytes <= num_missing <= max_bytes:
            raise BadEntry(Fault.SIZE)
        parts = []
        while num_missing and (part := os.read(file, num_missing)):
            parts.append(part)
            num_missing -= len(part)
    finally:
        os.close(file)
    if num_missing:
        raise BadEntry(Fault.SIZE)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def remove(path: str) -> bool:
    """Remove a file, if it is there. Raises `OSError`."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def files_in(folder: str) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, but for folders; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return


def folders_in(folder: str) -> list[str]:
    """Paths of the folders in a folder, in order of their names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


@contextmanager
def only_one(path: str) -> Iterator[bool]:
    """Whether nobody else is within such a block now. Raises `OSError`."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
