"""What this process may use of the machine, what it is called, and where kvik keeps files on it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from kvik.errors import InvalidInput


def user_folder() -> Path:
    """Where kvik keeps its own files: $KVIK_HOME, or the user's cache folder."""
    home = os.environ.get("KVIK_HOME")
    if home:
        try:
            return Path(home).expanduser()
        except RuntimeError as error:
            raise InvalidInput(f"KVIK_HOME is {home}: {error}", hint="set it to a folder of yours") from None
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("kvik", appauthor=False))


def processor_name() -> str:
    """What the processor calls itself, or else its architecture."""
    name = _value_text("model name", _read(Path("/proc/cpuinfo")))
    return name or platform.processor() or platform.machine()


def available_threads() -> int:
    """Processors that this process may use: its affinity, and the cgroup's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in cgroup_quotas())]))


def cgroup_quotas(root: Path = Path("/")) -> list[float]:
    """Processors that this process's control group and each one above it may use, where they are limited.

    Source: the kernel's cgroup-v2 document (cpu.max: quota and period in microseconds) and, for version 1, sched-bwc.
    """
    quotas = []
    for folder, version in _control_groups("cpu", root):
        if version == 1:
            limit = [_read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        else:
            limit = _read(folder / "cpu.max").split()
        if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit():
            quotas.append(int(limit[0]) / int(limit[1]))
    return quotas


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping, where the system tells; else all of the machine's.

    Nor more than this process's control group and each one above it leave: limit less usage, of which file pages do
    not count, as they do not for the machine: the kernel takes them back. Source: the kernel's cgroup-v2 document and,
    for version 1, memory.rst.
    """
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (available := _value_of("MemAvailable:", _read(root / "proc/meminfo"))) is not None:
        num_bytes = available * 1024
    for folder, version in _control_groups("memory", root):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        limit, usage = (_read(folder / name).strip() for name in names)
        if limit.isdigit() and usage.isdigit():
            prefix, stat = "total_" if version == 1 else "", _read(folder / "memory.stat")
            of_files = sum(_value_of(f"{prefix}{kind}_file", stat) or 0 for kind in ("active", "inactive"))
            num_bytes = min(num_bytes, int(limit) - max(0, int(usage) - of_files))
    return max(0, num_bytes)


def give_back_memory() -> None:
    """Return to the system what was freed and the C library keeps, where it can do that (glibc's `malloc_trim`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's control group and of each one above it, with the version of their files."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            yield folder, 1 if controllers else 2
            if folder == top:
                break


def _value_text(name: str, text: str) -> str:
    """What follows the first `name:` at the beginning of a line, or nothing."""
    for line in text.splitlines():
        key, _, content = line.partition(":")
        if key.strip() == name:
            return content.strip()
    return ""


def _value_of(name: str, text: str) -> int | None:
    """The number behind a name at the beginning of a line."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [name] and len(words) > 1 and words[1].isdigit():
            return int(words[1])
    return None


def _read(path: Path) -> str:
    """A system file's text; empty where this system has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
