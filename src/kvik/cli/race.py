"""`kvik race`: one prompt answered without the KV cache and with it, and whether the answers are the same."""

from __future__ import annotations

from textwrap import shorten
from typing import Annotated, Any

import typer

from kvik.cli.lanes import RaceLane, Verdict, compare, make_lanes, run_race
from kvik.cli.options import (
    PROMPT,
    SAMPLING,
    EngineOptions,
    PromptOptions,
    SamplingOptions,
    check_prompt,
    flag,
    spell_out,
    value,
)
from kvik.cli.report import request_report, write_report
from kvik.cli.terminal import Interrupt, mebibytes, note, rate, seconds, write

DEFAULT_PROMPT = "Write a short story about a lighthouse keeper."

Lanes = tuple[RaceLane, RaceLane]


@spell_out
def race(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What both lanes answer.")] = DEFAULT_PROMPT,
    *,
    prompt_options: PromptOptions,
    as_json: Annotated[bool, flag(PROMPT, "--json", "Print one JSON object when done.")] = False,
    max_tokens: Annotated[int, value(SAMPLING, "N", "Tokens that each lane writes.", show_default=True)] = 128,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Answer one prompt without the KV cache and with it, side by side.

    The lanes take turns on the same processors, and each one's clock counts its own steps only.

    Both write on past the end of the text. Exit code 1 where any token or any bit of the logits differs.
    """
    params = sampling.params(max_tokens=max_tokens, ignore_eos=True)
    prompt_options.check()
    check_prompt(prompt)
    llm = engine.load()
    prompt_ids = prompt_options.token_ids(llm, prompt)
    with Interrupt() as interrupted:
        lanes = make_lanes(llm, prompt_ids, params)
        shown = shorten(prompt, 200, placeholder=" …")
        note(f"{engine.model} · {max_tokens:,} tokens in each lane · prompt of {len(prompt_ids):,} tokens: {shown}")
        from kvik.cli.race_view import open_view  # rich is not needed before

        view = open_view(lanes, max_tokens)
        try:
            is_whole = run_race(lanes, view.show, interrupted)
        finally:
            view.close()
    verdict = compare(*lanes)
    if as_json:
        request = request_report(engine, llm, prompt_options, prompt, prompt_ids, params)
        write_report({**request, **race_report(lanes, verdict), "is_interrupted": not is_whole})
    else:
        write("\n".join(result_lines(lanes, verdict)) + "\n")
    if not is_whole:
        note(f"interrupted; compared are the {verdict.num_compared:,} tokens that both lanes have")
    if not is_whole or not verdict.is_same:
        raise typer.Exit(1)


def result_lines(lanes: Lanes, verdict: Verdict) -> list[str]:
    """The texts, a table and the verdict."""
    return [*text_lines(lanes), "", *table_lines(lanes), "", f"ratio: {ratio(lanes)}", verdict_line(verdict)]


def text_lines(lanes: Lanes) -> list[str]:
    """What was written: once if it is the same."""
    first, second = (lane.sequence.text.text for lane in lanes)
    if first == second:
        return ["both lanes wrote:", first]
    return [f"{lanes[0].name}:", first, "", f"{lanes[1].name}:", second]


def table_lines(lanes: Lanes) -> list[str]:
    """A line for each lane under a line of headings, in columns."""
    rows = [("lane", "tokens", "time", "tok/s", "first token", "tokens computed", "KV kept")]
    rows += [
        (
            lane.name,
            f"{lane.num_tokens:,}",
            f"{lane.elapsed_s:,.2f} s",
            rate(lane.tokens_per_s),
            "-" if lane.time_to_first_token_s is None else seconds(lane.time_to_first_token_s),
            f"{lane.sequence.total_computed_tokens:,}",
            mebibytes(lane.kv_kept_bytes),
        )
        for lane in lanes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def ratio(lanes: Lanes) -> str:
    """What the cache saves, where both lanes wrote equally much."""
    without, with_cache = lanes
    if not without.num_tokens or without.num_tokens != with_cache.num_tokens:
        return "not known, the lanes did not come equally far"
    faster = without.elapsed_s / with_cache.elapsed_s
    fewer = without.sequence.total_computed_tokens / with_cache.sequence.total_computed_tokens
    return f"{faster:.1f} × faster, {fewer:.1f} × fewer tokens computed"  # noqa: RUF001


def verdict_line(verdict: Verdict) -> str:
    """Whether both lanes did the same, and if not, from where on."""
    if not verdict.num_compared:
        return "same tokens: nothing to compare"
    count = f"{verdict.num_compared}/{verdict.num_compared}"
    tokens = f"yes ({count})" if verdict.token_difference is None else _difference(verdict.token_difference)
    logits = "bit for bit" if verdict.logits_difference is None else _difference(verdict.logits_difference)
    return f"same tokens: {tokens}, same logits: {logits}"


def race_report(lanes: Lanes, verdict: Verdict) -> dict[str, Any]:
    """The race as JSON has it."""
    return {
        "lanes": [lane_report(lane) for lane in lanes],
        "num_compared_tokens": verdict.num_compared,
        "same_tokens": verdict.token_difference is None,
        "same_logits": verdict.logits_difference is None,
        "first_token_difference": verdict.token_difference,
        "first_logits_difference": verdict.logits_difference,
    }


def lane_report(lane: RaceLane) -> dict[str, Any]:
    """One lane as JSON has it."""
    return {
        "name": lane.name,
        "use_cache": lane.sequence.keep_cache,
        "text": lane.sequence.text.text,
        "token_ids": lane.sequence.completion_ids,
        "seed": lane.sequence.seed,
        "num_completion_tokens": lane.num_tokens,
        "num_computed_tokens": lane.sequence.total_computed_tokens,
        "total_s": lane.elapsed_s,
        "time_to_first_token_s": lane.time_to_first_token_s,
        "tokens_per_s": lane.tokens_per_s,
        "kv_kept_bytes": lane.kv_kept_bytes,
        "weight_bytes": lane.sequence.weight_bytes,
    }


def _difference(number: int) -> str:
    return f"no (first difference at token {number:,})"
