"""`kvik race`: one prompt answered without the KV cache and with it: the same answer, and what each token cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.options import (
    PROMPT,
    SAMPLING,
    EngineOptions,
    PromptOptions,
    SamplingOptions,
    check_count,
    flag,
    parse_counts,
    spell_out,
    value,
)
from kvik.cli.plot import check_plot_path, save_plot
from kvik.cli.prompt import read_prompt
from kvik.cli.report import request_report, write_report
from kvik.cli.terminal import INTERRUPTED, Interrupt, note, write
from kvik.config import MAX_TOKENS
from kvik.errors import InvalidInput

if TYPE_CHECKING:
    from kvik.engine.llm import LLM

DEFAULT_PROMPT = "Write a short story about a lighthouse keeper."
DEFAULT_LENGTHS = "64,128,256,512,1024,2048"
CURVE = "What is measured"


@spell_out
def race(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt of both lanes; - reads it from stdin.")
    ] = DEFAULT_PROMPT,
    *,
    prompt_options: PromptOptions,
    as_json: Annotated[bool, flag(PROMPT, "--json", "Print one JSON object when done.")] = False,
    plot: Annotated[Path | None, value(PROMPT, "FILE", "Draw the curves into a .png or .svg.")] = None,
    lengths: Annotated[
        str,
        value(CURVE, "N,N,…", "Then time one token at each of these lengths; `none` skips that.", show_default=True),
    ] = DEFAULT_LENGTHS,
    rounds: Annotated[int, value(CURVE, "N", "Time each length N times.", show_default=True)] = 3,
    max_tokens: Annotated[int, value(SAMPLING, "N", "Tokens that each lane writes.", show_default=True)] = 128,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Answer one prompt without the KV cache and with it, and show what each token cost.

    The lanes take turns on the same processors, and each one's clock counts its own steps only. Work is counted from
    the batches that ran. Then one token is timed at each of several lengths, computed whole and computed with the
    cache.

    Both write on past the end of the text. Exit code 1 where any token or any bit of the logits differs.
    """
    params = sampling.params(max_tokens=max_tokens, ignore_eos=True)
    prompt_options.check()
    prompt = read_prompt(prompt)
    check_count("--rounds", rounds, 1, 1000)
    wanted = [] if lengths == "none" else parse_counts("--lengths", lengths, 1, MAX_TOKENS)
    if plot is not None:
        check_plot_path("--plot", plot)
    # Not before: these bring NumPy and the engine with them, and --help of any command imports this file.
    from kvik.cli.race_report import plot_panels, race_report, result_lines
    from kvik.measure.lanes import compare, make_lanes, run_race
    from kvik.measure.lengths import LATER_TOKENS, measure_lengths

    llm = engine.load()
    wanted = _within_context(llm, wanted, LATER_TOKENS + 2, is_default=lengths == DEFAULT_LENGTHS)
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
        costs = []
        if is_whole and wanted:
            note(f"timing one token at {len(wanted):,} lengths up to {max(wanted):,}")
            costs = measure_lengths(llm, wanted, rounds, interrupted)
    verdict = compare(*lanes)
    is_whole = is_whole and not interrupted()
    if as_json:
        request = request_report(engine, llm, asdict(prompt_options), prompt, prompt_ids, params)
        write_report({**request, **race_report(lanes, verdict, costs), "is_interrupted": not is_whole})
    else:
        write("\n".join(result_lines(lanes, verdict, costs)) + "\n")
    if plot is not None:
        save_plot(plot, f"{engine.model}: with the KV cache and without it", plot_panels(lanes, costs))
        note(f"drawn: {plot}")
    if not is_whole:
        note(f"interrupted; compared are the {verdict.num_compared:,} tokens that both lanes have")
    if not verdict.is_same:
        raise typer.Exit(1)
    if not is_whole:
        raise typer.Exit(INTERRUPTED)


def _within_context(llm: LLM, lengths: list[int], room: int, *, is_default: bool) -> list[int]:
    """The lengths behind which there is room; those that the caller did not name may be left out."""
    max_length = llm.model.context - room
    if is_default:
        return [length for length in lengths if length <= max_length]
    for length in lengths:
        if length > max_length:
            raise InvalidInput(
                f"--lengths has {length:,} in it, the context holds {llm.model.context:,} tokens",
                hint=f"give lengths up to {max_length:,}",
            )
    return lengths
