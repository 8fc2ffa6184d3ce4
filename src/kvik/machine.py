"""What this process may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def available_threads() -> int:
    """Processors that this process may use: its affinity, and the cgroup's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _read("/sys/fs/cgroup/cpu.max").split()
    if len(limit) != 2 or limit[0] == "max":
        return allowed
    return max(1, min(allowed, int(limit[0]) // int(limit[1])))


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, where the system tells; else all of the machine's."""
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: str) -> str:
    """A system file's text; empty where this system has no such file."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
