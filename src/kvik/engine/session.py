"""A conversation that keeps its cache."""

from __future__ import annotations

import asyncio
import copy
import reprlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, Unpack, cast

from kvik.config import SamplingParams
from kvik.engine.lease import Lease
from kvik.engine.llm import GREEDY, LLM
from kvik.engine.output import Completion, Piece, Stats
from kvik.engine.request import ChatOptions, Request, TemplateOptions, check_options, split_options
from kvik.engine.sequence import Sequence
from kvik.engine.stream import stream_sequence
from kvik.errors import InvalidInput
from kvik.text.chat_messages import Content, check_message, check_template_vars, check_tools

if TYPE_CHECKING:
    from kvik.store.files import FileStore
    from kvik.store.sessions import SavedSession

FLUSH_S = 60.0
"""That saving waits for blocks to be written."""


@dataclass(frozen=True, slots=True)
class TurnStats:
    """What one turn cost, and what the turns before it saved."""

    stats: Stats
    saved_tokens: int  # of its prompt, that were not computed again
    saved_s: float | None  # the time that computing them would have taken, as measured; None before any measurement


class Conversation:
    """The messages of a session, and the lease of what was computed of them."""

    def __init__(self, llm: LLM, *, system: Content | None, options: ChatOptions) -> None:
        self._for_template, self._for_requests = split_options(options)
        check_tools(options.get("tools"))
        check_template_vars(options.get("template_vars"))
        self.llm = llm
        self.messages: list[dict[str, Any]] = []
        self.turns: list[TurnStats] = []
        self._options = options
        self._writing: Sequence | None = None  # the turn that is being written
        self._completion: Completion | None = None
        self._lease: Lease | None = None
        self._pin: Lease | None = None
        self._is_closed = False
        if system is not None:
            self.append("system", system)

    @property
    def use_cache(self) -> bool:
        """Whether the session keeps and reuses computed blocks."""
        return self._options.get("use_cache", True)

    @property
    def salt(self) -> str | None:
        """The cache salt: no blocks are shared with requests of another salt."""
        return self._options.get("salt")

    def append(self, role: str, content: Content | None = None, **others: Any) -> None:
        """Add a message; `others` are its `tool_calls`, `tool_call_id` or `name`, as `LLM.render_chat` takes them."""
        message = {"role": role, "content": content, **others}
        self.messages.append(check_message(f"messages[{len(self.messages)}]", message))

    @property
    def completion(self) -> Completion | None:
        """The newest answer and what it cost; `None` before the first and while one is being written."""
        return None if self._is_writing else self._completion

    @property
    def _is_writing(self) -> bool:
        return self._writing is not None and self._writing.finish_reason is None

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

    def _new_request(self, params: SamplingParams) -> Request:
        if self._is_closed:
            raise InvalidInput("the session is closed", hint="make another one")
        if isinstance(params, SamplingParams) and (params.n > 1 or params.echo):
            raise InvalidInput(
                "a session has one answer a turn", hint="leave n and echo as they are, or use LLM.generate"
            )
        token_ids = self.llm.render_chat(self.messages, **self._for_template)
        return self.llm.engine.new_request(token_ids, params, **self._for_requests, hold=True, lease=self._lease)

    def _end_turn(self, sequence: Sequence, give_back: Callable[[Lease], None]) -> None:
        """Append the answer, whole or as far as it came; `give_back` closes a lease that nobody needs any more."""
        lease = sequence.lease
        if self._writing is not sequence or self._is_closed:  # a newer turn, or the end, has left this one behind
            if lease is not None:
                give_back(lease)
            return
        self._writing = None
        # The engine did not take it, or its thread has ended and left it as it was.
        if not sequence.is_queued or sequence.finish_reason is None:
            return
        if lease is not None:
            self._lease, lease = lease, self._lease
            if lease is not None:
                give_back(lease)
        engine = self.llm.engine
        self._completion = engine.completion(sequence)
        stats = self._completion.stats
        if stats.num_completion_tokens or sequence.finish_reason != "abort":
            self.append("assistant", sequence.text.text)
        cost_s = engine.prefill_token_s
        saved_s = None if cost_s is None else stats.num_cached_tokens * cost_s
        self.turns.append(TurnStats(stats, stats.num_cached_tokens, saved_s))

    def _copy_to(self, fork: Conversation) -> None:
        """Everything that a fork begins with but the lease."""
        fork.messages = copy.deepcopy(self.messages)
        fork._completion = self._completion

    def _restore(self, saved: SavedSession) -> None:
        for message in saved.messages:
            self.messages.append(check_message(f"messages[{len(self.messages)}]", dict(message)))

    def _forked_lease(self) -> Lease | None:
        return self._lease.fork() if self._lease is not None and self._lease.num_tokens else None

    def _replace_pin(self) -> None:
        self._check_not_writing("pin")
        if self._lease is None or not self._lease.num_tokens:
            raise InvalidInput("nothing of the session is in the cache", hint="pin it after an answer")
        before, self._pin = self._pin, self._lease.pin()
        if before is not None:
            before.close()

    def _save(self, name: str) -> SavedSession:
        from kvik.store.sessions import SavedSession, check_name, save_session

        self._check_not_writing("save")
        engine, store = self.llm.engine, _files_of(self.llm)
        check_name(name)
        digests = [] if self._lease is None else engine.store_lease(self._lease)
        engine.flush_store(FLUSH_S)
        saved = SavedSession(
            name=name,
            model=self.llm.model.path.name,
            messages=self.messages,
            template=self._for_template,
            num_tokens=len(digests) * engine.kv_spec.block_size,
            digests=[digest.hex() for digest in digests],
            num_stored_blocks=sum(map(store.exists, digests)),
        )
        save_session(store, engine.cache.root(self.salt), saved)
        return saved

    def _close(self) -> None:
        self._is_closed = True
        self._completion = None
        writing, self._writing = self._writing, None
        if writing is not None:
            self.llm.engine.abort(writing)
        for lease in (self._pin, self._lease):
            if lease is not None:
                lease.close()
        self._pin = self._lease = None

    def _check_not_writing(self, what: str) -> None:
        if self._is_writing:
            raise InvalidInput(
                f"cannot {what} a session while it writes", hint="wait until its answer is whole, or close the stream"
            )


