"""How fast the prefix cache keeps its accounts, without a model: medians of rounds of 100,000 operations.

python bench/radix.py [--blocks 50000] [--operations 100000] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvik.cache import BLOCK_SIZE, CacheManager, KVCacheSpec

GOAL = 200_000  # block matches a second
NUM_SYSTEM_PROMPTS = 50
SYSTEM_BLOCKS = 20  # of each system prompt
MAX_TURNS, TURN_BLOCKS = 8, 6  # of a conversation behind it


class Traffic:
    """Conversations behind a few system prompts, the popular ones more often; each comes back a turn longer."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.systems = [self.tokens(SYSTEM_BLOCKS * BLOCK_SIZE) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.conversations: list[list[int]] = []

    def tokens(self, count: int) -> list[int]:
        """Random ids of a vocabulary of 49,152."""
        return self.random.choices(range(49_152), k=count)

    def prompt(self) -> list[int]:
        """A new conversation, or an old one with a turn more; three in four are old ones."""
        old = self.conversations
        if not old or self.random.random() < 0.25:
            system = self.systems[int(NUM_SYSTEM_PROMPTS * self.random.random() ** 2)]
            tokens = system + self.turn()
            old.append(tokens)
            return tokens
        index = len(old) - 1 - int(min(len(old), 2000) * self.random.random() ** 2)
        old[index] = tokens = old[index] + self.turn()
        if len(tokens) >= (SYSTEM_BLOCKS + MAX_TURNS * TURN_BLOCKS) * BLOCK_SIZE:
            del old[index]
        return tokens

    def turn(self) -> list[int]:
        """Question and answer."""
        return self.tokens(self.random.randint(1, 2 * TURN_BLOCKS * BLOCK_SIZE))


def filled(num_blocks: int, traffic: Traffic) -> CacheManager:
    """A cache of so many blocks, nearly all of them in the tree, and nobody holds them."""
    spec = KVCacheSpec.uniform(num_layers=30, num_kv_heads=3, head_dim=64, dtype="f16")
    cache = CacheManager(spec, spec.pool_size_for(num_blocks, 1, 1))
    while cache.stats.num_evicted_blocks == 0:
        serve(cache, traffic.prompt())
    return cache


def serve(cache: CacheManager, tokens: Sequence[int]) -> None:
    """All that a request asks of the accounts when its prompt is computed in one step."""
    table = cache.new_table()
    num_computed = cache.adopt(table, tokens, cache.match(tokens))
    copies = cache.reserve(table, len(tokens), num_computed)
    assert copies is not None
    cache.end_copies()
    cache.seal(table, tokens, len(tokens))
    cache.release(table)


def one_round(num_blocks: int, num_operations: int, seed: int) -> dict[str, float]:
    """A match alone, then a request, again and again until the count of operations is reached.

    An operation is a match, an insert of one block, an eviction of one block, or a release.
    """
    traffic = Traffic(seed)
    cache = filled(num_blocks, traffic)
    gc.collect()
    spent = {"match": 0.0, "serve": 0.0}
    blocks = {"match": 0, "serve": 0}
    done = num_matches = 0
    while done < num_operations:
        tokens = traffic.prompt()
        started_s = time.perf_counter()
        found = cache.match(tokens)
        spent["match"] += time.perf_counter() - started_s
        blocks["match"] += len(found.block_ids)
        num_matches += 1
        evicted, size = cache.stats.num_evicted_blocks, len(cache.tree)
        started_s = time.perf_counter()
        serve(cache, tokens)
        spent["serve"] += time.perf_counter() - started_s
        num_evicted = cache.stats.num_evicted_blocks - evicted
        num_inserted = len(cache.tree) - size + num_evicted
        blocks["serve"] += len(found.block_ids) + num_inserted + num_evicted
        done += 1 + 2 + num_inserted + num_evicted  # two matches and a release
    cache.check([])
    return {
        "block matches/s": blocks["match"] / spent["match"],
        "operations/s": done / (spent["match"] + spent["serve"]),
        "matches/s": num_matches / spent["match"],
        "blocks of a match": blocks["match"] / num_matches,
        "requests/s": num_matches / spent["serve"],
        "blocks in the tree": len(cache.tree),
    }


def tree_alone(num_blocks: int, num_matches: int, seed: int) -> float:
    """Block matches a second of the tree itself, tokens packed before: what comparing and walking cost."""
    traffic = Traffic(seed)
    cache = filled(num_blocks, traffic)
    namespace = cache.new_table().namespace
    packed = [array("i", traffic.prompt()).tobytes() for _ in range(num_matches)]
    started_s = time.perf_counter()
    found = [cache.tree.match(tokens, namespace) for tokens in packed]
    return sum(len(match.block_ids) for match in found) / (time.perf_counter() - started_s)


def main() -> None:
    """Print a table; the goal is named where it is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=50_000)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds = [one_round(args.blocks, args.operations, seed) for seed in range(args.rounds)]
    medians: dict[str, Any] = {name: statistics.median(round[name] for round in rounds) for name in rounds[0]}
    medians["block matches/s, tree alone"] = statistics.median(
        tree_alone(args.blocks, 2000, seed) for seed in range(args.rounds)
    )
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for name, value in medians.items():
        print(f"{name:30}{value:14,.0f}")
    if medians["block matches/s"] < GOAL:
        print(f"short of the goal, {GOAL:,} block matches a second")
    if args.json:
        args.json.write_text(json.dumps({"medians": medians, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
