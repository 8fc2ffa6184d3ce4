"""What the engine makes of many requests, shared prefixes and prompts seen before: medians of interleaved rounds.

python bench/engine.py [--rounds 5] [--only TEXT] [--json FILE]; with llama.cpp where bench/peers/build_llama_cpp.sh
has built it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import kvik
from kvik import LLM, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.sequence import Sequence
from kvik.hub.store import resolve
from kvik.machine import available_threads
from kvik_runs import NotAvailable, random_tokens
from llama_cpp_runs import LlamaCppRuns

NUM_REQUESTS, PROMPT, ANSWER = 32, 128, 64
NUM_SHARERS, PREFIX = 16, 1500
SEEN_PROMPT = 500


@dataclass
class Figures:
    """Every round's figures, by name."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more."""
        self.rounds.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """Of all rounds, where there are any."""
        return statistics.median(self.rounds[name]) if name in self.rounds else None

    def ratio(self, above: str, below: str) -> float | None:
        """The median of the rounds' ratios: both figures of a round were measured within the same minute."""
        pairs = list(zip(self.rounds.get(above, []), self.rounds.get(below, []), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None


class Clock:
    """An observer that counts the time of the model, and of the scheduler: what is left is sampling and text."""

    def __init__(self, engine: Engine) -> None:
        self.forward_s = self.scheduler_s = 0.0
        engine.add_observer(self)

    def __call__(self, event: StepEvent) -> None:
        """A step has run."""
        self.forward_s += event.run_s
        self.scheduler_s += event.schedule_s + event.commit_s


class Bench:
    """One model, and an engine for each kind of measurement."""

    def __init__(self, model: Path, threads: int, peers: LlamaCppRuns) -> None:
        self.model, self.peers = model, peers
        self.llm = LLM(model, threads=threads)
        self.figures = Figures()
        self._seed = 0

    def new_prompt(self, num_tokens: int) -> list[int]:
        """Tokens that no request had before."""
        self._seed += 1
        vocab_size = self.llm.engine.decoder.spec.vocab_size
        return [(token + 7919 * self._seed) % vocab_size for token in random_tokens(self.llm.engine, num_tokens)]

    def decode_alone(self) -> None:
        """One request, its decode steps: the batch-1 figures that others are compared with."""
        engine = self.llm.new_engine()
        clock = Clock(engine)
        sequence = self._queue(engine, self.new_prompt(PROMPT), 128)
        self.figures.add("decode alone, tok/s", self._decode(engine, clock, [sequence], "batch 1"))

    def many_requests(self) -> None:
        """32 requests with prompts of 128 tokens that write 64 each."""
        engine = self.llm.new_engine()
        clock = Clock(engine)
        started_s = time.perf_counter()
        sequences = [self._queue(engine, self.new_prompt(PROMPT), ANSWER) for _ in range(NUM_REQUESTS)]
        rate = self._decode(engine, clock, sequences, "batch 32")
        whole_s = time.perf_counter() - started_s
        self.figures.add("32 requests, decode, tok/s", rate)
        self.figures.add("32 requests, whole run, generated tok/s", NUM_REQUESTS * ANSWER / whole_s)

    def peer_many_requests(self) -> None:
        """The same by llama-batched-bench, the better of flash attention on and off."""
        runs = [self.peers.batched(self.model, NUM_REQUESTS, PROMPT, ANSWER, flash) for flash in ("on", "off")]
        self.figures.add("llama.cpp, 32 requests, decode, tok/s", max(run["speed_tg"] for run in runs))
        whole = max(NUM_REQUESTS * ANSWER / (run["t_pp"] + run["t_tg"]) for run in runs)
        self.figures.add("llama.cpp, 32 requests, whole run, generated tok/s", whole)

    def sharing(self) -> None:
        """16 requests that begin with the same 1,500 tokens: once sharing them, once each with a salt of its own."""
        prefix = self.new_prompt(PREFIX)
        prompts = [[*prefix, *self.new_prompt(20)] for _ in range(NUM_SHARERS)]
        for name, salts in (
            ("shared", [None] * NUM_SHARERS),
            ("unshared", [f"tenant {index}" for index in range(NUM_SHARERS)]),
        ):
            engine = self.llm.new_engine()
            clock = Clock(engine)
            started_s = time.perf_counter()
            sequences = [self._queue(engine, prompt, ANSWER, salt) for prompt, salt in zip(prompts, salts, strict=True)]
            rate = self._decode(engine, clock, sequences)
            whole_s = time.perf_counter() - started_s
            self.figures.add(f"16 requests of 1,520 tokens, prefix {name}: decode step, ms", 1e3 * NUM_SHARERS / rate)
            self.figures.add(f"16 requests of 1,520 tokens, prefix {name}: whole run, s", whole_s)
            computed = sum(sequence.costs.num_computed_tokens for sequence in sequences) - NUM_SHARERS * (ANSWER - 1)
            self.figures.add(f"16 requests of 1,520 tokens, prefix {name}: prompt tokens computed", computed)

    def seen_before(self) -> None:
        """Time to the first token of a 500-token prompt, cold and again, on an engine that another one has warmed."""
        engine = self.llm.new_engine()
        prompt = self.new_prompt(SEEN_PROMPT)
        self._finish(engine, [self._queue(engine, self.new_prompt(SEEN_PROMPT), ANSWER)])
        for name in ("cold", "seen before"):
            sequence = self._queue(engine, prompt, ANSWER)
            self._finish(engine, [sequence])
            first_token_s = sequence.stats().time_to_first_token_s
            self.figures.add(f"first token of a 500-token prompt, {name}, ms", 1e3 * first_token_s)

    def _queue(self, engine: Engine, prompt: list[int], max_tokens: int, salt: str | None = None) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sequence = engine.new_sequence(engine.new_request(prompt, params, salt=salt))
        engine.add(sequence)
        return sequence

    def _decode(self, engine: Engine, clock: Clock, sequences: list[Sequence], batch: str = "") -> float:
        """Step to the end; tokens a second of the steps in which all decode; their shares where `batch` names it."""
        while any(sequence.num_completion_tokens == 0 for sequence in sequences) and engine.step() is not None:
            pass
        done = sum(sequence.num_completion_tokens for sequence in sequences)
        forward_s, scheduler_s, started_s = clock.forward_s, clock.scheduler_s, time.perf_counter()
        while all(sequence.finish_reason is None for sequence in sequences):
            engine.step()
        elapsed_s = time.perf_counter() - started_s
        num_tokens = sum(sequence.num_completion_tokens for sequence in sequences) - done
        forward_s, scheduler_s = clock.forward_s - forward_s, clock.scheduler_s - scheduler_s
        self._finish(engine, sequences)
        if not num_tokens:
            raise NotAvailable("there was no step in which all sequences decode")
        if batch:
            self.figures.add(f"share of a step for the scheduler and its accounts, {batch}", scheduler_s / elapsed_s)
            self.figures.add(
                f"share of a step for sampling and text, {batch}", 1 - (forward_s + scheduler_s) / elapsed_s
            )
        return num_tokens / elapsed_s

    def _finish(self, engine: Engine, sequences: list[Sequence]) -> None:
        """Step to the end; what was not as the figure's name says is no figure."""
        while engine.step() is not None:
            pass
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
            if sequence.costs.num_preemptions:
                raise NotAvailable("the memory is too small for all sequences at once")


def table(figures: Figures) -> str:
    """Markdown: each figure, then what is asked of their ratios."""
    lines = ["| figure | median (lowest … highest) |", "|---|---|"]
    for name, values in figures.rounds.items():
        scale, unit, digits = (100, " %", 1) if name.startswith("share") else (1, "", 1 if max(values) < 100 else 0)
        low, middle, high = (f"{scale * f(values):,.{digits}f}" for f in (min, statistics.median, max))
        lines.append(f"| {name} | {middle} ({low} … {high}){unit} |")
    lines += ["", "| ratio, median of the rounds' own | measured | asked |", "|---|---|---|"]
    shared, unshared = ("16 requests of 1,520 tokens, prefix " + name for name in ("shared", "unshared"))
    for name, above, below, asked in (
        ("32 requests to one, decode", "32 requests, decode, tok/s", "decode alone, tok/s", 4),
        (
            "32 requests to llama.cpp's, decode",
            "32 requests, decode, tok/s",
            "llama.cpp, 32 requests, decode, tok/s",
            3,
        ),
        (
            "32 requests to llama.cpp's, whole run",
            "32 requests, whole run, generated tok/s",
            "llama.cpp, 32 requests, whole run, generated tok/s",
            3,
        ),
        ("decode step, prefix unshared to shared", f"{unshared}: decode step, ms", f"{shared}: decode step, ms", 1.5),
        (
            "first token, cold to seen before",
            "first token of a 500-token prompt, cold, ms",
            "first token of a 500-token prompt, seen before, ms",
            20,
        ),
    ):
        ratio = figures.ratio(above, below)
        lines.append(f"| {name} | {'not measured' if ratio is None else f'{ratio:.2f}'} | ≥ {asked} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, and print what was measured, also after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where llama.cpp was built")
    parser.add_argument("--threads", type=int, default=min(2, available_threads()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="measurements with TEXT in their name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    args = parser.parse_args()

    bench = Bench(resolve(args.model), args.threads, LlamaCppRuns(args.peers.resolve(), args.threads))
    measurements: dict[str, Callable[[], None]] = {
        "decode alone": bench.decode_alone,
        "many requests": bench.many_requests,
        "many requests by llama.cpp": bench.peer_many_requests,
        "sharing": bench.sharing,
        "seen before": bench.seen_before,
    }
    chosen = {
        name: run for name, run in measurements.items() if not args.only or any(text in name for text in args.only)
    }
    missing: dict[str, str] = {}
    interrupted = False
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.rounds * len(chosen))
        try:
            for _ in range(args.rounds):
                for name, run in chosen.items():
                    progress.update(task, description=name)
                    if name not in missing:
                        try:
                            run()
                        except NotAvailable as reason:
                            missing[name] = str(reason)
                    progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    print(table(bench.figures))
    for name, why in missing.items():
        print(f"\nnot available: {name}: {why}")
    if args.json:
        settings = {
            "model": args.model,
            "threads": args.threads,
            "kvik": kvik.__version__,
            "machine": platform.platform(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(settings | {"rounds": bench.figures.rounds, "missing": missing}, indent=1))
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
