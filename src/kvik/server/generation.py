"""What all generating routes translate to: prompts of one model, how they are completed, and what it cost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from kvik.config import SamplingParams
from kvik.engine.output import Completion
from kvik.engine.request import HeldOptions
from kvik.engine.sequence import Sequence as Written
from kvik.engine.stream import collect
from kvik.engine.token_stream import TokenStream
from kvik.errors import EngineDead
from kvik.server.errors import ApiError, api_error
from kvik.server.origin import Origin
from kvik.server.served import ServedModel
from kvik.server.sse import left
from kvik.server.state import ServerState
from kvik.text.answer_parser import AnswerParser

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request of any route: prompts, each completed `params.n` times; choices are numbered in that order."""

    served: ServedModel
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    options: HeldOptions
    request_id: str
    origin: Origin
    fields: frozenset[str]  # of the request's body, for errors that name one
    tenant: str | None = None  # whose request it is
    # Where the answer may hold thoughts or tool calls; it is given what makes ids of calls.
    new_parser: Callable[[Callable[[int], str]], AnswerParser] | None = None
    wants_progress: bool = False
    prewarm: bool = False  # compute the prompts into the cache, and write nothing
    on_whole: Sequence[Callable[[Running], Awaitable[None]]] = ()  # awaited before the answer's end is sent
    on_end: Sequence[Callable[[Running], None]] = ()  # told when the completions are whole or given up
    extras: Sequence[Callable[[Running], dict[str, Any]]] = ()  # further fields of the answer, when it is whole

    @property
    def tells_tokens(self) -> bool:
        """Whether its stream tells a front which tokens it wrote; with logprobs they would be of no use."""
        return self.origin.is_told and self.params.logprobs is None


