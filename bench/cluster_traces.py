"""Requests over time, as routing sees them: published traces, and a generated tree of agents."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

BLOCK_TOKENS = 512  # that a name of Mooncake's traces stands for


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """When it comes, the names of its prompt's whole blocks, and its lengths in tokens."""

    at_s: float
    names: Sequence[int]
    num_prompt_tokens: int
    num_completion_tokens: int


def mooncake(path: Path) -> list[TracedRequest]:
    """A trace of Mooncake's: lines of JSON, whose hashes are chained, the last one's block not always whole."""
    found = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            length = fields["input_length"]
            names = fields["hash_ids"][: length // BLOCK_TOKENS]
            found.append(TracedRequest(fields["timestamp"] / 1000, names, length, fields["output_length"]))
    return sorted(found, key=lambda request: request.at_s)


def azure(path: Path) -> list[TracedRequest]:
    """A trace of Azure's, of times and lengths alone: no two prompts begin alike."""
    found = []
    unused = iter(range(1 << 40))
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            time = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            length = int(row["ContextTokens"])
            names = [next(unused) for _ in range(length // BLOCK_TOKENS)]
            found.append(TracedRequest(time, names, length, int(row["GeneratedTokens"])))
    start_s = min(request.at_s for request in found)
    moved = [
        TracedRequest(each.at_s - start_s, each.names, each.num_prompt_tokens, each.num_completion_tokens)
        for each in found
    ]
    return sorted(moved, key=lambda request: request.at_s)


def agents(seed: int = 1, num_tasks: int = 400, seconds: float = 3600.0) -> list[TracedRequest]:
    """A tree of agents for each task: turns that add to what came before, some of which hand it on to several others.

    All tasks begin with one of a few system prompts with tools, the popular ones more often.
    """
    chance = random.Random(seed)
    unused = iter(range(1 << 40))

    def new(num_blocks: int) -> list[int]:
        return [next(unused) for _ in range(num_blocks)]

    systems = [new(chance.randint(6, 16)) for _ in range(8)]

    def turns(at_s: float, path: list[int], depth: int) -> Iterator[TracedRequest]:
        for _ in range(chance.randint(3, 10)):
            path = path + new(chance.randint(1, 4))  # what the user or a tool said, and the answer before it
            num_written = chance.randint(50, 400)
            yield TracedRequest(at_s, path, len(path) * BLOCK_TOKENS + chance.randrange(BLOCK_TOKENS), num_written)
            if depth < 2 and chance.random() < 0.2:
                for _ in range(chance.randint(2, 4)):
                    yield from turns(at_s + chance.uniform(5, 10), path, depth + 1)
            at_s += num_written * 0.02 + chance.uniform(1, 20)

    found: list[TracedRequest] = []
    for _ in range(num_tasks):
        system = systems[int(len(systems) * chance.random() ** 2)]
        found += turns(chance.uniform(0, seconds), list(system), 0)
    return sorted(found, key=lambda request: request.at_s)
