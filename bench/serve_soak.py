"""300 clients of `kvik serve` for half an hour, of which a fifth leave and some read slowly: nothing held, no growth.

python bench/serve_soak.py [--minutes 30] [--seed N] [--clients 300] [--model smollm2]; exit status 0 where all is well,
1 where not. The server runs in this process, so that its blocks can be counted; the clients run in another one.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import random
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from statistics import median
from typing import Any

from kvik import LLM
from kvik.hub.store import resolve
from kvik.server.listening import bind
from kvik.server.run import new_server, run
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState
from soak import BOUND, MIN_S, SAMPLE_S, Sample, num_open_files, resident_bytes, slope, small_cache_bytes

CONTEXT, MAX_RUNNING, MAX_WAITING = 2048, 64, 200
LEAVES, SLOW, BAD, WHOLE = 0.2, 0.05, 0.03, 0.2  # shares of the requests
MAX_ANSWER = 40
REPORT_S = 60.0
STUCK_S = 120.0  # no request ends for so long
IDLE_S = 60.0  # after the last client has left
FILES_AT_REST = 8  # more than before the first client: connections that are about to close
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOPICS = ("rivers", "gardens", "the night", "old houses", "winter", "small animals", "the sea", "bread")


@dataclass(frozen=True)
class Ask:
    """One request, how it is read, and what must become of it."""

    path: str
    body: dict[str, Any]
    leave_after_s: float | None = None
    leave_after_events: int | None = None
    pause_s: float = 0.0  # between two events
    status: int = 200


def draw_ask(draw: random.Random) -> Ask:
    """The next request of one client."""
    if draw.random() < BAD:
        return Ask(CHAT, {"messages": [{"role": "user", "content": "Hi"}], "temperature": -1}, status=400)
    text = f"Tell me something about {draw.choice(TOPICS)}. " * draw.choice((1, 1, 1, 8))
    fields: dict[str, Any] = {"max_tokens": draw.randint(1, MAX_ANSWER), "stream": draw.random() >= WHOLE}
    fields["temperature"] = draw.choice((0, 1))
    if draw.random() < 0.1:
        fields["n"] = 2
    if draw.random() < 0.1:
        fields["guided_regex"] = "[a-z ]{4,40}[.]"
    if draw.random() < 0.2:
        fields["cache_salt"] = draw.choice(("one", "other"))
    if fields["stream"] and draw.random() < 0.5:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": draw.random() < 0.5}
    if draw.random() < 0.5:
        path, fields["messages"] = CHAT, [{"role": "user", "content": text}]
        fields |= {"logprobs": True, "top_logprobs": 2} if draw.random() < 0.2 else {}
    else:
        path, fields["prompt"] = TEXT, [text, text + "And"] if draw.random() < 0.1 else text
        fields |= {"logprobs": 1, "echo": True} if draw.random() < 0.1 else {}
    leave_s = leave_events = None
    if draw.random() < LEAVES:
        if draw.random() < 0.5:
            leave_s = draw.uniform(0, 3)
        else:
            leave_events = draw.randint(1, 10)
    pause_s = draw.uniform(0.05, 0.5) if draw.random() < SLOW else 0.0
    return Ask(path, fields, leave_s, leave_events, pause_s)


class Clients:
    """All clients, in a process of their own; each sends its next request when the last is over."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._seed = port, seed
        self.counts: Counter[str] = Counter()
        self.is_over = False

    async def run(self, num_clients: int, seconds: float) -> None:
        """Until the time is over; one line of JSON in each ten seconds says what was done so far."""
        tasks = [asyncio.create_task(self._client(number)) for number in range(num_clients)]
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not any(task.done() for task in tasks):
            await asyncio.sleep(min(10.0, max(0.1, end_s - time.monotonic())))
            print(json.dumps(self.counts), flush=True)
        self.is_over = True
        await asyncio.wait(tasks, timeout=STUCK_S)
        for number, task in enumerate(tasks):
            if not task.done():
                self._fail(f"client {number} got no answer within {STUCK_S:.0f} s")
                task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                self._fail(repr(found))
        print(json.dumps(self.counts), flush=True)

    def _fail(self, what: str) -> None:
        self.counts["failed"] += 1
        if self.counts["failed"] <= 10:
            print(f"FAILED: {what}", flush=True)

    async def _client(self, number: int) -> None:
        draw = random.Random(f"seed {self._seed}, client {number}")
        await asyncio.sleep(draw.uniform(0, 2))
        while not self.is_over:
            ask = draw_ask(draw)
            try:
                async with asyncio.timeout(ask.leave_after_s):
                    wait_s = await self._ask(ask)
            except TimeoutError:
                self.counts["left"] += 1
                continue
            await asyncio.sleep(wait_s)

    async def _ask(self, ask: Ask) -> float:
        """Ask once; seconds until the client comes again."""
        async with self._sent(ask) as reader:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status = int(head.split()[1])
            if status == 429:
                self.counts["refused for the time being"] += 1
                return float(head.lower().split("retry-after: ")[1].split()[0])
            if status != ask.status:
                self._fail(f"status {status} for {ask}: {await reader.read()!r}")
                return 1.0
            if "text/event-stream" not in head:
                body = json.loads(await reader.read())
                reasons = [choice["finish_reason"] for choice in body.get("choices", [])]
                if not set(reasons) <= {"stop", "length"}:
                    self._fail(f"an answer without an end to {ask}: {body}")
                self.counts["answers" if status == 200 else "refused"] += 1
                return 0.0
            await self._read_stream(ask, reader)
            return 0.0

    async def _read_stream(self, ask: Ask, reader: asyncio.StreamReader) -> None:
        num_events, ended = 0, Counter[int]()
        last = ""
        async for line in reader:  # those with the sizes of chunks begin no event
            if not line.startswith(b"data: "):
                continue
            last = line[6:].decode().strip()
            num_events += 1
            self.counts["events"] += 1
            if num_events == ask.leave_after_events:
                self.counts["left"] += 1
                return
            if last != "[DONE]":
                event = json.loads(last)
                if "error" in event:
                    self._fail(f"an error in the stream of {ask}: {event}")
                    return
                ended.update(choice["index"] for choice in event["choices"] if choice["finish_reason"] is not None)
            if ask.pause_s:
                await asyncio.sleep(ask.pause_s)
        num_prompts = len(ask.body["prompt"]) if isinstance(ask.body.get("prompt"), list) else 1
        if last != "[DONE]" or ended != Counter(range(num_prompts * ask.body.get("n", 1))):
            self._fail(f"the stream of {ask} ended with {last!r}, its choices {dict(ended)} times")
        self.counts["streams"] += 1

    @asynccontextmanager
    async def _sent(self, ask: Ask) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        try:
            data = json.dumps(ask.body).encode()
            head = f"POST {ask.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close"
            writer.write(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
            yield reader
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


class Soak:
    """The server's side: what is sampled while the clients run, and what is found when they have left."""

    def __init__(self, served: ServedModel, port: int) -> None:
        self.served, self.port = served, port
        self.samples: list[Sample] = []
        self.failures: list[str] = []
        self.counts: dict[str, int] = {}
        self._started_s = self._progress_s = time.monotonic()

    def fail(self, what: str) -> None:
        """Note it, and show it."""
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)

    def watch(self, clients: subprocess.Popen[str]) -> None:
        """Sample the process until the clients have ended."""
        reading = threading.Thread(target=self._read, args=(clients,))
        reading.start()
        reported_s = self._started_s
        while reading.is_alive():
            reading.join(SAMPLE_S)
            now_s = time.monotonic()
            self.samples.append(Sample(now_s - self._started_s, resident_bytes(), num_open_files()))
            if not self.served.is_healthy:
                self.fail("the engine is dead")
                clients.kill()
            if now_s - self._progress_s > STUCK_S:
                self.fail(f"nothing ended for {STUCK_S:.0f} s")
                clients.kill()
            if now_s - reported_s >= REPORT_S:
                reported_s = now_s
                print(self.line(), flush=True)
        if clients.wait():
            self.fail(f"the clients ended with status {clients.returncode}")

    def _read(self, clients: subprocess.Popen[str]) -> None:
        assert clients.stdout is not None
        for line in clients.stdout:
            if line.startswith("{"):
                counts = json.loads(line)
                if counts != self.counts:
                    self._progress_s = time.monotonic()
                self.counts = counts
            else:
                self.fail(line.strip().removeprefix("FAILED: "))

    def line(self) -> str:
        """How it stands."""
        last, pool = self.samples[-1], self.served.llm.engine.cache.pool
        scheduler = self.served.llm.engine.scheduler
        return (
            f"{last.second / 60:5.1f} min: {last.resident_bytes / 1e6:.0f} MB resident, {last.num_files} files,"
            f" {pool.num_held} of {pool.num_blocks} blocks held, {len(scheduler.running)} run, {len(scheduler.waiting)}"
            f" wait, {scheduler.num_preemptions:,} preemptions, "
            + ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        )

    def judge(self, files_at_rest: int) -> None:
        """The end: idle, nothing held, one more answer, and growth where the run was long enough for that."""
        engine = self.served.llm.engine
        deadline_s = time.monotonic() + IDLE_S
        while engine.scheduler.has_work or num_open_files() > files_at_rest:
            if time.monotonic() > deadline_s:
                self.fail(f"{IDLE_S:.0f} s after the last client: {self.line()}, {num_open_files()} files now")
                break
            time.sleep(0.1)
        print(f"at the end: {engine.cache.pool.num_held} blocks held, {num_open_files()} files, {files_at_rest} before")
        if engine.cache.pool.num_held:
            self.fail(f"{engine.cache.pool.num_held} blocks are held at the end")
        engine.scheduler.check()
        body = json.dumps({"prompt": "Hi", "max_tokens": 1})
        for method, route, data in (("GET", "/health", None), ("POST", TEXT, body)):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request(method, route, data, {"Content-Type": "application/json"})
            if (status := connection.getresponse().status) != 200:
                self.fail(f"at the end {route} answers {status}")
            connection.close()
        self._judge_growth()

    def _judge_growth(self) -> None:
        last_s = self.samples[-1].second
        half = [sample for sample in self.samples if sample.second >= last_s / 2]
        seconds = [sample.second for sample in half]
        minutes = (last_s - seconds[0]) / 60
        memory = [sample.resident_bytes / 1e6 for sample in half]
        grown = 60 * slope(seconds, memory) * minutes
        share = grown / median(memory)
        print(
            f"resident memory over the last {minutes:.1f} minutes: {grown:+.1f} MB of {median(memory):.0f}:"
            f" {share:+.1%}, bound {BOUND:.0%}"
        )
        files = 60 * slope(seconds, [float(sample.num_files) for sample in half]) * minutes
        print(f"open files over the same time: {files:+.1f}")
        if last_s < MIN_S:
            print(f"growth is not judged before {MIN_S / 60:.0f} minutes")
        elif share > BOUND:
            self.fail("the resident memory grows")


