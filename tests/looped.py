"""Many cases in one test, where a name for each would only take time to collect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]
MAX_TRACEBACKS = 5


def looped(argument: str, cases: Iterable[Any], name: Callable[[Any], str] = str) -> Callable[[Test], Test]:
    """As `pytest.mark.parametrize`, but one test checks all cases: its error names each that failed.

    The cases share the test's fixtures.
    """
    all_cases = list(cases)
    assert all_cases

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)
        others = [parameter for key, parameter in signature.parameters.items() if key != argument]
        assert len(others) == len(signature.parameters) - 1, f"{test.__name__} has no argument {argument}"

        @functools.wraps(test)
        def check_all(**arguments: Any) -> None:
            failed: list[str] = []
            errors: list[BaseException] = []
            for case in all_cases:
                try:
                    test(**arguments, **{argument: case})
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # raised below
                    failed.append(name(case))
                    errors.append(error)
            if errors:
                found = f"{argument}: {len(failed)} of {len(all_cases)} failed: {', '.join(failed)}"
                raise BaseExceptionGroup(found, errors[:MAX_TRACEBACKS])

        check_all.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return check_all

    return decorate
