"""kvik next to llama.cpp on the same files, machine and minutes: medians of interleaved rounds as a Markdown table.

bench/peers/build_llama_cpp.sh && python bench/against_llama_cpp.py [--only TEXT] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvik
from kvik import _native
from kvik.config import ActivationDType
from kvik.errors import KvikError
from kvik.hub.store import resolve
from kvik.machine import available_threads
from kvik_runs import KvikRuns, NotAvailable
from llama_cpp_runs import FlashAttention, LlamaCppRuns

COLD_PROMPT = "one two three four five six seven eight nine ten"  # ten tokens
BANDWIDTH_BYTES = 1 << 29
HOPELESS = 0.7  # a peer's variant slower than this share of its best is not run again: some take minutes

Measure = partial[float]


@dataclass(frozen=True)
class Unit:
    """How figures are written, and which of two is better."""

    name: str
    scale: float = 1.0
    more_is_better: bool = True
    digits: int = 0

    def show(self, value: float) -> str:
        """Without the unit's name."""
        return f"{value / self.scale:,.{self.digits}f}"


RATE = Unit("tok/s")
MEMORY = Unit("MB", 1e6, more_is_better=False)
SECONDS = Unit("s", more_is_better=False, digits=2)


@dataclass(frozen=True)
class Case:
    """One row: a measurement of ours, and those of theirs of which the best counts."""

    name: str
    ours: Measure
    theirs: Mapping[str, Measure]
    unit: Unit = RATE
    target: float = 1.0  # of the ratio: how many times better than the best of theirs
    step_bytes: Callable[[], float] | None = None  # bytes of memory that a step reads
    tokens_of_step: int = 1
    maximum: Callable[[], float] | None = None  # a target for our figure itself
    once: bool = False  # one round tells it


def cases(ours: KvikRuns, theirs: LlamaCppRuns, model: Path) -> Iterator[Case]:
    """All rows of the table."""
    flash: tuple[FlashAttention, ...] = ("on", "off")

    def prefill(count: int, of: Path = model) -> dict[str, Measure]:
        return {f"fa {on}": partial(theirs.prefill, of, count, on) for on in flash}

    def decode(count: int, depth: int = 0, of: Path = model) -> dict[str, Measure]:
        return {f"fa {on}": partial(theirs.decode, of, count, on, depth=depth) for on in flash}

    def ours_decode(
        name: str,
        count: int,
        depth: int,
        peers: Mapping[str, Measure],
        acts: ActivationDType = "int8",
        kv: str = "f16",
        *,
        target: float,
    ) -> Case:
        return Case(
            name,
            partial(ours.decode, model, count, depth=max(depth, 1), activations=acts, kv_dtype=kv),
            peers,
            target=target,
            step_bytes=partial(ours.step_bytes, model, depth + count / 2, 1, acts, kv),
        )

    yield ours_decode("decode 128 from empty", 128, 0, decode(128), target=2.6)
    yield ours_decode("decode 128 from empty, int16 activations", 128, 0, decode(128), "int16", target=2.2)
    for depth, target in ((2048, 3.0), (8000, 3.5)):
        yield ours_decode(f"decode 32 at {depth:,}, f16 KV", 32, depth, decode(32, depth), target=target)
    any_kv = decode(32, 8000) | {
        "q8_0 KV, fa on": partial(theirs.decode, model, 32, "on", depth=8000, kv_type="q8_0"),
    }
    yield ours_decode("decode 32 at 8,000, int8 KV", 32, 8000, any_kv, kv="int8", target=4.3)
    f16_kv = {"kvik, f16 KV": partial(ours.decode, model, 32, depth=8000)}
    yield ours_decode("decode 32 at 8,000, int8 KV, against kvik's f16 KV", 32, 8000, f16_kv, kv="int8", target=1.15)

    for count, target in ((512, 4.5), (2048, 4.0)):
        yield Case(f"prefill {count:,}", partial(ours.prefill, model, count), prefill(count), target=target)
    of_int16 = partial(ours.prefill, model, 512, "int16")
    yield Case("prefill 512, int16 activations", of_int16, prefill(512), target=2.5)

    for count in (8, 16, 32):
        yield Case(
            f"decode 64 after 128, {count} sequences",
            partial(ours.batched_decode, model, count, 128, 64),
            {f"fa {on}": partial(theirs.batched_decode, model, count, 128, 64, on) for on in flash},
            target=4.0,
            step_bytes=partial(ours.step_bytes, model, 128 + 32, count),
            tokens_of_step=count,
        )

    targets = {"Q4_0": (1.7, 2.2), "Q8_0": (1.5, 1.8), "F16": (1.2, 1.1), "Q4_K_M": (1.5, 2.0)}
    for kind, (decode_target, prefill_target) in targets.items():
        file = theirs.folder / "models" / f"{model.stem}.{kind}.gguf"
        yield Case(
            f"{kind}: decode 128 from empty",
            partial(with_file, theirs, model, kind, partial(ours.decode, file, 128)),
            decode(128, of=file),
            target=decode_target,
            step_bytes=partial(ours.step_bytes, file, 64),
        )
        yield Case(
            f"{kind}: prefill 512",
            partial(with_file, theirs, model, kind, partial(ours.prefill, file, 512)),
            prefill(512, file),
            target=prefill_target,
        )

    peers = {f"fa {on}": partial(theirs.peak_memory, model, on) for on in flash}
    memory = partial(ours.peak_memory, model)
    yield Case("peak memory, context of 8,192, f16 KV", memory, peers, MEMORY, once=True,
               maximum=partial(ours.memory_target, model))  # fmt: skip
    cold = {"llama-completion": partial(theirs.cold_start, model, COLD_PROMPT)}
    mine = partial(ours.cold_start, model, COLD_PROMPT)
    yield Case("cold start to first token", mine, cold, SECONDS, maximum=lambda: 0.7)


