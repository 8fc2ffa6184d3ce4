"""What this machine can do at best: measured once for some seconds, then remembered."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from kvik import _native
from kvik.machine import available_threads, processor_name, user_folder
from kvik.ops.program import MachineLimits

READ_BYTES = 1 << 29
"""Far more than any cache holds, so that reading means memory."""

MEASURE_S = 8.0
MIN_MEASURED_ROUNDS = 3
FORMAT = 2


def measured_limits(threads: int | None = None, *, fresh: bool = False) -> MachineLimits:
    """The machine's limits with so many threads (None: those this process may use), reading from memory, not caches.

    The upper quartile of some seconds of measuring, since other work only lessens it, and a single round may be an
    outlier; kept in the user's folder, by processor, instruction set and threads, until `fresh` asks to measure again.
    """
    threads = threads or available_threads()
    known = None if fresh else kept_limits(threads)
    return known or _measure_and_keep(threads, None)


def kept_limits(threads: int | None = None) -> MachineLimits | None:
    """What was measured before, where it was."""
    return _read(_path()).get(_key(threads or available_threads()))


def better_limits(threads: int | None = None) -> MachineLimits:
    """The limits measured again, for whoever did more than the kept ones allow: of each the better is kept."""
    threads = threads or available_threads()
    return _measure_and_keep(threads, kept_limits(threads))


def _measure_and_keep(threads: int, before: MachineLimits | None) -> MachineLimits:
    measured = _measure(threads)
    limits = measured if before is None else measured.or_better(before)
    _write(_path(), _read(_path()) | {_key(threads): limits})
    return limits


def _path() -> Path:
    return user_folder() / "limits.json"


def _key(threads: int) -> str:
    return f"{processor_name()}, {_native.isa}, {threads} of {os.cpu_count()} threads"


def _measure(threads: int) -> MachineLimits:
    pool = _native.ThreadPool(threads)
    rounds: list[tuple[float, float, float]] = []
    end_s = time.monotonic() + MEASURE_S
    while len(rounds) < MIN_MEASURED_ROUNDS or time.monotonic() < end_s:
        rounds.append(
            (
                _native.read_bandwidth(pool, READ_BYTES),
                2 * _native.integer_throughput(pool),
                2 * _native.float_throughput(pool),
            )
        )
    return MachineLimits(*(statistics.quantiles(column, n=4)[2] for column in zip(*rounds, strict=True)))


def _read(path: Path) -> dict[str, MachineLimits]:
    """What was measured before; a file that cannot be understood counts as none, since measuring again is cheap."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        limits = {str(key): MachineLimits(**values) for key, values in content["limits"].items()}
        if all(isinstance(one, float) and one > 0 for of in limits.values() for one in asdict(of).values()):
            return limits
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _write(path: Path, limits: dict[str, MachineLimits]) -> None:
    """Where the folder cannot be written, the next run measures again."""
    content = {"format": FORMAT, "limits": {key: asdict(of) for key, of in limits.items()}}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(path)
