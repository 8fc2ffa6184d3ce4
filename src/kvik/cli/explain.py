"""`kvik explain`: a traced run of the user's model as a page that shows why the KV cache works."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import (
    PROMPT,
    SAMPLING,
    EngineOptions,
    check_count,
    check_output_path,
    flag,
    parse_counts,
    spell_out,
    value,
)
from kvik.cli.prompt import check_prompt, read_prompt
from kvik.cli.report import save_text
from kvik.cli.terminal import note, seconds, write
from kvik.config import SamplingParams
from kvik.errors import InvalidInput
from kvik.explain.limits import MAX_PAGE_TOKENS
from kvik.hub.progress import counted_progress

if TYPE_CHECKING:
    from kvik.engine.llm import LLM
    from kvik.explain.page_data import FirstToken
    from kvik.explain.run import TracedRun

DRAWN = "What is drawn"
PROMPT_LENGTHS = (8, 32, 128, 512)
"""Prompts whose first token is timed, as far as the context goes."""

ROUNDS = 3
MAX_PARTS = 1 << 16
"""Layers or heads, far above every model's."""


@spell_out
def explain(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text that the model continues; - reads it from stdin.")
    ],
    *,
    html: Annotated[Path | None, value(PROMPT, "FILE", "Write the page: one .html file that needs no other.")] = None,
    trace: Annotated[
        Path | None, value(PROMPT, "FILE", "Write the raw trace as .json, for ui.perfetto.dev or chrome://tracing.")
    ] = None,
    chat: Annotated[bool, flag(PROMPT, "--chat", "Ask it through the model's chat template.")] = False,
    second: Annotated[str | None, value(PROMPT, "TEXT", "Another prompt, to show which blocks it shares.")] = None,
    layers: Annotated[str | None, value(DRAWN, "N,N,…", "Layers whose attention is drawn; else some that fit.")] = None,
    kv_heads: Annotated[str | None, value(DRAWN, "N,N,…", "KV heads and their query heads; else all that fit.")] = None,
    max_tokens: Annotated[int, value(SAMPLING, "N", "Tokens to write.", show_default=True)] = 40,
    engine: EngineOptions,
) -> None:
    """Show on this model, with its own numbers, why a KV cache works.

    The prompt is answered twice, without the cache and with it, taking the likeliest token each time. Both runs are
    watched op by op and compared bit by bit. The page shows what each step computes and keeps, one attention head
    number by number, the time of each step, memory, and which blocks another prompt shares.

    Exit code 1 where any bit differs.
    """
    prompt = read_prompt(prompt)
    if second is not None:
        check_prompt(second)
    if html is None and trace is None:
        raise InvalidInput("there is nothing to write", hint="add --html page.html, or --trace trace.json")
    _check_outputs(html, trace)
    for option, given in (("--second", second), ("--layers", layers), ("--kv-heads", kv_heads)):
        if html is None and given is not None:
            raise InvalidInput(f"{option} is about the page, and there is none", hint="add --html page.html")
    check_count("--max-tokens", max_tokens, 1, MAX_PAGE_TOKENS)
    wanted_layers = None if layers is None else parse_counts("--layers", layers, 0, MAX_PARTS)
    wanted_heads = None if kv_heads is None else parse_counts("--kv-heads", kv_heads, 0, MAX_PARTS)
    params = SamplingParams(max_tokens=max_tokens)
    # Not before: these bring NumPy and the engine with them, and --help of any command imports this file.
    from kvik.explain.perfetto import perfetto_trace
    from kvik.explain.prefixes import next_turn
    from kvik.explain.run import check_tokens, trace_run
    from kvik.explain.selection import select

    llm = engine.load()
    prompt_ids = _token_ids(llm, prompt, chat=chat)
    check_tokens(llm, len(prompt_ids), max_tokens)
    second_ids = None if second is None else _token_ids(llm, second, chat=chat)
    if second_ids is not None:
        check_tokens(llm, len(second_ids), 1)
    spec = llm.model.decoder.spec
    selection = select(spec, spec.kv_spec(engine.kv_dtype), len(prompt_ids) + max_tokens, wanted_layers, wanted_heads)
    with counted_progress("steps of both lanes", 2 * max_tokens) as advance:
        run = trace_run(llm, prompt_ids, params, selection, advance)
    lines = [_result_line(run)]
    if html is not None:
        chosen = [] if second_ids is None else [("The second prompt", second_ids)]
        if chat:
            chosen += next_turn(llm, prompt, run.with_cache.lane.sequence.completion_ids)
        page = _page(llm, run, engine.model, chosen)
        save_text(html, page)
        drawn = f"layers {number_list(selection.layers)}, KV heads {number_list(selection.kv_heads)}"
        lines.append(f"{html}: {len(page.encode()):,} bytes; attention of {drawn}")
    if trace is not None:
        events: Mapping[str, Any] = perfetto_trace(run, engine.model)
        save_text(trace, json.dumps(events, allow_nan=False, separators=(",", ":")))
        lines.append(f"{trace}: {len(events['traceEvents']):,} events; open it in ui.perfetto.dev")
    write("\n".join(lines) + "\n")
    if not run.is_same:
        raise typer.Exit(1)


