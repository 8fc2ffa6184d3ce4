"""Who leaves, in whatever phase, is aborted within a step or two: nothing runs on, and no block stays held."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvik.engine import async_llm
from kvik.engine.llm import LLM
from kvik.engine.token_stream import TokenStream
from kvik.errors import SlowReader
from kvik.server.openai.item_writer import ItemWriter
from server_process import Server, wait_until, with_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 1, "seed": 1}
LONG = {"prompt": [5 + at % 290 for at in range(7000)], "max_tokens": 1000, **ENDLESS}
DECODES = {"prompt": [5, 6, 7], "max_tokens": 8000, **ENDLESS}


@pytest.fixture(scope="module")
def one(tiny_llm: LLM) -> Iterator[Server]:
    """A server that runs one sequence at a time, in small steps, and lets two wait."""
    with Server({"tiny": with_engine(tiny_llm, max_running=1, max_waiting=2, token_budget=16)}) as server:
        yield server


@pytest.fixture(scope="module")
def many(tiny_llm: LLM) -> Iterator[Server]:
    """A server that runs several."""
    with Server({"tiny": with_engine(tiny_llm, token_budget=16)}) as server:
        yield server


@contextmanager
def asked(server: Server, body: dict[str, Any], path: str = TEXT) -> Iterator[socket.socket]:
    """A request whose answer nobody reads; leaving closes the connection, and the engine must notice."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        yield connection


def assert_left(server: Server, stream: TokenStream) -> None:
    """It was aborted, long before its end, and the server is as if it had never come."""
    server.assert_idle()
    assert {branch.finish_reason for branch in stream.branches} == {"abort"}
    assert all(branch.num_computed_tokens < branch.request.max_total_tokens - 1 for branch in stream.branches)
    assert server.client.ok(TEXT, {"prompt": [3], "max_tokens": 1})["choices"]
    server.wait_for_stream()
    server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_in_the_queue(one: Server, stream: bool) -> None:
    with asked(one, DECODES) as _:
        running = one.wait_for_stream()
        with asked(one, DECODES | {"stream": stream}) as _:
            waiting = one.wait_for_stream()
            wait_until(lambda: bool(running.branches[0].num_completion_tokens))
            assert not waiting.branches[0].num_computed_tokens
        wait_until(lambda: waiting.branches[0].finish_reason is not None)
        assert waiting.branches[0].num_completion_tokens == 0
        assert running.branches[0].finish_reason is None
    assert_left(one, running)


@pytest.mark.parametrize("others", [{}, {"n": 3}, {"prompt": [LONG["prompt"], LONG["prompt"][1:]]}])
@pytest.mark.parametrize("stream", [False, True])
def test_in_prefill(many: Server, stream: bool, others: dict[str, Any]) -> None:
    with asked(many, LONG | {"cache_prompt": False, "stream": stream} | others) as _:
        left = many.wait_for_stream()
        wait_until(lambda: left.sequences[0].num_computed_tokens > 0)
    many.assert_idle()
    assert all(sequence.num_computed_tokens < 7000 for sequence in left.sequences)
    assert_left(many, left)


@pytest.mark.parametrize("others", [{}, {"n": 3}, {"logprobs": 2, "echo": True}])
@pytest.mark.parametrize("stream", [False, True])
def test_in_decode(many: Server, stream: bool, others: dict[str, Any]) -> None:
    with asked(many, DECODES | {"stream": stream} | others) as _:
        left = many.wait_for_stream()
        wait_until(lambda: all(branch.num_completion_tokens > 2 for branch in left.branches))
    assert_left(many, left)


def test_between_two_events_of_a_chat(many: Server) -> None:
    """A client that has read some of it, as one that shows text until somebody says stop."""
    body = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 8000, **ENDLESS}
    with many.client.streaming(CHAT, body) as events:
        assert [json.loads(next(events))["object"] for _ in range(3)] == ["chat.completion.chunk"] * 3
        left = many.wait_for_stream()
    assert_left(many, left)


@pytest.mark.parametrize("stream", [False, True])
def test_before_the_answer_begins_is_told_as_a_status_of_its_own(tiny_llm: LLM, stream: bool) -> None:
    with Server({"tiny": with_engine(tiny_llm, token_budget=16)}) as server:
        with asked(server, LONG | {"stream": stream}):
            server.wait_for_stream()
        wait_until(lambda: server.state.http.responses.total() == 1)
        assert server.state.http.responses == {("POST", TEXT, 499): 1}


