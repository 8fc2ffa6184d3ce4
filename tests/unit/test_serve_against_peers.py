"""The comparison of servers: what it accepts as measured, and its table."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import pytest

from kvik.client.completions import Reply
from kvik.measure.load import Load, Message, Workload
from kvik_runs import NotAvailable
from serve_against_peers import figures, listening, put_on, table

WORKLOAD, LOAD = Workload(num_turns=2, max_tokens=3), Load(concurrency=2, num_requests=4)


class Fake:
    """Writes `count` tokens, and says so."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def ask(self, messages: Sequence[Message], max_tokens: int, reply: Reply) -> None:
        reply.text_times_s += [time.perf_counter() + 0.01 * index for index in range(self.count)]
        reply.usage = {
            "prompt_tokens": 10,
            "completion_tokens": self.count,
            "prompt_tokens_details": {"cached_tokens": 5},
        }

    def close(self) -> None:
        pass


def test_figures_and_the_table() -> None:
    found = figures(asyncio.run(put_on(lambda: Fake(3), WORKLOAD, LOAD)))
    assert found["cached"] == 0.5
    assert found["token p50"] == pytest.approx(0.01, rel=0.5)
    fast, slow, middle = ({**found, "tok/s": rate} for rate in (900.0, 100.0, 300.0))
    lines = table({2: {"theirs": [slow, slow, fast], "ours": [fast, slow, middle]}}, "theirs")
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [["theirs", "100"], ["ours", "300"]]
    assert lines[3].endswith("| 50% | 3.00 |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_an_answer_that_ended_early_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="not every answer has 3 tokens"):
        asyncio.run(put_on(lambda: Fake(2), WORKLOAD, LOAD))


def test_a_server_that_does_not_start_tells_why() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no room')"]
    with pytest.raises(NotAvailable, match="no room"), listening(lambda port: command):
        pass
