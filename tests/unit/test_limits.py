"""What the machine can do is measured once and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvik.ops import limits
from kvik.ops.limits import FORMAT, better_limits, measured_limits
from kvik.ops.program import MachineLimits


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads of each measurement, which takes no time here and finds more each time."""
    calls: list[int] = []

    def measure(threads: int) -> MachineLimits:
        calls.append(threads)
        return MachineLimits(1e9 * len(calls), 2e9, 3e9)

    monkeypatch.setattr(limits, "_measure", measure)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    return calls


def test_it_is_measured_once_for_each_number_of_threads(measured: list[int]) -> None:
    assert measured_limits(2).bytes_per_s == 1e9
    assert measured_limits(2).bytes_per_s == 1e9
    assert measured_limits(1).bytes_per_s == 2e9
    assert measured_limits(2).bytes_per_s == 1e9
    assert measured == [2, 1]


def test_fresh_measures_again_and_keeps_the_others(measured: list[int]) -> None:
    measured_limits(1)
    measured_limits(2)
    assert measured_limits(2, fresh=True).bytes_per_s == 3e9
    assert measured_limits(2).bytes_per_s == 3e9
    assert measured_limits(1).bytes_per_s == 1e9


def test_whoever_went_beyond_them_has_them_measured_again_and_the_better_kept(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_limits(2)
    assert better_limits(2).bytes_per_s == 2e9
    assert measured_limits(2).bytes_per_s == 2e9
    monkeypatch.setattr(limits, "_measure", lambda threads: MachineLimits(1e9, 5e9, 1e9))
    assert better_limits(2) == measured_limits(2) == MachineLimits(2e9, 5e9, 3e9)
    assert better_limits(1) == measured_limits(1) == MachineLimits(1e9, 5e9, 1e9)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "",
        lambda content: content[:-5],
        lambda content: content.replace(f'"format": {FORMAT}', '"format": 0'),
        lambda content: content.replace("1000000000.0", '"fast"'),
        lambda content: content.replace("1000000000.0", "-1.0"),
        lambda content: content.replace("bytes_per_s", "bits_per_s"),
        lambda content: "[]",
    ],
)
def test_a_file_that_makes_no_sense_is_measured_anew(measured: list[int], tmp_path: Path, change: object) -> None:
    measured_limits(2)
    path = tmp_path / "home/limits.json"
    before = path.read_text()
    assert callable(change)
    path.write_text(change(before))
    assert path.read_text() != before
    assert measured_limits(2).bytes_per_s == 2e9
    assert json.loads(path.read_text())["format"] == FORMAT


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "file"))
    assert measured_limits(2).bytes_per_s == 1e9
    assert measured_limits(2).bytes_per_s == 2e9


def test_neither_an_outlier_nor_a_busy_moment_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = iter([30e9, 64e9, 31e9, 10e9, 30e9, 32e9, 31e9, 30e9, 31e9, 12e9])
    monkeypatch.setattr("kvik._native.read_bandwidth", lambda pool, num_bytes: next(rates))
    for name in ("integer_throughput", "float_throughput"):
        monkeypatch.setattr(f"kvik._native.{name}", lambda pool: 1e9)
    monkeypatch.setattr(limits, "MEASURE_S", 0.0)
    monkeypatch.setattr(limits, "MIN_MEASURED_ROUNDS", 10)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    assert 30e9 <= measured_limits(1).bytes_per_s <= 32e9


def test_the_machine_is_really_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "MEASURE_S", 0.0)
    monkeypatch.setattr(limits, "MIN_MEASURED_ROUNDS", 2)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 24)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    found = measured_limits(1)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e7 < found.float_operations_per_s < 1e14
    assert 1e7 < found.integer_operations_per_s < 1e14