def test_in_prefill_and_the_log_says_how_long_it_was_there(many: Server, caplog: pytest.LogCaptureFixture) -> None:
    """It never had a token whose time could be taken."""
    with caplog.at_level("INFO", "kvik.engine"):
        with asked(many, LONG | {"cache_prompt": False, "stream": True}):
            left = many.wait_for_stream()
            wait_until(lambda: left.sequences[0].num_computed_tokens > 0)
            before_s = time.perf_counter()
        wait_until(lambda: bool(caplog.records))
    (record,) = caplog.records
    submitted_s = left.sequences[0].costs.submitted_s
    assert submitted_s is not None
    assert record.__dict__["finish_reason"] == "abort"
    assert record.__dict__["seconds"] >= round(before_s - submitted_s, 4) > 0


def test_an_embedding(many: Server) -> None:
    with asked(many, {"input": [LONG["prompt"], LONG["prompt"][1:]], "pooling": "mean"}, "/v1/embeddings") as _:
        left = many.wait_for_stream()
        many.wait_for_stream()
        wait_until(lambda: left.sequences[0].num_computed_tokens > 0)
    assert_left(many, left)


def test_a_slow_reader_is_given_up(many: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 26: what waits for it is bounded; then its request ends, and others never notice."""
    monkeypatch.setattr(async_llm, "MAX_PIECES", 64)
    body = DECODES | {"n": 8, "logprobs": 5, "max_tokens": 4000, "stream": True}
    with asked(many, body) as connection:
        slow = many.wait_for_stream()
        wait_until(lambda: slow.branches[0].finish_reason is not None)
        assert {branch.finish_reason for branch in slow.branches} == {"abort"}
        assert many.client.ok(TEXT, {"prompt": [3], "max_tokens": 4, "ignore_eos": True})["choices"]
        assert b'"code":"slow_reader"' in read_all(connection)
    many.assert_idle()


@pytest.fixture
def hasty(tiny_llm: LLM) -> Iterator[Server]:
    """A server that soon gives up on those who do not read an answer that is over."""
    with Server({"tiny": with_engine(tiny_llm)}, unread_s=0.2) as server:
        yield server


def test_who_never_reads_loses_the_connection_too(hasty: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request, its task and its descriptor go; and the failure is counted though nothing else runs."""
    monkeypatch.setattr(async_llm, "MAX_PIECES", 1024)
    with asked(hasty, DECODES | {"n": 8, "logprobs": 5, "max_tokens": 4000, "stream": True}) as connection:
        slow = hasty.wait_for_stream()
        wait_until(lambda: connections_of(hasty) == hasty.state.http.num_open == 0)
        assert {type(branch.error) for branch in slow.branches} == {SlowReader}
        assert not read_all(connection).endswith(b"0\r\n\r\n")
    meter = hasty.served.meter
    wait_until(lambda: meter.failed.total() == 8 and not meter.is_decoding)
    hasty.assert_idle()


def test_what_is_left_of_a_whole_answer_is_not_kept_for_ever(hasty: Server) -> None:
    """It is in the connection's buffer, and no task waits for it."""
    prompt = [5 + at % 290 for at in range(4000)]
    with asked(hasty, {"prompt": [prompt] * 40, "max_tokens": 1, "logprobs": 5, "echo": True}):
        hasty.wait_for_stream()
        wait_until(lambda: connections_of(hasty) == hasty.state.http.num_open == 0)


def test_who_pauses_while_tokens_come_keeps_the_connection(hasty: Server) -> None:
    with asked(hasty, DECODES | {"n": 8, "logprobs": 5, "max_tokens": 800, "stream": True}) as connection:
        paused = hasty.wait_for_stream()
        wait_until(lambda: paused.num_waiting > 64)
        with hasty.engine.lock:
            assert not paused.is_done
            time.sleep(1)
            assert connections_of(hasty) == 1
        events = read_all(connection)
    assert events.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b'"error"' not in events


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "Go on", "max_output_tokens": 4}),
    ],
)
def test_a_whole_answer_of_items_waits_for_nobody_s_step(
    many: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """Its completions are finished: it is made while another thread has the engine's lock."""
    replay = ItemWriter.replay
    has_waited: list[bool] = []

    def replay_beside_a_step(writer: ItemWriter) -> None:
        has_lock, is_made = threading.Event(), threading.Event()

        def step() -> None:
            with many.engine.lock:
                has_lock.set()
                has_waited.append(not is_made.wait(2))

        thread = threading.Thread(target=step)
        thread.start()
        has_lock.wait()
        replay(writer)
        is_made.set()
        thread.join()

    monkeypatch.setattr(ItemWriter, "replay", replay_beside_a_step)
    assert many.client.ok(path, body)
    assert has_waited == [False]


def test_many_that_time_out(one: Server) -> None:
    """As impatient clients do: all leave, and then one is answered."""
    for _ in range(20):
        with asked(one, DECODES | {"stream": True}) as _:
            pass
    wait_until(lambda: one.client.post(TEXT, {"prompt": [3], "max_tokens": 1}).status == 200)
    one.assert_idle()
    assert all(branch.finish_reason is not None for stream in one.streams for branch in stream.branches)


def test_half_a_request(many: Server) -> None:
    """A client that leaves within its own body."""
    with socket.create_connection(("127.0.0.1", many.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"prompt": '
        )
    assert many.client.ok(TEXT, {"prompt": [3], "max_tokens": 1})["choices"]
    many.assert_idle()


def test_the_queue_is_full(one: Server) -> None:
    """Row 24: 429, told when to come again; with many prompts, all or none."""
    with asked(one, DECODES) as _, asked(one, DECODES) as _:
        wait_until(lambda: bool(one.engine.scheduler.running and one.engine.scheduler.waiting))
        for stream in (False, True):
            answer = one.client.post(TEXT, {"prompt": ["a", "b"], "max_tokens": 1, "stream": stream})
            assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
            assert answer.error["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert len(one.engine.scheduler.waiting) == 1
        # What could never be queued is no matter of coming again.
        answer = one.client.post(TEXT, {"prompt": ["a", "b", "c"], "max_tokens": 1})
        assert (answer.status, answer.error["param"]) == (400, "prompt")
    one.assert_idle()


def test_one_of_a_batch_fails(many: Server) -> None:
    """Row 30: it alone gets an error, streamed or not; the others' tokens are what they would be without it."""

    def ask(body: dict[str, Any]) -> Any:
        return many.client.ok(TEXT, body | {"max_tokens": 200, "return_token_ids": True, **ENDLESS})

    alone = ask({"prompt": [9, 10, 11]})["choices"][0]["token_ids"]
    many.streams  # noqa: B018  # forget that one
    with asked(many, DECODES | {"stream": True}) as streamed, asked(many, DECODES | {"seed": 2}) as whole:
        failing = [many.wait_for_stream().branches[0] for _ in range(2)]
        wait_until(lambda: all(branch.num_completion_tokens > 2 for branch in failing))
        for branch in failing:
            branch.text.add = _fail  # type: ignore[method-assign]
        assert ask({"prompt": [9, 10, 11]})["choices"][0]["token_ids"] == alone
        events, answer = read_all(streamed), read_all(whole)
    assert events.count(b'"finish_reason":"') == 0
    assert events.index(b'data: {"error":{"message":') < events.index(b"data: [DONE]")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"boom" not in events + answer
    many.assert_idle()


def test_a_dead_engine(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that runs gets an error, and what comes later 503; nobody is told where or how it died."""

    def die(*_: object) -> None:
        raise RuntimeError("<object at 0x7f00> in /home/somebody/file.py")

    with Server({"tiny": with_engine(tiny_llm)}) as server:
        with asked(server, DECODES | {"stream": True}) as streamed:
            stream = server.wait_for_stream()
            wait_until(lambda: bool(stream.branches[0].num_completion_tokens))
            monkeypatch.setattr(server.engine, "step", die)
            events = read_all(streamed)
        later = server.client.post(TEXT, {"prompt": [3], "max_tokens": 1})
        assert not server.served.is_healthy
    assert b'"code":"engine_dead"' in events
    assert events.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert (later.status, later.error["code"]) == (503, "engine_dead")
    assert int(later.headers["retry-after"]) <= 120
    for data in (events, later.data):
        assert b"0x7f00" not in data
        assert b"/home" not in data


def _fail(*_: object, **__: object) -> None:
    raise ValueError("boom")


def connections_of(server: Server) -> int:
    return len(server._server.server_state.connections)


def read_all(connection: socket.socket) -> bytes:
    """What is sent until the server closes."""
    connection.settimeout(60)
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))