def _check_outputs(html: Path | None, trace: Path | None) -> None:
    """Raise `InvalidInput` before any work for files that could not be written in the end."""
    for option, path, suffixes in (("--html", html, (".html", ".htm")), ("--trace", trace, (".json",))):
        if path is None:
            continue
        check_output_path(option, path)
        if path.suffix.lower() not in suffixes:
            raise InvalidInput(f"{option} is {path}", hint=f"give a file name that ends in {suffixes[0]}")


def _token_ids(llm: LLM, prompt: str, *, chat: bool) -> list[int]:
    return llm.render_chat([{"role": "user", "content": prompt}]) if chat else llm.encode(prompt)


def _page(llm: LLM, run: TracedRun, model_name: str, others: list[tuple[str, list[int]]]) -> str:
    from kvik.explain.html import render_page
    from kvik.explain.page_data import page_data
    from kvik.explain.prefixes import default_follow_ups, follow_up

    follow_ups = [*others, *default_follow_ups(llm, run.prompt_ids, run.token_ids)]
    found = [follow_up(llm, run.token_ids, title, token_ids) for title, token_ids in follow_ups]
    return render_page(page_data(run, model_name, found, _first_tokens(llm)))


def _first_tokens(llm: LLM) -> list[FirstToken]:
    """How long prompts of several lengths take to their first token."""
    from kvik.explain.page_data import FirstToken
    from kvik.measure.lengths import LATER_TOKENS, measure_lengths

    lengths = [length for length in PROMPT_LENGTHS if length + LATER_TOKENS + 2 <= llm.model.context]
    if not lengths:
        return []
    note(f"timing first tokens after prompts of up to {max(lengths):,}")
    costs = measure_lengths(llm, lengths, ROUNDS)
    return [FirstToken(cost.length, cost.median_first_s, cost.median_later_s) for cost in costs]


def _result_line(run: TracedRun) -> str:
    without, with_cache = (traced.lane for traced in (run.without, run.with_cache))
    computed = [lane.sequence.costs.num_computed_tokens for lane in (without, with_cache)]
    verdict = "the same to the last bit" if run.is_same else "NOT the same"
    return (
        f"{with_cache.num_tokens:,} tokens after {len(run.prompt_ids):,}: {computed[0]:,} computed without the cache"
        f" in {seconds(without.elapsed_s)}, {computed[1]:,} with it in {seconds(with_cache.elapsed_s)}; {verdict}"
    )


def number_list(numbers: tuple[int, ...]) -> str:
    """`0-63, 70`: a run of three or more by its ends."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(chain.from_iterable(parts))
