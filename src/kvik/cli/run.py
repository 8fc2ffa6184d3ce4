"""`kvik run`: one prompt answered, or a chat."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvik.cli.options import (
    ENGINE,
    PROMPT,
    SAMPLING,
    EngineOptions,
    PromptOptions,
    SamplingOptions,
    ServerOptions,
    StoreOptions,
    flag,
    given_options,
    spell_out,
    value,
)
from kvik.cli.prompt import read_prompt_or_chat
from kvik.cli.report import completion_report, request_report, write_report
from kvik.cli.template import TemplateOptions
from kvik.cli.terminal import INTERRUPTED, Interrupt, is_terminal, note, stats_line, write_answer
from kvik.config import SamplingParams
from kvik.errors import InvalidInput

if TYPE_CHECKING:
    from kvik.engine.llm import LLM
    from kvik.engine.output import Completion


@spell_out
def run(
    command_line: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The prompt; - reads it from stdin, as does leaving it out where stdin is not a terminal.",
        ),
    ] = None,
    stdin: Annotated[
        Literal["-"] | None, typer.Argument(metavar="-", help="Append the text on stdin to the prompt.")
    ] = None,
    *,
    prompt_options: PromptOptions,
    template_options: TemplateOptions,
    as_json: Annotated[bool, flag(PROMPT, "--json", "Print one JSON object when done.")] = False,
    show_stats: Annotated[
        bool, flag(PROMPT, "--stats", "Print what the answer cost on stderr, even without a terminal.")
    ] = False,
    max_tokens: Annotated[int, value(SAMPLING, "N", "Write at most N tokens.", show_default=True)] = 256,
    sampling: SamplingOptions,
    ignore_eos: Annotated[bool, flag(SAMPLING, "--ignore-eos", "Continue past the end of the text.")] = False,
    logprobs: Annotated[
        int | None, value(SAMPLING, "N", "With --json: log-probabilities, and the N likeliest.")
    ] = None,
    engine: EngineOptions,
    no_cache: Annotated[
        bool, flag(ENGINE, "--no-cache", "Compute all tokens again for each new one: no KV cache.")
    ] = False,
    store_options: StoreOptions,
    server: ServerOptions,
) -> None:
    """Answer a prompt; without one, chat.

    stdin is read where it is asked for: kvik run "Summarise:" - < notes.txt

    The answer goes to stdout as it is written; Ctrl-C stops it.
    """
    given = given_options(command_line)
    server.check(given)
    if server.url is not None:
        from kvik.cli.remote import check_options

        check_options(given)
    params = sampling.params(max_tokens=max_tokens, ignore_eos=ignore_eos, logprobs=logprobs)
    prompt_options.check()
    template = template_options.read(raw=prompt_options.raw)
    if logprobs is not None and not as_json:
        raise InvalidInput("--logprobs are shown in JSON only", hint="add --json")
    text = read_prompt_or_chat(prompt, with_stdin=stdin is not None)
    if text is None and (prompt_options.raw or as_json):
        option = "--raw" if prompt_options.raw else "--json"
        raise InvalidInput(f"{option} needs a prompt", hint=f'for example `kvik run {option} "Once upon a time"`')
    if server.url is not None:
        from kvik.cli.remote import RemoteModel, request_fields, run_remote

        fields = request_fields(params, given, raw=prompt_options.raw, no_cache=no_cache)
        remote = RemoteModel(server, engine.model if "model" in given else None, fields)
        run_remote(remote, text, prompt_options, as_json=as_json, show_stats=show_stats)
        return
    if text is None:
        from kvik.cli.chat import chat

        chat(
            engine.load(**store_options.settings()),
            params,
            name=engine.model,
            system=prompt_options.system,
            template=template,
            use_cache=not no_cache,
        )
        return
    llm = engine.load(**store_options.settings())
    prompt_ids = prompt_options.token_ids(llm, text, **asdict(template))
    completion = answer(llm, prompt_ids, params, use_cache=not no_cache, show=not as_json)
    if as_json:
        request = request_report(engine, llm, asdict(prompt_options) | asdict(template), text, prompt_ids, params)
        write_report({**request, "use_cache": not no_cache, **completion_report(completion)})
    elif show_stats or is_terminal(sys.stderr):
        note(stats_line(completion.stats, completion.finish_reason, use_cache=not no_cache))
    llm.close()
    if completion.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)


def answer(llm: LLM, prompt_ids: list[int], params: SamplingParams, *, use_cache: bool, show: bool) -> Completion:
    """Complete the prompt, showing the text as it comes where `show`; Ctrl-C ends it early."""
    from kvik.engine.stream import stream_sequence

    with Interrupt() as interrupted:
        sequence = llm.engine.new_sequence(llm.engine.new_request(prompt_ids, params, use_cache=use_cache))
        pieces = stream_sequence(llm.engine, sequence, interrupted)
        if show:
            completion = write_answer(pieces, lambda: llm.engine.completion(sequence))
        else:
            for _ in pieces:
                pass
            completion = llm.engine.completion(sequence)
    return completion