class Running:
    """A generation that is being written."""

    def __init__(self, generation: Generation, stream: TokenStream) -> None:
        self.generation = generation
        self.stream = stream
        new_parser, origin = generation.new_parser, generation.origin
        self.parsers: list[AnswerParser] | None = None
        if new_parser is not None:
            self.parsers = [new_parser(origin.new_call_ids(choice)) for choice in range(len(stream.branches))]
        self.created = origin.created
        self.new_id = origin.new_ids()
        self.response_id = ""  # that its answer goes by
        self.written_by_ttl: Mapping[str, int] | None = None  # tokens of the prompt that are kept for a time, by it
        self._is_settled = False

    def extras(self) -> dict[str, Any]:
        """Further fields of the answer's body."""
        found: dict[str, Any] = {}
        for make in self.generation.extras:
            found |= make(self)
        return found

    @property
    def branches(self) -> list[Written]:
        """The completions as they are written, one for each choice."""
        return self.stream.branches

    @property
    def served(self) -> ServedModel:
        """The model that writes."""
        return self.generation.served

    def completions(self) -> list[Completion]:
        """All of them, whole. Raises the error of one that failed."""
        return collect(self.served.llm.engine, self.branches)

    async def wait(self) -> None:
        """Wait until all are whole."""
        while await self.stream.read():
            pass

    async def settle(self) -> None:
        """Do what must be done when all are whole, and before the answer says so."""
        if self._is_settled or any(branch.finish_reason is None for branch in self.branches):
            return
        self._is_settled = True
        for told in self.generation.on_whole:
            await told(self)
        for branch in self.branches:
            if branch.lease is not None:
                branch.lease.close_later()

    def usage(self) -> Usage:
        """What was read and written so far."""
        prompts = [branch for branch in self.branches if branch.branch == 0]
        cache = self.served.llm.engine.cache
        num_full = sum(
            max(
                0,
                sequence.num_prompt_tokens // cache.spec.block_size * cache.spec.block_size
                - sequence.costs.num_cached_tokens,
            )
            for sequence in prompts
            if sequence.request.use_cache and sequence.request.share and cache.prefix_cache
        )
        return Usage(
            num_prompt_tokens=sum(sequence.num_prompt_tokens for sequence in prompts),
            num_completion_tokens=sum(branch.num_completion_tokens for branch in self.branches),
            num_cached_tokens=sum(sequence.costs.num_cached_tokens for sequence in prompts),
            num_written_tokens=max(num_full, sum((self.written_by_ttl or {}).values())),
            written_by_ttl=self.written_by_ttl,
            num_thought_tokens=sum(parser.num_thought_tokens for parser in self.parsers or ()),
        )

    def timings(self) -> dict[str, Any]:
        """llama.cpp's `timings`, of all completions together, and the bytes of the blocks that they held."""
        usage, times = self.usage(), self._times_s()
        prompt_n = usage.num_prompt_tokens - usage.num_cached_tokens
        predicted_n, queue_s, prefill_s, decode_s = usage.num_completion_tokens, *times
        num_later = max(0, predicted_n - len(self.branches))
        return {
            "cache_n": usage.num_cached_tokens,
            "prompt_n": prompt_n,
            "prompt_ms": round(prefill_s * 1000, 3),
            "prompt_per_token_ms": round(prefill_s * 1000 / prompt_n, 3) if prompt_n else 0.0,
            "prompt_per_second": round(prompt_n / prefill_s, 3) if prefill_s else 0.0,
            "predicted_n": predicted_n,
            "predicted_ms": round(decode_s * 1000, 3),
            "predicted_per_token_ms": round(decode_s * 1000 / num_later, 3) if num_later else 0.0,
            "predicted_per_second": round(num_later / decode_s, 3) if decode_s else 0.0,
            "queue_ms": round(queue_s * 1000, 3),
            "draft_n": sum(branch.costs.num_drafted_tokens for branch in self.branches),
            "draft_n_accepted": sum(branch.costs.num_accepted_tokens for branch in self.branches),
            "kv_bytes": sum(branch.costs.kv_bytes for branch in self.branches),
        }

    def server_timing(self) -> str:
        """The header of that name: milliseconds in the queue, of the prompt and, once it is over, of decoding."""
        queue_s, prefill_s, decode_s = self._times_s()
        parts = [f"queue;dur={queue_s * 1000:.1f}", f"prefill;dur={prefill_s * 1000:.1f}"]
        if all(branch.finish_reason is not None for branch in self.branches):
            parts.append(f"decode;dur={decode_s * 1000:.1f}")
        return ", ".join(parts)

    def _times_s(self) -> tuple[float, float, float]:
        """Seconds until the first prompt was begun, until the last first token, and until the last token."""
        costs = [branch.costs for branch in self.branches]
        submitted_s = min(cost.submitted_s or 0.0 for cost in costs)
        begun_s = min((cost.begun_s for cost in costs if cost.begun_s is not None), default=submitted_s)
        first_s = max((cost.first_token_s for cost in costs if cost.first_token_s is not None), default=begun_s)
        last_s = max((cost.last_token_s for cost in costs if cost.last_token_s is not None), default=first_s)
        return begun_s - submitted_s, first_s - begun_s, last_s - first_s


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int  # of the prompts
    num_written_tokens: int  # of the prompts, that were not in the cache, in full blocks or before a breakpoint
    written_by_ttl: Mapping[str, int] | None = None  # by breakpoints, for how long each
    num_thought_tokens: int = 0  # of the completions

    def write_details(self) -> dict[str, Any]:
        """OpenAI's `cache_write_tokens_details`, where breakpoints were asked for."""
        if self.written_by_ttl is None:
            return {}
        counts = {"30m": 0, "12h": 0, **self.written_by_ttl}
        return {"cache_write_tokens_details": {f"ttl_{ttl}_tokens": count for ttl, count in counts.items()}}

    def openai(self) -> dict[str, Any]:
        """As chat and completions have it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.num_cached_tokens,
                "cache_write_tokens": self.num_written_tokens,
                **self.write_details(),
            },
            "completion_tokens_details": {"reasoning_tokens": self.num_thought_tokens},
        }

    def responses(self) -> dict[str, Any]:
        """As Responses have it."""
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": self.num_cached_tokens,
                "cache_write_tokens": self.num_written_tokens,
                **self.write_details(),
            },
            "output_tokens": self.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_thought_tokens},
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }

    def anthropic(self) -> dict[str, Any]:
        """As Messages have it: the prompt's tokens are those read from the cache, those written to it, and the rest."""
        num_for_an_hour = (self.written_by_ttl or {}).get("1h", 0)
        return {
            "input_tokens": self.num_prompt_tokens - self.num_cached_tokens - self.num_written_tokens,
            "cache_read_input_tokens": self.num_cached_tokens,
            "cache_creation_input_tokens": self.num_written_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.num_written_tokens - num_for_an_hour,
                "ephemeral_1h_input_tokens": num_for_an_hour,
            },
            "output_tokens": self.num_completion_tokens,
        }


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return prefix + secrets.token_hex(12)


