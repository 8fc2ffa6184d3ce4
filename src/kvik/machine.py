"""What this process may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def available_threads() -> int:
    """Processors that this process may use: its affinity, and the cgroup's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in cgroup_quotas())]))


def cgroup_quotas(root: Path = Path("/")) -> list[float]:
    """Processors that this process's control group and each one above it may use, where they are limited.

    Source: the kernel's cgroup-v2 document (cpu.max: quota and period in microseconds) and, for version 1, sched-bwc.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if controllers:
                limit = [_read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
            else:
                limit = _read(folder / "cpu.max").split()
            if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit():
                quotas.append(int(limit[0]) / int(limit[1]))
            if folder == top:
                break
    return quotas


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, where the system tells; else all of the machine's."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path) -> str:
    """A system file's text; empty where this system has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
