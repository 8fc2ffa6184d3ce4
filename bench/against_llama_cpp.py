"""kvik next to llama.cpp on the same files, machine and minutes: medians of interleaved rounds as a Markdown table.

bench/peers/build_llama_cpp.sh && python bench/against_llama_cpp.py [--only TEXT] [--against TEXT] [--rounds 5] ...
bench/peers/build_ik_llama_cpp.sh && python bench/against_llama_cpp.py --model FILE      ... the better of both forks

Any model but the default one, and that one with --bars, is measured in the few cases of bench/bars.py, next to
ik_llama.cpp too; bench/random_model.py makes files of the shapes for which bars are set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvik
from bars import bar_cases, context_of
from comparison import MEMORY, SECONDS, Case, Measure, Results, table
from kvik import _native
from kvik.config import ActivationDType
from kvik.hub.store import resolve
from kvik.machine import available_threads
from kvik_runs import KvikRuns
from llama_cpp_runs import FlashAttention, IkLlamaCppRuns, LlamaCppRuns

DEFAULT_MODEL = "smollm2"
COLD_PROMPT = "one two three four five six seven eight nine ten"  # ten tokens
BANDWIDTH_BYTES = 1 << 29


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


def named(measures: Mapping[str, Measure], texts: list[str]) -> dict[str, Measure]:
    """Those whose name contains one of the texts."""
    return {name: measure for name, measure in measures.items() if any(text in name for text in texts)}


def machine(threads: int, versions: str, results: Results) -> str:
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
        f" {versions}{bandwidth}; load average at the end {load:.1f}"
    )


def main() -> int:
    """Measure, and print the table of what was measured, also after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--bars", action="store_true", help="the cases of bench/bars.py, also of the default model")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where llama.cpp was built")
    parser.add_argument("--threads", type=int, default=min(2, available_threads()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--against", action="append", default=[], metavar="TEXT", help="peers whose name contains TEXT, such as 'fa on'"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    args = parser.parse_args()

    model = resolve(args.model)
    theirs, results = LlamaCppRuns(args.peers.resolve(), args.threads), Results()
    peers, versions = "llama.cpp", f"llama.cpp: {theirs.version}"
    if args.bars or args.model != DEFAULT_MODEL:
        ik = IkLlamaCppRuns(theirs.folder, args.threads)
        peers, versions = "the others", f"{versions}; ik_llama.cpp: {ik.version}"
        every = list(bar_cases(KvikRuns(args.threads, context=context_of(model)), theirs, ik, model))
    else:
        every = list(cases(KvikRuns(args.threads), theirs, model))
    chosen = [case for case in every if not args.only or any(text in case.name for text in args.only)]
    if not chosen:
        parser.error("no case has such a name; there are:\n" + "\n".join(case.name for case in every))
    if args.against:
        chosen = [replace(case, theirs=named(case.theirs, args.against)) for case in chosen]
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

    told = machine(args.threads, versions, results)
    print(
        f"{told}\n\nMedians of {len(results.bandwidth)} rounds (lowest … highest).\n\n{table(results, chosen, peers)}"
    )
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
