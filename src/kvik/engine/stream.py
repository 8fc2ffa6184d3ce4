"""A request as it is written: its tokens, step by step, while the engine serves others too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvik.engine.engine import Engine
from kvik.engine.output import Piece
from kvik.engine.sequence import Sequence


def stream_sequence(
    engine: Engine, sequence: Sequence, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Piece]:
    """Queues the sequence and steps the engine until it is finished, giving its tokens as they come.

    Closing the iterator aborts the sequence, and so does `should_stop`, asked before each step.
    """
    engine.add(sequence)
    feed = PieceFeed(engine, sequence)
    try:
        while True:
            yield from feed.take()
            if sequence.error is not None:
                raise sequence.error
            if feed.is_done or should_stop():
                return
            engine.step()
    finally:
        engine.abort(sequence)


class PieceFeed:
    """What a sequence has written since the last look; another stream's steps may have brought it several tokens."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._num_tokens = self._num_chars = 0
        self.is_done = False

    def take(self) -> list[Piece]:
        """The new pieces; with the last of all, `is_done` becomes true."""
        pieces = []
        sequence = self._sequence
        with self._engine.lock:
            self.is_done = sequence.finish_reason is not None
            while self._num_tokens < sequence.num_completion_tokens:
                token_id = sequence.token_ids[sequence.num_prompt_tokens + self._num_tokens]
                text = sequence.text.text[self._num_chars :]
                self._num_tokens += 1
                self._num_chars += len(text)
                is_last = self.is_done and self._num_tokens == sequence.num_completion_tokens
                pieces.append(Piece(text, token_id, self._engine.completion(sequence) if is_last else None))
        return pieces
