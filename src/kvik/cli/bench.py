"""`kvik bench`: prefill and decode on this machine, and where a step's time goes."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from kvik.cli.load_options import LoadOptions, LoadOutput
from kvik.cli.options import (
    MAX_KV_HEADS,
    ModelOptions,
    ServerOptions,
    check_count,
    check_output_path,
    flag,
    given_options,
    parse_counts,
    parse_list,
    spell_out,
    value,
)
from kvik.cli.report import write_report
from kvik.cli.terminal import INTERRUPTED, Interrupt, note, write
from kvik.config import MAX_TOKENS, KVDType, kv_dtype_name, parse_kv_dtype
from kvik.errors import InvalidInput
from kvik.hub.progress import counted_progress

if TYPE_CHECKING:
    from kvik.engine.llm import LLM
    from kvik.measure.cases import Bench, Case
    from kvik.measure.passes import StepProfile
    from kvik.ops.program import MachineLimits

CASES, OUTPUT = "What is measured", "Output"
MAX_BATCH = 4096
MAX_THREADS = 256


@spell_out
def bench(
    command_line: typer.Context,
    *,
    prompt: Annotated[str, value(CASES, "N,N,…", "Lengths of prompts.", show_default=True)] = "512",
    gen: Annotated[int, value(CASES, "N", "Tokens that each sequence writes.", show_default=True)] = 64,
    depth: Annotated[str, value(CASES, "N,N,…", "Tokens in the cache before them.", show_default=True)] = "0",
    batch: Annotated[str, value(CASES, "N,N,…", "Sequences at once.", show_default=True)] = "1",
    kv: Annotated[
        str, value(CASES, "TYPE,…", "Keys and values: f16, f32, int8, k4v4, k=int8,v=v4, …", show_default=True)
    ] = "f16",
    threads: Annotated[str | None, value(CASES, "N,N,…", "Default: one for each processor.")] = None,
    kv_heads: Annotated[
        str | None,
        value(CASES, "N,N,…", "Measure the model's shape with each number of KV heads, with random weights."),
    ] = None,
    rounds: Annotated[int, value(CASES, "N", "Measure N times; the median counts.", show_default=True)] = 5,
    profile: Annotated[
        bool, flag(CASES, "--profile", "Show each op's time, and how near the machine's limit.")
    ] = False,
    fresh_limits: Annotated[
        bool, flag(CASES, "--fresh-limits", "Measure the machine's limits again (some seconds).")
    ] = False,
    as_json: Annotated[bool, flag(OUTPUT, "--json", "Print one JSON object when done.")] = False,
    as_csv: Annotated[bool, flag(OUTPUT, "--csv", "Print comma-separated values.")] = False,
    as_markdown: Annotated[bool, flag(OUTPUT, "--markdown", "Print a Markdown table.")] = False,
    save: Annotated[Path | None, value(OUTPUT, "FILE", "Keep the JSON in a file too.")] = None,
    compare: Annotated[Path | None, value(OUTPUT, "FILE", "Show what moved against such a file.")] = None,
    model: ModelOptions,
    server: ServerOptions,
    load: LoadOptions,
) -> None:
    """Measure prefill and decode on this machine, with random tokens; or with --url a server under load.

    Every round measures each case once, so that a slow spell of the machine hits all alike. A prompt is measured cold,
    which is asserted, and again when it was seen before. Ctrl-C ends it; what was measured is shown and saved.

    A server is asked by clients that hold chats; the exit code is 1 where a request failed.
    """
    from kvik.cli import bench_report
    from kvik.measure.cases import Bench, Interrupted, check_cases
    from kvik.measure.kv_heads import variants
    from kvik.ops.limits import measured_limits

    given = given_options(command_line)
    server.check(given)
    if server.url is not None:
        from kvik.cli.bench_load import bench_load

        output = LoadOutput(as_json=as_json, as_markdown=as_markdown, save=save)
        bench_load(given, server, load, output, prompt=prompt, model=model.model)
        return
    load.check_absent(given)
    if as_json + as_csv + as_markdown > 1:
        raise InvalidInput("more than one of --json, --csv and --markdown is given", hint="give one, and --save FILE")
    check_count("--rounds", rounds, 1, 10_000)
    if profile and kv_heads is not None:
        raise InvalidInput("--profile and --kv-heads are both given", hint="leave out one")
    heads = parse_counts("--kv-heads", kv_heads, 1, MAX_KV_HEADS) if kv_heads is not None else []
    cases = _cases(prompt, gen, depth, batch, kv, threads, heads)
    if save is not None:
        check_output_path("--save", save)
    old = bench_report.read_report(compare) if compare is not None else None
    llm = model.load()
    check_cases(cases, llm.model.context)
    profiles: list[StepProfile] = []
    with Interrupt() as interrupted:
        bench = Bench(llm, cases, interrupted, variants(llm, heads))
        if fresh_limits:
            note("measuring what the machine can do")
        limits = {case.threads: measured_limits(case.threads, fresh=fresh_limits) for case in cases}
        with suppress(Interrupted):
            _run(bench, rounds)
            if profile:
                profiles = _profiles(llm, cases, rounds)
            _improve(limits, bench, profiles, cases[0].threads)
        is_whole = not interrupted()
    report = bench_report.bench_report(model.model, bench.llms, bench.rows, limits, rounds, profiles, is_whole=is_whole)
    if as_json:
        write_report(report)
    elif as_csv:
        write(bench_report.csv_text(report))
    else:
        lines = bench_report.table_lines(report, markdown=as_markdown, by_heads=bool(heads))
        for one in profiles:
            lines += ["", *(["```"] if as_markdown else []), *bench_report.profile_lines(one)]
            lines += ["```"] if as_markdown else []
        write("\n".join(lines) + "\n")
    if save is not None:
        bench_report.save_report(save, report)
    if old is not None:
        text = "\n".join(bench_report.compare_lines(old, report, str(compare)))
        if as_json or as_csv:
            note(text)
        else:
            write(f"\n{text}\n")
    if not is_whole:
        note("interrupted; shown is what was measured")
        raise typer.Exit(INTERRUPTED)


def _kv_dtype(text: str) -> str:
    try:
        return kv_dtype_name(*parse_kv_dtype(text))
    except InvalidInput as error:
        near = difflib.get_close_matches(text, (*get_args(KVDType), "k4v4"), 1)
        meant = f"did you mean {near[0]}? " if near else ""
        hint = f"{meant}{error.hint}"
        raise InvalidInput(f"--kv has {text!r:.40} in it", hint=hint) from None


def _cases(prompt: str, gen: int, depth: str, batch: str, kv: str, threads: str | None, heads: list[int]) -> list[Case]:
    from kvik.machine import available_threads
    from kvik.measure.cases import make_cases

    together = parse_list("--kv", kv.replace(",v=", ";v="))  # of "f16,k=int8,v=f16" the last two are one
    kv_dtypes = [_kv_dtype(one.replace(";", ",")) for one in together]
    return make_cases(
        threads=[available_threads()] if threads is None else parse_counts("--threads", threads, 1, MAX_THREADS),
        kv_dtypes=kv_dtypes,
        prompts=parse_counts("--prompt", prompt, 1, MAX_TOKENS),
        depths=parse_counts("--depth", depth, 0, MAX_TOKENS),
        batches=parse_counts("--batch", batch, 1, MAX_BATCH),
        num_tokens=check_count("--gen", gen, 1, MAX_TOKENS),
        kv_heads=list(dict.fromkeys(heads)) or [None],
    )


def _run(bench: Bench, rounds: int) -> None:
    with counted_progress("measurements", rounds * len(bench.rows)) as advance:
        for _ in range(rounds):
            bench.run_round(advance)


def _improve(
    limits: dict[int, MachineLimits], bench: Bench, profiles: list[StepProfile], profiled_threads: int
) -> None:
    """Measure limits again, once, that something here went beyond: a busy minute may have left them too low."""
    from kvik.cli.bench_report import exceeds
    from kvik.ops.limits import better_limits

    for threads, kept in limits.items():
        rows = (row for row in bench.rows if row.case.threads == threads)
        is_exceeded = any(exceeds(row, bench.llms[row.case.num_kv_heads], kept) for row in rows)
        if is_exceeded or (threads == profiled_threads and any(one.exceeds(kept) for one in profiles)):
            note("measuring again what the machine can do: a figure is beyond what was measured before")
            limits[threads] = better_limits(threads)


def _profiles(llm: LLM, cases: list[Case], rounds: int) -> list[StepProfile]:
    """Of the first prompt and the first depth, with the first number of threads and KV type."""
    from kvik.measure import passes as measure

    prefill = next(case for case in cases if case.kind == "prefill")
    decode = next(case for case in cases if case.kind == "decode")
    engine = llm.new_engine(threads=prefill.threads, kv_dtype=prefill.kv_dtype, prefix_cache=False)
    return [
        measure.profile_prefill(engine, prefill.length, rounds=rounds),
        measure.profile_decode(engine, depth=decode.length, rounds=8 * rounds),
    ]
