"""Fixtures that several folders share."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tiers import NUM_EXAMPLES, RANDOM_SEEDS, TIER

# Test modules are imported after this, so that their own settings start from the tier's.
for tier, num_examples in NUM_EXAMPLES.items():
    settings.register_profile(
        tier, max_examples=num_examples, deadline=None, print_blob=True, derandomize=tier != "nightly"
    )
settings.load_profile(TIER)

SOURCES_OF_TINY = ("mark.tiny", "simulation_groups")

# A shell that starts the tests in the background has them ignore Ctrl-C, and each process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """The seed is drawn before pytest-xdist starts its workers: all must collect the same tests."""
    if RANDOM_SEEDS:
        os.environ.setdefault("KVIK_SEED", str(secrets.randbits(32)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """What repeats a run with random seeds."""
    if RANDOM_SEEDS:
        terminalreporter.write_line(f"KVIK_TIER={TIER} KVIK_RANDOM_SEEDS=1 KVIK_SEED={os.environ['KVIK_SEED']}")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Importing a hundred modules takes longer than the tests of the tiny tier: only those that have some."""
    if TIER != "tiny" or not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return None if any(word in text for word in SOURCES_OF_TINY) else True


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The trained default model, fetched once for the machine."""
    from kvik.hub.store import resolve

    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M, if it is on this machine: `make test-all` asks for its terms before it fetches it."""
    from kvik.errors import ModelNotFound
    from kvik.hub.store import find

    try:
        return find("gemma3-270m")
    except ModelNotFound as error:
        pytest.skip(f"{error.message}; `kvik models pull gemma3-270m` fetches it, once its terms are accepted")


@pytest.fixture(autouse=True)
def no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is compared as plain text."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
