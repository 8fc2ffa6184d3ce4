"""Tokens per second of prefill and decode on this machine: medians of several rounds.

python bench/speed.py [--model smollm2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np

from kvik import LLM, SamplingParams
from kvik.engine.engine import Engine

PROMPT_TOKENS = 512
NEW_TOKENS = 128


def prompt(engine: Engine, num_tokens: int) -> list[int]:
    """Random tokens: the arithmetic does not depend on which."""
    rng = np.random.default_rng(0)
    return [int(token_id) for token_id in rng.integers(0, engine.decoder.spec.vocab_size, num_tokens)]


def tokens_per_s(engine: Engine, num_prompt_tokens: int, max_tokens: int) -> float:
    """Prefill alone where one token is asked for, else decode after the first token."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    sequence = engine.new_sequence(prompt(engine, num_prompt_tokens), params)
    engine.add(sequence)
    started_s = time.perf_counter()
    while sequence.num_completion_tokens == 0:
        engine.step()
    prefill_s = time.perf_counter() - started_s
    while sequence.finish_reason is None:
        engine.step()
    decode_s = time.perf_counter() - started_s - prefill_s
    engine.release(sequence)
    return num_prompt_tokens / prefill_s if max_tokens == 1 else (max_tokens - 1) / decode_s


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    from kvik import _native

    engines = {kind: LLM(args.model, activations=kind).engine for kind in ("int8", "int16")}
    cases = {
        f"prefill, {PROMPT_TOKENS} tokens": (PROMPT_TOKENS, 1),
        f"decode, {NEW_TOKENS} tokens from empty": (1, NEW_TOKENS),
        f"decode, {NEW_TOKENS} tokens at depth 2048": (2048, NEW_TOKENS),
    }
    rates: dict[tuple[str, str], list[float]] = {(case, kind): [] for case in cases for kind in engines}
    for _ in range(args.rounds):  # all cases in each round, so that a slow spell of the machine hits them alike
        for case, (num_prompt_tokens, max_tokens) in cases.items():
            for kind, engine in engines.items():
                rates[case, kind].append(tokens_per_s(engine, num_prompt_tokens, max_tokens))

    print(f"{args.model} on {platform.machine()}, kernels {_native.isa}; tokens/s, median (lowest ... highest)")
    for case in cases:
        for kind in engines:
            values = rates[case, kind]
            low, median, high = min(values), statistics.median(values), max(values)
            print(f"{case:36} {kind:6} {median:7.0f} ({low:.0f} ... {high:.0f})")


if __name__ == "__main__":
    main()
