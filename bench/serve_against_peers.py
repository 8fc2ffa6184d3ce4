"""kvik's server next to llama.cpp's under the same load: medians of interleaved rounds as a Markdown table.

bench/peers/build_llama_cpp.sh && python bench/serve_against_peers.py [--clients 1,8,32] [--rounds 3] [--json FILE]

Each client holds a chat of 5 turns over one system prompt of 480 words, 48 tokens an answer, and all begin at once.
Servers run in turns, never two at once, each started anew, with two threads; every round has texts of its own, so that
the system prompt is cold. Clients and server share the machine. AsyncLLM in the clients' process, with the same load,
shows what HTTP adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvik import LLM, AsyncLLM, SamplingParams
from kvik.client.completions import Reply, Server
from kvik.client.http import Connection, parse_url
from kvik.engine.output import Completion
from kvik.hub.store import resolve
from kvik.machine import processor_name
from kvik.measure.load import Asker, HttpAsker, Load, LoadResult, Message, Workload, run_load, warm_up
from kvik.measure.load_summary import summarise
from kvik_runs import NotAvailable

START_S = 120.0
TIMEOUT_S = 600.0
SLOT_TOKENS = 2048  # of llama-server; a chat of the load ends below it
WARM_UP_REQUESTS = 2

Figures = dict[str, float]
Measure = Callable[[Workload, Load], LoadResult]

COLUMNS: dict[str, Callable[[Figures], str]] = {
    "tok/s": lambda of: f"{of['tok/s']:,.0f}",
    "TTFT first: p50, p99": lambda of: f"{of['first p50'] * 1e3:,.0f}, {of['first p99'] * 1e3:,.0f} ms",
    "TTFT later: p50, p99": lambda of: f"{of['later p50'] * 1e3:,.0f}, {of['later p99'] * 1e3:,.0f} ms",
    "ms a token: p50, p99": lambda of: f"{of['token p50'] * 1e3:.1f}, {of['token p99'] * 1e3:.1f}",
    "cached": lambda of: f"{of['cached']:.0%}",
}


class InProcess:
    """A client of an `AsyncLLM` in this process."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def ask(self, messages: Sequence[Message], max_tokens: int, reply: Reply) -> None:
        """Answer the chat so far."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        completion: Completion | None = None
        async for piece in self._llm.stream_chat(messages, params):
            if piece.text:
                reply.texts.append(piece.text)
                reply.text_times_s.append(time.perf_counter())
            completion = piece.completion or completion
        assert completion is not None
        reply.finish_reason, stats = completion.finish_reason, completion.stats
        reply.usage = {
            "prompt_tokens": stats.num_prompt_tokens,
            "completion_tokens": stats.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": stats.num_cached_tokens},
        }

    def close(self) -> None:
        """Nothing is held between requests."""


def in_process(name: str, threads: int) -> Measure:
    """Measures AsyncLLM."""

    async def measure(workload: Workload, load: Load) -> LoadResult:
        async with AsyncLLM(LLM(name, threads=threads, max_running=load.concurrency or 1)) as llm:
            return await put_on(lambda: InProcess(llm), workload, load)

    return lambda workload, load: asyncio.run(measure(workload, load))


def served(command: Callable[[int, int], Sequence[str]]) -> Measure:
    """Measures the server that `command(port, clients)` starts."""

    async def measure(url: str, workload: Workload, load: Load) -> LoadResult:
        address, server = parse_url(url), Server()
        connection = Connection(address, timeout_s=TIMEOUT_S)
        try:
            model = await server.first_model(connection)
        finally:
            connection.close()
        return await put_on(lambda: HttpAsker(address, server, model, timeout_s=TIMEOUT_S), workload, load)

    def start_and_measure(workload: Workload, load: Load) -> LoadResult:
        with listening(lambda port: command(port, load.concurrency or 1)) as url:
            return asyncio.run(measure(url, workload, load))

    return start_and_measure


async def put_on(make_asker: Callable[[], Asker], workload: Workload, load: Load) -> LoadResult:
    """Warm up, and measure. Raises `RuntimeError` where a request fails or an answer ends early."""
    asker = make_asker()
    try:
        await warm_up(asker, workload, WARM_UP_REQUESTS)
    finally:
        asker.close()
    result = await run_load(make_asker, workload, load)
    counts = {record.reply.num_completion_tokens for record in result.records}
    errors = [str(record.error) for record in result.records if record.error is not None]
    if errors or counts != {workload.max_tokens}:
        raise RuntimeError(f"not every answer has {workload.max_tokens} tokens: {counts}, {errors[:3]}")
    return result


@contextlib.contextmanager
def listening(command: Callable[[int], Sequence[str]]) -> Iterator[str]:
    """The URL of a server that runs meanwhile. Raises `NotAvailable` where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, subprocess.Popen(command(port), stdout=log, stderr=log) as process:
        try:
            wait_until_healthy(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    """Until GET /health answers 200."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):  # not yet
            time.sleep(0.1)
    log.seek(0)
    raise NotAvailable(f"it did not start: {log.read().decode(errors='replace')[-500:]}")


def figures(result: LoadResult) -> Figures:
    """One round's."""
    summary = summarise(result)
    first, later = (summary["time_to_first_token_s"][name] for name in ("first_turn", "later_turns"))
    token = summary["time_per_output_token_s"]
    return {
        "tok/s": summary["completion_tokens_per_s"],
        "cached": summary["cached_share"],
        **{
            f"{name} {p}": of[p]
            for name, of in (("first", first), ("later", later), ("token", token))
            for p in ("p50", "p99")
        },
    }


def table(rounds: dict[int, dict[str, list[Figures]]], reference: str) -> list[str]:
    """Markdown: for each number of clients a row of each engine; the ratio is of tokens a second to the reference's."""
    lines = [
        "| clients | | " + " | ".join(COLUMNS) + f" | against {reference} |",
        "|---:|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for num_clients, by_name in rounds.items():
        medians = {
            name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
            for name, measured in by_name.items()
            if measured
        }
        for name, of in medians.items():
            ratio = f"{of['tok/s'] / medians[reference]['tok/s']:.2f}" if reference in medians else "-"
            cells = [f"{num_clients}", name, *(show(of) for show in COLUMNS.values()), ratio]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", default="1,8,32", help="how many at once, for example 1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="", help="engines whose names have this text in them")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where build_llama_cpp.sh built")
    parser.add_argument("--json", type=Path, help="every round's figures too")
    args = parser.parse_args()
    threads, name = args.threads, "smollm2"
    llama_server, model = args.peers / "bin" / "llama-server", str(resolve(name))

    def kvik_command(port: int, clients: int) -> list[str]:
        return [sys.executable, "-m", "kvik", "serve", name, "--port", f"{port}", "--threads", f"{threads}"]

    def llama_cpp_command(port: int, clients: int) -> list[str]:
        if not llama_server.exists():
            raise NotAvailable(f"{llama_server} is missing; bench/peers/build_llama_cpp.sh makes it")
        options = {
            "-t": threads,
            "-tb": threads,
            "-np": clients,
            "-c": SLOT_TOKENS * clients,
            "-fa": "on",
            "--port": port,
        }
        flat = [f"{part}" for pair in options.items() for part in pair]
        return [f"{llama_server}", "-m", model, "--host", "127.0.0.1", "--no-ui", *flat]

    engines: dict[str, Measure] = {
        "llama-server": served(llama_cpp_command),
        "kvik serve": served(kvik_command),
        "kvik AsyncLLM, in process": in_process(name, threads),
    }
    engines = {key: measure for key, measure in engines.items() if args.only in key}
    rounds: dict[int, dict[str, list[Figures]]] = {}
    for number in range(args.rounds):
        for num_clients in map(int, args.clients.split(",")):
            workload = Workload(
                num_turns=args.turns, system_words=480, turn_words=32, max_tokens=48, seed=1000 * number + num_clients
            )
            load = Load(concurrency=num_clients, num_requests=num_clients * args.turns)
            for key in list(engines):
                try:
                    found = figures(engines[key](workload, load))
                except NotAvailable as error:
                    print(f"{key}: {error}", file=sys.stderr)
                    del engines[key]
                    continue
                rounds.setdefault(num_clients, {}).setdefault(key, []).append(found)
                print(f"round {number + 1}, {num_clients} clients, {key}: {found['tok/s']:.0f} tok/s", file=sys.stderr)
    print(f"{Path(model).name}, {threads} threads on {os.cpu_count()} of {processor_name()}, {args.rounds} rounds\n")
    print("\n".join(table(rounds, "llama-server")))
    if args.json is not None:
        args.json.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
