"""What Python costs a token where many streams share one engine: CPU time of a whole run, less the model's part.

python bench/async_streams.py [--streams 200] [--tokens 100] [--rounds 5]

The model is a stand-in whose arithmetic takes no time worth naming, so what is measured is scheduling, the batch,
sampling of the likeliest token, text, the accounts of the cache, and the way of each piece to the task that reads it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import AsyncLLM, SamplingParams
from kvik.cache import KVCacheSpec
from kvik.config import EngineConfig
from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.output import TokenLogprobs
from kvik.engine.runner import StepOutput
from kvik.engine.sampler import Sampled, SampleRow, make_sampler
from kvik.ops.native import NativeOps

VOCAB, CONTEXT, PROMPT = 32, 4096, 20
FloatArray = npt.NDArray[np.float32]


class StandInRunner:
    """Writes the same token for ever."""

    def __init__(self) -> None:
        self._sampler = make_sampler(NativeOps(threads=1))
        self._logits = np.zeros((4096, VOCAB), np.float32)
        self._logits[:, 1] = 1

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """One row for each token that is asked for."""
        return StepOutput(self._logits[: len(batch.arrays.logit_rows)], self._logits[:0])

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """The likeliest token."""
        return self._sampler.sample(logits, rows)

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Nobody asks for these."""
        raise AssertionError

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]], group: int) -> None:
        """There is no memory."""

    def discard_blocks(self, superblocks: SequenceOf[int], group: int) -> None:
        """There is no memory."""

    def read_blocks(self, block_ids: SequenceOf[int], group: int) -> bytes:
        """Of no memory."""
        return b""

    def write_blocks(self, block_ids: SequenceOf[int], data: bytes | memoryview, group: int) -> None:
        """There is no memory."""

    def step_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Of no weights."""
        return 0


class Letters:
    """A tokenizer: token i is the letter i."""

    add_space_prefix = False
    eos_token_ids = frozenset({VOCAB - 1})

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """One letter."""
        return bytes([ord("a") + token_id])


def make_engine(num_streams: int) -> Engine:
    """An engine that runs all streams at once."""
    spec = KVCacheSpec.uniform(1, num_kv_heads=1, head_dim=1, dtype="f32")
    decoder = SimpleNamespace(
        spec=SimpleNamespace(kv_spec=lambda dtype: spec, vocab_size=VOCAB, context_length=CONTEXT)
    )
    model: Any = SimpleNamespace(decoder=decoder, context=CONTEXT, tokenizer=Letters(), path=Path("stand-in"))
    config = EngineConfig(
        kv_memory=64 << 20, max_running=num_streams, token_budget=max(256, num_streams), max_waiting=4 * num_streams
    )
    return Engine(model, config, make_runner=lambda *_: StandInRunner())


async def run(num_streams: int, num_tokens: int) -> tuple[float, float]:
    """Microseconds of CPU a token: all of it, and the model's."""
    engine = make_engine(num_streams)
    run_s = 0.0

    def note(event: StepEvent) -> None:
        nonlocal run_s
        run_s += event.run_s

    engine.add_observer(note)
    llm: Any = SimpleNamespace(engine=engine, encode=lambda prompt: prompt)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)

    async def read(index: int) -> int:
        return sum([1 async for _ in served.stream([index % 7] * PROMPT, params, salt=f"{index}")])

    async with AsyncLLM(llm) as served:
        started_s = time.process_time()
        counts = await asyncio.gather(*(read(index) for index in range(num_streams)))
        elapsed_s = time.process_time() - started_s
    assert set(counts) == {num_tokens}
    count = num_streams * num_tokens
    return 1e6 * elapsed_s / count, 1e6 * run_s / count


def main() -> None:
    """Print the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("streams", 200), ("tokens", 100), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rounds = [asyncio.run(run(args.streams, args.tokens)) for _ in range(args.rounds)]
    each = [whole - model for whole, model in rounds]
    print(
        f"{args.streams} streams of {args.tokens} tokens: {statistics.median(each):.1f} µs of Python a token"
        f" ({min(each):.1f} … {max(each):.1f})"
    )


if __name__ == "__main__":
    main()
