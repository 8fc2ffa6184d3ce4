"""A tiny model, and `kvik` run in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from command_line import Kvik
from gguf_files import tiny_llama
from kvik.cli.app import app
from kvik.engine.engine import Engine
from kvik.engine.events import StepResult


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights; its context is longer than any answer here."""
    return tiny_llama(tmp_path_factory.mktemp("cli") / "tiny.gguf", context_length=1 << 17, tied=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    metadata = {"tokenizer.chat_template": ""}
    return tiny_llama(tmp_path_factory.mktemp("cli") / "base.gguf", tied=False, extra_metadata=metadata)


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """`kvik serve` has loggers write to its stderr, which a test's command line does not outlive."""
    loggers = [logging.getLogger(name) for name in ("kvik", "uvicorn")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def kvik(tiny: Path, monkeypatch: pytest.MonkeyPatch, logs_as_before: None) -> Kvik:
    """Run a command line in this process; the model is the tiny one unless -m names another."""
    monkeypatch.setenv("KVIK_MODEL", str(tiny))

    def invoke(*arguments: str, stdin: bytes | str = b"") -> Result:
        result = CliRunner().invoke(app, arguments, input=stdin, prog_name="kvik")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have Ctrl-C pressed in the middle of the engine's n-th step."""
    step, count = Engine.step, 0

    def set_up(number: int) -> None:
        def interrupted_step(engine: Engine) -> StepResult | None:
            nonlocal count
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)
            return step(engine)

        monkeypatch.setattr(Engine, "step", interrupted_step)

    return set_up
