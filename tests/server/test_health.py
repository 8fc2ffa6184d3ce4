"""`/health` tells the truth: of a server that is well, that drains, whose engine is dead, and whose engine hangs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvik.engine.batch import ScheduledBatch
from kvik.engine.llm import LLM
from kvik.engine.runner import StepOutput
from kvik.server.watch.health import condition_of, hang_limit_s
from live_server import GatedRunner, LiveServer, gated, live
from models import tiny_model
from server_process import wait_until

HANG_S = 0.4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=2048).path
    return LLM(path, kv_memory="8MiB", threads=1)


@pytest.fixture
def runner_and_server(tiny: LLM) -> Iterator[tuple[GatedRunner, LiveServer]]:
    llm, runner = gated(tiny)
    with live({"tiny": llm}, hang_s=HANG_S, ping_s=0.05) as server:
        yield runner, server
        runner.open()


def statuses(server: LiveServer) -> list[int]:
    return [server.ask("GET", path).status for path in ("/health", "/ready", "/health/decode")]


def test_a_server_that_is_well_and_has_nothing_to_do(runner_and_server: tuple[GatedRunner, LiveServer]) -> None:
    _, server = runner_and_server
    answer = server.ask("GET", "/health")
    assert answer.status == 200
    assert answer.body == {"status": "ok", "models": {"tiny": "ok"}}
    assert server.served.async_llm.silent_s == 0
    assert statuses(server) == [200, 200, 200]
    assert server.ask("HEAD", "/health").status == 200


def test_a_hung_engine_is_told_and_its_streams_end_with_an_error(
    runner_and_server: tuple[GatedRunner, LiveServer],
) -> None:
    runner, server = runner_and_server
    runner.close_after(3)
    body = {"prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "stream": True}
    with server.asking("POST", "/v1/completions", body) as response:
        events = [line[6:] for line in response if line.startswith(b"data: ")]
    *_, error, done = events
    assert done.strip() == b"[DONE]"
    assert json.loads(error)["error"]["code"] == "engine_hung"
    assert statuses(server) == [503, 503, 503]
    assert server.ask("GET", "/health").body["models"] == {"tiny": "hung"}
    # One that comes meanwhile does not wait for ever either.
    late = server.ask("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 2})
    assert (late.status, late.body["error"]["code"]) == (503, "engine_hung")
    assert "retry-after" in late.headers
    runner.open()
    wait_until(lambda: statuses(server) == [200, 200, 200])
    wait_until(lambda: not server.served.llm.engine.scheduler.has_work)
    assert server.ask("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 2}).status == 200


def test_a_process_that_stood_still_has_no_hung_engine(tiny: LLM) -> None:
    """While a server is paused its steps do not end either; the event loop stands still here, as all would."""
    llm, runner = gated(tiny)
    with live({"tiny": llm}, hang_s=3.0) as server, ThreadPoolExecutor() as pool:
        runner.close_after(3)
        body = {"prompt": [1, 2, 3], "max_tokens": 9, "ignore_eos": True}
        asked = pool.submit(server.ask, "POST", "/v1/completions", body)
        wait_until(lambda: runner.is_closed)
        server.stand_still(3.5)
        time.sleep(0.9)  # so that engines are looked after once
        runner.open()
        assert asked.result().status == 200


def test_a_prompt_of_many_steps_is_no_hang(tiny: LLM) -> None:
    llm, runner = gated(tiny, token_budget=16)
    seen: list[list[int]] = []
    with live({"tiny": llm}, hang_s=30.0) as server:
        run = runner.run

        def watched(batch: object) -> object:
            seen.append(statuses(server))
            return run(batch)  # type: ignore[arg-type]

        runner.run = watched  # type: ignore[method-assign, assignment]
        assert server.ask("POST", "/v1/completions", {"prompt": [7] * 100, "max_tokens": 2}).status == 200
    assert len(seen) > 6
    assert all(each == [200, 200, 200] for each in seen)


def test_a_dead_engine_is_told(runner_and_server: tuple[GatedRunner, LiveServer]) -> None:
    _, server = runner_and_server
    server.served.async_llm.stop(5)
    assert statuses(server) == [503, 503, 503]
    assert server.ask("GET", "/health").body == {"status": "dead", "models": {"tiny": "dead"}}
    answer = server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 2})
    assert (answer.status, answer.body["error"]["code"]) == (503, "engine_dead")


def test_a_draining_server_takes_nothing_new(runner_and_server: tuple[GatedRunner, LiveServer]) -> None:
    _, server = runner_and_server
    server.state.is_draining = True
    assert server.ask("GET", "/health").body == {"status": "draining", "models": {"tiny": "ok"}}
    assert statuses(server) == [503, 503, 503]
    answer = server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 2})
    assert (answer.status, answer.body["error"]["code"]) == (503, "shutting_down")
    assert int(answer.headers["retry-after"]) > 0
    assert server.ask("GET", "/metrics").status == 200


def test_a_full_queue_is_alive_and_not_ready(tiny: LLM) -> None:
    llm, runner = gated(tiny, max_running=1, max_waiting=1)
    other, _ = gated(tiny)
    scheduler, run = llm.engine.scheduler, runner.run
    is_told = threading.Event()

    def stops_when_full(batch: ScheduledBatch) -> StepOutput:
        if scheduler.is_full and not is_told.is_set():
            runner.close()
        time.sleep(0 if is_told.is_set() else 0.002)  # so that the first is not whole before the second comes
        return run(batch)

    runner.run = stops_when_full  # type: ignore[method-assign]
    body = {"prompt": [1, 2], "max_tokens": 1000, "ignore_eos": True}
    with live({"busy": llm, "idle": other}, hang_s=30.0) as server, ThreadPoolExecutor() as pool:
        asked = [pool.submit(server.ask, "POST", "/v1/completions", body)]
        wait_until(lambda: bool(scheduler.running))
        assert server.ask("GET", "/ready").status == 200
        asked.append(pool.submit(server.ask, "POST", "/v1/completions", body))
        wait_until(lambda: runner.is_closed)
        ready = server.ask("GET", "/ready")
        assert (ready.status, ready.body) == (503, {"status": "full", "models": {"busy": "full", "idle": "ok"}})
        assert int(ready.headers["retry-after"]) > 0
        alive = server.ask("GET", "/health")
        assert (alive.status, alive.body["status"]) == (200, "ok")
        assert server.ask("POST", "/v1/completions", body).status == 429
        server.state.is_draining = True
        assert server.ask("GET", "/ready").body["status"] == "draining"
        server.state.is_draining = False
        is_told.set()
        runner.open()
        wait_until(lambda: server.ask("GET", "/ready").status == 200)
        assert [each.result().status for each in asked] == [200, 200]


def test_a_big_model_may_take_longer_for_a_step(runner_and_server: tuple[GatedRunner, LiveServer]) -> None:
    _, server = runner_and_server
    engine = server.served.llm.engine
    assert hang_limit_s(server.served, 10.0) == 10.0
    engine.runner.step_bytes = lambda num_tokens, num_logits: 5 << 30  # type: ignore[method-assign]
    unmeasured_s = hang_limit_s(server.served, 10.0)
    assert unmeasured_s > 60
    engine.prefill_token_s = 0.02
    assert 10 < hang_limit_s(server.served, 10.0) < unmeasured_s
    assert condition_of(server.served, 10.0) == "ok"
