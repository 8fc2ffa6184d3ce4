"""A conversation that keeps its cache."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from kvik.cache import BlockTable
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import GREEDY, LLM
from kvik.engine.output import Completion, Piece, Stats
from kvik.engine.sequence import Sequence
from kvik.engine.stream import stream_sequence
from kvik.errors import InvalidInput
from kvik.text.chat_messages import Content, check_message, check_template_vars, check_tools


@dataclass(frozen=True, slots=True)
class TurnStats:
    """What one turn cost, and what the turns before it saved."""

    stats: Stats
    saved_tokens: int  # of its prompt, that were not computed again
    saved_s: float | None  # the time that computing them would have taken, as measured; None before any measurement


class Session:
    """A conversation as an object: each turn computes only what the turns before it have not.

    Between turns its blocks stay with it for as long as nobody else needs them (`pin` keeps them in any case); what was
    taken is computed again. They go back when the session is closed, left (`with`) or forgotten.

    >>> with Session(LLM("smollm2")) as session:
    ...     session.append("user", "Why is the sky blue?")
    ...     print(session.generate().text)
    ...     other = session.fork()  # goes its own way from here, at the price of one block
    ...     session.rewind(1)  # as if the answer had not been given
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: Content | None = None,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        use_cache: bool = True,
        salt: str | None = None,
    ) -> None:
        self.llm = llm
        self.tools = check_tools(tools)
        self.template_vars = check_template_vars(template_vars)
        self.use_cache = use_cache
        self.salt = salt
        self.messages: list[dict[str, Any]] = []
        self.turns: list[TurnStats] = []
        self._sequence: Sequence | None = None
        self._pin: BlockTable | None = None
        if system is not None:
            self.append("system", system)

    def append(self, role: str, content: Content | None = None, **others: Any) -> None:
        """Add a message; `others` are its `tool_calls`, `tool_call_id` or `name`, as `LLM.render_chat` takes them."""
        message = {"role": role, "content": content, **others}
        self.messages.append(check_message(f"messages[{len(self.messages)}]", message))

    def generate(self, params: SamplingParams = GREEDY) -> Completion:
        """Answers the messages so far, and appends the answer."""
        for _ in self.stream(params):
            pass
        assert self.completion is not None
        return self.completion

    def stream(
        self, params: SamplingParams = GREEDY, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Piece]:
        """Answers the messages so far, piece by piece, and appends the answer, whole or as far as it came.

        `should_stop` is asked between steps, and ends the answer as closing the iterator does.
        """
        if isinstance(params, SamplingParams) and (params.n > 1 or params.echo):
            raise InvalidInput(
                "a session has one answer a turn", hint="leave n and echo as they are, or use LLM.generate"
            )
        engine = self.llm.engine
        token_ids = self.llm.render_chat(self.messages, tools=self.tools, template_vars=self.template_vars)
        self._sequence = engine.new_sequence(
            token_ids, params, keep_cache=self.use_cache, park=True, previous=self._sequence, salt=self.salt
        )
        return self._stream(engine, self._sequence, should_stop)

    def fork(self) -> Session:
        """Another session with the same past and the same blocks: only what they come to differ in costs anything."""
        self._check_not_writing("fork")
        fork = Session(
            self.llm,
            tools=self.tools,
            template_vars=self.template_vars,
            use_cache=self.use_cache,
            salt=self.salt,
        )
        fork.messages = [dict(message) for message in self.messages]
        if self._sequence is not None:
            fork._sequence = self.llm.engine.fork(self._sequence)
        return fork

    def rewind(self, num_messages: int = 1) -> None:
        """Forget the last messages; what was computed of those before them is still in the cache."""
        self._check_not_writing("rewind")
        if type(num_messages) is not int or not 0 <= num_messages <= len(self.messages):
            raise InvalidInput(
                f"cannot rewind {reprlib.repr(num_messages)} messages",
                hint=f"the session has {len(self.messages)} messages",
            )
        if num_messages:
            del self.messages[-num_messages:]

    def pin(self) -> None:
        """Keep what is computed of the conversation until `unpin` or `close`, whoever else needs memory.

        Later turns are not pinned until `pin` is called again. Raises `CacheTooSmall` where a request under way would
        no longer fit.
        """
        if self._sequence is None or not self._sequence.table.block_ids:
            raise InvalidInput("nothing of the session is in the cache", hint="pin it after an answer")
        engine, before = self.llm.engine, self._pin
        self._pin = engine.pin(self._sequence)
        if before is not None:
            engine.unpin(before)

    def unpin(self) -> None:
        """Let others have the memory again, should they need it."""
        if self._pin is not None:
            self.llm.engine.unpin(self._pin)
            self._pin = None

    @property
    def completion(self) -> Completion | None:
        """The newest answer and what it cost; `None` before the first and while one is being written."""
        if self._sequence is None or self._sequence.finish_reason is None:
            return None
        return self.llm.engine.completion(self._sequence)

    def close(self) -> None:
        """Stop what is being written and give back the session's blocks."""
        self.unpin()
        if self._sequence is not None:
            self.llm.engine.abort(self._sequence)
            self.llm.engine.release(self._sequence)
            self._sequence = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that raised has left no sequence behind.
        sequence, pin = getattr(self, "_sequence", None), getattr(self, "_pin", None)
        if sequence is not None or pin is not None:
            self.llm.engine.forget(sequence, pin)

    def _check_not_writing(self, what: str) -> None:
        if self._sequence is not None and self._sequence.finish_reason is None:
            raise InvalidInput(
                f"cannot {what} a session while it writes", hint="wait until its answer is whole, or close the stream"
            )

    def _stream(self, engine: Engine, sequence: Sequence, should_stop: Callable[[], bool]) -> Iterator[Piece]:
        try:
            yield from stream_sequence(engine, sequence, should_stop)
        finally:
            if sequence is self._sequence:
                self.append("assistant", sequence.text.text)
                stats = engine.completion(sequence).stats
                cost_s = engine.prefill_token_s
                saved_s = None if cost_s is None else stats.num_cached_tokens * cost_s
                self.turns.append(TurnStats(stats, stats.num_cached_tokens, saved_s))
            else:  # a newer turn, or the session's end, has left this one behind
                engine.release(sequence)
