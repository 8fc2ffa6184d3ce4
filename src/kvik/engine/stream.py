"""A request as it is written: its tokens, step by step, while the engine serves others too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from kvik.engine.engine import Engine
from kvik.engine.output import Completion, Piece
from kvik.engine.sequence import Sequence
from kvik.errors import KvikError, RequestsFailed


def stream_sequence(
    engine: Engine, sequence: Sequence, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Piece]:
    """Queues the sequence and steps the engine until it is finished, giving its tokens as they come.

    With several completions the pieces of all come as they are written, and say whose they are. Closing the iterator
    aborts the sequence, and so does `should_stop`, asked before each step.
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
                if feed.sequence.error is not None:
                    raise feed.sequence.error
            if all(feed.is_done for feed in feeds) or should_stop():
                return
            engine.step()
    finally:
        if any(branch.finish_reason is None for branch in branches):
            engine.abort(*branches)


def collect(engine: Engine, branches: SequenceOf[Sequence]) -> list[Completion]:
    """The completions of finished sequences.

    Raises the error of one that stands alone or where all failed; `RequestsFailed`, which has the completions of the
    others, where some did.
    """
    errors = {index: branch.error for index, branch in enumerate(branches) if branch.error is not None}
    if not errors:
        return [engine.completion(branch) for branch in branches]
    index, first = next(iter(errors.items()))
    if len(errors) == len(branches):
        raise first
    raise RequestsFailed(
        f"{len(errors):,} of {len(branches):,} completions failed, the first of them {index}: {_line(first)}",
        hint="the error's `completions` has the others, its `errors` tells why each failed",
        completions=[None if branch.error else engine.completion(branch) for branch in branches],
        errors=errors,
    ) from first


def _line(error: Exception) -> str:
    return error.message if isinstance(error, KvikError) else repr(error)


class PieceFeed:
    """What a sequence has written since the last look; another stream's steps may have brought it several tokens."""

    __slots__ = ("_engine", "_num_taken", "is_done", "sequence")

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self.sequence = sequence
        self._num_taken = 0
        self.is_done = False

    def take(self) -> list[Piece]:
        """The new pieces, for whoever holds the engine's lock; with the last of all, `is_done` becomes true."""
        sequence = self.sequence
        finish_reason = sequence.finish_reason
        self.is_done = finish_reason is not None
        first, last = self._num_taken, sequence.num_completion_tokens
        if first == last:
            return []
        self._num_taken = last
        token_ids, parts, logprobs = sequence.token_ids, sequence.text.parts, sequence.logprobs
        num_prompt = sequence.num_prompt_tokens
        pieces = []
        for at in range(first, last):
            completion = self._engine.completion(sequence) if finish_reason and at == last - 1 else None
            pieces.append(
                Piece(
                    parts[at],
                    token_ids[num_prompt + at],
                    completion,
                    sequence.branch,
                    logprobs[at] if logprobs else None,
                    None if completion is None else finish_reason,
                )
            )
        return pieces
