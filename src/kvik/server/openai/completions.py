"""`/v1/completions`: text or token ids in, what follows them out, with the prompt's own logprobs where asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from kvik.engine.output import TokenLogprobs
from kvik.engine.sequence import Sequence as Written
from kvik.server.bodies import read_body
from kvik.server.cache.breakpoints import with_breakpoints
from kvik.server.cache.diagnostics import with_diagnostics
from kvik.server.errors import api_error, bad_request
from kvik.server.event_stream import EventStream, floor
from kvik.server.fields import MAX_TOP_LOGPROBS, CacheOptions, Count, SamplingFields
from kvik.server.generation import Generation, Running, check_texts, check_work, start
from kvik.server.openai.chat import stop_reason
from kvik.server.openai.openai_writer import OpenAIWriter
from kvik.server.preparing import constraint_of, ignored_header, options_of
from kvik.server.reply import reply
from kvik.server.served import ServedModel
from kvik.server.sse import encode
from kvik.server.state import ServerState, tenant_of
from kvik.text.detokenizer import Detokenizer
from kvik.text.tokenizer import encode_prompt

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """A request for what follows some prompts."""

    accepted = frozenset(
        {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_retention", "timings_per_token"}
        | {"store"}
    )

    model: str | None = None
    prompt: str | list[str | int | list[int]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
    store: Literal[False] | None = None

    def check(self) -> None:
        """Raise `ApiError` for fields that contradict each other, or that kvik has nothing for."""
        super().check()
        if self.suffix is not None:
            raise bad_request("suffix is not supported: the models of this server write on, not between", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request("best_of is supported where it equals n", "best_of")
        for name, most in (("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_TOP_LOGPROBS)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise bad_request(f"{name} is {value}, give 0 to {most}", name)
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs come with the whole answer: leave out stream", "prompt_logprobs")


COMPLETION_FIELDS = frozenset(CompletionRequest.__struct_fields__)


async def completions(request: Request) -> Response | EventStream:
    """Complete one or more prompts."""
    state = ServerState.of(request)
    body = await read_body(request, CompletionRequest)
    served = state.models.get(body.model)
    try:
        body.check()
        generation = await asyncio.to_thread(prepare, state, request, body, served)
    except Exception as error:
        raise api_error(error, COMPLETION_FIELDS) from error
    headers = ignored_header(body.ignored())
    running = await start(generation, wants_pieces=bool(body.stream))
    writer = CompletionWriter(running, body) if body.stream else None
    return await reply(request, running, headers, writer=writer, whole=partial(completion, running, body))


def prepare(state: ServerState, request: Request, body: CompletionRequest, served: ServedModel) -> Generation:
    """Tokenize and compile; not on the event loop, for it takes its time."""
    served.check_queue()
    prompts = prompts_of(served, body.prompt, add_special=body.add_special_tokens is not False)
    # More than may wait could never be queued; whoever finds the queue full may come again.
    max_prompts = min(state.config.max_prompts, served.llm.engine.scheduler.max_waiting)
    if len(prompts) > max_prompts:
        raise bad_request(f"there are {len(prompts):,} prompts, give up to {max_prompts:,}", "prompt")
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    check_work(state, len(prompts), body.n or 1, max_tokens)
    wanted = [count for count in (body.logprobs, body.prompt_logprobs) if count is not None]
    params = body.params(
        max_tokens=max_tokens,
        logprobs=max(wanted, default=None),
        echo=bool(body.echo) or body.prompt_logprobs is not None,
    )
    generation = Generation(
        served=served,
        prompts=prompts,
        params=params,
        options=options_of(state, request, body, constraint_of(served, body, None)),
        request_id=request.scope["state"]["request_id"],
        origin=request.scope["state"]["origin"],
        tenant=tenant_of(request),
        fields=COMPLETION_FIELDS,
        wants_progress=bool(body.return_progress),
    )
    caching = body.prompt_cache_options or CacheOptions()
    generation = with_breakpoints(
        state, tenant_of(request), generation, explicit=caching.mode == "explicit", ttl=caching.ttl
    )
    fields = {"prompt_cache_key": body.prompt_cache_key, "service_tier": body.service_tier}
    return with_diagnostics(state, request, generation, compared_id=body.compared_id, fields=fields)


def prompts_of(
    served: ServedModel,
    prompt: str | Sequence[str | int | Sequence[int]],
    *,
    add_special: bool = True,
    name: str = "prompt",
) -> list[list[int]]:
    """Token ids of each prompt: text, token ids, or a list of either. Raises `ApiError`."""

    def encode_text(text: str) -> list[int]:
        check_texts(served, [text], name)
        return encode_prompt(served.llm.model.tokenizer, text, add_special=add_special)

    if isinstance(prompt, str):
        return [encode_text(prompt)]
    if not prompt:
        raise bad_request(f"{name} is empty (hint: give at least one)", name)
    token_ids = [item for item in prompt if isinstance(item, int)]
    if token_ids:
        if len(token_ids) < len(prompt):
            raise bad_request(f"{name} mixes token ids with prompts", name)
        return [_checked(served, token_ids, name)]
    return [
        encode_text(item) if isinstance(item, str) else _checked(served, item, name)
        for item in prompt
        if not isinstance(item, int)
    ]


def _checked(served: ServedModel, token_ids: Sequence[int], name: str) -> list[int]:
    """The ids, all of which are in the vocabulary. Raises `ApiError`."""
    vocab_size = served.llm.model.decoder.spec.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise bad_request(
                f"token id {token_id} is not in the vocabulary (hint: ids go from 0 to {vocab_size - 1})", name
            )
    return list(token_ids)


def completion(running: Running, body: CompletionRequest) -> dict[str, Any]:
    """The whole answer."""
    running.response_id = running.new_id("cmpl-")
    served, choices = running.served, []
    for index, branch in enumerate(running.branches):
        text = branch.text.text
        if branch.params.echo and not body.echo:
            text = text[len(served.llm.model.tokenizer.decode(branch.request.prompt_ids)) :]
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if body.logprobs is None else _Logprobs(running, body, branch).take(),
            "finish_reason": branch.finish_reason,
            "stop_reason": stop_reason(branch),
        }
        if body.return_token_ids:
            choice |= {"token_ids": branch.completion_ids, "prompt_token_ids": branch.request.prompt_ids}
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(running, branch, body.prompt_logprobs)
        choices.append(choice)
    return {
        "id": running.response_id,
        "object": "text_completion",
        "created": running.created,
        "model": running.served.id,
        "system_fingerprint": running.served.fingerprint,
        "choices": choices,
        "usage": running.usage().openai(),
        "timings": running.timings(),
        **running.extras(),
    }


def _prompt_logprobs(running: Running, branch: Written, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's, without ranks: of each token of the prompt but the first, its logprob and the likeliest ones'."""
    tokenizer = running.served.llm.model.tokenizer
    found: list[dict[str, Any] | None] = [None]
    for entry in branch.prompt_logprobs:
        told = dict(list(entry.top.items())[:num_top]) | {entry.token_id: entry.logprob}
        found.append(
            {
                str(token_id): {"logprob": floor(logprob), "decoded_token": tokenizer.token_text(token_id)}
                for token_id, logprob in told.items()
            }
        )
    return found


