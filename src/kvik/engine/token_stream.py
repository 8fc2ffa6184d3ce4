"""The tokens of sequences on their way from the engine's thread to a task of an event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from kvik.engine.engine import Engine
from kvik.engine.output import Piece, Progress
from kvik.engine.sequence import Sequence
from kvik.engine.stream import PieceFeed
from kvik.errors import SlowReader

log = logging.getLogger(__name__)


class Delivery:
    """What one step brought the reader of a stream."""

    __slots__ = ("error", "is_last", "pieces", "progress")

    def __init__(
        self, pieces: list[Piece], progress: list[Progress], *, is_last: bool, error: Exception | None = None
    ) -> None:
        self.pieces = pieces
        self.progress = progress
        self.is_last = is_last
        self.error = error


class TokenStream:
    """What sequences write, on its way from the engine's thread to a task, a batch of pieces for each step.

    `Piece.index` counts the completions of all of them: those of the first sequence, then those of the next. A context
    manager; `AsyncLLM.open` makes it.
    """

    __slots__ = (
        "__weakref__",
        "_error",
        "_feeds",
        "_is_done",
        "_is_woken",
        "_leave",
        "_num_read",
        "_num_sent",
        "_pieces",
        "_progress",
        "_waiter",
        "branches",
        "loop",
        "progress",
        "sequences",
    )

    def __init__(
        self,
        engine: Engine,
        sequences: SequenceOf[Sequence],
        leave: Callable[[SequenceOf[Sequence]], None],
        *,
        wants_pieces: bool,
        wants_progress: bool,
    ) -> None:
        self.sequences = sequences
        self.branches = [branch for sequence in sequences for branch in sequence.all_branches()]
        self.loop = asyncio.get_running_loop()
        self.progress: list[Progress] = []  # that nobody has looked at yet; the reader empties it
        self._leave = leave
        self._feeds = [PieceFeed(engine, branch, at) for at, branch in enumerate(self.branches)] if wants_pieces else []
        self._progress = dict.fromkeys(sequences, -1) if wants_progress else {}
        self._pieces: list[Piece] = []
        # Written by the engine's thread alone. What was sampled elsewhere comes at once, and does not count.
        self._num_sent = -sum(branch.num_completion_tokens for branch in self.branches)
        self._num_read = 0  # written by the event loop's
        self._waiter: asyncio.Future[None] | None = None
        self._is_done = False
        self._is_woken = False
        self._error: Exception | None = None

    def close(self) -> None:
        """Abort what is not finished, within a step."""
        self._leave(self.branches)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # For the engine's thread.

    @property
    def num_waiting(self) -> int:
        """Pieces that nobody has read yet, those on their way to the event loop among them."""
        return self._num_sent - self._num_read

    def take(self) -> Delivery | None:
        """What is new, if anything is; the caller holds the engine's lock."""
        if len(self._feeds) == 1:
            pieces = self._feeds[0].take()
        else:
            pieces = [piece for feed in self._feeds for piece in feed.take()]
        self._num_sent += len(pieces)
        progress = self._take_progress() if self._progress else []
        for branch in self.branches:
            if branch.finish_reason is None:
                return Delivery(pieces, progress, is_last=False) if pieces or progress else None
        return Delivery(pieces, progress, is_last=True)

    def _take_progress(self) -> list[Progress]:
        """How far each prompt has come since the last look: first what was cached, at the end all of it."""
        news = []
        for sequence, before in list(self._progress.items()):
            costs, total = sequence.costs, sequence.num_prompt_tokens
            if costs.begun_s is None:
                continue
            processed = total if costs.first_token_s is not None else min(sequence.num_computed_tokens, total)
            elapsed_s = time.perf_counter() - costs.begun_s
            if before < 0:
                news.append(Progress(total, costs.num_cached_tokens, costs.num_cached_tokens, 0.0))
            if processed > max(before, costs.num_cached_tokens):
                news.append(Progress(total, costs.num_cached_tokens, processed, elapsed_s))
            self._progress[sequence] = processed
            if processed == total:
                del self._progress[sequence]
        return news

    def fail(self, error: Exception) -> None:
        """No more pieces: this went wrong."""
        call_soon(self.loop, lambda: self.receive(Delivery([], [], is_last=True, error=error)))

    def slow_error(self, max_pieces: int) -> SlowReader:
        """Why it gets no more."""
        return SlowReader(
            f"{self.num_waiting:,} tokens wait to be read, {max_pieces:,} may", hint="read them as they come"
        )

    # For the event loop's.

    def receive(self, delivery: Delivery) -> None:
        """Take a delivery, and wake the task that waits for it."""
        self._pieces += delivery.pieces
        self.progress += delivery.progress
        self._is_done = self._is_done or delivery.is_last
        self._error = self._error or delivery.error
        self._wake_waiter()

    def wake(self) -> None:
        """Have `read` return although nothing has come."""
        self._is_woken = True
        self._wake_waiter()

    def _wake_waiter(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_done(self) -> bool:
        """Whether no more will come than what waits to be read."""
        return self._is_done

    async def read(self) -> list[Piece]:
        """Pieces, as many as there are; none at the end. Raises what kept the sequences from being served at all.

        Where `progress` was asked for and has come, or after `wake`, it returns without pieces although `is_done` is
        false.
        """
        while not (self._pieces or self._is_done or self.progress or self._is_woken):
            self._waiter = self.loop.create_future()
            await self._waiter
        self._is_woken = False
        pieces, self._pieces = self._pieces, []
        self._num_read += len(pieces)
        if not pieces and self._error is not None:
            raise self._error
        return pieces


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> bool:
    """Whether the loop will do it; one that is closed has no tasks any more that wait for anything."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        log.info("an event loop was closed while requests of it ran")
        return False
    return True
