"""A load on a server: clients that hold chats, when each begins, and what every request cost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kvik.client.completions import CHAT_PATH, Reply, Server, until_stopped
from kvik.client.http import Address, Connection
from kvik.errors import KvikError

Outcome = Literal["ok", "failed", "interrupted"]
Message = dict[str, str]

FAILURE_PAUSE_S = 0.1
"""A client whose request failed waits so long, or a dead server would be asked a million times."""

# Short and frequent, so that each is one token behind a space in nearly every vocabulary.
TEXT = """\
after again all and any apple around ask back bad ball bank bed bird black blood blue boat body book box boy
bread bring brother build car chair child city clean clear cold color come cook corn cost cut day deep dog door
down draw dream drink dry earth eat egg eye face fall farm fast father fear field fire fish floor flower fly
food foot free friend game garden girl give glass gold good grass green ground hair hand hard head heart heavy
high hill home horse hot hour house ice iron king lake land language late leaf learn leg letter light line long
man map market milk money moon morning mother mountain music name night nose ocean old open paper park part
people picture plant play rain red rest rice right ring river road rock room salt sand school sea seed ship shoe
short sing sister sky sleep small snow song sound spring star stone story street strong summer sun table tail
talk tall tea teach thing time tooth town train tree turn walk wall warm water week wheel white wild wind window
winter wood word work world write year yellow young"""
WORDS = TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked: chats of `num_turns` over one system prompt, whose texts follow from `seed`.

    Lengths are words, about as many tokens; the server's usage has the real counts.
    """

    num_turns: int = 1
    system_words: int = 0  # that all chats have in common
    turn_words: int = 64
    max_tokens: int = 64
    seed: int = 0

    def system(self) -> list[Message]:
        """What every chat begins with."""
        return [{"role": "system", "content": self._text("system", self.system_words)}] if self.system_words else []

    def message(self, chat: int, turn: int) -> Message:
        """What the user says in that turn; no two begin alike."""
        return {"role": "user", "content": f"{chat + 1}.{turn + 1} {self._text(f'{chat}/{turn}', self.turn_words)}"}

    def _text(self, name: str, num_words: int) -> str:
        return " ".join(random.Random(f"{self.seed}/{name}").choices(WORDS, k=num_words))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked at once, and when it ends.

    `concurrency` clients ask one after the other; or chats begin at random moments, `rate` a second on average,
    whether earlier ones have ended or not. No request begins after `num_requests` or `duration_s`.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None


class Asker(Protocol):
    """One client's way to the model."""

    async def ask(self, messages: Sequence[Message], max_tokens: int, reply: Reply) -> None:
        """Fill `reply` as the answer comes. Raises `KvikError`."""

    def close(self) -> None:
        """Leave."""


class HttpAsker:
    """A client on a connection of its own, which it keeps between requests."""

    def __init__(
        self, address: Address, server: Server, model: str, *, timeout_s: float, ignore_eos: bool = True
    ) -> None:
        self._server = server
        self._connection = Connection(address, timeout_s=timeout_s)
        self._body: dict[str, Any] = {"model": model, "temperature": 0}
        if ignore_eos:
            self._body["ignore_eos"] = True

    async def ask(self, messages: Sequence[Message], max_tokens: int, reply: Reply) -> None:
        """Send the chat so far."""
        body = {**self._body, "messages": messages, "max_tokens": max_tokens}
        await self._server.ask(self._connection, CHAT_PATH, body, reply)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass(slots=True)