def serve_and_soak(args: argparse.Namespace, seed: int) -> int:
    """Start the server and the clients; 0 where all is well."""
    path = resolve(args.model)
    llm = LLM(
        path,
        context=CONTEXT,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        kv_memory=small_cache_bytes(path),  # too small for all at once
    )
    config = ServerConfig(port=0, access_log=False, drain_s=5.0)
    served = ServedModel("smollm2", llm)
    state = ServerState(config, Models([served]))
    listening = bind(config.host, config.port)
    port = listening.getsockname()[1]
    server = new_server(state)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run(server, state, listening, ready.set)))
    thread.start()
    try:
        assert ready.wait(STUCK_S)
        soak = Soak(served, port)
        files_at_rest = num_open_files() + FILES_AT_REST
        command = [sys.executable, __file__, "--port", str(port), "--seed", str(seed), "--minutes", str(args.minutes)]
        with subprocess.Popen(
            [*command, "--clients", str(args.clients)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as clients:
            soak.watch(clients)
        print(soak.line())
        soak.judge(files_at_rest)
    finally:
        server.should_exit = True
        thread.join()
    print(f"{len(soak.failures)} failures (seed {seed})" if soak.failures else "no failures")
    return 1 if soak.failures else 0


def main() -> int:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--seed", type=int, help="repeats a run's requests")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of the server: then this process is the clients
    args = parser.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    if args.port is not None:
        asyncio.run(Clients(args.port, seed).run(args.clients, 60 * args.minutes))
        return 0
    print(f"seed {seed}: {args.clients} clients", flush=True)
    # Whatever hangs, and be it the event loop itself, is shown with all threads' stacks, and ends.
    faulthandler.dump_traceback_later(60 * args.minutes + 4 * STUCK_S, exit=True)
    return serve_and_soak(args, seed)


if __name__ == "__main__":
    sys.exit(main())
