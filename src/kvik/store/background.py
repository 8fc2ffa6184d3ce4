"""Threads beside the engine's: one that writes blocks behind it, some that read ahead of it."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing

from kvik.cache.digest import Digest
from kvik.store.base import Fault, Store, StoredBlock

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 64 << 20
"""Blocks that wait to be written, or that were read and wait to be taken."""

NUM_READERS = 2

EXIT_S = 10.0
"""That the end of the process waits for blocks to be written."""

LAST_BLOCK_S = 5.0
"""That closing a writer waits for the block that is being written."""

NICENESS = 10
"""Of the writer, so that it takes what the engine leaves."""


class BlockWriter:
    """Writes blocks in a thread of its own, in order. The end of the process waits for it, some seconds at most."""

    def __init__(self, store: Store, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._store = store
        self._max_queued_bytes = max_queued_bytes
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._num_queued_bytes = 0
        self._is_working = False
        self._is_closing = False
        self.work_s = 0.0  # processor time of its thread
        self._idle: Callable[[], bool] | None = None
        self._thread: threading.Thread | None = None

    @property
    def has_room(self) -> bool:
        """Whether another block may be queued."""
        return self._num_queued_bytes < self._max_queued_bytes

    def put(self, block: StoredBlock, done: Callable[[bool], None]) -> None:
        """Queue a block; `done` is told in the writer's thread whether it is stored."""

        def write() -> None:
            try:
                done(self._store.put(block))
                self._store.tidy()
            finally:
                with self._changed:
                    self._num_queued_bytes -= len(block.payload)

        self._queue(write, len(block.payload))

    def used(self, digests: Sequence[Digest]) -> None:
        """Queue a note that these were wanted."""

        def note() -> None:
            self._store.used(digests)
            self._store.tidy()

        self._queue(note, 0)

    def when_idle(self, idle: Callable[[], bool]) -> None:
        """Have `idle` called in the writer's thread when nothing is to be written, again and again while it is true."""
        with self._changed:
            self._idle = idle
            self._start()

    def flush(self, seconds: float) -> bool:
        """Wait until all is written; False where that takes longer."""
        end_s = time.monotonic() + seconds
        with self._changed:
            while self._jobs or self._is_working or self._idle is not None:
                if not self._changed.wait(end_s - time.monotonic()):
                    return False
        return True

    def end(self) -> None:
        """End the thread after what is queued; nothing may follow."""
        with self._changed:
            self._is_closing, self._idle = True, None
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the block that it writes now, which is waited for; what is queued is not written."""
        with self._changed:
            self._jobs.clear()
        self.end()
        if not self.flush(LAST_BLOCK_S):
            log.warning("a block is still being written %g s after the store was closed", LAST_BLOCK_S)

    def _queue(self, job: Callable[[], None], num_bytes: int) -> None:
        with self._changed:
            self._num_queued_bytes += num_bytes
            self._jobs.append(job)
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="kvik-store-writer", daemon=True)
            self._thread.start()
            atexit.register(self._flush_at_exit)
        self._changed.notify_all()

    def _flush_at_exit(self) -> None:
        if not self.flush(EXIT_S):
            log.warning("some blocks were not stored: the process ends")

    def _do_idle(self) -> None:
        idle = self._idle
        if idle is not None and not idle():
            with self._changed:
                if self._idle is idle:
                    self._idle = None

    def _main(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                while not (self._jobs or self._idle is not None or self._is_closing):
                    self._changed.wait()
                if self._is_closing and not self._jobs:
                    atexit.unregister(self._flush_at_exit)
                    return
                job = self._jobs.popleft() if self._jobs else self._do_idle
                self._is_working = True
            try:
                job()
            except Exception:
                log.exception("a block could not be stored")
                self._idle = None
            finally:
                del job  # it may hold a block, or be the last that holds an engine
                with self._changed:
                    self._is_working = False
                    self.work_s = time.thread_time()
                    self._changed.notify_all()


class Load:
    """A path of blocks that is being read: `take` gives what has come, in order, until `is_over`."""

    def __init__(
        self, digests: Sequence[Digest], progress: threading.Condition, max_bytes: int, seconds: float | None
    ) -> None:
        self._digests = digests
        self._seconds = seconds
        self._progress = progress
        self._max_bytes = max_bytes
        self._ready: deque[StoredBlock] = deque()
        self._num_ready_bytes = 0
        self._is_read = False
        self._is_cancelled = False
        self.fault: Fault | None = None  # why no more was read
        self.read_s = 0.0  # that reading took
        self.num_bytes = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to take, now or later."""
        return self._is_read and not self._ready

    @property
    def is_ready(self) -> bool:
        """Whether `take` has something to say."""
        return self._is_read or bool(self._ready)

    def take(self) -> StoredBlock | None:
        """The next block, if it was read."""
        with self._progress:
            if not self._ready:
                return None
            block = self._ready.popleft()
            self._num_ready_bytes -= len(block.payload)
            self._progress.notify_all()
        return block

    def cancel(self) -> None:
        """Nobody will take any more."""
        with self._progress:
            self._is_cancelled = True
            self._ready.clear()
            self._progress.notify_all()

    def run(self, store: Store) -> None:
        """Read block after block until one is missing; waits while too much is ready."""
        with closing(store.read(self._digests, self._seconds)) as blocks:
            while True:
                with self._progress:
                    while self._num_ready_bytes >= self._max_bytes and not self._is_cancelled:
                        self._progress.wait()
                    if self._is_cancelled:
                        break
                started_s = time.perf_counter()
                block = next(blocks, None)
                self.read_s += time.perf_counter() - started_s
                if block is None:
                    break
                if isinstance(block, Fault):
                    self.fault = block
                    break
                with self._progress:
                    self.num_bytes += len(block.payload)
                    self._num_ready_bytes += len(block.payload)
                    self._ready.append(block)
                    self._progress.notify_all()
        self.end()

    def end(self) -> None:
        """No more will be read."""
        with self._progress:
            self._is_read = True
            self._progress.notify_all()


class BlockReader:
    """Reads paths of blocks in threads of its own, in the order in which they were asked for."""

    def __init__(self, store: Store, max_ready_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._store = store
        self._max_ready_bytes = max_ready_bytes
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._num_threads = 0
        self.progress = threading.Condition()  # told when something was read

    def load(self, digests: Sequence[Digest], seconds: float | None = None) -> Load:
        """Begin to read a path from its beginning; `seconds` as `Store.read` has it."""
        load = Load(digests, self.progress, self._max_ready_bytes, seconds)
        if self._num_threads < NUM_READERS:
            self._num_threads += 1
            threading.Thread(target=self._main, name="kvik-store-reader", daemon=True).start()
        self._loads.put(load)
        return load

    def close(self) -> None:
        """End the threads after the path that each reads now."""
        for _ in range(self._num_threads):
            self._loads.put(None)

    def _main(self) -> None:
        while (load := self._loads.get()) is not None:
            try:
                load.run(self._store)
            except Exception:
                log.exception("stored blocks could not be read")
                load.fault = Fault.UNREADABLE
                load.end()
