"""`kvik bench --url`: what a load asks, what it counts, and servers that fail under it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvik
from fake_server import DONE, Behave, Exchange, FakeServer, answer, chunk, usage
from kvik.cli.bench_load import table_lines
from kvik.cli.terminal import INTERRUPTED
from kvik.client.completions import Reply
from kvik.errors import RemoteError
from kvik.measure.load import WORDS, Load, Message, Record, Workload, arrivals, run_load
from kvik.measure.load_summary import distribution, parse_server_timing, percentile, summarise

SHORT = ("--prompt", "4", "--max-tokens", "3")


def bench(kvik: Kvik, server: FakeServer, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = kvik("bench", "--url", server.url, "--json", *SHORT, *arguments)
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def after_warm_up(behave: Behave) -> Behave:
    return lambda exchange: answer(exchange) if exchange.number == 0 else behave(exchange)


def test_percentiles_are_measured_values_by_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0, 1, 50, 90, 99, 100)] == [1, 1, 50, 90, 99, 100]
    assert [percentile([1.0, 2.0, 3.0], share) for share in (50, 90)] == [2, 3]
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2
    assert distribution([3.0, None, 1.0]) == {"count": 2, "mean": 2, "p50": 1, "p90": 3, "p99": 3, "max": 3}
    assert distribution([None]) is None


def test_server_timing() -> None:
    header = 'queue;dur=2, prefill;desc="a";dur=4.5, cached, broken;dur=x, odd;dur=nan'
    assert parse_server_timing(header) == {"queue": 0.002, "prefill": 0.0045}


def test_arrivals_are_those_of_their_seed_and_rate() -> None:
    first = list(itertools.islice(arrivals(50.0, 3), 5000))
    assert first == list(itertools.islice(arrivals(50.0, 3), 5000))
    assert first != list(itertools.islice(arrivals(50.0, 4), 5000))
    assert first == sorted(first)
    assert first[-1] == pytest.approx(100, rel=0.05)
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *first])]
    deviation = (sum((gap - 0.02) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(0.02, rel=0.1)  # as of exponential gaps


def test_texts_follow_from_the_seed_and_share_only_the_system_prompt() -> None:
    workload = Workload(system_words=20, turn_words=5, seed=7)
    assert workload == Workload(system_words=20, turn_words=5, seed=7)
    assert len(workload.system()[0]["content"].split()) == 20
    texts = {workload.message(chat, turn)["content"] for chat in range(20) for turn in range(5)}
    assert len(texts) == 100
    assert workload.system() != Workload(system_words=20, seed=8).system()
    assert len(set(WORDS)) == len(WORDS)


def test_clients_hold_chats_of_several_turns_over_one_system_prompt(kvik: Kvik) -> None:
    with FakeServer() as server:
        report = bench(kvik, server, "--concurrency", "2", "--turns", "3", "--shared-prefix", "10")
    [row] = report["rows"]
    assert (row["num_requests"], row["num_answered"], row["errors"]) == (6, 6, {})
    warm_up, *bodies = server.bodies()
    chats: dict[str, list[list[Message]]] = {}
    for body in bodies:
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("first", 3, True)
        chats.setdefault(body["messages"][1]["content"], []).append(body["messages"])
    assert len(chats) == 2
    assert len({messages[0]["content"] for turns in chats.values() for messages in turns}) == 1
    for turns in chats.values():
        assert [len(messages) for messages in turns] == [2, 4, 6]
        assert turns[2][:4] == turns[1]
        assert turns[2][4] == {"role": "assistant", "content": "w0 w1 w2 "}
        assert len(turns[0][1]["content"].split()) == 5  # its number and four words
    assert warm_up["messages"][0] != bodies[0]["messages"][0]


def test_the_figures_add_up(kvik: Kvik) -> None:
    with FakeServer() as server:
        report = bench(kvik, server, "--concurrency", "1,3", "--turns", "2", "--requests", "7")
    assert [row["load"]["concurrency"] for row in report["rows"]] == [1, 3]
    measured = server.exchanges[1:]
    for row, exchanges in zip(report["rows"], (measured[:7], measured[7:]), strict=True):
        lengths = [len(exchange.prompt_words()) for exchange in exchanges]
        assert row["num_answered"] == 7
        assert row["num_completion_tokens"] == 21
        assert row["completion_tokens_per_s"] == pytest.approx(21 / row["duration_s"])
        assert row["requests_per_s"] == pytest.approx(7 / row["duration_s"])
        assert row["prompt_tokens"]["mean"] == pytest.approx(sum(lengths) / 7)
        assert row["cached_share"] == pytest.approx(sum(length // 2 for length in lengths) / sum(lengths))
        first, later = (row["time_to_first_token_s"][name] for name in ("first_turn", "later_turns"))
        assert first["count"] + later["count"] == row["time_to_first_token_s"]["all"]["count"] == 7
        assert row["time_between_chunks_s"]["count"] == 14
        assert row["latency_s"]["count"] == row["time_per_output_token_s"]["count"] == 7
        assert row["server_timing_s"]["prefill"]["p50"] == 0.0045
        assert row["finish_reasons"] == {"length": 7}
        assert (row["num_ended_early"], row["num_uncounted"]) == (0, 0)
    # No text of the first load is one of the second's.
    texts = [{exchange.body["messages"][0]["content"] for exchange in part} for part in (measured[:7], measured[7:])]
    assert not texts[0] & texts[1]


def test_chats_that_arrive_at_a_rate(kvik: Kvik) -> None:
    with FakeServer() as server:
        report = bench(kvik, server, "--rate", "500", "--turns", "2", "--requests", "9")
    [row] = report["rows"]
    assert row["num_answered"] == 9
    assert row["time_to_first_token_s"]["first_turn"]["count"] == 5
    assert row["send_delay_s"]["count"] == 9


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A client that stands still for a while owes that to the requests which were due meanwhile."""
    stall_s = 0.3

    class Stalls:
        num_asked = 0

        async def ask(self, messages: Sequence[Message], max_tokens: int, reply: Reply) -> None:
            Stalls.num_asked += 1
            if Stalls.num_asked == 1:
                threading.Event().wait(stall_s)  # the whole event loop

        def close(self) -> None:
            pass

    result = asyncio.run(run_load(Stalls, Workload(), Load(rate=200.0, num_requests=20)))
    late = [record for record in result.records if record.begun_s - record.due_s > stall_s / 3]
    assert len(late) > 5
    assert summarise(result)["latency_s"]["p50"] > stall_s / 4


