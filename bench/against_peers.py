"""kvik and its peers on the same file, prompts and threads, in turns: medians and ratios.

bench/peers/build.sh && python bench/against_peers.py [--rounds 3] [--only TEXT] [--markdown docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparison import MEMORY, RATE, SECONDS, Unit
from document import replace_part
from kvik import LLM, SamplingParams, _native
from kvik.hub.store import resolve
from kvik.machine import available_threads, processor_name
from kvik_runs import first_byte_s
from peer_process import NoFigure, PeerProcess

FOLDER = Path(__file__).parent / "peers"
VENVS = Path("build/peers/venvs")
MILLISECONDS = Unit("ms", 1e-3, more_is_better=False, digits=1)
TOKENS = Unit("tokens")
TIMEOUT_S = 240.0
TEXT = "The lighthouse stood on a rock in the sea. Every evening the keeper climbed the stairs, lit the lamp and"
OURS = "kvik"


@dataclass(frozen=True)
class Peer:
    """An engine and how its worker is started."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def process(self) -> PeerProcess:
        """A worker that is not started yet."""
        return PeerProcess(self.command, dict(self.environment))


@dataclass(frozen=True)
class Case:
    """One row: what is asked of a worker in a round, and the figure in its answer."""

    name: str
    unit: Unit
    measure: Callable[[Peer, PeerProcess, int], float]
    once: bool = False  # one round tells it
    has_ratio: bool = True


def peers(model: Path, threads: int) -> list[Peer]:
    """kvik first."""
    arguments = (str(model), str(threads))

    def of(name: str, worker: str, **environment: str) -> Peer:
        command = (str(VENVS / name / "bin/python"), str(FOLDER / worker), *arguments)
        return Peer(name, command, tuple(environment.items()))

    return [
        Peer(OURS, (sys.executable, str(FOLDER / "kvik_worker.py"), *arguments)),
        of("llama-cpp-python", "llama_cpp_python_worker.py"),
        of("openvino-genai", "openvino_worker.py"),
        of("transformers", "transformers_worker.py", PEER_DTYPE="bfloat16", OMP_NUM_THREADS=str(threads)),
    ]


def cases(model: Path) -> list[Case]:
    """All rows of the table."""

    def first_token(peer: Peer, process: PeerProcess, round_number: int) -> float:
        process.ask({"do": "first_token", "prompt": prompt(64, f"warm-up {round_number}")}, TIMEOUT_S)
        asked = {"do": "first_token", "prompt": prompt(512, f"prefill {round_number}")}
        return 512 / float(process.ask(asked, TIMEOUT_S)["seconds"])

    def repeated(peer: Peer, process: PeerProcess, round_number: int) -> float:
        asked = {"do": "repeated", "prompt": prompt(512, f"repeated {round_number}")}
        return float(process.ask(asked, TIMEOUT_S)["seconds"])

    def decode(
        depth: int, count: int, num_sequences: int, peer: Peer, process: PeerProcess, round_number: int
    ) -> float:
        # The same prompts in each round: what a peer still has of them is outside of the clock anyway.
        prompts = [prompt(depth, f"decode {index}") for index in range(num_sequences)]
        answer = process.ask({"do": "decode", "prompts": prompts, "count": count}, TIMEOUT_S)
        return num_sequences * count / float(answer["seconds"])

    def memory(peer: Peer, process: PeerProcess, round_number: int) -> float:
        fresh = peer.process()
        try:
            asked = {"do": "decode", "prompts": [prompt(2048, "memory")], "count": 64}
            return float(fresh.ask(asked, TIMEOUT_S)["peak_bytes"])
        finally:
            fresh.close()

    def agreement(peer: Peer, process: PeerProcess, round_number: int) -> float:
        # kvik's int16 activations write what transformers writes in float32: tests/oracle/test_greedy.py.
        llm = LLM(model, activations="int16", context=512)
        ids = llm.encode(TEXT)
        expected = llm.generate([ids], SamplingParams(max_tokens=32, ignore_eos=True))[0].token_ids
        tokens = process.ask({"do": "tokens", "prompt": ids, "count": 32}, TIMEOUT_S)["tokens"]
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, tokens, strict=False))
        return float(len(list(pairs)))

    def cold_start(peer: Peer, process: PeerProcess, round_number: int) -> float:
        if not Path(peer.command[0]).exists():
            raise NoFigure("is not built: bench/peers/build.sh does that")
        try:
            return first_byte_s(["env", *(f"{key}={text}" for key, text in peer.environment), *peer.command, "first"])
        except RuntimeError as error:
            raise NoFigure(str(error).splitlines()[-1][:200]) from None

    def decoding(name: str, depth: int, count: int, num_sequences: int = 1) -> Case:
        return Case(name, RATE, functools.partial(decode, depth, count, num_sequences))

    return [
        decoding("decode 64 behind 8 tokens", 8, 64),
        decoding("decode 32 behind 2,048 tokens", 2048, 32),
        decoding("decode 32 behind 8,000 tokens", 8000, 32),
        Case("prefill 512, new", RATE, first_token),
        decoding("decode 32 behind 128 tokens, 1 sequence", 128, 32),
        decoding("decode 32 behind 128 tokens, 8 sequences", 128, 32, 8),
        decoding("decode 32 behind 128 tokens, 32 sequences", 128, 32, 32),
        Case("first token of a repeated prompt of 512", MILLISECONDS, repeated),
        Case("peak memory, 2,048 + 64 tokens", MEMORY, memory, once=True),
        Case("start of the process to the first token of 10", SECONDS, cold_start),
        Case("greedy tokens behind a sentence that float32 writes too, of 32", TOKENS, agreement, True, False),
    ]