def with_file(theirs: LlamaCppRuns, model: Path, kind: str, measure: Callable[[], float]) -> float:
    """Measure with a file that llama-quantize makes first, if it is not there."""
    theirs.make_file(model, kind)
    return measure()


class Results:
    """Every figure of every round, by case and by whose it is."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}
        self.missing: dict[str, str] = {}  # case and whose, why there is no figure
        self.failed = False  # something that should have worked did not
        self.bandwidth: list[float] = []
        self._of_this_round: dict[Any, float] = {}  # several cases may compare with one measurement

    def start_round(self, bandwidth: float) -> None:
        """Nothing measured before counts as measured."""
        self._of_this_round.clear()
        self.bandwidth.append(bandwidth)

    def measure(self, case: Case, whose: str, measure: Measure) -> None:
        """Add one figure, or note why there is none."""
        key = f"{case.name}: {whose}"
        if key in self.missing:
            return
        try:
            what = (measure.func, measure.args, tuple(measure.keywords.items()))
            value = self._of_this_round[what] if what in self._of_this_round else measure()
            self._of_this_round[what] = value
            self.values.setdefault(case.name, {}).setdefault(whose, []).append(value)
        except NotAvailable as reason:
            self.missing[key] = str(reason).partition("\n")[0]
        except (RuntimeError, OSError, KvikError) as error:  # the other cases are worth their time still
            self.missing[key] = f"failed: {error}"
            self.failed = True

    def run(self, case: Case, round_number: int) -> None:
        """One round of one case: ours, then theirs."""
        if case.once and round_number > 0:
            return
        self.measure(case, "kvik", case.ours)
        if "kvik" not in self.values.get(case.name, {}):
            return
        for variant in case.theirs:
            if not self.is_hopeless(case, variant):
                self.measure(case, variant, case.theirs[variant])

    def median(self, case: Case, whose: str) -> float | None:
        """Of the rounds so far."""
        values = self.values.get(case.name, {}).get(whose)
        return statistics.median(values) if values else None

    def best(self, case: Case) -> str | None:
        """The variant of theirs with the best median."""
        medians = {variant: self.median(case, variant) for variant in case.theirs}
        known = {variant: value for variant, value in medians.items() if value is not None}
        pick = max if case.unit.more_is_better else min
        return pick(known, key=lambda variant: known[variant]) if known else None

    def is_hopeless(self, case: Case, variant: str) -> bool:
        """Whether a variant has been shown to be far behind."""
        best, mine = self.best(case), self.values.get(case.name, {}).get(variant)
        if best is None or not mine or not case.unit.more_is_better:
            return False
        top = self.median(case, best)
        return top is not None and max(mine) < HOPELESS * top


def table(results: Results, chosen: Sequence[Case]) -> str:
    """Markdown: median (lowest ... highest)."""
    bandwidth = statistics.median(results.bandwidth) if results.bandwidth else None
    lines = ["| case | kvik | llama.cpp, its best | ratio | target | of the bandwidth |", "|---|---|---|---|---|---|"]
    for case in chosen:
        ours, best = results.median(case, "kvik"), results.best(case)
        theirs = results.median(case, best) if best else None
        ratio = "-"
        if ours and theirs:
            ratio = f"{ours / theirs if case.unit.more_is_better else theirs / ours:.2f}"
        target = (
            f"≥ {case.target:g}" if case.maximum is None else f"≤ {case.unit.show(case.maximum())} {case.unit.name}"
        )
        share = "-"
        if bandwidth and ours and case.step_bytes:
            share = f"{ours * case.step_bytes() / case.tokens_of_step / bandwidth:.0%}"
        name = f"{case.name}, {case.unit.name}"
        mine, other = figure(results, case, "kvik"), figure(results, case, best)
        lines.append(f"| {name} | {mine} | {other} | {ratio} | {target} | {share} |")
    return "\n".join(lines)


def figure(results: Results, case: Case, whose: str | None) -> str:
    """A cell."""
    values = results.values.get(case.name, {}).get(whose, []) if whose else []
    if not values:
        return "not available" if whose == "kvik" else "not measured"
    low, middle, high = (case.unit.show(value) for value in (min(values), statistics.median(values), max(values)))
    spread = f" ({low} … {high})" if len(values) > 1 else ""
    return f"{middle}{spread}" + (f" [{whose}]" if whose != "kvik" else "")


def machine(threads: int, theirs: LlamaCppRuns, results: Results) -> str:
    """What the figures belong to."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    load = os.getloadavg()[0]
    bandwidth = ""
    if results.bandwidth:
        low, middle, high = (f(results.bandwidth) / 1e9 for f in (min, statistics.median, max))
        bandwidth = f"; memory read by {threads} threads: {middle:.1f} ({low:.1f} … {high:.1f}) GB/s"
    kvik_version = f"kvik {kvik.__version__}, {_native.compiler()}, kernels {_native.isa}"
    return (
        f"{names[0] if names else platform.machine()}, {threads} threads each; {kvik_version};"
        f" llama.cpp: {theirs.version}{bandwidth}; load average at the end {load:.1f}"
    )