def test_a_duration_ends_the_load(kvik: Kvik) -> None:
    with FakeServer() as server:
        report = bench(kvik, server, "--concurrency", "2", "--duration", "0.1")
    [row] = report["rows"]
    assert row["num_answered"] == row["num_requests"] == len(server.exchanges) - 1
    assert row["duration_s"] >= 0.1


def fails_by_number(exchange: Exchange) -> None:
    match exchange.number:
        case 1:
            exchange.fail(429, {"error": {"message": "busy"}}, retry_after="3600")
        case 2:
            exchange.start()
            exchange.send(chunk("a"))
            exchange.break_off()
        case 3:
            exchange.start()
            exchange.send(chunk("a"), b'data: {"error":{"message":"x"}}\n\n')
            exchange.end()
        case 4:
            exchange.start()
            exchange.send(b"data: nonsense\n\n")
            exchange.end()
        case 5:
            exchange.start()
            exchange.send(b"data: " + b"x" * (2 << 20))
        case _:
            answer(exchange)


def test_failures_are_counted_by_kind_and_none_is_tried_again(kvik: Kvik) -> None:
    with FakeServer(fails_by_number) as server:
        report = bench(kvik, server, "--concurrency", "1", "--requests", "7", code=1)
    [row] = report["rows"]
    kinds = ("HTTP 429", "disconnected", "error event", "not JSON", "too large")
    assert row["errors"] == dict.fromkeys(kinds, 1)
    assert (row["num_requests"], row["num_answered"]) == (7, 2)
    assert len(server.exchanges) == 8
    assert row["latency_s"]["count"] == 2
    notes = [line for line in table_lines(report) if "failed" in line]
    assert notes == [f"1 client: 1 failed: {kind}" for kind in kinds]


def test_a_failure_ends_its_chat(kvik: Kvik) -> None:
    def fail_second_turns(exchange: Exchange) -> None:
        if len(exchange.body["messages"]) > 1:
            exchange.fail(500, {"error": {"message": "x"}})
        else:
            answer(exchange)

    with FakeServer(fail_second_turns) as server:
        report = bench(kvik, server, "--concurrency", "1", "--turns", "3", "--requests", "4", code=1)
    assert report["rows"][0]["errors"] == {"HTTP 500": 2}
    assert [len(body["messages"]) for body in server.bodies()[1:]] == [1, 3, 1, 3]


def test_a_slow_server_is_given_up(kvik: Kvik) -> None:
    go_on = threading.Event()

    def hang(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("a"))
        go_on.wait(30)

    with FakeServer(after_warm_up(hang)) as server:
        report = bench(kvik, server, "--concurrency", "2", "--timeout", "0.5", code=1)
        go_on.set()
    assert report["rows"][0]["errors"] == {"timeout": 2}
    assert report["rows"][0]["latency_s"] is None


def test_a_server_without_usage(kvik: Kvik) -> None:
    def tell_nothing(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("a"), chunk("b"), chunk(finish="stop"), DONE)
        exchange.end()

    with FakeServer(tell_nothing) as server:
        report = bench(kvik, server, "--concurrency", "2")
    [row] = report["rows"]
    assert (row["num_uncounted"], row["num_completion_tokens"]) == (2, 4)
    assert (row["prompt_tokens"], row["cached_share"]) == (None, None)
    assert "2 clients: 2 of 2 answers came without usage: their chunks are counted" in table_lines(report)


