"""Ctrl-C and other interruptions at any point: accounts that prove themselves, and an engine that goes on."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import StepFailed
from sequences import new_sequence
from simulation import SimulatedEngine, expected_sequence

ROOMS = ("/kvik/engine/", "/kvik/cache/")
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)


def simulated() -> SimulatedEngine:
    return SimulatedEngine(num_blocks=64, token_budget=64, max_running=8, max_waiting=50)


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(10) for _ in range(70)] for _ in range(3)]


@contextmanager
def at_line(number: int, happen: Callable[[], None]) -> Iterator[list[str]]:
    """Let something happen at the n-th line that is run in the engine's rooms; yields where that was, if it came."""
    where: list[str] = []
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not any(room in frame.f_code.co_filename for room in ROOMS):
            return None
        if event == "line":
            count += 1
            if count == number:
                where.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
                sys.settrace(None)
                happen()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)


def interrupt() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def assert_whole(engine: Engine, where: object) -> None:
    """No block is held, and each is where the accounts say."""
    engine.clear_cache()
    engine.scheduler.check()
    for pool in (engine.cache.pool, *(group.pool for group in engine.cache.twins.groups)):
        assert pool.num_free == pool.num_blocks, where
    assert engine.cache.committed_bytes == 0, where
    assert not engine.scheduler.has_work, where


def assert_serves(engine: SimulatedEngine, where: object) -> None:
    prompt = prompts()[0]
    sequence = new_sequence(engine, prompt, PARAMS)
    engine.add(sequence)
    while engine.step() is not None:
        engine.scheduler.check()
    assert sequence.error is None, where
    assert sequence.token_ids == expected_sequence(engine, prompt, PARAMS, 1, None).token_ids, where


@pytest.mark.parametrize("happen", [interrupt, press_ctrl_c])
def test_an_interruption_at_any_line_of_a_step_leaves_the_accounts_whole(happen: Callable[[], None]) -> None:
    """`interrupt` is what no handler can put off, as another signal's; Ctrl-C waits for the step's end."""
    num_hits = 0
    for number in range(1, 100_000, 17):
        engine = simulated()
        sequences = [new_sequence(engine, prompt, PARAMS, hold=True) for prompt in prompts()]
        for sequence in sequences:
            engine.add(sequence)
        with at_line(number, happen) as where:
            try:
                for _ in range(6):
                    engine.step()
            except KeyboardInterrupt:
                num_hits += 1
        if not where:
            break
        if happen is press_ctrl_c:
            engine.scheduler.check()  # nothing was lost
            assert not any(sequence.error for sequence in sequences), where
        engine.abort(*sequences)
        for sequence in sequences:
            assert sequence.error is None or isinstance(sequence.error, StepFailed), where
            if sequence.lease is not None:
                sequence.lease.close()
        assert_whole(engine, where)
        assert_serves(engine, where)
    assert num_hits > 50


# Python drops what is raised in a finaliser, and a lease has one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("happen", [interrupt, press_ctrl_c])
def test_an_interrupted_call_of_a_model_leaves_it_usable(llm: LLM, happen: Callable[[], None]) -> None:
    """Of `generate`, `stream`, `chat` and a session, at points all over them."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    wanted = llm.generate("Once upon a time", params)[0].token_ids

    def generate() -> None:
        llm.generate(["Once upon a time", "Hello there"], params)

    def stream() -> None:
        list(llm.stream("Once upon a time", params))

    def chat() -> None:
        llm.chat([{"role": "user", "content": "Hello"}], params)

    def talk() -> None:
        with Session(llm) as session:
            for _ in range(2):
                session.append("user", "Hello")
                session.generate(params)
            session.fork().close()

    num_hits = 0
    for call in (generate, stream, chat, talk):
        for number in range(1, 100_000, 101):
            with at_line(number, happen) as where:
                try:
                    call()
                except KeyboardInterrupt:
                    num_hits += 1
            if not where:
                break
            assert_whole(llm.engine, (call.__name__, where))
        assert llm.generate("Once upon a time", params)[0].token_ids == wanted
    assert num_hits > 50


def test_what_others_run_ends_with_a_torn_step_and_says_so() -> None:
    """An interruption in the middle of the accounts is rare, and then nothing of them can be trusted."""
    engine = simulated()
    sequence = new_sequence(engine, prompts()[0], PARAMS)
    engine.add(sequence)

    def tear() -> None:
        raise KeyboardInterrupt

    engine.runner.before = tear
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert isinstance(sequence.error, StepFailed)
    assert "send the request again" in sequence.error.hint
    assert_whole(engine, "a torn step")
