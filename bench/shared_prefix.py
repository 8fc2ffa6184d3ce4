"""A decode step of sequences that begin alike: with the same blocks for what they share, and each with its own.

python bench/shared_prefix.py [MODEL] [--sequences 16] [--prefix 1500] [--kv-dtype f16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from kvik import LLM
from kvik.cache import BLOCK_SIZE
from kvik.ops.base import Batch
from kvik.ops.program import CapturedStep
from kvik_runs import IntArray, one_step, random_tokens

TOKENS = 24  # that each sequence has of its own at first


class Sharers:
    """Sequences with one prefix, and two block tables for them whose blocks hold the same."""

    def __init__(self, llm: LLM, num_sequences: int, num_prefix_tokens: int, num_steps: int) -> None:
        engine = llm.engine
        self.decoder, spec = engine.decoder, engine.kv_spec
        self.num_tokens = num_prefix_tokens + TOKENS
        whole = num_prefix_tokens // BLOCK_SIZE  # blocks that can be shared
        width = spec.num_blocks_for(self.num_tokens + num_steps)
        self.own = np.arange(num_sequences * width, dtype=np.int32).reshape(num_sequences, width)
        self.shared = self.own.copy()
        self.shared[:, :whole] = self.own[0, :whole]
        kv_cache = self.decoder.ops.allocate_kv(spec, self.own.size)
        self.forward = self.decoder.capture(kv_cache)
        prefix, rng = random_tokens(engine, num_prefix_tokens), np.random.default_rng(1)
        self._prefill(prefix, self.own[0], 0)
        last = range(whole * BLOCK_SIZE, num_prefix_tokens)  # the block that is not full is everybody's own
        copies = [(int(self.own[0, i]), int(table[i])) for table in self.own[1:] for i in range(whole)]
        self.decoder.ops.copy_blocks(kv_cache, copies)
        for table in self.own:
            own = rng.integers(0, engine.decoder.spec.vocab_size, TOKENS).tolist()
            self._prefill([prefix[i] for i in last] + own, table, whole * BLOCK_SIZE)

    def _prefill(self, tokens: list[int], table: IntArray, first: int) -> None:
        positions = np.arange(first, first + len(tokens), dtype=np.int32)
        self.forward(one_step(np.asarray(tokens, np.int32), positions, table[None]))

    def step(self, index: int, tables: IntArray) -> tuple[float, np.ndarray]:
        """Seconds, and the logits."""
        batch = self._batch(index, tables)
        started_s = time.perf_counter()
        logits = self.decoder.ops.to_numpy(self.forward(batch))
        return time.perf_counter() - started_s, logits

    def attention(self, index: int, tables: IntArray) -> tuple[float, float]:
        """Milliseconds of attention in one step, and megabytes that it has to read."""
        assert isinstance(self.forward, CapturedStep)
        ops = [op for op in self.forward.profile(self._batch(index, tables)) if op.name == "attend"]
        return 1e3 * sum(op.seconds for op in ops), 1e-6 * sum(op.bytes for op in ops)

    def _batch(self, index: int, tables: IntArray) -> Batch:
        tokens = np.random.default_rng(index).integers(0, self.decoder.spec.vocab_size, len(tables))
        return one_step(tokens.astype(np.int32), np.full(len(tables), self.num_tokens + index, np.int32), tables)


def main() -> None:
    """Print the medians of rounds that take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--kv-dtype", choices=("f32", "f16", "int8"), default="f16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    llm = LLM(given.model, kv_dtype=given.kv_dtype, threads=given.threads)
    sharers = Sharers(llm, given.sequences, given.prefix, given.steps)
    seconds: list[tuple[float, float]] = []
    for index in range(given.steps):
        (own_s, own), (shared_s, shared) = sharers.step(index, sharers.own), sharers.step(index, sharers.shared)
        np.testing.assert_array_equal(own.view(np.uint32), shared.view(np.uint32))
        seconds.append((own_s, shared_s))
    own_ms, shared_ms = (1e3 * statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(own_s / shared_s for own_s, shared_s in seconds)
    for name, ms, tables in (("own blocks", own_ms, sharers.own), ("shared blocks", shared_ms, sharers.shared)):
        profiles = [sharers.attention(given.steps - 1, tables) for _ in range(5)]
        attend_ms, megabytes = (statistics.median(column) for column in zip(*profiles, strict=True))
        print(f"{name:14} {ms:6.2f} ms a step, of that attention {attend_ms:6.2f} ms, which reads {megabytes:.0f} MB")
    print(f"a step is {ratio:.2f} times as fast (median of {given.steps} pairs), bit for bit the same")


if __name__ == "__main__":
    main()
