"""The engine for servers: one thread steps it, any number of tasks await their tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import TypeVar, Unpack
from weakref import WeakSet

from kvik.config import Pooling, SamplingParams
from kvik.engine.engine import MAX_FAILED_STEPS
from kvik.engine.llm import GREEDY, LLM, Prompt, as_list
from kvik.engine.output import Completion, Embedding, Piece
from kvik.engine.request import (
    ChatOptions,
    Message,
    RequestOptions,
    TemplateOptions,
    check_options,
    split_options,
)
from kvik.engine.sequence import Sequence
from kvik.engine.session import AsyncSession, load_saved
from kvik.engine.stream import collect, collect_embeddings
from kvik.engine.token_stream import Delivery, TokenStream, call_soon
from kvik.errors import EngineDead
from kvik.text.chat_messages import Content

log = logging.getLogger(__name__)

Made = TypeVar("Made")

MAX_PIECES = 4096
"""Pieces that wait for a reader; one who is further behind loses the request."""


class AsyncLLM:
    """An `LLM` that many tasks of an event loop share; requests are batched as they come.

    Requests go into an inbox, which the engine's thread empties between two steps, so that nobody waits for a step to
    be admitted; what a step brought leaves with one call to the event loop. Leaving an iterator, or cancelling the task
    that reads it, aborts the request within a step. A step that fails ends its own requests; when the engine's thread
    ends, for whatever reason, every request gets `EngineDead`.

    >>> async with AsyncLLM(LLM("smollm2")) as llm:
    ...     async for piece in llm.stream("Once upon a time"):
    ...         print(piece.text, end="")
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine = llm.engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[TokenStream, None] = {}  # the engine thread's own
        self._death: BaseException | None = None
        self._is_closing = False
        self._streams: WeakSet[TokenStream] = WeakSet()  # the event loop's own
        self._awake_s: float | None = None  # when the engine's thread last showed life; None while it waits for work
        self._lock = threading.Lock()  # between a last command and the thread's end
        self._thread = threading.Thread(target=self._main, name="kvik-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._death is None and not self._is_closing and self._engine.death is None

    @property
    def silent_s(self) -> float:
        """Seconds that the present step takes already, 0 where there is nothing to do: the age of a hang."""
        awake_s = self._awake_s
        return 0.0 if awake_s is None else time.monotonic() - awake_s

    async def generate(
        self, prompt: Prompt, params: SamplingParams = GREEDY, **options: Unpack[RequestOptions]
    ) -> list[Completion]:
        """Completes a prompt, `params.n` times. Cancelling aborts it.

        Raises the error of a completion that failed; where others are whole, `RequestsFailed` with them.
        """
        sequence = await self._new_sequence(prompt, params, options)
        with self.open([sequence], wants_pieces=False) as stream:
            while await stream.read():
                pass
        return collect(self._engine, stream.branches)

    def stream(
        self, prompt: Prompt, params: SamplingParams = GREEDY, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[Piece]:
        """Completes one prompt piece by piece; the last piece of a completion carries the `Completion`.

        With `params.n` above 1 the pieces of all completions come as they are written; `Piece.index` says whose each
        is.
        """
        return self._pieces(partial(self._new_sequence, prompt, params, options))

    async def chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, **options: Unpack[ChatOptions]
    ) -> list[Completion]:
        """Answers a conversation, `params.n` times."""
        for_template, others = split_options(options)
        token_ids = await self._render_chat(messages, for_template)
        return await self.generate(token_ids, params, **others)

    def stream_chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, **options: Unpack[ChatOptions]
    ) -> AsyncIterator[Piece]:
        """Answers a conversation piece by piece."""
        for_template, others = split_options(options)

        async def make() -> Sequence:
            return await self._new_sequence(await self._render_chat(messages, for_template), params, others)

        return self._pieces(make)

    async def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        pooling: Pooling = "last",
        normalize: bool = True,
        **options: Unpack[RequestOptions],
    ) -> list[Embedding]:
        """Makes each prompt one vector; see `LLM.embed`. Cancelling aborts them.

        Of many prompts no more are queued at a time than the engine runs, so that others are not refused.
        """
        sequences = await self._checked(partial(self._new_embed_sequences, prompts, pooling, normalize, options))
        readers: list[TokenStream] = []
        max_queued = self._engine.scheduler.max_running
        try:
            for index, sequence in enumerate(sequences):
                if index >= max_queued:
                    await readers[index - max_queued].read()
                readers.append(self.open([sequence], wants_pieces=False))
            for reader in readers[-max_queued:]:
                await reader.read()
        finally:
            self._leave([branch for reader in readers for branch in reader.branches])
        return collect_embeddings(sequences)

    def session(self, *, system: Content | None = None, **options: Unpack[ChatOptions]) -> AsyncSession:
        """A conversation that keeps its cache; `options` are those of `chat`, and hold for every turn."""
        return AsyncSession(self, system=system, **options)

    async def load_session(self, name: str, **options: Unpack[ChatOptions]) -> AsyncSession:
        """A saved conversation to go on with; see `Session.load`."""
        saved, options = await asyncio.to_thread(load_saved, self.llm, name, options)
        session = AsyncSession(self, **options)
        session._restore(saved)
        return session

    def stream_sequence(self, sequence: Sequence) -> AsyncIterator[Piece]:
        """Queues a sequence of this engine and gives its tokens, and those of its branches, as they come."""

        async def given() -> Sequence:
            return sequence

        return self._pieces(given)

    def open(
        self, sequences: SequenceOf[Sequence], *, wants_pieces: bool = True, wants_progress: bool = False
    ) -> TokenStream:
        """Queue new sequences of this engine, all or none, and let them be read step by step.

        Closing the stream aborts what is not finished. With `wants_progress` it also says how far the prompts are.
        """
        if not self.is_alive:
            raise self._dead()
        stream = TokenStream(
            self._engine, sequences, self.leave, wants_pieces=wants_pieces, wants_progress=wants_progress
        )
        for branch in stream.branches:
            branch.costs.submitted_s = time.perf_counter()

        def begin() -> None:
            try:
                for sequence in sequences:
                    self._engine.add(sequence)
            except Exception as error:  # noqa: BLE001  # that the queue is full, or whatever it is: this one hears of it
                self._engine.abort(*stream.branches)
                stream.fail(error)
            else:
                self._readers[stream] = None

        self._command(begin)
        self._streams.add(stream)
        return stream

    def fail_all(self, error: Exception) -> None:
        """Have every stream that is read end with this error, now, whatever the engine does; and abort it."""
        for stream in list(self._streams):
            if not stream.is_done:
                stream.receive(Delivery([], [], is_last=True, error=error))
                stream.close()

    async def _pieces(self, make: Callable[[], Awaitable[Sequence]]) -> AsyncIterator[Piece]:
        # One generator for every route: leaving an outer one would not close an inner one at once.
        with self.open([await make()]) as stream:
            while pieces := await stream.read():
                for piece in pieces:
                    yield piece
            collect(self._engine, stream.branches)  # raises what went wrong

    def leave(self, sequences: SequenceOf[Sequence]) -> None:
        """Stop those that are not finished, at the end of the present step, without waiting for it."""
        self._leave(sequences)

    async def abort(self, sequences: SequenceOf[Sequence]) -> None:
        """Stop those that are not finished, and wait until they are."""
        if all(sequence.finish_reason is not None for sequence in sequences):
            return
        done = asyncio.get_running_loop().create_future()
        self._leave(sequences, done)
        await asyncio.shield(done)

    async def close(self) -> None:
        """End the engine's thread after its present step; what still runs gets `EngineDead`."""
        self._is_closing = True
        self._wake()
        await asyncio.to_thread(self._thread.join)

    def stop(self, seconds: float) -> bool:
        """The same without an event loop: whether the thread has ended within so many seconds."""
        self._is_closing = True
        self._wake()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # On the event loop's side.

    async def _new_sequence(self, prompt: Prompt, params: SamplingParams, options: RequestOptions) -> Sequence:
        check_options(options, RequestOptions)

        def make() -> Sequence:
            return self._engine.new_sequence(self._engine.new_request(self.llm.encode(prompt), params, **options))

        return await self._checked(make)

    def _new_embed_sequences(
        self, prompts: Prompt | SequenceOf[Prompt], pooling: Pooling, normalize: bool, options: RequestOptions
    ) -> list[Sequence]:
        check_options(options, RequestOptions)
        new_request, encode = self._engine.new_embed_request, self.llm.encode
        requests = [new_request(encode(prompt), pooling, normalize, **options) for prompt in as_list(prompts)]
        return [self._engine.new_sequence(request) for request in requests]

    async def _checked(self, make: Callable[[], Made]) -> Made:
        """Made elsewhere than on the event loop, for tokenizing takes its time, and so may echoing a prompt."""
        if not self.is_alive:
            raise self._dead()
        return await asyncio.to_thread(make)

    async def _render_chat(self, messages: SequenceOf[Message], options: TemplateOptions) -> list[int]:
        return await asyncio.to_thread(lambda: self.llm.render_chat(messages, **options))

    def _leave(self, branches: SequenceOf[Sequence], done: asyncio.Future[None] | None = None) -> None:
        """Abort what is not finished, at the end of the present step; `done` is told, and so is who still reads."""

        def end() -> None:
            try:
                self._engine.abort(*branches)
            finally:
                if done is not None:
                    call_soon(done.get_loop(), partial(_resolve, done))

        is_over = all(branch.finish_reason is not None for branch in branches)
        try:
            if not is_over:
                self._command(end)
        except EngineDead:  # which has told everybody
            is_over = True
        if is_over and done is not None:
            done.set_result(None)

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._death is not None:
                raise self._dead()
            self._inbox.put(command)

    def _dead(self) -> EngineDead:
        if isinstance(self._death, EngineDead):
            return EngineDead(self._death.message, hint=self._death.hint)
        why = "it was closed" if self._death is None or isinstance(self._death, _Closed) else repr(self._death)
        error = EngineDead(f"the engine's thread has ended: {why}", hint="make another AsyncLLM")
        error.__cause__ = self._death
        return error

    # On the engine's side.

    def _main(self) -> None:
        death: BaseException = _Closed()
        num_stuck = 0  # steps in a row that ended before they began
        try:
            while not self._is_closing:
                self._awake_s = time.monotonic()
                # Another thread's step may have ended what readers here still wait for.
                self._obey(wait=not (self._engine.scheduler.has_work or self._readers))
                num_steps = self._engine.scheduler.num_steps
                try:
                    self._engine.step()
                except EngineDead:
                    raise
                except Exception:
                    # An observer's, or accounts that broke: then the engine has forgotten what it cannot trust, and
                    # ended those whose requests went with it.
                    log.exception("a step ended with an error of its own")
                    num_stuck = num_stuck + 1 if self._engine.scheduler.num_steps == num_steps else 0
                    if num_stuck == MAX_FAILED_STEPS:
                        raise
                self._deliver()
        except BaseException as error:  # noqa: BLE001  # all who wait must hear of it, whatever it was
            death = error
        finally:
            with self._lock:
                self._death = death
            self._obey(wait=False)  # requests that came meanwhile have readers too
            readers, self._readers = self._readers, {}
            for reader in readers:
                reader.fail(self._dead())
            self._engine.abort(*(branch for reader in readers for branch in reader.branches))
            self._awake_s = None

    def _obey(self, *, wait: bool) -> None:
        """Do what the event loop asked for; with `wait`, sleep until it asks for something."""
        while True:
            try:
                if wait:
                    self._awake_s = None
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            self._awake_s = time.monotonic()
            try:
                command()
            except Exception:
                log.exception("a request could not be begun or ended")
            wait = False

    def _deliver(self) -> None:
        """Hand on what is new, with one call to each event loop."""
        outbox: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Delivery]]] = {}
        late: list[TokenStream] = []
        with self._engine.lock:
            for reader in self._readers:
                delivery = reader.take()
                if delivery is None:
                    continue
                outbox.setdefault(reader.loop, []).append((reader, delivery))
                if not delivery.is_last and reader.num_waiting > MAX_PIECES:
                    late.append(reader)
        for reader in late:
            error = reader.slow_error(MAX_PIECES)
            self._engine.abort(*reader.branches, error=error)
            self._wake()
            outbox[reader.loop].append((reader, Delivery([], [], is_last=True, error=error)))
        for loop, deliveries in outbox.items():
            is_closed = not call_soon(loop, partial(_hand_out, deliveries))
            for reader, delivery in deliveries:
                if delivery.is_last or is_closed:
                    self._readers.pop(reader, None)
                if is_closed:
                    self._engine.abort(*reader.branches)
                    self._wake()

    def _wake(self) -> None:
        """Have another step follow, where nothing may be left to do: observers hear of what has ended in it."""
        self._inbox.put(lambda: None)


class _Closed(Exception):
    """The thread was asked to end."""


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _hand_out(deliveries: list[tuple[TokenStream, Delivery]]) -> None:
    for reader, delivery in deliveries:
        reader.receive(delivery)