def main() -> int:
    """Measure, and print the table of what was measured, also after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where llama.cpp was built")
    parser.add_argument("--threads", type=int, default=min(2, available_threads()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    args = parser.parse_args()

    model = resolve(args.model)
    ours, theirs, results = KvikRuns(args.threads), LlamaCppRuns(args.peers.resolve(), args.threads), Results()
    every = list(cases(ours, theirs, model))
    chosen = [case for case in every if not args.only or any(text in case.name for text in args.only)]
    if not chosen:
        parser.error("no case has such a name; there are:\n" + "\n".join(case.name for case in every))
    pool = _native.ThreadPool(args.threads)
    interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.rounds * len(chosen))
        try:
            for round_number in range(args.rounds):
                results.start_round(_native.read_bandwidth(pool, BANDWIDTH_BYTES))
                for case in chosen:
                    progress.update(task, description=f"round {round_number + 1}: {case.name}")
                    results.run(case, round_number)
                    progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True

    told = machine(args.threads, theirs, results)
    print(f"{told}\n\nMedians of {len(results.bandwidth)} rounds (lowest … highest).\n\n{table(results, chosen)}")
    for key, reason in results.missing.items():
        print(f"\nnot available: {key}: {reason}")
    if args.json:
        report = {"machine": told, "bandwidth": results.bandwidth, "values": results.values, "missing": results.missing}
        args.json.write_text(json.dumps(report, indent=1))
    if interrupted:
        print("interrupted: not all rounds were measured", file=sys.stderr)
    return 130 if interrupted else int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
