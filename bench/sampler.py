"""How long sampling takes for each row of logits: medians, the reference in NumPy against the native sampler.

python bench/sampler.py [MODEL] [--rows 32] [--rounds 30] [--threads 2] [--json FILE]

The logits are MODEL's own (SmolLM2's unless another is named) where it is on this machine, and seeded random ones:
peaked, as a language model's often are, or normal with a standard deviation of 3, where hundreds of tokens compete.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import LLM
from kvik.config import SamplingParams
from kvik.engine.sampler import NumpySampler, Sampler, SampleRow, make_sampler
from kvik.errors import KvikError
from kvik.hub.store import find
from kvik.ops.native import NativeOps

FloatArray = npt.NDArray[np.float32]

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "  top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "  top_k 40": {"temperature": 0.8, "top_k": 40},
    "  min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "  top_p 0.95, mask": {"temperature": 0.8, "top_p": 0.95},
    "temperature 5, top_p 0.95": {"temperature": 5.0, "top_p": 0.95},
    "greedy, penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "greedy, 5 logprobs": {"logprobs": 5},
}
HISTORY = 1000  # tokens before the one that is sampled


def all_logits(model: str, count: int) -> Iterator[tuple[str, FloatArray]]:
    """Rows of logits and what they are."""
    rng = np.random.default_rng(7)
    try:
        llm = LLM(str(find(model)), context=256)
    except KvikError as error:
        print(f"without the logits of {model}: {error}")
    else:
        engine = llm.engine
        prompt = engine.model.tokenizer.encode("Once upon a time, in a small town by the sea,")
        params = SamplingParams(max_tokens=count, temperature=0.8, ignore_eos=True)
        engine.add(engine.new_sequence(engine.new_request(prompt, params)))
        rows = [result.logits for result in iter(engine.step, None) if len(result.logits)]
        own = np.concatenate(rows)
        yield model, own
        # As a larger vocabulary would have it: the same tokens again, each time less likely by a factor of 50.
        larger = np.concatenate([own - np.float32(4 * again) for again in range(4)], axis=1)
        yield f"{model}, 151,936", np.ascontiguousarray(larger[:, :151_936])
    for vocab_size in (49_152, 151_936):
        normal = rng.normal(0, 3, (count, vocab_size)).astype(np.float32)
        peaked = normal.copy()
        for row in peaked:
            row[rng.integers(0, vocab_size, 12)] += rng.uniform(6, 14, 12).astype(np.float32)
        yield f"peaked, {vocab_size:,}", peaked
        yield f"normal, {vocab_size:,}", normal


def rows_of(case: str, logits: FloatArray) -> list[SampleRow]:
    """What the rows are sampled with."""
    rng = np.random.default_rng(8)
    count, vocab_size = logits.shape
    params = SamplingParams(**CASES[case])
    history = rng.integers(0, vocab_size, HISTORY).tolist()
    mask = rng.integers(0, 256, (vocab_size + 7) // 8, np.uint8).tobytes() if "mask" in case else None
    return [SampleRow(i, params, i, HISTORY, history, HISTORY // 2, mask=mask) for i in range(count)]


def microseconds(samplers: Sequence[Sampler], logits: FloatArray, case: str, rounds: int) -> list[float]:
    """The median of each sampler for one row; their rounds take turns."""
    rows = rows_of(case, logits)
    times: list[list[float]] = [[] for _ in samplers]
    chosen = [sampler.sample(logits, rows) for sampler in samplers]
    assert all(result == chosen[0] for result in chosen), "the samplers differ"
    for _ in range(rounds):
        for sampler, spent in zip(samplers, times, strict=True):
            if isinstance(sampler, NumpySampler) and len(spent) >= 3:
                continue  # it is slow, and slow in the same way each time
            started_s = time.perf_counter()
            sampler.sample(logits, rows)
            spent.append((time.perf_counter() - started_s) / len(rows) * 1e6)
    return [statistics.median(spent) for spent in times]


def argmax_microseconds(logits: FloatArray, rounds: int) -> float:
    """NumPy's argmax of all rows, which greedy sampling was before."""
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        logits.argmax(axis=1).tolist()
        times.append((time.perf_counter() - started_s) / len(logits) * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samplers = [NumpySampler(), *(make_sampler(NativeOps(threads=count)) for count in sorted({1, args.threads}))]
    found: dict[str, dict[str, list[float]]] = {}
    print(f"microseconds a row, medians; {args.rows} rows a call")
    for kind, logits in all_logits(args.model, args.rows):
        print(f"\n{kind:30}{'NumPy':>10}" + "".join(f"{n:>8} thr." for n in sorted({1, args.threads})))
        found[kind] = {}
        for case in CASES:
            found[kind][case] = times = microseconds(samplers, logits, case, args.rounds)
            print(f"{case:30}{times[0]:10,.1f}" + "".join(f"{each:13,.2f}" for each in times[1:]))
        print(f"{'(argmax of NumPy)':30}{argmax_microseconds(logits, args.rounds):10,.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
