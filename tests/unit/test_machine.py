"""What the process may use of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from kvik import machine
from subprocesses import python


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quotas"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5]),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                "sys/fs/cgroup/user/app/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/user/cpu.max": "200000 100000\n",
            },
            [4.0, 2.0],
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [0.5],
        ),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], quotas: list[float]) -> None:
    assert machine.cgroup_quotas(write(tmp_path, files)) == quotas


MEMINFO = {"proc/meminfo": "MemTotal:  4000 kB\nMemFree:  100 kB\nMemAvailable:  2000 kB\n"}
MACHINE = 2000 * 1024


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n"}, MACHINE),
        ({"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "1\n"}, MACHINE),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "5000\n",
            },
            MACHINE,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n"}, MACHINE),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "900000\n",
                "sys/fs/cgroup/memory.current": "600000\n",
            },
            300_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                "sys/fs/cgroup/user/app/memory.max": "900000\n",
                "sys/fs/cgroup/user/app/memory.current": "600000\n",
                "sys/fs/cgroup/user/app/memory.stat": "anon 5\nactive_file 70000\ninactive_file 50000\nslab 3\n",
            },
            420_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                "sys/fs/cgroup/user/app/memory.max": "900000\n",
                "sys/fs/cgroup/user/app/memory.current": "600000\n",
                "sys/fs/cgroup/user/memory.max": "1000000\n",
                "sys/fs/cgroup/user/memory.current": "990000\n",
                "sys/fs/cgroup/user/memory.stat": "inactive_file 40000\n",
            },
            50_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "5000\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 100\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "100\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 500\n",
            },
            1000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "9223372036854775807\n",
                "sys/fs/cgroup/memory.current": "100\n",
            },
            MACHINE,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "800000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 9\ntotal_inactive_file 100000\n"
                "active_file 8\ntotal_active_file 30000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
                "sys/fs/cgroup/cpu/x/memory.limit_in_bytes": "1\n",
                "sys/fs/cgroup/cpu/x/memory.usage_in_bytes": "1\n",
            },
            430_000,
        ),
    ],
)
def test_memory_that_control_groups_leave(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert machine.available_memory_bytes(write(tmp_path, MEMINFO | files)) == available


def test_memory_of_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.available_memory_bytes(tmp_path) == physical
    assert 0 < machine.available_memory_bytes() <= physical


@pytest.mark.parametrize(("quotas", "threads"), [([], 3), ([2.0], 2), ([2.9, 1.5], 1), ([0.5], 1), ([64.0], 3)])
def test_threads_keep_to_quota_and_affinity(monkeypatch: pytest.MonkeyPatch, quotas: list[float], threads: int) -> None:
    monkeypatch.setattr(machine, "cgroup_quotas", lambda: quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert machine.available_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_one_processor_means_one_thread() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from kvik.ops.native import NativeOps; print(NativeOps().num_threads)"
    assert python("-c", code).stdout.strip() == "1"


FREED = """
import os
from kvik.machine import give_back_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

pieces = [bytes(2000) for _ in range(20_000)]
del pieces[:-1]  # the C library cannot give back what lies below the last of them by itself
before = resident_bytes()
give_back_memory()
print(before - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have nothing to call")
def test_what_was_freed_goes_back() -> None:
    done = python("-c", FREED)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30e6
