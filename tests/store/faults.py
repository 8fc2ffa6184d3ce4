"""A module `os` that fails, or kills the process, at a chosen call."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

CALLS = frozenset("open write read close rename replace unlink fstat lstat scandir mkdir makedirs utime".split())  # noqa: SIM905
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)


class Faulty:
    """`os`, but for the calls of which `fails`, given how many came before it and its name, says that they fail."""

    def __init__(self, fails: Callable[[int, str], int | None]) -> None:
        self._fails = fails
        self._numbers = count()  # threads share it
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            number = next(self._numbers)
            self.num_calls = number + 1
            error = self._fails(number, name)
            if error == signal.SIGKILL:
                if name == "write":
                    real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if error is not None:
                if name == "close":
                    real(*arguments)  # it is closed in any case
                raise OSError(error, os.strerror(error))
            return real(*arguments, **options)

        return call


def inject(patch: pytest.MonkeyPatch, fails: Callable[[int, str], int | None]) -> Faulty:
    """Let the store's calls of the system fail from now on."""
    faulty = Faulty(fails)
    for module in ("disk", "files", "sweep"):
        patch.setattr(f"kvik.store.{module}.os", faulty)
    return faulty