def prompt(length: int, seed: str) -> list[int]:
    """Token ids of no meaning; the same ones for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(length)]


class Results:
    """Every figure of every round, and why there is none."""

    def __init__(self, earlier: dict[str, Any] | None = None) -> None:
        self.values: dict[str, dict[str, list[float]]] = earlier["values"] if earlier else {}
        self.reasons: dict[str, dict[str, str]] = earlier["reasons"] if earlier else {}

    def forget(self, case: Case) -> None:
        """Measure it anew."""
        self.values.pop(case.name, None)
        self.reasons.pop(case.name, None)

    def run(self, case: Case, peer: Peer, process: PeerProcess, round_number: int) -> None:
        """One measurement; what failed once is not tried again."""
        if peer.name in self.reasons.setdefault(case.name, {}) or (case.once and round_number):
            return
        try:
            value = case.measure(peer, process, round_number)
        except NoFigure as reason:
            self.reasons[case.name][peer.name] = str(reason)
            return
        self.values.setdefault(case.name, {}).setdefault(peer.name, []).append(value)

    def cell(self, case: Case, name: str) -> str:
        """Median (lowest … highest), and how many times better kvik is."""
        values = self.values.get(case.name, {}).get(name)
        if not values:
            return self.reasons.get(case.name, {}).get(name, "not measured")
        middle = statistics.median(values)
        text = case.unit.show(middle)
        if len(values) > 1:
            text += f" ({case.unit.show(min(values))} … {case.unit.show(max(values))})"
        ours = self.values[case.name].get(OURS)
        if name != OURS and ours and case.has_ratio:
            mine = statistics.median(ours)
            text += f" · **{mine / middle if case.unit.more_is_better else middle / mine:.2g} ×**"  # noqa: RUF001
        return text


def table(results: Results, chosen: Sequence[Case], names: Sequence[str]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in chosen:
        cells = [results.cell(case, name) for name in names]
        lines.append(f"| {case.name}, {case.unit.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(model: Path, threads: int) -> str:
    """What the figures belong to."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model.name}, {threads} threads each, on {os.cpu_count()} processors of {processor_name()} with"
        f" {memory:.0f} GiB, {platform.system()} {platform.release().partition('-')[0]},"
        f" Python {platform.python_version()}, {_native.compiler()}, kvik's kernels {_native.isa}"
    )


def report(told: str, results: Results, chosen: Sequence[Case], running: dict[str, PeerProcess], rounds: int) -> str:
    """The machine, the table, and what each engine is."""
    lines = [
        f"{told}. Medians of the rounds (lowest … highest), {rounds} whole ones in the last run; bold: how many times"
        " kvik's figure is better."
    ]
    lines += ["", table(results, chosen, list(running)), ""]
    lines += [f"* {process.description}" for process in running.values()]
    return "\n".join(lines)


def save(
    args: argparse.Namespace,
    told: str,
    results: Results,
    shown: Sequence[Case],
    running: dict[str, PeerProcess],
    rounds: int,
) -> str:
    """Write what is known so far where it was asked for; the table."""
    text = report(told, results, shown, running, rounds)
    if args.markdown:
        replace_part(args.markdown, "peers", text)
    if args.json:
        content: dict[str, Any] = {"machine": told, "values": results.values, "reasons": results.reasons}
        content["engines"] = {name: one.description for name, one in running.items()}
        args.json.write_text(json.dumps(content, indent=1))
    return text


def main() -> int:
    """Measure round by round; the table of what was measured is there after Ctrl-C too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=min(2, available_threads()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round")
    parser.add_argument("--onto", type=Path, metavar="FILE", help="such a file: keep its figures of all other cases")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into this document's part")
    args = parser.parse_args()
    model = resolve(args.model)
    every = cases(model)
    chosen = [case for case in every if not args.only or any(text in case.name for text in args.only)]
    if not chosen:
        parser.error("no case has such a name; there are:\n" + "\n".join(case.name for case in every))
    engines = peers(model, args.threads)
    running = {peer.name: peer.process() for peer in engines}
    earlier = json.loads(args.onto.read_text()) if args.onto else None
    if earlier and earlier["machine"] != machine(model, args.threads):
        parser.error(f"{args.onto} is of another machine: {earlier['machine']}")
    results, rounds, interrupted = Results(earlier), 0, False
    told, shown = machine(model, args.threads), every if earlier else chosen
    for case in chosen:
        results.forget(case)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.rounds * len(chosen) * len(engines))
        try:
            for round_number in range(args.rounds):
                for case in chosen:
                    for peer in engines:
                        progress.update(task, description=f"round {round_number + 1}: {case.name}: {peer.name}")
                        results.run(case, peer, running[peer.name], round_number)
                        progress.advance(task)
                rounds += 1
                save(args, told, results, shown, running, rounds)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for process in running.values():
                process.close()
    print(save(args, told, results, shown, running, rounds))
    if interrupted:
        print("interrupted: not all rounds were measured", file=sys.stderr)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
