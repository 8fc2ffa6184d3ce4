"""`kvik serve --replicas`: whatever happens to a replica, clients get what one process would write."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api_servers import serving
from mixed_requests import PATIENCE_S, ask, ids_of, lasting, mixed_request
from tool_model import write_tool_model

ENGINE = ("--kv-memory", "48MiB", "--no-access-log")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tool_model(tmp_path_factory.mktemp("replicated")))


@pytest.fixture(scope="module")
def single(model: str) -> Iterator[str]:
    with serving(model, "--threads", "1", *ENGINE) as url:
        yield url


@pytest.fixture(scope="module")
def shared_front(model: str) -> Iterator[str]:
    with serving(model, "--replicas", "2", "--threads", "2", *ENGINE) as url:
        yield url


@pytest.fixture
def front(shared_front: str) -> str:
    """All of whose replicas are ready."""
    wait_for(lambda: all_are_ready(shared_front))
    return shared_front


def replicas_of(url: str) -> list[dict[str, Any]]:
    """What /health says of each, whatever its status."""
    try:
        found: list[dict[str, Any]] = ask(url, "/health")["replicas"]
    except urllib.error.HTTPError as answer:
        with answer:
            found = json.load(answer)["replicas"]
    return found


def all_are_ready(url: str) -> bool:
    return all(each["status"] == "ok" for each in replicas_of(url))


def refusal(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, path, body)
    with refused.value as answer:
        return answer.code, json.load(answer)["error"]


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


MESSAGES = [{"role": "user", "content": "tell me something"}]
STREAMS = {
    "completion": ("/v1/completions", {"prompt": "once", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}),
    "drawn": ("/v1/completions", {"prompt": "once", "max_tokens": 1500, "ignore_eos": True, "seed": 7, "n": 2}),
    "logprobs": ("/v1/completions", {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "seed": 5, "logprobs": 1}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1500, "ignore_eos": True, "seed": 3}),
    "responses": ("/v1/responses", {"input": "tell", "max_output_tokens": 1500, "temperature": 0}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1500, "temperature": 0}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_replica_killed_in_mid_stream_changes_nothing(single: str, front: str, name: str) -> None:
    path, body = STREAMS[name]
    body = body | {"stream": True}
    expected = ask(single, path, body)
    assert len(expected) > 60
    killed: list[int] = []

    def kill(count: int) -> None:
        if count == 20:
            (replica,) = [each for each in replicas_of(front) if each["in_flight"]]
            os.kill(replica["pid"], signal.SIGKILL)
            killed.append(replica["pid"])

    found = ask(front, path, body, kill)
    assert killed
    assert lasting(found) == lasting(expected)
    assert len(ids_of(found)) <= 1


def run_mixed(url: str, num_requests: int, num_clients: int, kill_s: float, num_replicas: int) -> list[Any]:
    """The answers to mixed requests of several clients, while a replica is killed every few seconds."""
    found: dict[int, Any] = {}
    is_over = threading.Event()
    drawn = random.Random(1)

    def client(first: int) -> None:
        for at in range(first, num_requests, num_clients):
            found[at] = ask(url, *mixed_request(at))

    def kill() -> None:
        while not is_over.wait(kill_s):
            ready = [each for each in replicas_of(url) if each["status"] == "ok"]
            if len(ready) == num_replicas:
                os.kill(drawn.choice(ready)["pid"], signal.SIGKILL)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(num_clients)]
    killer = threading.Thread(target=kill)
    for thread in (killer, *threads):
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)
    is_over.set()
    killer.join()
    return [found.get(at) for at in range(num_requests)]


def test_mixed_requests_while_replicas_are_killed(single: str, front: str) -> None:
    found = run_mixed(front, 24, num_clients=4, kill_s=0.5, num_replicas=2)
    for at, answer in enumerate(found):
        assert lasting(answer) == lasting(ask(single, *mixed_request(at))), mixed_request(at)


@pytest.mark.full
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_300_mixed_requests_while_replicas_are_killed(single: str, model: str, num_replicas: int) -> None:
    count = str(num_replicas)
    with serving(model, "--replicas", count, "--threads", count, *ENGINE) as url:
        found = run_mixed(url, 300, num_clients=6, kill_s=2.0, num_replicas=num_replicas)
    for at, answer in enumerate(found):
        assert lasting(answer) == lasting(ask(single, *mixed_request(at))), mixed_request(at)


@pytest.mark.full
def test_a_rolling_restart_loses_nothing(single: str, front: str) -> None:
    before = {each["pid"] for each in replicas_of(front)}
    path, body = STREAMS["chat"]
    body = body | {"stream": True, "max_tokens": 200}
    expected = lasting(ask(single, path, body))
    os.kill(parent_of(min(before)), signal.SIGHUP)

    def is_restarted() -> bool:
        assert lasting(ask(front, path, body)) == expected
        return not {each["pid"] for each in replicas_of(front)} & before and all_are_ready(front)

    wait_for(is_restarted)


def test_the_same_beginning_goes_to_the_same_replica(front: str) -> None:
    prompt = " ".join(f"word {at}" for at in range(100))
    first = ask(front, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
    for at in range(4):
        again = ask(front, "/v1/completions", {"prompt": f"{prompt} {at}", "max_tokens": 2})
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"] * 0.9


def test_what_is_about_one_replica_is_refused(front: str) -> None:
    for path in ("/v1/cache", "/v1/sessions", "/v1/saved_sessions", "/"):
        status, told = refusal(front, path)
        assert (status, "about one of them" in told["message"]) == (404, True)
    status, told = refusal(front, "/v1/chat/completions", {"messages": [], "session_id": "x"})
    assert (status, told["param"]) == (400, "session_id")
    assert refusal(front, "/v1/completions", {"prompt": 7})[0] == 400
    assert ask(front, "/v1/models")["data"]


@pytest.mark.full
def test_replicas_end_with_the_front(model: str) -> None:
    with serving(model, "--replicas", "2", "--threads", "2", *ENGINE) as url:
        pids = [each["pid"] for each in replicas_of(url)]
        os.kill(parent_of(pids[0]), signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.full
def test_without_a_replica_new_requests_are_told_to_come_again(front: str) -> None:
    for each in replicas_of(front):
        os.kill(each["pid"], signal.SIGKILL)
    wait_for(lambda: not any(each["status"] == "ok" for each in replicas_of(front)))
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(front, "/v1/completions", {"prompt": "a"})
    with refused.value as answer:
        assert (answer.code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.full
def test_a_front_that_drains_loses_nothing(single: str, model: str) -> None:
    path, body = STREAMS["chat"]
    body = body | {"stream": True, "max_tokens": 300}
    with serving(model, "--replicas", "2", "--threads", "2", *ENGINE) as url:
        front_pid = parent_of(replicas_of(url)[0]["pid"])

        def drain(count: int) -> None:
            if count == 20:
                os.kill(front_pid, signal.SIGTERM)

        assert lasting(ask(url, path, body, drain)) == lasting(ask(single, path, body))


@pytest.mark.full
def test_a_replica_that_stands_still_is_ended_and_its_stream_goes_on(single: str, front: str) -> None:
    path, body = STREAMS["chat"]
    body = body | {"stream": True}

    def stop(count: int) -> None:
        if count == 20:
            (replica,) = [each for each in replicas_of(front) if each["in_flight"]]
            os.kill(replica["pid"], signal.SIGSTOP)

    assert lasting(ask(front, path, body, stop)) == lasting(ask(single, path, body))