def load_saved(llm: LLM, name: str, options: ChatOptions) -> tuple[SavedSession, ChatOptions]:
    """A saved conversation, and the options that it goes on with: what is given, else what it had."""
    from kvik.store.sessions import load_session

    owner = llm.engine.cache.root(options.get("salt"))
    saved = load_session(_files_of(llm), owner, name)
    check_options(saved.template, TemplateOptions)
    return saved, cast(ChatOptions, {**saved.template, **options})


def _files_of(llm: LLM) -> FileStore:
    from kvik.store.files import FileStore

    tier = llm.engine.tier
    if tier is None or not isinstance(tier.store, FileStore):
        what = "there is none" if tier is None else "it is a server, where none are"
        raise InvalidInput(f"sessions are saved in the store, and {what}", hint="LLM(..., store=FOLDER)")
    return tier.store


def _whole(last: list[Piece]) -> Completion:
    if last and last[0].completion is not None and last[0].completion.finish_reason != "abort":
        return last[0].completion
    raise InvalidInput(
        "the turn ended before its answer was whole: a newer one began, or the session was closed",
        hint="let one turn of a session end before the next begins",
    )


class Session(Conversation):
    """A conversation whose turns compute only their new tokens.

    Between turns the session holds its blocks until memory is short (`pin` holds them in any case); blocks that were
    taken back are computed again. They are released when the session is closed, left (`with`) or collected. `options`
    are those of `LLM.chat`, and hold for every turn.

    >>> with Session(LLM("smollm2")) as session:
    ...     session.append("user", "Why is the sky blue?")
    ...     print(session.generate().text)
    ...     other = session.fork()  # goes its own way from here, at the price of one block
    ...     session.rewind(1)  # as if the answer had not been given
    """

    def __init__(self, llm: LLM, *, system: Content | None = None, **options: Unpack[ChatOptions]) -> None:
        super().__init__(llm, system=system, options=options)

    def generate(self, params: SamplingParams = GREEDY) -> Completion:
        """Answers the messages so far, and appends the answer. Raises `InvalidInput` where another turn ended it."""
        return _whole([piece for piece in self.stream(params) if piece.completion is not None])

    def stream(
        self, params: SamplingParams = GREEDY, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Piece]:
        """Streams the answer to the messages so far, and appends it, whole or as far as it came.

        `should_stop` is asked between steps, and ends the answer as closing the iterator does. The messages are
        checked before this returns; reading begins the turn, and ends one that is still being written.
        """
        request = self._new_request(params)
        self.llm.engine.check_room(request)
        return self._stream(request, should_stop)

    def fork(self) -> Session:
        """Another session with the same past, which shares its blocks; only tokens after the fork cost anything."""
        self._check_not_writing("fork")
        fork = Session(self.llm, **self._options)
        self._copy_to(fork)
        fork._lease = self._forked_lease()
        return fork

    def pin(self) -> None:
        """Hold the blocks of the conversation until `unpin` or `close`, even when memory is short.

        Later turns are not pinned until `pin` is called again. Raises `CacheTooSmall` where a request under way would
        no longer fit.
        """
        self._replace_pin()

    def unpin(self) -> None:
        """Undo `pin`: the blocks may be taken back when memory is short."""
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.close()

    def save(self, name: str) -> SavedSession:
        """Keep the conversation in the store, in place of one of this name: messages, and the blocks computed of them.

        What it gives says how many blocks could be stored; what could not is computed again. Raises `InvalidInput`.
        """
        return self._save(name)

    @classmethod
    def load(cls, llm: LLM, name: str, **options: Unpack[ChatOptions]) -> Self:
        """A saved conversation of this model, to go on with; its blocks are read when its next turn begins.

        `options` replace those that it was saved with; its salt must be given. Raises `InvalidInput`.
        """
        saved, options = load_saved(llm, name, options)
        session = cls(llm, **options)
        session._restore(saved)
        return session

    def close(self) -> None:
        """Stop a turn that is being written and release the session's blocks."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(self, request: Request, should_stop: Callable[[], bool]) -> Iterator[Piece]:
        engine = self.llm.engine
        if self._is_closed:
            return
        sequence = engine.new_sequence(request)
        try:
            previous, self._writing = self._writing, sequence
            if previous is not None:
                engine.abort(previous)
            yield from stream_sequence(engine, sequence, should_stop)
        finally:
            self._end_turn(sequence, Lease.close)


class Streams(Protocol):
    """An `AsyncLLM`, as far as a session needs it."""

    llm: LLM

    def stream_sequence(self, sequence: Sequence) -> AsyncIterator[Piece]:
        """The tokens of a sequence as they come."""

    async def abort(self, sequences: list[Sequence]) -> None:
        """Stop those that are not finished, and wait until they are."""


class AsyncSession(Conversation):
    """A `Session` for tasks of an event loop; `AsyncLLM.session` makes one."""

    def __init__(self, llm: Streams, *, system: Content | None = None, **options: Unpack[ChatOptions]) -> None:
        super().__init__(llm.llm, system=system, options=options)
        self._async_llm = llm

    async def generate(self, params: SamplingParams = GREEDY) -> Completion:
        """Answers the messages so far, and appends the answer. Cancelling ends it; see `Session.generate`."""
        return _whole([piece async for piece in self.stream(params) if piece.completion is not None])

    async def stream(self, params: SamplingParams = GREEDY) -> AsyncIterator[Piece]:
        """Streams the answer to the messages so far, and appends it, whole or as far as it came."""
        request = await asyncio.to_thread(self._new_request, params)
        if self._is_closed:
            return
        sequence = self.llm.engine.new_sequence(request)  # one, without an echo: it takes no time
        try:
            previous, self._writing = self._writing, sequence
            if previous is not None:
                await self._async_llm.abort([previous])
            async for piece in self._async_llm.stream_sequence(sequence):
                yield piece
        finally:
            try:
                await self._async_llm.abort([sequence])  # it has its lease when the engine's thread has done so
            finally:
                self._end_turn(sequence, Lease.close_later)

    async def fork(self) -> AsyncSession:
        """Another session with the same past, which shares its blocks; only tokens after the fork cost anything."""
        self._check_not_writing("fork")
        fork = AsyncSession(self._async_llm, **self._options)
        self._copy_to(fork)
        fork._lease = await asyncio.to_thread(self._forked_lease)
        return fork

    async def pin(self) -> None:
        """Keep what is computed of the conversation; see `Session.pin`."""
        await asyncio.to_thread(self._replace_pin)

    async def unpin(self) -> None:
        """Undo `pin`: the blocks may be taken back when memory is short."""
        pin, self._pin = self._pin, None
        if pin is not None:
            await asyncio.to_thread(pin.close)

    async def save(self, name: str) -> SavedSession:
        """Keep the conversation in the store; see `Session.save`."""
        return await asyncio.to_thread(self._save, name)

    async def close(self) -> None:
        """Stop a turn that is being written and release the session's blocks."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
