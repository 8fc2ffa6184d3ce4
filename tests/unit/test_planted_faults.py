"""The faults of `make plant-faults` can still be planted, and their failures are read right."""

from __future__ import annotations

from pathlib import Path

from looped import looped
from plant_faults import FAULTS, Fault, first_failure

ROOT = Path(__file__).parents[2]


@looped("fault", FAULTS, lambda fault: fault.name)
def test_each_text_stands_once_in_its_file(fault: Fault) -> None:
    """A fault whose text was rewritten is written anew, not dropped."""
    assert fault.count(ROOT) == 1
    assert fault.old != fault.new


def test_faults_are_of_many_kinds() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 10
    assert 3 <= sum(fault.is_native for fault in FAULTS) <= 5


def test_the_first_failure_is_read_from_what_was_printed() -> None:
    assert first_failure("..F\nFAILED tests/a/test_b.py::test_c[1] - x\nFAILED tests/a/test_d.py::test_e\n") == (
        "a/test_b.py::test_c[1]"
    )
    crash = (
        'SUMMARY: AddressSanitizer: heap-buffer-overflow x.cpp:1\n  File "/x/tests/ops/test_p.py", line 5 in test_q\n'
    )
    assert first_failure(crash) == "ops/test_p.py::test_q (AddressSanitizer: heap-buffer-overflow)"
    assert first_failure("Killed") == "a test that did not end"
