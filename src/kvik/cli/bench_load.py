"""`kvik bench --url`: a server under load, and what that shows."""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import typer

from kvik import __version__
from kvik.cli.load_options import LoadOptions, LoadOutput
from kvik.cli.options import ServerOptions, check_count, check_output_path, parse_counts, refuse_options
from kvik.cli.report import save_text, write_report
from kvik.cli.terminal import INTERRUPTED, Interrupt, columns, note, rate, seconds, write
from kvik.client.completions import Server
from kvik.client.http import Connection, parse_url
from kvik.config import MAX_TOKENS
from kvik.errors import InvalidInput, RemoteError
from kvik.hub.progress import counted_progress
from kvik.machine import available_threads, processor_name
from kvik.measure.load import HttpAsker, Load, LoadResult, Workload, run_load, warm_up
from kvik.measure.load_summary import Distribution, summarise

KIND, VERSION = "kvik bench --url", 1
"""Of the JSON."""

MAX_CLIENTS = 4096
MAX_REQUESTS = 1_000_000
MAX_WORDS = 1_000_000
MAX_TURNS = 10_000
MAX_RATE = 100_000.0
MAX_DURATION_S = 7 * 86_400.0
DEFAULT_CLIENTS, DEFAULT_ARRIVALS, DEFAULT_WORDS = 8, 100, 64

ALLOWED = {
    "url", "api_key", "timeout", "model", "prompt", "as_json", "as_markdown", "save", "concurrency", "rate", "requests",
    "duration", "shared_prefix", "turns", "max_tokens", "warmup", "seed", "stop_at_eos",
}  # fmt: skip

Report = Mapping[str, Any]


