"""A server's state as a client keeps it up, from events that are made up; tests/cli/test_top.py has a server's own."""

from __future__ import annotations

from typing import Any

import pytest

from kvik.client.live import FREE, HELD, REUSABLE, SHARED, BlockCounts, LiveState, NotTold
from told import COUNTERS, change, model, row, state, told


def test_blocks_are_what_was_told_last() -> None:
    found = told(model(bytes([0, 1, 2, 3, 4, 255]), []))
    smol = found.models["smol"]
    assert smol.looks(0) == bytes([FREE, REUSABLE, HELD, HELD, SHARED, SHARED])
    assert smol.block_counts(0) == BlockCounts(held=4, shared=2, reusable=1, free=1)
    found.take(b"change", change(blocks=[[[0, 5], [4, 0]]]))
    assert smol.states == [bytearray([4, 1, 2, 3, 4, 0])]
    assert smol.block_counts(0) == BlockCounts(held=4, shared=2, reusable=1, free=1)
    assert (found.num_events, found.now_s) == (2, 102.0)


def test_a_request_keeps_what_a_change_does_not_say() -> None:
    found = told(model(b"\0", [row(1, "decode"), row(2, "done")]))
    requests = found.models["smol"].requests
    found.take(b"change", change(requests=[{"key": 1, "phase": "done", "num_written_tokens": 9}], gone=[2]))
    assert list(requests) == [1]
    assert (requests[1].phase, requests[1].num_written_tokens, requests[1].num_prompt_tokens) == ("done", 9, 1200)
    assert requests[1].written == "upon a time"
    found.take(b"change", change(requests=[row(3, "queued")], gone=[77]))
    assert list(requests) == [1, 3]


def test_what_follows_from_a_request() -> None:
    found = told(model(b"\0", [row(1, "decode"), row(2, "queued", first_token_s=None, num_written_tokens=0)]))
    first, second = found.models["smol"].requests.values()
    assert first.time_to_first_token_s == 0.5
    assert first.time_per_token_s == pytest.approx(0.1)
    assert first.num_blocks == 2
    assert second.time_to_first_token_s is second.time_per_token_s is None
    hidden = {name: value for name, value in row(3, "decode").items() if name not in ("prompt", "written")}
    (told_less,) = told(model(b"\0", [hidden])).models["smol"].requests.values()
    assert told_less.prompt is told_less.written is None


def test_running_ones_come_first_and_the_newest_ended_after_them() -> None:
    rows = [
        row(1, "done", last_token_s=200.0), row(2, "queued"), row(3, "done", last_token_s=300.0), row(4, "prefill"),
        row(5, "decode"), row(6, "done", last_token_s=None, submitted_s=250.0),
    ]  # fmt: skip
    smol = told(model(b"\0", rows)).models["smol"]
    assert [each.key for each in smol.ordered_requests] == [4, 5, 2, 3, 6, 1]


def test_rates_are_of_the_last_seconds() -> None:
    found = told(model(b"\0", []))
    smol = found.models["smol"]
    assert smol.rate("generated_tokens") is None
    for second in range(1, 21):
        written = 50 + (1000 if second <= 10 else 0) + 30 * second
        found.take(b"change", change(101.0 + second, counters=COUNTERS | {"generated_tokens": written}))
    assert smol.rate("generated_tokens") == pytest.approx(30)
    found.take(b"change", change(121.0, counters=COUNTERS | {"generated_tokens": 0}))  # of the same moment
    assert smol.rate("generated_tokens") == pytest.approx(30)
    assert smol.counters["generated_tokens"] == 0


def test_the_newest_of_the_history_gives_a_rate_at_once() -> None:
    names = ["at_s", "generated_tokens"]
    told_model = model(b"\0", [], history={"names": names, "rows": [[10.0, 0], [97.0, 10], [99.0, 30]]})
    assert told(told_model).models["smol"].rate("generated_tokens") == pytest.approx((50 - 10) / (101 - 97))


def test_hit_rate_and_misses() -> None:
    smol = told(model(b"\0", [])).models["smol"]
    assert smol.hit_rate == 0.7
    assert list(smol.misses.items()) == [("differs", 7), ("unseen", 2)]
    assert told(model(b"\0", [], counters={})).models["smol"].hit_rate is None


def test_a_new_state_takes_the_place_of_all() -> None:
    found = told(model(b"\0", [row(1, "decode")]), model(b"\1", [], name="other"))
    found.take(b"state", state(model(b"\0\0", [row(7, "done")])))
    assert list(found.models) == ["smol"]
    assert list(found.models["smol"].requests) == [7]


BAD: list[tuple[bytes, Any]] = [
    (b"ping", b"{}"),
    (b"state", b"[" * 100_000),
    (b"state", b"{}"),
    (b"state", state(model(b"\0", []) | {"states": ["?"]})),
    (b"state", state(model(b"\0", []) | {"states": ["AAAA"]})),
    (b"state", state(model(b"\0", []) | {"states": []})),
    (b"state", state(model(b"\0", [{"phase": "done"}]))),
    (b"state", state(model(b"\0", [{"key": 1, "phase": 7}]))),
    (b"state", state(model(b"\0", [{"key": [], "phase": "done"}]))),
    (b"change", change(name="another")),
    (b"change", change(blocks=[])),
    (b"change", change(blocks=[[[1], [0]]])),
    (b"change", change(blocks=[[[-1], [0]]])),
    (b"change", change(blocks=[[[0], [256]]])),
    (b"change", change(blocks=[[[0, 0], [1]]])),
    (b"change", change(requests=[{"key": 1, "kv_bytes": "many"}])),
]


@pytest.mark.parametrize(("name", "data"), BAD)
def test_an_event_that_is_none_of_kviks(name: bytes, data: bytes) -> None:
    found = told(model(b"\0", []))
    with pytest.raises(NotTold):
        found.take(name, data)
    assert found.num_events == 1


def test_before_the_first_event_nothing_can_change() -> None:
    with pytest.raises(NotTold, match="smol"):
        LiveState().take(b"change", change())
