"""Random requests for 20 minutes on a cache too small for them: whether anything is wrong, held for ever, or grows.

python bench/soak.py [--minutes 20] [--seed N] [--model smollm2]; exit status 0 where all is well, 1 where not. Ctrl-C
ends the run early with what was measured so far (130 where that is well). The seed repeats requests, not their timing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import os
import random
import secrets
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvik import LLM, AsyncLLM, Completion, InvalidInput, SamplingParams, Session
from kvik.cache import BLOCKS_PER_SUPERBLOCK
from kvik.config import Speculation
from kvik.files.gguf import read_gguf
from kvik.hub.store import resolve
from kvik.models.gguf_spec import read_spec

NUM_CLIENTS, NUM_TALKERS = 24, 2
NUM_SUPERBLOCKS = 10
CONTEXT = 2048
MAX_PROMPT, MAX_ANSWER = 500, 250
MAX_CONVERSATION = 400  # tokens
ABORTS = 0.2  # share of the requests
CHECKS = 0.15  # share of the greedy answers
CHECKED_TOKENS = 6
SAMPLE_S = 1.0
REPORT_S = 60.0
STUCK_S = 120.0  # nothing ends for so long: something hangs
BOUND = 0.03  # of the resident memory, for its growth
MIN_S = 600.0  # a shorter run says nothing about growth: the heap finds its size in some minutes
MAX_FAILURES = 10
WORDS = (  # noqa: SIM905  # fifty words in a list of strings take fifty lines
    "the a of to and in is was that it he she they we had have not but with from as at by this which or one all were"
    " there when time water day night old man house river garden winter light hand eye work world story small green"
).split()


@dataclass(frozen=True)
class Request:
    """What one client asks, and after how many tokens or seconds it leaves, if it does."""

    name: str  # repeats it, with the run's seed
    prompt: list[int]
    params: SamplingParams
    salt: str | None
    priority: int
    leave_after_tokens: int | None = None
    leave_after_s: float | None = None


@dataclass
class Sample:
    """The process at one moment."""

    second: float
    resident_bytes: int
    num_files: int


@dataclass
class Counts:
    """What was done so far."""

    completed: int = 0
    aborted: int = 0
    turns: int = 0  # of sessions
    tokens: int = 0
    checked: int = 0
    ended_s: float = field(default_factory=time.monotonic)  # when something ended last


class Traffic:
    """Draws requests: prompts that share beginnings, that come again, that repeat themselves, and others."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm, self.name = llm, name
        self.random = random.Random(name)
        self._seen: deque[list[int]] = deque(maxlen=8)
        self._count = 0

    def request(self, shared: list[list[int]]) -> Request:
        """The next one."""
        draw = self.random
        self._count += 1
        kind = draw.random()
        if kind < 0.4:
            prompt = draw.choice(shared) + self.tokens(draw.randint(1, 80))
        elif kind < 0.55 and self._seen:
            prompt = draw.choice(self._seen)
        elif kind < 0.7:
            prompt = (self.tokens(draw.randint(1, 12)) * MAX_PROMPT)[: draw.randint(20, 200)]
        else:
            prompt = self.tokens(int(MAX_PROMPT ** draw.random()))
        self._seen.append(prompt)
        params = self.params()
        leave_after_tokens = leave_after_s = None
        if draw.random() < ABORTS:
            if params.n == 1 and draw.random() < 0.5:
                leave_after_tokens = draw.randint(1, params.max_tokens)
            else:
                leave_after_s = draw.uniform(0, 2)
        salt = draw.choice((None, None, None, "one", "other"))
        name = f"{self.name}, request {self._count}"
        return Request(name, prompt, params, salt, draw.choice((0, 0, 0, 1, -1)), leave_after_tokens, leave_after_s)

    def params(self, *, n: bool = True) -> SamplingParams:
        """Half of them greedy."""
        draw = self.random
        max_tokens = draw.choice((int(MAX_ANSWER ** draw.random()), draw.randint(1, MAX_ANSWER)))
        ignore_eos = draw.random() < 0.5
        speculate: Speculation | None = "ngram" if draw.random() < 0.3 else None
        count = draw.randint(2, 4) if n and draw.random() < 0.2 else 1
        logprobs = draw.choice((None, None, 0, 3))
        if draw.random() < 0.5:
            return SamplingParams(
                n=count, max_tokens=max_tokens, ignore_eos=ignore_eos, logprobs=logprobs, speculate=speculate
            )
        return SamplingParams(
            n=count,
            max_tokens=max_tokens,
            min_tokens=draw.randint(0, max_tokens) if draw.random() < 0.2 else 0,
            temperature=draw.uniform(0, 1.5),
            top_k=draw.choice((0, 0, 1, 40)),
            top_p=draw.choice((1.0, 0.9, 0.5)),
            min_p=draw.choice((0.0, 0.05)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
            presence_penalty=draw.choice((0.0, 0.5)),
            frequency_penalty=draw.choice((0.0, 0.2)),
            stop=draw.choice(((), (), (".",), ("\n", "the end"))),
            seed=draw.choice((None, draw.getrandbits(64))),
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            echo=n and draw.random() < 0.1,
            speculate=speculate,
        )

    def text(self, num_words: int) -> str:
        """Words in no order."""
        return " ".join(self.random.choices(WORDS, k=num_words))

    def tokens(self, count: int) -> list[int]:
        """Text, or any ids at all."""
        if self.random.random() < 0.7:
            return self.llm.encode(self.text(count))[:count]
        return self.random.choices(range(self.llm.engine.decoder.spec.vocab_size), k=count)


class Soak:
    """The clients, the conversations beside them, and what they found."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.seed = llm, seed
        self.counts, self.lock = Counts(), threading.Lock()
        self.failures: list[str] = []
        self.samples: list[Sample] = []
        self.stopping = threading.Event()
        self.started_s = time.monotonic()
        self.check_engine = llm.new_engine()
        self._to_check: deque[tuple[str, list[int], Completion]] = deque(maxlen=4)
        common = Traffic(llm, f"seed {seed}, shared prompts")
        self.shared = [common.tokens(common.random.randint(30, 400)) for _ in range(6)]

    async def run(self, minutes: float, report: Callable[[str], None], tick: Callable[[float, str], None]) -> bool:
        """Until the time is over or Ctrl-C; says whether it was the latter."""
        loop = asyncio.get_running_loop()
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            self.stopping.set()
            loop.remove_signal_handler(signal.SIGINT)  # the next one is not waited for

        loop.add_signal_handler(signal.SIGINT, interrupt)
        self.started_s = self.counts.ended_s = time.monotonic()
        pool = ThreadPoolExecutor(NUM_TALKERS + 1)
        async with AsyncLLM(self.llm) as served:
            work: list[asyncio.Future[None]] = [
                asyncio.ensure_future(self._client(served, index)) for index in range(NUM_CLIENTS)
            ]
            work += [loop.run_in_executor(pool, self._talker, index) for index in range(NUM_TALKERS)]
            work.append(loop.run_in_executor(pool, self._checker))
            await self._watch(60 * minutes, report, tick)
            self.stopping.set()
            _, hanging = await asyncio.wait(work, timeout=STUCK_S)
            if hanging:
                self.fail(f"{len(hanging)} of {len(work)} clients and conversations hang")
                report(self.verdict(is_idle=False))
                faulthandler.dump_traceback()
                os._exit(1)  # threads that hang would be waited for
            for done in work:
                if (error := done.exception()) is not None:
                    self.fail(f"a client died: {error!r}")
        pool.shutdown()
        return interrupted

    async def _watch(self, seconds: float, report: Callable[[str], None], tick: Callable[[float, str], None]) -> None:
        """Measure every second, and report every minute."""
        next_report_s = REPORT_S
        while not self.stopping.is_set() and (now_s := time.monotonic() - self.started_s) < seconds:
            self.samples.append(Sample(now_s, resident_bytes(), num_open_files()))
            tick(now_s / seconds, self.line(now_s))
            if now_s >= next_report_s:
                next_report_s += REPORT_S
                report(self.line(now_s))
                await asyncio.to_thread(self.check_accounts)
            if time.monotonic() - self.counts.ended_s > STUCK_S:
                self.fail(f"nothing has ended for {STUCK_S:.0f} s")
                return
            await asyncio.sleep(SAMPLE_S)

    def check_accounts(self) -> None:
        """Prove the engine's books between two steps."""
        with self.llm.engine.lock:
            try:
                self.llm.engine.scheduler.check()
            except AssertionError as error:
                self.fail(f"the accounts are wrong: {error}")

    # Requests.

    async def _client(self, served: AsyncLLM, index: int) -> None:
        traffic = Traffic(self.llm, f"seed {self.seed}, client {index}")
        while not self.stopping.is_set():
            request = traffic.request(self.shared)
            try:
                completions = await self._serve(served, request, streams=traffic.random.random() < 0.5)
            except Exception as error:  # noqa: BLE001  # every one of them is a finding
                self.fail(f"{request.name}: {error!r}\n  {request}")
                await asyncio.sleep(1)
                continue
            self._note(completed=completions is not None, completions=completions or [])
            for completion in completions or []:
                self._offer(request.name, request.prompt, request.params, completion, traffic.random)

    async def _serve(self, served: AsyncLLM, request: Request, *, streams: bool) -> list[Completion] | None:
        """The completions, or `None` where the client has left."""
        route = {"priority": request.priority, "salt": request.salt}
        if request.leave_after_s is not None:
            task = asyncio.ensure_future(served.generate(request.prompt, request.params, **route))  # type: ignore[arg-type]
            done, _ = await asyncio.wait([task], timeout=request.leave_after_s)
            if done:
                return task.result()
            task.cancel()
            await asyncio.wait([task])
            return None if task.cancelled() else task.result()
        if request.params.n > 1 or (not streams and request.leave_after_tokens is None):
            completions = await served.generate(request.prompt, request.params, **route)  # type: ignore[arg-type]
            if len(completions) != request.params.n:
                raise AssertionError(f"{len(completions)} completions")
            return completions
        stream = served.stream(request.prompt, request.params, **route)  # type: ignore[arg-type]
        text, token_ids = "", list[int]()
        try:
            async for piece in stream:
                text, token_ids = text + piece.text, [*token_ids, piece.token_id]
                if piece.completion is not None:
                    if (piece.completion.text, piece.completion.token_ids) != (text, token_ids):
                        raise AssertionError("the pieces are not the completion")
                    return [piece.completion]
                if len(token_ids) == request.leave_after_tokens:
                    return None
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        raise AssertionError("a stream without an end")

    # Conversations.

    def _talker(self, index: int) -> None:
        traffic, count = Traffic(self.llm, f"seed {self.seed}, talker {index}"), 0
        while not self.stopping.is_set():
            count += 1
            name = f"{traffic.name}, conversation {count}"
            salt = traffic.random.choice((None, "one"))
            sessions = [Session(self.llm, system=traffic.text(traffic.random.randint(1, 60)), salt=salt)]
            did: list[str] = []
            try:
                for _ in range(traffic.random.randint(2, 12)):
                    if not self.stopping.is_set():
                        self._talk(name, sessions, traffic, did)
            except Exception as error:  # noqa: BLE001  # every one of them is a finding
                self.fail(f"{name}: {error!r}\n  after {', '.join(did)}")
                time.sleep(1)
            for session in sessions:
                session.close()

    def _talk(self, name: str, sessions: list[Session], traffic: Traffic, did: list[str]) -> None:
        """Do one thing to one of the sessions."""
        draw = traffic.random
        session = draw.choice(sessions)
        what = draw.choice(("say", "say", "say", "say", "fork", "rewind", "pin", "unpin"))
        did.append(f"{what} {sessions.index(session)}")
        if what == "fork" and len(sessions) < 3:
            sessions.append(session.fork())
        elif what == "rewind":
            session.rewind(draw.randint(0, len(session.messages) - 1))
        elif what == "pin" and session.completion is not None and session.completion.finish_reason != "abort":
            for other in sessions:  # one at a time, so that everybody's requests fit beside all pins
                other.unpin()
            with contextlib.suppress(InvalidInput):  # its blocks may be gone, or a request may need them
                session.pin()
        elif what == "unpin":
            session.unpin()
        elif what == "say":
            session.append("user", traffic.text(draw.randint(1, 40)))
            prompt = self.llm.render_chat(session.messages)
            if len(prompt) > MAX_CONVERSATION:
                session.rewind(len(session.messages) - 1)
                return
            params = traffic.params(n=False)
            if draw.random() < ABORTS:
                max_pieces = draw.randint(1, params.max_tokens)
                stream = session.stream(params)
                for count, _ in enumerate(stream, start=1):
                    if count >= max_pieces:
                        break
                stream.close()  # type: ignore[attr-defined]
                self._note(completed=False)
                return
            completion = session.generate(params)
            self._note(completed=True, completions=[completion], is_turn=True)
            self._offer(f"{name} after {', '.join(did)}", prompt, params, completion, draw)

    # Checks.

    def _offer(
        self, name: str, prompt: list[int], params: SamplingParams, done: Completion, draw: random.Random
    ) -> None:
        """Let a part of the greedy answers be checked; where the checker is behind, the oldest are not."""
        plain = SamplingParams(
            n=params.n,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs,
            speculate=params.speculate,
        )
        if params == plain and done.token_ids and draw.random() < CHECKS:
            self._to_check.append((name, prompt, done))

    def _checker(self) -> None:
        draw = random.Random(f"seed {self.seed}, checker")
        while not self.stopping.is_set():
            if not self._to_check:
                time.sleep(0.1)
                continue
            name, prompt, done = self._to_check.popleft()
            start = draw.randrange(max(1, len(done.token_ids) - CHECKED_TOKENS + 1))
            try:
                self._check(name, prompt, done, start)
            except Exception as error:  # noqa: BLE001  # every one of them is a finding
                self.fail(f"{name}: its check: {error!r}")
            with self.lock:
                self.counts.checked += 1

    def _check(self, name: str, prompt: list[int], done: Completion, start: int) -> None:
        """Some of an answer's tokens, and their logprobs to the last bit, without any cache."""
        wanted = done.token_ids[start : start + CHECKED_TOKENS]
        top = 0 if not done.logprobs else max(0, len(done.logprobs[0].top))
        params = SamplingParams(
            max_tokens=len(wanted), ignore_eos=True, logprobs=None if done.logprobs is None else top
        )
        before = prompt + done.token_ids[:start]
        sequence = self.check_engine.new_sequence(self.check_engine.new_request(before, params, use_cache=False))
        self.check_engine.add(sequence)
        while sequence.finish_reason is None:
            self.check_engine.step()
        if sequence.error is not None:
            raise sequence.error
        where = f"{name}, tokens {start} and on of the answer to {prompt}"
        if sequence.completion_ids != wanted:
            self.fail(f"{where}: {wanted}, without a cache {sequence.completion_ids}")
        elif done.logprobs is not None and done.logprobs[start : start + len(wanted)] != sequence.logprobs:
            self.fail(f"{where}: other logprobs than without a cache")

    # What was found.

    def fail(self, what: str) -> None:
        """Note it, and show it."""
        with self.lock:
            self.failures.append(what)
            if len(self.failures) <= MAX_FAILURES:
                print(f"FAILED: {what}", flush=True)

    def _note(self, *, completed: bool, completions: list[Completion] | None = None, is_turn: bool = False) -> None:
        with self.lock:
            counts = self.counts
            counts.completed += completed
            counts.aborted += not completed
            counts.turns += is_turn
            counts.tokens += sum(len(completion.token_ids) for completion in completions or [])
            counts.ended_s = time.monotonic()

    def line(self, now_s: float) -> str:
        """How it stands."""
        cache, counts, engine = self.llm.cache, self.counts, self.llm.engine
        return (
            f"{now_s / 60:5.1f} min: {resident_bytes() / 1e6:.0f} MB resident, {num_open_files()} files,"
            f" blocks {cache.num_held} held {cache.num_reusable} reusable {cache.num_free} free,"
            f" {counts.completed:,} requests done ({counts.turns:,} turns) {counts.aborted:,} aborted,"
            f" {counts.tokens:,} tokens, {engine.scheduler.num_preemptions:,} preemptions,"
            f" {cache.stats.num_evicted_blocks:,} evictions, {cache.stats.hit_rate:.0%} found, {counts.checked} checked"
        )

    def verdict(self, *, is_idle: bool = True) -> str:
        """The end: the cache emptied, memory and files over time, and all failures counted."""
        lines: list[str] = []
        if is_idle:
            lines += self._emptied()
        if len(self.samples) > 10:
            lines += self._growth()
        if not self._is_long:
            lines.append(f"growth is not judged before {MIN_S / 60:.0f} minutes")
        lines.append(f"{self.counts.checked} greedy answers compared with the model's own without a cache")
        lines.append(f"{len(self.failures)} failures (seed {self.seed})" if self.failures else "no failures")
        return "\n".join(lines)

    def _emptied(self) -> Iterator[str]:
        for name, engine in (("engine", self.llm.engine), ("checking engine", self.check_engine)):
            engine.clear_cache()
            try:
                engine.scheduler.check()
            except AssertionError as error:
                self.fail(f"the accounts are wrong at the end: {error}")
            pool, committed = engine.cache.pool, engine.cache.committed_bytes
            found = (
                f"{name}, cleared: {pool.num_held} blocks held, {pool.num_reusable} reusable, {committed} bytes in use"
            )
            if pool.num_free != pool.num_blocks or committed or engine.scheduler.has_work or engine.cache.holds:
                self.fail(found)
            yield found

    def _growth(self) -> Iterator[str]:
        last_s = self.samples[-1].second
        half = [sample for sample in self.samples if sample.second >= last_s / 2]
        per_minute = 60 * slope([sample.second for sample in half], [sample.resident_bytes / 1e6 for sample in half])
        minutes, middle = (
            (last_s - half[0].second) / 60,
            statistics.median(sample.resident_bytes / 1e6 for sample in half),
        )
        yield self._judged(
            f"resident memory over the second half: {per_minute:+.3f} MB a minute, in {minutes:.1f} minutes"
            f" {per_minute * minutes:+.1f} MB of {middle:.0f}",
            per_minute * minutes / middle,
        )
        quarter, end = self._around(last_s / 4), self._around(last_s)
        memory = [statistics.median(sample.resident_bytes / 1e6 for sample in samples) for samples in (quarter, end)]
        yield self._judged(
            f"resident memory at the end against a quarter of the time: {memory[1]:.1f} MB against {memory[0]:.1f}",
            memory[1] / memory[0] - 1,
        )
        files = [max(sample.num_files for sample in samples) for samples in (quarter, end)]
        found = f"open files at the end against a quarter of the time: {files[1]} against {files[0]}"
        if files[1] > files[0] and self._is_long:
            self.fail(found)
        yield found

    @property
    def _is_long(self) -> bool:
        return bool(self.samples) and self.samples[-1].second >= MIN_S - 5 * SAMPLE_S

    def _around(self, second: float) -> list[Sample]:
        """The samples of a tenth of the time, which end or have their middle there."""
        width = self.samples[-1].second / 20
        return [sample for sample in self.samples if abs(sample.second - second) <= width]

    def _judged(self, found: str, growth: float) -> str:
        found += f": {growth:+.1%}, bound {BOUND:.0%}"
        if growth > BOUND and self._is_long:
            self.fail(found)
        return found


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line with the least squares."""
    return statistics.linear_regression(xs, ys).slope


def resident_bytes() -> int:
    """Of this process, at present."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_open_files() -> int:
    """Descriptors of this process, without the one that looks."""
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208  # a Path makes it no clearer


@contextmanager
def shown(minutes: float) -> Iterator[tuple[Callable[[str], None], Callable[[float, str], None]]]:
    """Lines for each report, and on a terminal a bar below them."""

    def report(text: str) -> None:
        print(text, flush=True)

    if not sys.stdout.isatty():
        yield report, lambda share, text: None
        return
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", total=1.0)
        yield report, lambda share, text: progress.update(task, completed=share, description=text.partition(": ")[2])


def small_cache_bytes(model: Path) -> int:
    """Bytes of the cache that is too small for all clients at once."""
    return NUM_SUPERBLOCKS * BLOCKS_PER_SUPERBLOCK * read_spec(read_gguf(model)).kv_spec("f16").block_bytes


def main() -> int:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, help="repeats a run's requests")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    path = resolve(args.model)
    llm = LLM(path, context=CONTEXT, threads=args.threads, kv_memory=small_cache_bytes(path))
    print(
        f"seed {seed}: {NUM_CLIENTS} clients and {NUM_TALKERS} conversations, {llm.cache.num_blocks} blocks", flush=True
    )
    soak = Soak(llm, seed)
    # Whatever hangs, and be it the event loop itself, is shown with all threads' stacks, and ends.
    faulthandler.dump_traceback_later(60 * args.minutes + 3 * STUCK_S, exit=True)
    with shown(args.minutes) as (report, tick):
        interrupted = asyncio.run(soak.run(args.minutes, report, tick))
    if interrupted:
        print("interrupted")
    print(soak.line(time.monotonic() - soak.started_s))
    print(soak.verdict())
    return 1 if soak.failures else 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
