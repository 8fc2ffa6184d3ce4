"""The yardsticks: what they say about this machine is no test's business, only that they say something sane."""

from __future__ import annotations

import pytest

from kvik import _native


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_rates_of_a_machine_of_this_world(threads: int) -> None:
    pool = _native.ThreadPool(threads)
    assert 1e7 < _native.read_bandwidth(pool, 1 << 24) < 1e14
    assert 1e7 < _native.float_throughput(pool) < 1e14
    assert 1e7 < _native.integer_throughput(pool) < 1e15


@pytest.mark.parametrize("num_bytes", [0, -1, 2**30 + 1, 2**63 - 1])
def test_an_impossible_number_of_bytes_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="num_bytes"):
        _native.read_bandwidth(_native.ThreadPool(1), num_bytes)
