"""The HTTP client: addresses, server-sent events, and servers that misbehave."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_server import DONE, Behave, Exchange, FakeServer, answer, chunk, event, usage
from kvik.client.completions import CHAT_PATH, Reply, Server, until_stopped
from kvik.client.http import MAX_EVENT_BYTES, Connection, EventParser, EventTooLarge, parse_url
from kvik.errors import InvalidInput, RemoteError

BODY = {"model": "m", "messages": [{"role": "user", "content": "a b c d"}], "max_tokens": 3}


def ask(url: str, *, timeout_s: float = 30.0, api_key: str | None = None) -> Reply:
    reply = Reply()

    async def work() -> None:
        connection = Connection(parse_url(url), timeout_s=timeout_s)
        try:
            await Server(api_key).ask(connection, CHAT_PATH, BODY, reply)
        finally:
            connection.close()

    asyncio.run(work())
    return reply


def error_of(behave: Behave, **options: Any) -> RemoteError:
    with FakeServer(behave) as server, pytest.raises(RemoteError) as caught:
        ask(server.url, **options)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://host/some/path", "https://host:443/some/path"),
        ("http://[::1]:80/v1", "http://[::1]:80"),
    ],
)
def test_an_address(url: str, shown: str) -> None:
    assert str(parse_url(url)) == shown


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://h:99999", "http://h/?q=1", "http://a b", "http://ü"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidInput, match="--url"):
        parse_url(url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_url("http://me:secret@host")
    assert "secret" not in str(caught.value)


@given(
    st.lists(st.lists(st.binary(max_size=9).map(lambda line: line.translate(None, b"\r\n")), min_size=1, max_size=3)),
    st.sampled_from([b"\n", b"\r\n"]),
    st.data(),
)
def test_events_are_the_same_however_the_bytes_are_cut(
    events: list[list[bytes]], end: bytes, data: st.DataObject
) -> None:
    stream = b": ping" + end + end
    for lines in events:
        stream += b"event: x" + end + b"".join(b"data: " + line + end for line in lines) + end
    parser, found, at = EventParser(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, 20))
        found += parser.feed_named(stream[at : at + size])
        at += size
    assert found == [(b"x", b"\n".join(lines)) for lines in events]


def test_an_event_has_the_name_that_was_said_of_it() -> None:
    parser = EventParser()
    assert parser.feed_named(b"event:lost\n\nevent: a\ndata: 1\n\ndata: 2\n\n") == [(b"a", b"1"), (b"", b"2")]
    assert parser.feed(b"event: b\ndata: 3\n\n") == [b"3"]


@pytest.mark.parametrize("line", [b"x" * (MAX_EVENT_BYTES + 1), b"data: 1234567890\n" * (MAX_EVENT_BYTES // 16 + 1)])
def test_an_event_without_an_end_is_given_up(line: bytes) -> None:
    parser = EventParser()
    with pytest.raises(EventTooLarge):
        parser.feed(line)
    assert EventParser(2 * len(line)).feed(line) == []


def test_an_answer_is_read_whole() -> None:
    with FakeServer() as server:
        reply = ask(server.url, api_key="sk-1")
    assert (reply.text, reply.finish_reason) == ("w0 w1 w2 ", "length")
    assert (reply.num_prompt_tokens, reply.num_cached_tokens, reply.num_completion_tokens) == (4, 2, 3)
    assert len(reply.text_times_s) == 3
    assert reply.server_timing == "queue;dur=2, prefill;dur=4.5"
    exchange = server.exchanges[0]
    assert exchange.headers["authorization"] == "Bearer sk-1"
    assert exchange.body == {**BODY, "stream": True, "stream_options": {"include_usage": True}}


def test_a_connection_is_kept_and_opened_again_after_the_server_closed_it() -> None:
    ports = []

    def note_port(exchange: Exchange) -> None:
        ports.append(exchange.handler.client_address[1])
        answer(exchange)
        if exchange.number == 1:
            exchange.break_off()

    async def ask_often(server: FakeServer) -> None:
        connection = Connection(parse_url(server.url), timeout_s=30)
        for _ in range(4):
            await Server().ask(connection, CHAT_PATH, BODY, Reply())
            if len(ports) == 2:
                while not connection._reader.at_eof():  # type: ignore[union-attr]
                    await asyncio.sleep(0.005)
        connection.close()

    with FakeServer(note_port) as server:
        asyncio.run(ask_often(server))
    assert ports[0] == ports[1] != ports[2] == ports[3]


def test_a_request_on_a_kept_connection_that_closes_unanswered_is_sent_once_more() -> None:
    def close_second(exchange: Exchange) -> None:
        if exchange.number in (1, 3, 4):
            exchange.break_off()
        else:
            answer(exchange)

    async def ask_twice(server: FakeServer) -> None:
        connection = Connection(parse_url(server.url), timeout_s=30)
        for _ in range(2):
            await Server().ask(connection, CHAT_PATH, BODY, Reply())
        with pytest.raises(RemoteError, match="closed the connection"):
            await Server().ask(connection, CHAT_PATH, BODY, Reply())

    with FakeServer(close_second) as server:
        asyncio.run(ask_twice(server))
    assert len(server.exchanges) == 5


def test_llama_cpp_tells_tokens_by_timings_and_others_nothing() -> None:
    def with_timings(exchange: Exchange) -> None:
        exchange.start()
        last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        exchange.send(chunk("a"), event({**last, "timings": {"prompt_n": 3, "cache_n": 9, "predicted_n": 1}}))
        exchange.end()  # without [DONE], which some leave out

    with FakeServer(with_timings) as server:
        reply = ask(server.url)
    assert (reply.num_prompt_tokens, reply.num_cached_tokens, reply.num_completion_tokens) == (12, 9, 1)
    assert Reply(usage={"prompt_tokens": "many", "prompt_tokens_details": 7}).num_prompt_tokens is None
    assert Reply(usage={"prompt_tokens_details": 7}).num_cached_tokens is None


def test_reasoning_counts_as_text_and_is_none_of_the_answer() -> None:
    def think(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(event({"choices": [{"delta": {"reasoning_content": "hm"}}]}), chunk("a"), chunk(finish="stop"))
        exchange.send(usage(4, 2), DONE)
        exchange.end()

    with FakeServer(think) as server:
        reply = ask(server.url)
    assert (reply.text, reply.reasoning, len(reply.text_times_s)) == ("a", ["hm"], 2)
    assert reply.num_cached_tokens is None


def sends(*parts: bytes) -> Behave:
    def behave(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(*parts)
        exchange.end()

    return behave


def breaks_off(exchange: Exchange) -> None:
    exchange.start()
    exchange.send(chunk("a"))
    exchange.break_off()


def says_nothing(exchange: Exchange) -> None:
    exchange.break_off()


def is_no_stream(exchange: Exchange) -> None:
    exchange.fail(200, {"choices": []})


def is_no_http(exchange: Exchange) -> None:
    exchange.handler.wfile.write(b"hello\r\n\r\n")
    exchange.break_off()


@pytest.mark.parametrize(
    ("behave", "kind", "message"),
    [
        (breaks_off, "disconnected", "closed the connection before its answer was whole"),
        (says_nothing, "disconnected", "closed the connection before its answer was whole"),
        (sends(chunk("a")), "disconnected", "ended the stream before its answer was whole"),
        (sends(chunk("a"), event({"error": {"message": "out of luck"}}), DONE), "error event", "out of luck"),
        (sends(chunk("a"), event({"error": "plain"})), "error event", "plain"),
        (sends(event(b"not json")), "not JSON", "no chunk of an answer"),
        (sends(event(b"[" * 100_000)), "not JSON", "no chunk of an answer"),
        (sends(event({"choices": [{"delta": {"content": 7}}]})), "not JSON", "no chunk of an answer"),
        (sends(*[b"data: " + b"x" * 65_000] * 20), "too large", "an event of more than 1,048,576 bytes"),
        (is_no_stream, "no stream", "application/json"),
        (is_no_http, "bad HTTP", "does not speak HTTP/1.1"),
    ],
)
def test_a_server_that_misbehaves(behave: Behave, kind: str, message: str) -> None:
    error = error_of(behave)
    assert error.kind == kind
    assert message in error.message


@pytest.mark.parametrize(
    ("status", "body", "headers", "message", "hint"),
    [
        (401, {"error": {"message": "no key"}}, {}, "answers 401: no key", "KVIK_API_KEY"),
        (404, {"error": {"message": "no such model"}}, {}, "answers 404: no such model", "/v1/models"),
        (429, {"error": "busy"}, {"retry_after": "7"}, "answers 429: busy", "(Retry-After: 7 s)"),
        (500, b"<html>oops</html>", {}, "answers 500: <html>oops</html>", "log"),
        (307, b"", {"location": "http://there"}, "answers 307", "http://there"),
        (400, {"detail": "vLLM's"}, {}, "answers 400: vLLM's", "message"),
    ],
)
def test_a_refusal_carries_the_servers_words(
    status: int, body: Any, headers: dict[str, str], message: str, hint: str
) -> None:
    error = error_of(lambda exchange: exchange.fail(status, body, **headers))
    assert (error.kind, error.status) == (f"HTTP {status}", status)
    assert error.message.endswith(message)
    assert hint in error.hint


def test_silence_ends_by_the_timeout() -> None:
    go_on = threading.Event()

    def wait(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("a"))
        go_on.wait(30)

    with FakeServer(wait) as server:
        with pytest.raises(RemoteError, match=r"was silent for 0\.05 s") as caught:
            ask(server.url, timeout_s=0.05)
        go_on.set()
    assert caught.value.kind == "timeout"


def test_nobody_listens() -> None:
    with FakeServer() as server:
        pass
    with pytest.raises(RemoteError, match="cannot be reached: Connection refused") as caught:
        ask(server.url)
    assert caught.value.kind == "connect"
    assert "kvik serve" in caught.value.hint


def test_stopping_disconnects() -> None:
    stopped = threading.Event()

    def write_on(exchange: Exchange) -> None:
        exchange.start()
        while not exchange.is_gone:
            exchange.send(chunk("a"))
            stopped.set()

    async def work(url: str) -> bool:
        connection, reply = Connection(parse_url(url), timeout_s=30), Reply()
        asking = Server().ask(connection, CHAT_PATH, BODY, reply)
        return await until_stopped(asking, stopped.is_set)

    with FakeServer(write_on) as server:
        assert not asyncio.run(work(server.url))
        server.wait_until(lambda: server.exchanges[0].is_gone)


@pytest.mark.parametrize(
    ("models", "message"),
    [(b'{"data":[]}', "has no model"), (b"[]", "none"), (b"{", "none"), (b" " * (5 << 20), "more than")],
)
def test_a_list_of_models_that_is_none(models: bytes, message: str) -> None:
    async def find(url: str) -> str:
        connection = Connection(parse_url(url), timeout_s=30)
        try:
            return await Server().first_model(connection)
        finally:
            connection.close()

    with FakeServer(models=models) as server, pytest.raises(RemoteError, match=message):
        asyncio.run(find(server.url))


@pytest.mark.parametrize("key", ["with space", "line\nbreak", "ü", "x" * 5000])
def test_a_key_that_no_header_takes_is_not_repeated(key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Server(key)
    assert key not in str(caught.value)
