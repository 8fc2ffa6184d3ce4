"""How fast a model is ready, and what memory that takes: packed, and from kept packed weights.

python bench/loading.py MODEL.gguf [--rounds 3] [--cold] [--threads N]

Each load is a process of its own, next to a plain read of the file by one thread in pieces of 1 MiB; `--cold` drops the
files from the page cache before each (`posix_fadvise`, which needs no rights). Peak memory is VmHWM from just before
the load on, less what the process had then; it includes the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvik.cli.terminal import columns, seconds
from kvik.units import amount


def status_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def load(model: Path, folder: str | None, threads: int | None) -> dict[str, Any]:
    """In a process of its own: load once."""
    from kvik.models.loader import load_model
    from kvik.ops.native import NativeOps

    ops = NativeOps("int8", threads)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before_bytes, started_s = status_bytes("VmRSS"), time.perf_counter()
    load_model(model, ops, context=2048, packed_cache=None if folder is None else Path(folder))
    return {"load_s": time.perf_counter() - started_s, "peak_bytes": status_bytes("VmHWM") - before_bytes}


def read(model: Path) -> float:
    """Seconds that reading the file once takes."""
    space, started_s = bytearray(1 << 20), time.perf_counter()
    with model.open("rb", buffering=0) as file:
        while file.readinto(space):
            pass
    return time.perf_counter() - started_s


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(load(arguments.model, arguments.child or None, arguments.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="kvik-packed-") as folder:
        first = child(arguments, folder)
        reads: list[float] = []
        loads: dict[str, list[dict[str, Any]]] = {"packed": [], "from kept packed weights": []}
        for _ in range(arguments.rounds):
            ready(arguments, folder)
            reads.append(read(arguments.model))
            for name, chosen in zip(loads, ("", folder), strict=True):
                ready(arguments, folder)
                loads[name].append(child(arguments, chosen))
    read_s = statistics.median(reads)
    rows = [("", "TIME", "OF READING", "PEAK MEMORY"), ("reading the file once", seconds(read_s), "1.00", "")]
    for name, found in {**loads, "packed and kept": [first]}.items():
        load_s = statistics.median(each["load_s"] for each in found)
        rows.append(
            (name, seconds(load_s), f"{load_s / read_s:.2f}", amount(max(each["peak_bytes"] for each in found)))
        )
    print("\n".join(columns(rows, left=1)))


def ready(arguments: argparse.Namespace, folder: str) -> None:
    """Files in the page cache, or out of it."""
    for path in (arguments.model, *Path(folder).glob("*.packed")):
        if arguments.cold:
            drop(path)
        else:
            read(path)


def child(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What one process tells."""
    command = [sys.executable, __file__, str(arguments.model), "--child", folder]
    if arguments.threads is not None:
        command += ["--threads", str(arguments.threads)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    main()
