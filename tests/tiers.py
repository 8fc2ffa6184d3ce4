"""What a tier of the tests runs: how many simulations and examples, which formats, which seeds.

    KVIK_TIER            tiny, test (where it is not set), all or nightly
    KVIK_RANDOM_SEEDS=1  random seeds instead of fixed ones; nightly sets it
    KVIK_SEED=n          the run's seed, which a failing run printed
    KVIK_ONE_FORMAT=1    one weight format a kernel: under sanitizers, where only shapes matter

Markers choose the tests (pyproject.toml), these variables their size. docs/testing.md has the whole picture.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import pytest
from gguf import GGMLQuantizationType as Type

from gguf_files import WEIGHT_TYPES

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

TIER = os.environ.get("KVIK_TIER", "test")
NUM_SIMULATIONS = {"tiny": 100, "test": 300, "all": 2000, "nightly": 20_000}
NUM_EXAMPLES = {"tiny": 10, "test": 25, "all": 100, "nightly": 1000}  # of Hypothesis, where a test names no number
if TIER not in NUM_SIMULATIONS:
    raise pytest.UsageError(f"KVIK_TIER={TIER} is not one of: {', '.join(NUM_SIMULATIONS)}")

RANDOM_SEEDS = os.environ.get("KVIK_RANDOM_SEEDS") == "1"
SIMULATIONS_A_TEST = 50

# A format for each kind of tile of native/linear.inl and for each way to keep scales: 4 bits from below zero and with
# minima, 4 + 1 and 4 + 2 bits, 8 bits, 2 bits, codes of a table, float16 and float32.
ONE_FORMAT_A_KERNEL = (
    *(Type.F32, Type.F16, Type.Q4_0, Type.Q4_K, Type.Q5_0, Type.Q8_0),
    *(Type.Q2_K, Type.Q3_K, Type.Q6_K, Type.IQ4_XS, Type.MXFP4),
)
TESTED_TYPES = ONE_FORMAT_A_KERNEL if os.environ.get("KVIK_ONE_FORMAT") == "1" else WEIGHT_TYPES


def run_seed(name: str) -> int:
    """The seed of one test, from its name and the run's seed."""
    return zlib.crc32(f"{os.environ.get('KVIK_SEED', '0')} {name}".encode())


def num_simulations() -> int:
    """How many random workloads run on the simulated model."""
    return int(os.environ.get("KVIK_SIMULATIONS", NUM_SIMULATIONS[TIER]))


def simulation_groups() -> list[ParameterSet]:
    """Their seeds, in groups that workers share out; each group has the marker of the first tier that runs it.

    KVIK_SIMULATION_SEED=n is that one alone. Nightly ones begin at a random seed.
    """
    if "KVIK_SIMULATION_SEED" in os.environ:
        seed = int(os.environ["KVIK_SIMULATION_SEED"])
        return [pytest.param(range(seed, seed + 1), id=str(seed))]
    first = run_seed("simulations") if RANDOM_SEEDS else 0
    groups = []
    for start in range(0, num_simulations(), SIMULATIONS_A_TEST):
        group = range(first + start, first + min(start + SIMULATIONS_A_TEST, num_simulations()))
        marks = (pytest.mark.nightly,) if RANDOM_SEEDS else _first_tier(start)
        groups.append(pytest.param(group, id=f"{group.start}-{group.stop - 1}", marks=marks))
    return groups


def _first_tier(start: int) -> tuple[pytest.MarkDecorator, ...]:
    if start < NUM_SIMULATIONS["tiny"]:
        return (pytest.mark.tiny,)
    return () if start < NUM_SIMULATIONS["test"] else (pytest.mark.full,)


def examples(full: int) -> int:
    """How many examples Hypothesis draws of a test to which `full` of them are enough before a merge."""
    return {"all": full, "nightly": 10 * full}.get(TIER, min(full, NUM_EXAMPLES[TIER]))