def test_answers_that_end_early_are_told(kvik: Kvik) -> None:
    def end_early(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("a"), chunk(finish="stop"), usage(4, 1), DONE)
        exchange.end()

    with FakeServer(end_early) as server:
        report = bench(kvik, server, "--concurrency", "2")
    assert report["rows"][0]["num_ended_early"] == 2
    line = "2 clients: 2 of 2 answers ended before 3 tokens, although ignore_eos was sent"
    assert line in table_lines(report)


def test_a_server_that_refuses_ignore_eos_is_asked_without(kvik: Kvik) -> None:
    def strict(exchange: Exchange) -> None:
        if "ignore_eos" in exchange.body:
            exchange.fail(400, {"error": {"message": "unknown field ignore_eos"}})
        else:
            answer(exchange)

    with FakeServer(strict) as server:
        report = bench(kvik, server, "--concurrency", "2")
    assert report["ignore_eos"] is False
    assert report["rows"][0]["num_answered"] == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_server_that_answers_nothing_ends_it_before_the_load(kvik: Kvik, status: int) -> None:
    def refuse(exchange: Exchange) -> None:
        exchange.fail(status, {"error": {"message": "no"}})

    with FakeServer(refuse) as server:
        result = kvik("bench", "--url", server.url, *SHORT)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"answers {status}: no" in result.stderr
    assert len(server.exchanges) <= 2


def test_ctrl_c_shows_what_was_measured(kvik: Kvik) -> None:
    def behave(exchange: Exchange) -> None:
        if exchange.number < 3:
            answer(exchange)
            return
        exchange.start()
        exchange.send(chunk("a"))
        os.kill(os.getpid(), signal.SIGINT)
        while not exchange.is_gone:
            exchange.send(chunk(""))

    with FakeServer(behave) as server:
        report = bench(kvik, server, "--concurrency", "1", "--requests", "50", code=INTERRUPTED)
        server.wait_until(lambda: server.exchanges[-1].is_gone)
    [row] = report["rows"]
    assert report["is_interrupted"]
    assert (row["num_requests"], row["num_answered"], row["num_interrupted"]) == (3, 2, 1)
    assert row["latency_s"]["count"] == 2


def test_the_tables(kvik: Kvik, tmp_path: Path) -> None:
    saved = tmp_path / "load.json"
    with FakeServer() as server:
        text = kvik("bench", "--url", server.url, *SHORT, "--turns", "2", "--concurrency", "1,2")
        markdown = kvik("bench", "--url", server.url, *SHORT, "--markdown", "--rate", "99", "--save", str(saved))
    lines = text.stdout.splitlines()
    assert lines[0].startswith(f"first at {server.url}: chats of 2 turns over 0 words in common, 4 words a turn")
    assert lines[0].endswith("seed 0")
    assert lines[2].split() == ["1", "client", "2", "clients"]
    names = ("answered", "generated tok/s", "cached", "TTFT, first turn", "TTFT, later turns", "server: queue")
    assert all(any(line.startswith(name) for line in lines) for name in names)
    rows = [line for line in markdown.stdout.splitlines() if line.startswith("|")]
    assert rows[:2] == ["|  | 99 chats/s |", "|---|---:|"]
    assert any(line.startswith("| sent too late by | ") for line in rows)
    assert not any("later turns" in line for line in rows)
    assert json.loads(saved.read_text())["kind"] == "kvik bench --url"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "2"], "--batch has no meaning with --url"),
        (["--profile", "--csv"], "--profile, --csv have no meaning with --url"),
        (["--kv-memory", "1GiB"], "--kv-memory has no meaning with --url"),
        (["--rate", "3", "--concurrency", "2"], "--rate and --concurrency are both given"),
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--duration", "inf"], "--duration is inf"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--requests", "0"], "--requests is 0"),
        (["--prompt", "4,8"], "more than one length"),
        (["--json", "--markdown"], "are both given"),
    ],
)
def test_what_is_refused_with_a_server(kvik: Kvik, options: list[str], message: str) -> None:
    result = kvik("bench", "--url", "http://127.0.0.1:1", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    "options", [["--rate", "3"], ["--concurrency", "2"], ["--turns", "2"], ["--stop-at-eos"], ["--api-key", "k"]]
)
def test_what_is_refused_without_one(kvik: Kvik, options: list[str]) -> None:
    result = kvik("bench", *options)
    assert result.exit_code == 2
    assert f"{options[0]} without --url" in result.stderr


def test_a_record_of_no_text_has_no_first_token() -> None:
    assert Record(0, 0, 1.0).time_to_first_token_s is None
    assert RemoteError("x", hint="y", kind="timeout").status is None
