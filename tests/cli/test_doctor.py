"""`kvik doctor`: what it finds is there, and what is slow is said with what to do about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvik
from kvik.cli.doctor import Machine, examine, findings, huge_pages

GOOD: dict[str, Any] = {
    "kernels": "avx2",
    "usable_kernels": ("avx2", "generic"),
    "num_threads": 8,
    "num_processors": 8,
    "load": 0.5,
    "memory_bytes": 16_000_000_000,
    "huge_pages": "madvise",
    "folder_is_writable": True,
    "disk_free_bytes": 50_000_000_000,
    "extras": ("server", "plot"),
    "keeps_bytecode": True,
    "forced_isa": "",
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    return replace(examine(), **GOOD)


def test_a_good_machine_has_no_findings(machine: Machine) -> None:
    assert [*findings(machine)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": "generic", "usable_kernels": ("generic",)}, "no AVX2"),
        ({"kernels": "generic", "forced_isa": "generic"}, "KVIK_ISA=generic keeps kvik from the avx2 kernels"),
        ({"memory_bytes": 500_000_000}, "500 MB of memory"),
        ({"load": 7.2}, "a load of 7.2 on 8 processors"),
        ({"num_threads": 2}, "2 of 8 processors"),
        ({"huge_pages": "never"}, "no large pages"),
        ({"folder_is_writable": False}, "cannot be written"),
        ({"disk_free_bytes": 1_000_000}, "1.00 MB are free"),
        ({"keeps_bytecode": False}, "PYTHONDONTWRITEBYTECODE"),
        ({"extras": ()}, "kvik serve"),
    ],
)
def test_each_fault_is_said_with_a_hint(machine: Machine, changes: dict[str, Any], said: str) -> None:
    (found,) = findings(replace(machine, **changes))
    assert said in found.problem
    assert found.hint


def test_the_choice_of_pages_stands_in_brackets(tmp_path: Path) -> None:
    path = tmp_path / "enabled"
    assert huge_pages(path) == "unknown"
    path.write_text("always [madvise] never\n")
    assert huge_pages(path) == "madvise"


def test_the_command_prints_both(kvik: Kvik, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    text = kvik("doctor").stdout
    for part in (
        "processor",
        "kernels",
        "threads",
        "not downloaded",
        "not measured yet",
        "PYTHONDONTWRITEBYTECODE",
        "hint: ",
    ):
        assert part in text
    report = json.loads(kvik("doctor", "--json").stdout)
    assert report["machine"]["kernels"] in text
    assert any("PYTHONDONTWRITEBYTECODE" in one["problem"] for one in report["findings"])
    assert not (tmp_path / "not").exists()
