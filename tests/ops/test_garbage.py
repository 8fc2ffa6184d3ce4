"""Garbage into every function of the native module: an exception or a result, never a crash.

What "outside an array" means is seen best under ASan (`make sanitize`), which runs this file too. Everything that the
module offers must have a maker of arguments here: a new binding without one fails the first test.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvik import _native
from looped import looped
from ops import one_op
from ops.garbage import (
    ARENA,
    BLOCKS,
    CALLS,
    GOOD_SAMPLE,
    GOOD_STEP,
    HEAD_DIM,
    KV_HEADS,
    NORM,
    NOT_MADE_OUTSIDE,
    ODDITIES,
    POOL,
)
from ops.test_bad_arguments import GOOD
from tiers import run_seed

pytestmark = pytest.mark.sanitize

NUM_CALLS = 1500  # of random combinations for each function
SEED = run_seed("garbage")
REFUSALS = (TypeError, ValueError, IndexError, MemoryError, OverflowError)


def offered() -> Iterator[str]:
    """All that can be called: functions, constructors, methods. Properties take no arguments."""
    for name, value in vars(_native).items():
        if inspect.isclass(value):
            yield name
            for method, member in vars(value).items():
                if callable(member) and not method.startswith("__"):
                    yield f"{name}.{method}"
        elif callable(value):
            yield name


def test_everything_that_the_module_offers_has_a_case() -> None:
    assert set(offered()) == CALLS.keys() | NOT_MADE_OUTSIDE


def call(name: str, arguments: dict[str, Any]) -> bool:
    """Whether it was accepted."""
    try:
        CALLS[name][0](**arguments)
    except REFUSALS:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name][1]])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_random_combinations(name: str) -> None:
    """Seeded: what fails under one seed fails again under it."""
    seed = f"{SEED} {name}"
    print(f"seed {seed!r}")  # noqa: T201  # a crash leaves no other trace
    chance = random.Random(seed)
    makers = CALLS[name][1]
    num_accepted = 0
    for _ in range(NUM_CALLS):
        # Calls that fit but for an argument or two go further than those of which nothing fits.
        share = chance.choice((0.1, 0.3, 1.0))
        good = GOOD[name][1] if name in GOOD else GOOD_SAMPLE if name == "Sampler.sample" else GOOD_STEP
        arguments = {
            key: good[key]() if key in good and chance.random() > share else make(chance)
            for key, make in makers.items()
        }
        if chance.random() < 0.05:
            arguments[chance.choice(list(makers))] = chance.choice(ODDITIES)
        elif chance.random() < 0.2:  # the same memory twice
            arrays = [key for key, value in arguments.items() if isinstance(value, np.ndarray)]
            if len(arrays) > 1:
                left, right = chance.sample(arrays, 2)
                arguments[left] = arguments[right]
        num_accepted += call(name, arguments)
    # Makers that no call gets past would test the first check alone.
    assert num_accepted > 0 or name in {"integer_throughput", "float_throughput"}


@looped("name", CALLS)
def test_the_wrong_number_of_arguments(name: str) -> None:
    function = CALLS[name][0]
    for count in (len(CALLS[name][1]) + 1, max(0, len(CALLS[name][1]) - 1)):
        if count == len(CALLS[name][1]):
            continue
        with pytest.raises(TypeError):
            function(*[None] * count)
    with pytest.raises(TypeError):
        function(no_such_argument=1)


def test_no_tokens_at_all() -> None:
    """Arrays of no elements have no memory."""
    none, ids = np.zeros((0, 64), np.float32), np.zeros(0, np.int32)
    one_op.norm(POOL, none, NORM, none)
    one_op.activate(POOL, "relu", none, none, none)
    one_op.soft_cap(POOL, none, 30.0, none)
    one_op.xielu(POOL, none, 0.8, 0.9, 0.5, -1e-6, none)
    one_op.scale_by_position(POOL, none, ids, np.ones(1, np.float32), none)
    one_op.rope(POOL, none, ids, np.zeros((1, 8, 2), np.float32), 0, HEAD_DIM, none)
    one_op.project(POOL, none, [], [], False)
    kv = _native.KVArrays(1, BLOCKS, KV_HEADS, HEAD_DIM, "f16", "f16").layer(0)
    few = np.zeros((0, KV_HEADS * HEAD_DIM), np.float32)
    one_op.write_kv(POOL, kv, few, few, ids)
    one_op.attend(POOL, none, kv, np.zeros((0, 0), np.int32), ids, ids, ids, 1.0, 0.0, none)


def test_what_garbage_found_stays_refused() -> None:
    """No query heads, outputs that lie over indices which were checked, the last position of all."""
    table, layer_kv = np.zeros((1, 1), np.int32), _native.KVArrays(1, BLOCKS, 1, 8, "f16", "f16").layer(0)
    ids = np.zeros(1, np.int32)
    none = np.zeros((1, 0), np.float32)
    with pytest.raises(ValueError, match="input's width"):
        one_op.attend(POOL, none, layer_kv, table, ids, ids, ids + np.int32(1), 1.0, 0.0, none)
    memory = np.zeros(8, np.int32)
    over = memory.view(np.float32).reshape(1, 8)
    x = np.full((1, 8), 1e30, np.float32)
    one_op.rope(POOL, x, memory[:1], np.ones((4, 4, 2), np.float32), 0, 8, over)
    rows = np.zeros(64, np.int32)
    weights = np.full((2, 32), 1e30, np.float32).view(np.uint8).reshape(-1)
    packed = _native.pack("F32", weights, 2, 32, ARENA, POOL)
    one_op.embed_rows(packed, rows[:2], 1.0, rows.view(np.float32).reshape(2, 32))
    far = np.array([2**31 - 1], np.int32)
    q = np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match="not below its bound"):
        one_op.attend(POOL, q, layer_kv, np.zeros((1, 1 << 26), np.int32), ids, far, far, 1.0, 0.0, q.copy())
