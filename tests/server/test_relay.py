"""A stream that another replica goes on with: what the client has is not sent again, and what differs is never sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvik.server.front.relay import Broken, Differs, Relay

pytestmark = pytest.mark.tiny

DONE = b"data: [DONE]\n\n"


def chunk(text: str, choice: int = 0, **others: Any) -> bytes:
    fields = {"id": "cmpl-1", "choices": [{"index": choice, "text": text}], **others}
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def named(kind: str, **fields: Any) -> bytes:
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def resumed(*parts: bytes) -> Relay:
    relay = Relay()
    assert relay.feed(b"".join(parts)) == b"".join(parts)
    relay.restart()
    return relay


def test_another_replica_goes_on_behind_what_the_client_has() -> None:
    relay = Relay()
    assert relay.feed(chunk("a") + chunk("b") + chunk("c")[:20]) == chunk("a") + chunk("b")
    relay.restart()
    whole = b": ping\n\n" + b"".join(map(chunk, "abcd")) + DONE
    parts = [relay.feed(whole[at : at + 7]) for at in range(0, len(whole), 7)]
    assert b"".join(parts) == b": ping\n\n" + chunk("c") + chunk("d") + DONE
    assert relay.is_over
    assert relay.failure is None


def test_choices_may_come_in_another_order() -> None:
    relay = resumed(chunk("a"), chunk("x", 1), chunk("b"))
    again = chunk("x", 1) + chunk("y", 1) + chunk("a") + chunk("b") + chunk("c")
    assert relay.feed(again) == chunk("y", 1) + chunk("c")


def test_usage_and_timings_may_differ() -> None:
    relay = resumed(chunk("a", usage={"cached": 0}), chunk("b", usage=None, timings={"n": 1}))
    assert relay.feed(chunk("a", usage={"cached": 7}) + chunk("b", timings={"n": 2}) + chunk("c")) == chunk("c")
    begun = named("message_start", message={"id": "msg_1", "usage": {"cached": 0}})
    relay = resumed(begun, named("content_block_start", index=0))
    again = named("message_start", message={"id": "msg_1", "usage": {"cached": 9}}) + named("ping")
    assert relay.feed(again + named("content_block_start", index=0)) == b""
    assert relay.feed(named("message_stop")) == named("message_stop")
    assert relay.is_over


def test_how_far_the_prompt_is_is_not_told_again() -> None:
    progress = b'data: {"choices":[],"prompt_progress":{"total":9}}\n\n'
    assert resumed(progress).feed(progress) == progress
    assert resumed(progress, chunk("a")).feed(progress + chunk("a") + chunk("b")) == chunk("b")


@pytest.mark.parametrize(
    ("before", "other"),
    [(chunk("a"), chunk("x")), (named("delta", text="a"), named("delta", text="x")), (DONE, chunk("a"))],
)
def test_what_differs_is_never_sent(before: bytes, other: bytes) -> None:
    relay = resumed(before, chunk("b"))
    sent = relay.feed(other + chunk("c"))
    assert isinstance(relay.failure, Differs)
    assert sent == b""


@pytest.mark.parametrize("code", ["shutting_down", "engine_dead", "engine_hung"])
def test_a_replica_that_says_that_it_ends_is_left(code: str) -> None:
    error = {"message": "it ends", "code": code}
    for told in (
        b"data: " + json.dumps({"error": error}).encode() + b"\n\n",
        named("error", **error),
        named("error", error={"type": "overloaded_error", "message": "it ends"}),
    ):
        relay = Relay()
        assert relay.feed(chunk("a") + told) == chunk("a"), "what came before is the client's"
        assert isinstance(relay.failure, Broken)
        relay.restart()
        assert relay.failure is None


def test_errors_of_the_request_itself_are_the_clients() -> None:
    told = b'data: {"error":{"message":"no","code":"slow_reader"}}\n\n' + DONE
    assert Relay().feed(told) == told


def test_tokens_are_noted_and_not_sent() -> None:
    relay = Relay()
    assert relay.feed(chunk("a") + b": tokens [[0,5],[2,7]]\n\n") == chunk("a")
    assert relay.written == [[5], [], [7]]
    relay.restart()
    relay.feed(b": tokens [[0,5],[0,6]]\n\n")
    assert relay.written == [[5, 6], [], [7]]


@pytest.mark.parametrize("data", [b"data: " + b"x" * 200, b"data: {no\n\n", b": tokens [1\n\n", b"event: a\n\n"])
def test_what_is_no_event_breaks_the_stream(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("kvik.server.front.relay.MAX_EVENT_BYTES", 100)
    relay = Relay()
    assert relay.feed(data) == b""
    assert isinstance(relay.failure, Broken)
