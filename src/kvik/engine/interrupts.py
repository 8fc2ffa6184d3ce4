"""Interruptions: Ctrl-C comes between two steps, and a lock that one has left behind is found again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OwnedLock:
    """A lock that may be taken again by the thread that has it, and that knows its owner.

    An interruption between the end of a block and its release leaves the lock with its thread; `take` finds it there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def is_owned(self) -> bool:
        """Whether this thread has it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # what threading.Condition asks too

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have it for a block; where it was left behind, it is had already."""
        if not self.is_owned:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def try_to_take(self) -> bool:
        """Have it for the `take` that follows, if that needs no wait and this thread does not have it yet."""
        return not self.is_owned and self._lock.acquire(blocking=False)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class _PutOff:
    """A handler that notes Ctrl-C."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: object) -> None:
        self.came = True


def is_uninterrupted() -> bool:
    """Whether Ctrl-C is being put off."""
    return isinstance(signal.getsignal(signal.SIGINT), _PutOff)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block, where Python would raise KeyboardInterrupt between any two lines of it.

    Python raises it in the main thread alone, and only while nobody has set a handler of their own. Not to be nested.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_default = handler is signal.default_int_handler or isinstance(handler, _PutOff)  # one that was left behind
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = _PutOff()
    try:
        signal.signal(signal.SIGINT, noted)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if noted.came:
            raise KeyboardInterrupt