class Record:
    """One request. Its times count from the moment when it was due, which is before a slow client has sent it."""

    chat: int
    turn: int
    due_s: float
    begun_s: float = 0.0
    ended_s: float = 0.0
    outcome: Outcome = "interrupted"
    error: KvikError | None = None
    reply: Reply = field(default_factory=Reply)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Until the first text."""
        return self.reply.text_times_s[0] - self.due_s if self.reply.text_times_s else None


@dataclass(slots=True)
class LoadResult:
    """Every request that began, in the order of their ends."""

    workload: Workload
    load: Load
    records: list[Record] = field(default_factory=list)
    duration_s: float = 0.0  # to the end of the last one
    is_whole: bool = True  # not interrupted


async def run_load(
    make_asker: Callable[[], Asker],
    workload: Workload,
    load: Load,
    *,
    on_end: Callable[[Record], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> LoadResult:
    """Put the load on and wait for every answer; `should_stop` ends it with what was measured so far."""
    run = _Run(make_asker, workload, load, on_end)
    run.result.is_whole = await until_stopped(run.run(), should_stop)
    run.result.duration_s = time.perf_counter() - run.started_s
    return run.result


async def warm_up(
    asker: Asker, workload: Workload, num_requests: int, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Ask such requests one after the other, of which the cache keeps nothing that the measured ones need.

    False where `should_stop` said so. Raises `KvikError`.
    """
    other = Workload(
        system_words=workload.system_words,
        turn_words=workload.turn_words,
        max_tokens=workload.max_tokens,
        seed=-1 - workload.seed,
    )

    async def ask_all() -> None:
        for chat in range(num_requests):
            await asker.ask([*other.system(), other.message(chat, 0)], other.max_tokens, Reply())

    return await until_stopped(ask_all(), should_stop)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds of a Poisson process, for ever."""
    draw, at_s = random.Random(f"{seed}/arrivals"), 0.0
    while True:
        at_s += draw.expovariate(rate)
        yield at_s


class _Run:
    """One load while it runs."""

    def __init__(
        self, make_asker: Callable[[], Asker], workload: Workload, load: Load, on_end: Callable[[Record], None]
    ) -> None:
        self.result = LoadResult(workload, load)
        self.started_s = time.perf_counter()
        self._make_asker = make_asker
        self._workload = workload
        self._load = load
        self._on_end = on_end
        self._system = workload.system()
        self._num_begun = 0
        self._num_chats = 0

    async def run(self) -> None:
        """To the last answer."""
        async with asyncio.TaskGroup() as group:
            if self._load.rate is not None:
                await self._arrive(group, self._load.rate)
            else:
                for _ in range(self._load.concurrency or 1):
                    group.create_task(self._client())

    async def _client(self) -> None:
        """Hold one chat after the other."""
        asker = self._make_asker()
        try:
            while self._may_begin(time.perf_counter()):
                if not await self._hold_chat(asker, self._next_chat(), time.perf_counter()):
                    await asyncio.sleep(FAILURE_PAUSE_S)
        finally:
            asker.close()

    async def _arrive(self, group: asyncio.TaskGroup, rate: float) -> None:
        """Begin chats when they are due; a request that is to come later in a chat is counted when the chat begins."""
        num_due = 0
        for after_s in arrivals(rate, self._workload.seed):
            due_s = self.started_s + after_s
            if not self._is_in_time(due_s) or not self._has_requests(num_due):
                return
            num_due += self._workload.num_turns
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(self._arrived(self._next_chat(), due_s))

    async def _arrived(self, chat: int, due_s: float) -> None:
        asker = self._make_asker()
        try:
            await self._hold_chat(asker, chat, due_s)
        finally:
            asker.close()

    async def _hold_chat(self, asker: Asker, chat: int, due_s: float) -> bool:
        """One turn after the other, each due when the one before has ended; False after a failure, which ends it."""
        messages = list(self._system)
        for turn in range(self._workload.num_turns):
            if not self._may_begin(due_s):
                break
            messages.append(self._workload.message(chat, turn))
            record = await self._ask(asker, messages, Record(chat, turn, due_s))
            if record.outcome != "ok":
                return False
            messages.append({"role": "assistant", "content": record.reply.text})
            due_s = record.ended_s
        return True

    async def _ask(self, asker: Asker, messages: Sequence[Message], record: Record) -> Record:
        self._num_begun += 1
        record.begun_s = time.perf_counter()
        try:
            await asker.ask(messages, self._workload.max_tokens, record.reply)
            record.outcome = "ok"
        except KvikError as error:
            record.outcome, record.error = "failed", error
        finally:
            record.ended_s = time.perf_counter()
            self.result.records.append(record)
            self._on_end(record)
        return record

    def _next_chat(self) -> int:
        self._num_chats += 1
        return self._num_chats - 1

    def _may_begin(self, due_s: float) -> bool:
        return self._has_requests(self._num_begun) and self._is_in_time(due_s)

    def _has_requests(self, num_begun: int) -> bool:
        return self._load.num_requests is None or num_begun < self._load.num_requests

    def _is_in_time(self, due_s: float) -> bool:
        return self._load.duration_s is None or due_s - self.started_s < self._load.duration_s