def bench_load(
    given: dict[str, str], server: ServerOptions, options: LoadOptions, output: LoadOutput, *, prompt: str, model: str
) -> None:
    """Put each load on, one after the other, and show what came of it."""
    refuse_options(given, ALLOWED, "with --url", "it is for models in this process; leave it out")
    if output.as_json and output.as_markdown:
        raise InvalidInput("--json and --markdown are both given", hint="give one, and --save FILE")
    if output.save is not None:
        check_output_path("--save", output.save)
    num_words = DEFAULT_WORDS
    if "prompt" in given:
        lengths = parse_counts("--prompt", prompt, 1, MAX_WORDS)
        if len(lengths) > 1:
            raise InvalidInput(f"--prompt is {prompt!r:.60}, more than one length", hint="with --url give one")
        num_words = lengths[0]
    workload = _workload(options, num_words)
    bench = _LoadBench(server, model if "model" in given else None, ignore_eos=not options.stop_at_eos)
    with Interrupt() as interrupted:
        results = asyncio.run(bench.run(workload, _loads(options), options.warmup, interrupted))
        is_whole = not interrupted()
    report = load_report(bench, results, is_whole=is_whole)
    if output.as_json:
        write_report(report)
    else:
        write("\n".join(table_lines(report, markdown=output.as_markdown)) + "\n")
    if output.save is not None:
        save_text(output.save, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if not is_whole:
        note("interrupted; shown is what was measured")
        raise typer.Exit(INTERRUPTED)
    if any(row["errors"] for row in report["rows"]):
        raise typer.Exit(1)


def _workload(options: LoadOptions, num_words: int) -> Workload:
    return Workload(
        num_turns=check_count("--turns", options.turns, 1, MAX_TURNS),
        system_words=check_count("--shared-prefix", options.shared_prefix, 0, MAX_WORDS),
        turn_words=num_words,
        max_tokens=check_count("--max-tokens", options.max_tokens, 1, MAX_TOKENS),
        seed=check_count("--seed", options.seed, 0, MAX_TOKENS),
    )


def _loads(options: LoadOptions) -> list[Load]:
    """One for each number of clients, or the one of the rate. Raises `InvalidInput`."""
    check_count("--warmup", options.warmup, 1, MAX_REQUESTS)
    if options.requests is not None:
        check_count("--requests", options.requests, 1, MAX_REQUESTS)
    if options.duration is not None and not 0 < options.duration <= MAX_DURATION_S:
        raise InvalidInput(
            f"--duration is {options.duration:g}", hint=f"give seconds above 0, {MAX_DURATION_S:.0f} at most"
        )
    limits = {"num_requests": options.requests, "duration_s": options.duration}
    is_bounded = options.requests is not None or options.duration is not None
    if options.rate is not None:
        if options.concurrency is not None:
            raise InvalidInput("--rate and --concurrency are both given", hint="leave out one")
        if not 0 < options.rate <= MAX_RATE:
            raise InvalidInput(
                f"--rate is {options.rate:g}", hint=f"give chats a second above 0, {MAX_RATE:.0f} at most"
            )
        return [Load(rate=options.rate, **(limits if is_bounded else {"num_requests": DEFAULT_ARRIVALS}))]
    clients = parse_counts("--concurrency", options.concurrency or str(DEFAULT_CLIENTS), 1, MAX_CLIENTS)
    return [
        Load(concurrency=count, **(limits if is_bounded else {"num_requests": count * options.turns}))
        for count in clients
    ]


class _LoadBench:
    """The server, what is asked of it in every request, and the loads that are put on it."""

    def __init__(self, options: ServerOptions, model: str | None, *, ignore_eos: bool) -> None:
        self.address = parse_url(options.url or "")
        self.model = model
        self.ignore_eos = ignore_eos
        self._timeout_s = options.timeout
        self._server = Server(options.api_key)

    async def run(
        self, workload: Workload, loads: Sequence[Load], num_warm_up: int, should_stop: Callable[[], bool]
    ) -> list[LoadResult]:
        """What was measured until `should_stop` said so. Raises `RemoteError` where the server answers not at all."""
        if self.model is None:
            connection = Connection(self.address, timeout_s=self._timeout_s)
            try:
                self.model = await self._server.first_model(connection)
            finally:
                connection.close()
        results: list[LoadResult] = []
        if not await self._warm_up(workload, num_warm_up, should_stop):
            return results
        for index, load in enumerate(loads):
            # Other texts for each, or the later ones would find the earlier ones' in the cache.
            own = replace(workload, seed=workload.seed + index)
            total = load.num_requests if load.duration_s is None else None
            with counted_progress(_title(asdict(load)), total or 0) as advance:
                result = await run_load(
                    self._make_asker, own, load, on_end=lambda record: advance(1), should_stop=should_stop
                )
            results.append(result)
            if not result.is_whole:
                break
        return results

    async def _warm_up(self, workload: Workload, count: int, should_stop: Callable[[], bool]) -> bool:
        """Ask so often, and find out whether the server takes `ignore_eos`."""
        asker = self._make_asker()
        try:
            return await warm_up(asker, workload, count, should_stop)
        except RemoteError as error:
            if not self.ignore_eos or error.status not in (400, 422):
                raise
            first = error
        finally:
            asker.close()
        self.ignore_eos = False
        asker = self._make_asker()
        try:
            is_whole = await warm_up(asker, workload, count, should_stop)
        except RemoteError:
            raise first from None  # it was something else
        finally:
            asker.close()
        note("the server does not take ignore_eos: answers may end early")
        return is_whole

    def _make_asker(self) -> HttpAsker:
        assert self.model is not None
        return HttpAsker(self.address, self._server, self.model, timeout_s=self._timeout_s, ignore_eos=self.ignore_eos)


def load_report(bench: _LoadBench, results: Sequence[LoadResult], *, is_whole: bool) -> dict[str, Any]:
    """Everything that was measured, and from where."""
    return {
        "kind": KIND,
        "version": VERSION,
        "client": {
            "processor": processor_name(),
            "num_threads": available_threads(),
            "python": platform.python_version(),
            "kvik": __version__,
        },
        "server": {"url": str(bench.address), "model": bench.model},
        "ignore_eos": bench.ignore_eos,
        "rows": [
            {"load": asdict(result.load), "workload": asdict(result.workload), **summarise(result)}
            for result in results
            if result.records
        ],
        "is_interrupted": not is_whole,
    }


def table_lines(report: Report, *, markdown: bool = False) -> list[str]:
    """The server, a column for each load, and what was out of the ordinary."""
    rows = report["rows"]
    if not rows:
        return ["no request ended"]
    table = [("", *(_title(row["load"]) for row in rows))]
    table += [(name, *(show(row) for row in rows)) for name, show in _figures(rows)]
    workload = rows[0]["workload"]
    title = (
        f"{report['server']['model']} at {report['server']['url']}: chats of {workload['num_turns']:,} turns over"
        f" {workload['system_words']:,} words in common, {workload['turn_words']:,} words a turn,"
        f" {workload['max_tokens']:,} tokens an answer, seed {workload['seed']}"
    )
    notes = [line for row in rows for line in _notes(row, ignore_eos=report["ignore_eos"])]
    if not markdown:
        return [title, "", *columns(table), *([""] if notes else []), *notes]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|---" + "|---:" * len(rows) + "|")
    return [title, "", *lines, *([""] if notes else []), *(f"* {line}" for line in notes)]


def _figures(rows: Sequence[Report]) -> list[tuple[str, Callable[[Report], str]]]:
    """The lines of the table; one that no row has a figure for is left out."""
    figures: list[tuple[str, Callable[[Report], str]]] = [
        ("answered", lambda row: f"{row['num_answered']:,} of {row['num_requests']:,}"),
        ("duration", lambda row: seconds(row["duration_s"])),
        ("requests/s", lambda row: rate(row["requests_per_s"])),
        ("generated tok/s", lambda row: rate(row["completion_tokens_per_s"])),
        ("prompt tokens, mean (max)", _prompt_tokens),
        ("cached", lambda row: "-" if row["cached_share"] is None else f"{row['cached_share']:.0%}"),
        ("TTFT, first turn: p50 · p90 · p99", lambda row: _times(row["time_to_first_token_s"]["first_turn"])),
    ]
    if any(row["workload"]["num_turns"] > 1 for row in rows):
        figures.append(("TTFT, later turns", lambda row: _times(row["time_to_first_token_s"]["later_turns"])))
    figures += [
        ("time per output token", lambda row: _times(row["time_per_output_token_s"])),
        ("between chunks", lambda row: _times(row["time_between_chunks_s"])),
        ("whole answer", lambda row: _times(row["latency_s"])),
    ]
    if any(row["load"]["rate"] is not None for row in rows):
        figures.append(("sent too late by", lambda row: _times(row["send_delay_s"])))
    for name in dict.fromkeys(name for row in rows for name in row["server_timing_s"]):
        figures.append((f"server: {name}", lambda row, name=name: _times(row["server_timing_s"].get(name))))  # type: ignore[misc]
    return figures


def _notes(row: Report, *, ignore_eos: bool) -> list[str]:
    """What a reader has to know of one load."""
    name, count = _title(row["load"]), row["num_answered"]
    notes = [f"{name}: {number:,} failed: {kind}" for kind, number in row["errors"].items()]
    if row["num_ended_early"]:
        limit = row["workload"]["max_tokens"]
        why = "although ignore_eos was sent" if ignore_eos else "as ignore_eos was not sent"
        notes.append(f"{name}: {row['num_ended_early']:,} of {count:,} answers ended before {limit:,} tokens, {why}")
    if row["num_uncounted"]:
        notes.append(
            f"{name}: {row['num_uncounted']:,} of {count:,} answers came without usage: their chunks are counted"
        )
    if row["num_interrupted"]:
        notes.append(f"{name}: {row['num_interrupted']:,} requests were interrupted")
    return notes


def _prompt_tokens(row: Report) -> str:
    tokens = row["prompt_tokens"]
    return "-" if tokens is None else f"{tokens['mean']:,.0f} ({tokens['max']:,})"


def _times(times: Distribution | None) -> str:
    return "-" if times is None else " · ".join(_time(times[name]) for name in ("p50", "p90", "p99"))


def _time(value_s: float) -> str:
    return f"{value_s * 1e3:.1f} ms" if value_s < 0.0995 else seconds(value_s)


def _title(load: Report) -> str:
    if load["rate"] is not None:
        return f"{load['rate']:g} chats/s"
    return "1 client" if load["concurrency"] == 1 else f"{load['concurrency']:,} clients"
