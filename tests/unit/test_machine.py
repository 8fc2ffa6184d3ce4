"""What the process may use of the machine."""

from __future__ import annotations

import os
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
