"""Interruptions: Ctrl-C comes between two steps, and a lock that one has left behind is found again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OwnedLock:
    """A lock that a thread may find its own: an interruption has left it behind there, and it is taken over."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def is_owned(self) -> bool:
        """Whether this thread has it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # what threading.Condition asks too

    def acquire_now(self) -> bool:
        """Take it, if nobody has it."""
        return not self.is_owned and self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Let it go."""
        self._lock.release()

    def __enter__(self) -> None:
        if not self.is_owned:
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class _PutOff:
    """A handler that notes Ctrl-C."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: object) -> None:
        self.came = True


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