class _Logprobs:
    """One choice's, in the legacy form, as far as they are known; each `take` gives what comes next."""

    def __init__(self, running: Running, body: CompletionRequest, branch: Written) -> None:
        assert body.logprobs is not None
        self._num_top = body.logprobs
        self._branch = branch
        self._tokenizer = running.served.llm.model.tokenizer
        self._text = Detokenizer(self._tokenizer, continues_text=not body.echo)
        self._offset = 0
        self._echoes = bool(body.echo)
        self._num_taken = 0

    def take(self, count: int | None = None) -> dict[str, Any]:
        """Those of so many tokens that came since, or of all."""
        branch = self._branch
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if self._echoes and not self._num_taken:
            prompt = branch.request.prompt_ids
            entries += zip(prompt, [None, *branch.prompt_logprobs], strict=True)
        new = branch.logprobs[self._num_taken :][:count]
        self._num_taken += len(new)
        entries += [(entry.token_id, entry) for entry in new]
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in entries:
            tokens.append(self._token(token_id))
            values.append(None if entry is None else floor(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
            offsets.append(self._offset)
            self._offset += len(self._text.add(token_id))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        told = dict(list(entry.top.items())[: self._num_top]) | {entry.token_id: entry.logprob}
        return {self._token(token_id): floor(logprob) for token_id, logprob in told.items()}

    def _token(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id, skip_special=False)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionWriter(OpenAIWriter):
    """Chunks of a completion."""

    shows_ends = True

    def __init__(self, running: Running, body: CompletionRequest) -> None:
        super().__init__(
            running,
            body.stream_options,
            prefix="cmpl-",
            kind="text_completion",
            with_token_ids=body.return_token_ids,
        )
        self._begun = set[int]()  # choices that have told their prompts' token ids
        self._logprobs = (
            None if body.logprobs is None else [_Logprobs(running, body, branch) for branch in running.branches]
        )

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def new_token_ids(self, index: int) -> dict[str, Sequence[int]]:
        """With a choice's first ones, those of its prompt."""
        found = super().new_token_ids(index)
        if found and index not in self._begun:
            self._begun.add(index)
            found["prompt_token_ids"] = self.running.branches[index].request.prompt_ids
        return found

    def text(self, index: int, text: str, logprobs: TokenLogprobs | None) -> bytes:
        """More text."""
        told = b"null" if self._logprobs is None else encode(self._logprobs[index].take(1))
        ids = self.encoded_token_ids(index)
        return self.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null%b}' % (index, encode(text), told, ids)
        )

    def finished_choice(self, index: int) -> dict[str, Any]:
        """No text, and why it ended."""
        branch = self.running.branches[index]
        reasons = {"finish_reason": branch.finish_reason, "stop_reason": stop_reason(branch)}
        return {"index": index, "text": "", "logprobs": None, **reasons}
