"""The thread pool: any number of threads, several pools, several callers, a fork, and rest when there is no work."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from kvik import _native
from kvik.ops.base import Norm
from kvik.ops.native import NativeOps
from ops.arrangement import FloatArray, Heads, random_history, random_weights
from ops.digest import digest

pytestmark = pytest.mark.sanitize

SEED = 30


def work(ops: NativeOps) -> list[FloatArray]:
    """Ops that share their work each in their own way: by rows of the weight, by tokens, by tasks."""
    rng = np.random.default_rng(SEED)
    weights = [random_weights(GGMLQuantizationType.Q4_1, rows, 64, rng).linear(ops) for rows in (200, 33)]
    x = rng.normal(0, 1, (70, 64)).astype(np.float32)
    history = random_history(Heads(4, 2, 16), [300], rng)
    kv = history.allocate(ops, "f16")
    history.write(ops, kv, history.everything)
    return [
        *ops.project(x, weights),
        ops.norm(x, Norm(x[0], 1e-5)),
        ops.activate(x, "silu", x),
        history.attend(ops, kv, [(0, 0, 40), (0, 299, 300)]),
        history.attend(ops, kv, [(0, 299, 300)]),
    ]


def assert_equal(results: list[FloatArray], wanted: list[FloatArray]) -> None:
    for result, other in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_results(threads: int) -> None:
    assert digest(threads) == digest(1)
    assert_equal(work(NativeOps(threads=threads)), work(NativeOps(threads=1)))


def test_more_threads_than_work() -> None:
    ops, alone = NativeOps(threads=8), NativeOps(threads=1)
    weight = random_weights(GGMLQuantizationType.Q8_0, 3, 32, np.random.default_rng(SEED)).linear(ops)
    x = np.random.default_rng(SEED).normal(0, 1, (1, 32)).astype(np.float32)
    np.testing.assert_array_equal(ops.linear(x, weight), alone.linear(x, weight))


@pytest.mark.parametrize("num_threads", [1, 0, -3])
def test_a_pool_has_one_thread_at_least(num_threads: int) -> None:
    assert _native.ThreadPool(num_threads).num_threads == 1


def test_pools_come_and_go() -> None:
    """Used or not, a pool that is dropped takes its threads with it."""
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0  # noqa: PTH208, PTH112
    wanted = work(NativeOps(threads=1))
    for _ in range(20):
        NativeOps(threads=4)
        assert_equal(work(NativeOps(threads=3)), wanted)
    if before:
        assert len(os.listdir("/proc/self/task")) <= before  # noqa: PTH208


def in_python_threads(jobs: list[Callable[[], None]]) -> None:
    """Run all at the same time and raise what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            barrier.wait(60)
            job()
        except BaseException as error:  # noqa: BLE001  # carried to the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False])
def test_two_python_threads_at_once(shared: bool) -> None:
    """Each with its own pool, or both with one that runs a job at a time."""
    wanted = work(NativeOps(threads=1))
    first = NativeOps(threads=2)
    pools = [first, first if shared else NativeOps(threads=3)]

    def repeat(ops: NativeOps) -> None:
        for _ in range(15):
            assert_equal(work(ops), wanted)

    in_python_threads([lambda ops=ops: repeat(ops) for ops in pools])  # type: ignore[misc]


def exit_status_of_child(job: Callable[[], bool]) -> int:
    """Fork; the child's status is 0 where `job` says True. A child that hangs is ended by its alarm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if job() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("used_before", [True, False])
def test_a_forked_child_computes_with_threads_of_its_own(used_before: bool) -> None:
    ops = NativeOps(threads=3)
    wanted = work(NativeOps(threads=1))
    if used_before:
        work(ops)

    def job() -> bool:
        return all(np.array_equal(result, other) for result, other in zip(work(ops), wanted, strict=True))

    assert exit_status_of_child(job) == 0
    assert_equal(work(ops), wanted)  # and the parent goes on
    assert exit_status_of_child(job) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_may_drop_the_pool() -> None:
    pools = [NativeOps(threads=3)]
    work(pools[0])

    def job() -> bool:
        pools.clear()
        return True

    assert exit_status_of_child(job) == 0


def test_an_idle_pool_uses_no_processor() -> None:
    pools = [NativeOps(threads=3) for _ in range(3)]
    for ops in pools:
        work(ops)
    started = time.process_time()  # of all threads
    time.sleep(1.0)
    assert time.process_time() - started < 0.01


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not show its threads")  # noqa: PTH110
def test_workers_take_no_signals() -> None:
    """Ctrl-C is the main thread's: a worker that took it would leave input() or a blocking read asleep."""

    def blocked(task: str) -> int:
        with open(f"/proc/self/task/{task}/status") as status:  # noqa: PTH123
            return int(next(line for line in status if line.startswith("SigBlk:")).split()[1], 16)

    before = set(os.listdir("/proc/self/task"))  # noqa: PTH208
    ops = NativeOps(threads=3)
    work(ops)
    workers = set(os.listdir("/proc/self/task")) - before  # noqa: PTH208
    assert len(workers) == 2
    interrupt = 1 << (signal.SIGINT - 1)
    assert all(blocked(task) & interrupt for task in workers)
    assert not blocked(str(os.getpid())) & interrupt
