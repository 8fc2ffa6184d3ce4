"""The engine for servers: one thread steps it, any number of tasks await their tokens."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import GREEDY, LLM, Message, Prompt
from kvik.engine.output import Completion, Piece
from kvik.engine.sequence import Sequence
from kvik.engine.stream import PieceFeed
from kvik.errors import EngineDead, InvalidInput, KvikError, SlowReader

MAX_PIECES = 4096
"""Pieces that wait for a reader at most; one who is further behind loses the request."""


class AsyncLLM:
    """An `LLM` that many tasks of an event loop share; requests are batched as they come.

    Leaving an iterator, or cancelling the task that reads it, aborts the request within a step. When the engine's
    thread ends, for whatever reason, every request gets `EngineDead`.

    >>> async with AsyncLLM(LLM("smollm2")) as llm:
    ...     async for piece in llm.stream("Once upon a time"):
    ...         print(piece.text, end="")
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine = llm.engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[Sequence, _Reader] = {}  # the engine thread's own
        self._death: BaseException | None = None
        self._is_closing = False
        self._beat_s = time.monotonic()
        self._lock = threading.Lock()  # between a last command and the thread's end
        self._thread = threading.Thread(target=self._main, name="kvik-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._death is None and not self._is_closing

    @property
    def idle_s(self) -> float:
        """Seconds since the engine's thread last showed that it lives; long ones during work mean a hanging step."""
        return time.monotonic() - self._beat_s

    async def generate(
        self, prompt: Prompt, params: SamplingParams = GREEDY, *, priority: int = 0, salt: str | None = None
    ) -> list[Completion]:
        """Completes a prompt, `params.n` times. Cancelling aborts it."""
        sequence = await self._new_sequence(prompt, params, priority, salt)
        branches = list(sequence.all_branches())
        readers = [_Reader(self._engine, branch) for branch in branches]
        self._submit(sequence, readers)
        try:
            for reader in readers:
                async for _ in reader:
                    pass
        finally:
            self._leave(branches)
        return [self._engine.completion(branch) for branch in branches]

    async def stream(
        self, prompt: Prompt, params: SamplingParams = GREEDY, *, priority: int = 0, salt: str | None = None
    ) -> AsyncIterator[Piece]:
        """Completes one prompt piece by piece; the last piece carries the `Completion`."""
        if isinstance(params, SamplingParams) and params.n > 1:
            raise InvalidInput(f"n is {params.n}", hint="a stream has one completion; `generate` gives several")
        sequence = await self._new_sequence(prompt, params, priority, salt)
        reader = _Reader(self._engine, sequence)
        self._submit(sequence, [reader])
        try:
            async for piece in reader:
                yield piece
        finally:
            self._leave([sequence])

    async def chat(
        self,
        messages: SequenceOf[Message],
        params: SamplingParams = GREEDY,
        *,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        priority: int = 0,
        salt: str | None = None,
    ) -> list[Completion]:
        """Answers a conversation, `params.n` times."""
        token_ids = await asyncio.to_thread(self.llm.render_chat, messages, tools=tools, template_vars=template_vars)
        return await self.generate(token_ids, params, priority=priority, salt=salt)

    async def stream_chat(
        self,
        messages: SequenceOf[Message],
        params: SamplingParams = GREEDY,
        *,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        priority: int = 0,
        salt: str | None = None,
    ) -> AsyncIterator[Piece]:
        """Answers a conversation piece by piece."""
        token_ids = await asyncio.to_thread(self.llm.render_chat, messages, tools=tools, template_vars=template_vars)
        async for piece in self.stream(token_ids, params, priority=priority, salt=salt):
            yield piece

    async def close(self) -> None:
        """End the engine's thread after its present step; what still runs gets `EngineDead`."""
        self._is_closing = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # On the event loop's side.

    async def _new_sequence(self, prompt: Prompt, params: SamplingParams, priority: int, salt: str | None) -> Sequence:
        """Checked elsewhere than on the event loop: it takes the engine's lock, and tokenizing takes its time."""
        if not self.is_alive:
            raise self._dead()

        def make() -> Sequence:
            return self._engine.new_sequence(self.llm.encode(prompt), params, priority=priority, salt=salt)

        return await asyncio.to_thread(make)

    def _submit(self, sequence: Sequence, readers: list[_Reader]) -> None:
        def begin() -> None:
            self._readers |= {reader.sequence: reader for reader in readers}
            try:
                self._engine.add(sequence)
            except KvikError as error:  # the queue is full
                for reader in readers:
                    del self._readers[reader.sequence]
                    reader.fail(error)

        self._command(begin)

    def _leave(self, branches: list[Sequence]) -> None:
        def end() -> None:
            for branch in branches:
                self._readers.pop(branch, None)
                self._engine.abort(branch)

        if any(branch.finish_reason is None for branch in branches) and self.is_alive:
            self._command(end)

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._death is not None:
                raise self._dead()
            self._commands.put(command)

    def _dead(self) -> EngineDead:
        why = "it was closed" if self._death is None or isinstance(self._death, _Closed) else repr(self._death)
        error = EngineDead(f"the engine's thread has ended: {why}", hint="make another AsyncLLM")
        error.__cause__ = self._death
        return error

    # On the engine's side.

    def _main(self) -> None:
        death: BaseException = _Closed()
        try:
            while not self._is_closing:
                # Another thread's step may have ended what readers here still wait for.
                self._obey(wait=not (self._engine.scheduler.has_work or self._readers))
                self._beat_s = time.monotonic()
                self._engine.step()
                self._deliver()
        except BaseException as error:  # noqa: BLE001  # all who wait must hear of it, whatever it was
            death = error
        finally:
            with self._lock:
                self._death = death
            self._obey(wait=False)  # requests that came meanwhile have readers too
            readers, self._readers = self._readers, {}
            for reader in readers.values():
                reader.fail(self._dead())
            for sequence in readers:
                self._engine.abort(sequence)

    def _obey(self, *, wait: bool) -> None:
        """Do what the event loop asked for; with `wait`, sleep until it asks for something."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _deliver(self) -> None:
        for sequence, reader in list(self._readers.items()):
            try:
                reader.deliver()
            except SlowReader as error:
                self._engine.abort(sequence)
                reader.fail(error)
            if reader.is_done:
                del self._readers[sequence]


class _Closed(Exception):
    """The thread was asked to end."""


class _Reader:
    """One request's pieces on their way from the engine's thread to a task."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.sequence = sequence
        self.is_done = False
        self._feed = PieceFeed(engine, sequence)
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    def deliver(self) -> None:
        """Hand over what is new. Raises `SlowReader` where too much of the old is still there."""
        pieces: list[Piece | Exception | None] = [*self._feed.take()]
        if self._feed.is_done:
            pieces.append(self.sequence.error)  # None: it ended well
            self.is_done = True
        elif self._pieces.qsize() + len(pieces) > MAX_PIECES:
            raise SlowReader(
                f"{self._pieces.qsize():,} tokens wait to be read, {MAX_PIECES:,} may", hint="read them as they come"
            )
        if pieces:
            self._put(pieces)

    def fail(self, error: Exception) -> None:
        """No more pieces: this went wrong."""
        self.is_done = True
        self._put([error])

    def _put(self, items: list[Piece | Exception | None]) -> None:
        def put() -> None:
            for item in items:
                self._pieces.put_nowait(item)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.is_done = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while (item := await self._pieces.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
