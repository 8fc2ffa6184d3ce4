"""Routing policies on published traces and a generated tree of agents, simulated; and how long a decision takes.

python bench/routing.py [--traces DIR] [--only NAME]

`--traces` has what https://github.com/kvcache-ai/Mooncake (FAST25-release/traces, as mooncake/) and
https://github.com/Azure/AzurePublicDataset (the LLM inference traces of 2023, as azure/) publish.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster_simulation import PREFILL_TOKENS_S, Outcome, Setup, simulate, speed_for
from cluster_traces import TracedRequest, agents, azure, mooncake
from kvik.cluster import Cost, Hash, LeastLoaded, Policy, RoundRobin, RoutedRequest, Router

LOADS = (0.3, 0.6, 0.9)
STORE_CACHES = 16  # a shared store is as large as so many caches

CONTENDERS: dict[str, tuple[Callable[[], Policy], bool]] = {  # and whether replicas tell what they hold
    "round robin": (RoundRobin, True),
    "least loaded": (LeastLoaded, True),
    "hash": (Hash, True),
    "cost, guessed": (Cost, False),
    "cost, exact": (Cost, True),
}

NUM_REPLICAS, NUM_BLOCKS, PROMPT_BLOCKS = 64, 1_000_000, 256  # of the timed decisions


@dataclass(frozen=True, slots=True)
class Source:
    """A trace, and the caches that it is tried with."""

    title: str
    file: str | None
    read: Callable[[Path], list[TracedRequest]]
    cache_blocks: Sequence[int]  # of each replica
    has_store: bool = True


SOURCES = {
    "conversation": Source("Mooncake, conversation", "mooncake/conversation_trace.jsonl", mooncake, (500, 2000)),
    "synthetic": Source("Mooncake, synthetic", "mooncake/synthetic_trace.jsonl", mooncake, (500, 2000)),
    "agents": Source("Generated tree of agents", None, lambda path: agents(num_tasks=100), (50, 500)),
    "azure-conv": Source(
        "Azure, conversation (no prefixes)", "azure/AzureLLMInferenceTrace_conv.csv", azure, (500,), False
    ),
    "azure-code": Source("Azure, code (no prefixes)", "azure/AzureLLMInferenceTrace_code.csv", azure, (500,), False),
}


def rows(source: Source, trace: Sequence[TracedRequest]) -> Iterator[tuple[str, list[Outcome]]]:
    """Each setup in words, and what each contender makes of it."""
    for cache_blocks in source.cache_blocks:
        for store_blocks in (0, STORE_CACHES * cache_blocks) if source.has_store else (0,):
            for load in LOADS:
                speed = speed_for(trace, load, Setup().num_replicas)
                setup = Setup(cache_blocks=cache_blocks, store_blocks=store_blocks, speed=speed)
                outcomes = [
                    simulate(trace, policy(), replace(setup, is_exact=is_exact))
                    for policy, is_exact in CONTENDERS.values()
                ]
                yield f"{load:g} | {cache_blocks:,} | {'yes' if store_blocks else 'no'}", outcomes


def table(source: Source, trace: Sequence[TracedRequest]) -> str:
    """A trace's table, the best mean of each row in bold."""
    lines = [
        f"**{source.title}**, {len(trace):,} requests:",
        "",
        f"| load | cache | store | {' | '.join(CONTENDERS)} |",
        f"|---|---|---|{'---|' * len(CONTENDERS)}",
    ]
    for told, outcomes in rows(source, trace):
        best_s = min(outcome.mean_s for outcome in outcomes)
        cells = [_cell(outcome, outcome.mean_s < best_s * 1.005) for outcome in outcomes]
        lines.append(f"| {told} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def _cell(outcome: Outcome, is_best: bool) -> str:
    mean = f"{outcome.mean_s:.2f}"
    return (
        f"{f'**{mean}**' if is_best else mean} ({outcome.median_s:.2f}, {outcome.p99_s:.1f}), {outcome.hit_share:.0%}"
    )


def decision_times(num_rounds: int = 2000) -> dict[str, float]:
    """Microseconds of processor time to choose, median and 99th percentile, and to note what was sent, median."""
    chance = random.Random(1)
    router = Router(Cost())
    for index in range(NUM_REPLICAS):
        router.add(f"replica-{index}", prefill_tokens_s=1000.0, max_guessed=NUM_BLOCKS)
    unused = iter(range(1 << 40))
    beginnings: list[list[int]] = []
    while len(router.contents) < NUM_BLOCKS:
        old = chance.choice(beginnings) if beginnings and chance.random() < 0.5 else []
        names = [*old[: PROMPT_BLOCKS // 2], *(next(unused) for _ in range(PROMPT_BLOCKS // 2))]
        beginnings.append(names)
        replica = chance.choice(router.replicas)
        router.contents.sent(replica.slot, names)
    choosing_us, noting_us = [], []
    for _ in range(num_rounds):
        old = chance.choice(beginnings)
        names = [*old[: chance.randint(0, len(old))], *(next(unused) for _ in range(PROMPT_BLOCKS))][:PROMPT_BLOCKS]
        request = RoutedRequest(names, PROMPT_BLOCKS * 32 + 1, 32)
        started_s = time.thread_time()
        chosen = router.choose(request)
        chosen_s = time.thread_time()
        assert chosen is not None
        ticket = router.send(request, chosen, 0.0)
        sent_s = time.thread_time()
        ticket.end()
        choosing_us.append((chosen_s - started_s) * 1e6)
        noting_us.append((sent_s - chosen_s) * 1e6)
    choosing_us.sort()
    noting_us.sort()
    return {
        "choose, median": choosing_us[len(choosing_us) // 2],
        "choose, 99th percentile": choosing_us[len(choosing_us) * 99 // 100],
        "note what was sent, median": noting_us[len(noting_us) // 2],
    }


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="the folder of the traces")
    parser.add_argument("--only", action="append", choices=[*SOURCES, "decisions"], help="this one; may be repeated")
    args = parser.parse_args()
    parts = []
    for name, source in SOURCES.items():
        if name not in (args.only or SOURCES):
            continue
        path = Path() if source.file is None else args.traces / source.file
        if not path.exists():
            print(f"{path} is not there (hint: --traces DIR; --only agents needs none)", file=sys.stderr)
            return 2
        parts.append(table(source, source.read(path)))
    if "decisions" in (args.only or ["decisions"]):
        told = "; ".join(f"{name} {us:.0f} µs" for name, us in decision_times().items())
        parts.append(
            f"A decision among {NUM_REPLICAS} replicas that hold {NUM_BLOCKS:,} blocks, for a prompt of"
            f" {PROMPT_BLOCKS} blocks, processor time: {told}."
        )
    legend = (
        f"Seconds to the first token: mean (median, 99th percentile), and the share of prompt tokens that were not"
        f" computed. {Setup().num_replicas} replicas of {PREFILL_TOKENS_S:,.0f} tokens a second. *Load*: computing all"
        " prompt tokens would keep the replicas busy to this share. *Cache*: blocks of 512 tokens of each replica."
        f" *Store*: as large as {STORE_CACHES} of these caches, and 10 times as fast as computing."
    )
    print("\n\n".join([legend, *parts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