def default_max_tokens(state: ServerState, served: ServedModel, num_prompt_tokens: int, n: int) -> int:
    """As many as context, cache and the limit on work have room for, where the client names no number; 1 at least."""
    cache = served.llm.engine.cache
    num_blocks = cache.num_reachable_blocks - cache.num_pinned
    room = min(served.llm.model.context, num_blocks * cache.spec.block_size + 1) - num_prompt_tokens
    return max(1, min(room, state.config.work_limit // n))


def check_texts(served: ServedModel, texts: Iterable[str], param: str) -> None:
    """Raise `ApiError` for texts that could not fit the context if each token were the longest of the vocabulary.

    Rendering and tokenizing take time and memory for each byte, so they are not begun with what is refused in any case.
    """
    num_bytes = sum(len(text) for text in texts)
    context = served.llm.model.context
    limit = context * served.max_token_bytes
    if num_bytes > limit:
        raise ApiError(
            400,
            f"maximum context length is {context} tokens; you sent {num_bytes:,} characters, which are more"
            " (hint: shorten them; nothing is cut off)",
            code="context_length_exceeded",
            param=param,
        )


def check_work(state: ServerState, num_prompts: int, n: int, max_tokens: int) -> None:
    """Raise `ApiError` for a request that asks for more tokens than any may."""
    asked = num_prompts * n * max_tokens
    if asked > state.config.work_limit:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n {n} and up to {max_tokens:,} tokens ask for {asked:,} tokens, the server"
            f" writes {state.config.work_limit:,} for one request (hint: lower n or max_tokens)",
            code="work_limit_exceeded",
            param="max_tokens",
        )


def give_back_leases(running: Running) -> None:
    """Close what is held of a generation's sequences, when all have ended; for `Generation.on_end`.

    A finaliser would do it too, but only when the last reference to a sequence is gone, whenever that is.
    """

    async def when_ended() -> None:
        await running.served.async_llm.abort(running.branches)
        for branch in running.branches:
            lease, branch.lease = branch.lease, None
            if lease is not None:
                lease.close_later()

    in_background(when_ended())


def in_background(work: Coroutine[Any, Any, None]) -> None:
    """Have the event loop do some work that nobody waits for; an engine that is dead has nothing to end."""

    async def unless_dead() -> None:
        with suppress(EngineDead):
            await work

    task = asyncio.ensure_future(unless_dead())
    _background.add(task)
    task.add_done_callback(_background.discard)


_background: set[asyncio.Task[None]] = set()  # kept, for the event loop does not


async def start(generation: Generation, *, wants_pieces: bool) -> Running:
    """Check everything that can be refused, and queue it."""
    engine = generation.served.llm.engine

    def make() -> list[Written]:
        options: HeldOptions = {**generation.options, "request_id": generation.request_id}
        if generation.prewarm:  # what an embedding computes is what an answer would start from
            options.pop("constraint", None)
            requests = [engine.new_embed_request(each, "last", False, **options) for each in generation.prompts]
            return [engine.new_sequence(request) for request in requests]
        params, origin = generation.params, generation.origin
        requests = [
            engine.new_request(
                each, params if params.seed is not None else replace(params, seed=origin.seed(at)), **options
            )
            for at, each in enumerate(generation.prompts)
        ]
        written = [*origin.written, *([()] * (len(requests) * params.n - len(origin.written)))]
        if not any(written):
            return [engine.new_sequence(request) for request in requests]
        sequences = []
        for at, request in enumerate(requests):
            last = len(written) if at == len(requests) - 1 else (at + 1) * params.n
            sequences += engine.resumed_sequences(request, written[at * params.n : last])
        return sequences

    try:
        sequences = await asyncio.to_thread(make)
        for branch in (branch for sequence in sequences for branch in sequence.all_branches()):
            generation.served.tenants[branch] = generation.tenant
        stream = generation.served.async_llm.open(
            sequences, wants_pieces=wants_pieces, wants_progress=generation.wants_progress
        )
    except Exception as error:
        raise api_error(error, generation.fields) from error
    return Running(generation, stream)


async def unless_client_leaves(request: HttpRequest, work: asyncio.Task[T]) -> T | None:
    """What the work gives; None, with the work cancelled, where the client leaves first."""
    leaving = asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        leaving.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
