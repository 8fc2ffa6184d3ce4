"""`kvik run --url`: a prompt answered by a server, or a chat with it."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import typer

from kvik.cli.chat import converse
from kvik.cli.options import PromptOptions, ServerOptions, refuse_options
from kvik.cli.report import write_report
from kvik.cli.terminal import INTERRUPTED, Interrupt, cached_part, is_terminal, note, rate, seconds, write
from kvik.client.completions import CHAT_PATH, TEXT_PATH, Reply, Server, until_stopped
from kvik.client.http import Connection, parse_url
from kvik.config import SamplingParams
from kvik.errors import KvikError

# By the names that OpenAI's API, vLLM and kvik have for them; those of which a server may know nothing are sent only
# where they are given.
FIELDS = {
    "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "min_tokens": "min_tokens",
    "stop": "stop", "stop_token_id": "stop_token_ids", "seed": "seed", "speculate": "speculate",
    "ignore_eos": "ignore_eos",
}  # fmt: skip
ALLOWED = {
    *FIELDS, "prompt", "stdin", "raw", "system", "as_json", "show_stats", "max_tokens", "temperature", "logprobs",
    "no_cache", "model", "url", "api_key", "timeout",
}  # fmt: skip


def check_options(given: dict[str, str]) -> None:
    """Raise `InvalidInput` for options that are the server's own."""
    refuse_options(given, ALLOWED, "with --url", "a server has its own: start it so, or leave this out")


def request_fields(params: SamplingParams, given: dict[str, str], *, raw: bool, no_cache: bool) -> dict[str, Any]:
    """The sampling parameters as fields of a request."""
    fields: dict[str, Any] = {"max_tokens": params.max_tokens, "temperature": params.temperature}
    fields |= {name: getattr(params, name) for option, name in FIELDS.items() if option in given}
    if params.logprobs is not None:
        fields |= {"logprobs": params.logprobs} if raw else {"logprobs": True, "top_logprobs": params.logprobs}
    if no_cache:
        fields["cache_prompt"] = False
    return fields


@dataclass(slots=True)
class Answer:
    """What came back, perhaps not all of it."""

    reply: Reply = field(default_factory=Reply)
    begun_s: float = 0.0
    ended_s: float = 0.0
    is_whole: bool = False  # not interrupted

    @property
    def time_to_first_token_s(self) -> float | None:
        """Of the first text."""
        return self.reply.text_times_s[0] - self.begun_s if self.reply.text_times_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token."""
        return 1 / self.reply.time_per_token_s if self.reply.time_per_token_s else None

    @property
    def finish_reason(self) -> str | None:
        """The server's, or abort after Ctrl-C."""
        return self.reply.finish_reason if self.is_whole else "abort"

    def stats_line(self) -> str:
        """What it cost, in one line; what the server did not say is left out."""
        reply, parts = self.reply, []
        if reply.num_prompt_tokens:
            parts.append(f"prompt {reply.num_prompt_tokens:,}")
            if reply.num_cached_tokens is not None:
                parts.append(cached_part(reply.num_cached_tokens, reply.num_prompt_tokens))
        first_s = self.time_to_first_token_s
        parts.append(f"TTFT {seconds(first_s) if first_s is not None else '-'}")
        if reply.num_completion_tokens is not None and self.tokens_per_s:
            parts.append(f"{rate(self.tokens_per_s)} tok/s")
        if not self.is_whole:
            parts.append(f"interrupted after {len(reply.text_times_s):,} pieces")
        elif reply.finish_reason == "length":
            count = reply.num_completion_tokens
            parts.append("cut" if count is None else f"cut at {count:,} tokens")
        return " · ".join(parts)


class RemoteModel:
    """One model of one server; the server's first where none is named."""

    def __init__(self, options: ServerOptions, model: str | None, fields: dict[str, Any]) -> None:
        self.address = parse_url(options.url or "")
        self.model = model
        self.fields = fields
        self._timeout_s = options.timeout
        self._server = Server(options.api_key)

    def find(self) -> str:
        """The model's name. Raises `RemoteError`."""

        async def find() -> None:
            connection = Connection(self.address, timeout_s=self._timeout_s)
            try:
                self.model = await self._server.first_model(connection)
            finally:
                connection.close()

        if self.model is None:
            asyncio.run(find())
        assert self.model is not None
        return self.model

    def answer(self, path: str, prompt: dict[str, Any], *, show: bool) -> Answer:
        """Ask, showing the text as it comes where `show`; Ctrl-C ends it early. Raises `RemoteError`."""
        answer = Answer()
        body = {"model": self.find(), **prompt, **self.fields}

        async def ask() -> None:
            connection = Connection(self.address, timeout_s=self._timeout_s)
            answer.begun_s = time.perf_counter()
            try:
                await self._server.ask(connection, path, body, answer.reply, write if show else None)
            finally:
                answer.ended_s = time.perf_counter()
                connection.close()

        with Interrupt() as interrupted:
            try:
                answer.is_whole = asyncio.run(until_stopped(ask(), interrupted))
            except KvikError:
                if answer.reply.texts and show:
                    write("\n")
                raise
        if show and not answer.reply.text.endswith("\n"):
            write("\n")
        return answer


class RemoteConversation:
    """A chat whose messages are kept here and sent whole with each turn, as the API has it."""

    def __init__(self, model: RemoteModel, system: str | None) -> None:
        self.model = model
        self.messages = _messages(system)

    def take_turn(self, text: str) -> None:
        """Answer one message and show what it cost; a message that the server did not take is not kept."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self.model.answer(CHAT_PATH, {"messages": self.messages}, show=True)
        except KvikError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.reply.text})
        note(answer.stats_line())

    def close(self) -> None:
        """Nothing of it is held."""


def run_remote(
    model: RemoteModel, text: str | None, options: PromptOptions, *, as_json: bool, show_stats: bool
) -> None:
    """Answer the text, or chat where there is none."""
    if text is None:
        converse(lambda: RemoteConversation(model, options.system), f"{model.find()} at {model.address}")
        return
    if options.raw:
        answer = model.answer(TEXT_PATH, {"prompt": text}, show=not as_json)
    else:
        messages = [*_messages(options.system), {"role": "user", "content": text}]
        answer = model.answer(CHAT_PATH, {"messages": messages}, show=not as_json)
    if as_json:
        prompt = {"text": text, "raw": options.raw, "system": options.system}
        write_report(answer_report(model, prompt, answer))
    elif show_stats or is_terminal(sys.stderr):
        note(answer.stats_line())
    if not answer.is_whole:
        raise typer.Exit(INTERRUPTED)


def answer_report(model: RemoteModel, prompt: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """All of it for `--json`; usage, timings and log-probabilities as the server sent them."""
    reply = answer.reply
    return {
        "server": {"url": str(model.address), "model": model.model},
        "prompt": prompt,
        "request": model.fields,
        "text": reply.text,
        "reasoning": "".join(reply.reasoning),
        "finish_reason": answer.finish_reason,
        "logprobs": reply.logprobs or None,
        "usage": reply.usage,
        "timings": reply.timings,
        "server_timing": reply.server_timing,
        "stats": {
            "num_prompt_tokens": reply.num_prompt_tokens,
            "num_cached_tokens": reply.num_cached_tokens,
            "num_completion_tokens": reply.num_completion_tokens,
            "time_to_first_token_s": answer.time_to_first_token_s,
            "tokens_per_s": answer.tokens_per_s,
            "elapsed_s": answer.ended_s - answer.begun_s,
        },
    }


def _messages(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]
