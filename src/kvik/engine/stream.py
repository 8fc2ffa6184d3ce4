"""A request as it is written: its tokens, step by step, while the engine serves others too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

from kvik.engine.engine import Engine
from kvik.engine.output import Completion, Embedding, Piece
from kvik.engine.sequence import Sequence
from kvik.errors import CacheTooSmall, EngineDead, KvikError, QueueFull, RequestsFailed

Result = TypeVar("Result", Completion, Embedding)


def stream_sequence(
    engine: Engine, sequence: Sequence, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Piece]:
    """Queues the sequence and steps the engine until it is finished, giving its tokens as they come.

    With several completions the pieces of all come as they are written, and say whose they are; what failed is raised
    when the others are whole. Closing the iterator aborts the sequence, and so does `should_stop`, asked before each
    step.
    """
    branches = list(sequence.all_branches())
    feeds = [PieceFeed(engine, branch) for branch in branches]
    try:
        engine.add(sequence)
        while True:
            for feed in feeds:
                with engine.lock:
                    pieces = feed.take()
                yield from pieces
            if all(feed.is_done for feed in feeds):
                collect(engine, branches)  # raises what went wrong
                return
            if should_stop():
                return
            engine.step()
    finally:
        if any(branch.finish_reason is None for branch in branches):
            engine.abort(*branches)


def run_all(
    engine: Engine, sequences: SequenceOf[Sequence], advance: Callable[[int], None] = lambda count: None
) -> list[Sequence]:
    """Queue as many at a time as the engine takes, and step until all are finished; gives them with their branches.

    `advance` is told how many have ended since the last time. An error of a sequence is its own; see `collect`.
    """
    queue = deque(sequences)
    branches = [branch for sequence in sequences for branch in sequence.all_branches()]
    unfinished = branches
    try:
        while unfinished:
            try:
                while queue and not engine.scheduler.is_full:
                    _add_first(engine, queue)
                engine.step()
            except EngineDead as error:
                for branch in unfinished:
                    branch.finish("abort", error)
            left = [branch for branch in unfinished if branch.finish_reason is None]
            advance(len(unfinished) - len(left))
            unfinished = left
    finally:
        engine.abort(*unfinished)
    return branches


def _add_first(engine: Engine, queue: deque[Sequence]) -> None:
    """Queue the first of the sequences, unless another thread was quicker to fill the engine's queue."""
    try:
        engine.add(queue[0])
    except QueueFull:
        return
    except CacheTooSmall as error:  # blocks were pinned after it was checked
        for branch in queue[0].all_branches():
            branch.finish("abort", error)
    queue.popleft()


def collect(engine: Engine, branches: SequenceOf[Sequence]) -> list[Completion]:
    """The completions of finished sequences.

    Raises the error of one that stands alone or where all failed; `RequestsFailed`, which has the completions of the
    others, where some did.
    """
    return _collect(branches, engine.completion, "completions")


def collect_embeddings(sequences: SequenceOf[Sequence]) -> list[Embedding]:
    """The same of sequences that are to become vectors."""
    return _collect(sequences, Sequence.embedding, "embeddings")


def _collect(branches: SequenceOf[Sequence], result: Callable[[Sequence], Result], name: str) -> list[Result]:
    errors = {index: branch.error for index, branch in enumerate(branches) if branch.error is not None}
    if not errors:
        return [result(branch) for branch in branches]
    index, first = next(iter(errors.items()))
    if len(errors) == len(branches):
        raise first
    raise RequestsFailed(
        f"{len(errors):,} of {len(branches):,} {name} failed, the first of them {index}: {_line(first)}",
        hint="the error's `completions` has the others, its `errors` tells why each failed",
        completions=[None if branch.error else result(branch) for branch in branches],
        errors=errors,
    ) from first


def _line(error: Exception) -> str:
    return error.message if isinstance(error, KvikError) else repr(error)


class PieceFeed:
    """What a sequence has written since the last look; another stream's steps may have brought it several tokens."""

    __slots__ = ("_engine", "_index", "_num_taken", "is_done", "sequence")

    def __init__(self, engine: Engine, sequence: Sequence, index: int | None = None) -> None:
        self._engine = engine
        self._index = sequence.branch if index is None else index  # of its completion, for whom reads it
        self.sequence = sequence
        self._num_taken = 0
        self.is_done = False

    def take(self) -> list[Piece]:
        """The new pieces, for whoever holds the engine's lock; with the last of all, `is_done` becomes true."""
        sequence = self.sequence
        finish_reason = sequence.finish_reason
        self.is_done = finish_reason is not None
        # A token whose text went wrong has none.
        first, last = self._num_taken, len(sequence.text.parts)
        if first == last:
            return []
        self._num_taken = last
        token_ids, parts, logprobs = sequence.token_ids, sequence.text.parts, sequence.logprobs
        num_prompt = sequence.num_prompt_tokens
        pieces = []
        for at in range(first, last):
            is_last = finish_reason is not None and at == last - 1
            completion = self._engine.completion(sequence) if is_last and sequence.error is None else None
            pieces.append(
                Piece(
                    parts[at],
                    token_ids[num_prompt + at],
                    completion,
                    self._index,
                    logprobs[at] if logprobs else None,
                    finish_reason if is_last else None,
                )
            )
        return pieces
