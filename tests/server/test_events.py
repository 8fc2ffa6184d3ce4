"""`/v1/events`: what watchers are told is what the engine is, each is told his own, and nobody costs nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from families.goldens import golden_of
from kept_server import KEYS, KeptServer
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.server.live import watcher as watching_module
from kvik.server.live.history import MAX_SAMPLES, History
from kvik.server.live.hub import INTERVAL_S, MAX_SHARE, Viewer, Watcher, smoothed
from kvik.server.live.watcher import MAX_ENDED, STORED, ModelWatch, state_of
from kvik.server.served import ServedModel
from live_server import gated
from server_process import PATIENCE_S, wait_until, with_engine

LONG = "The password of the safe is swordfish. " * 4


class Watching:
    """A watcher that keeps up what it is told, as the page does."""

    def __init__(self, response: HTTPResponse) -> None:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        self._response = response
        self.raw = b""
        self.num_states = self.num_changes = 0
        self.history: dict[str, Any] = {}
        self.times_s: list[float] = []
        self.states: list[bytearray] = []
        self.requests: dict[int, dict[str, Any]] = {}
        self.counters: dict[str, float] = {}
        self.evicted: list[int] = []
        self.hits: dict[int, int] = {}

    def read(self) -> bool:
        """The next message, of the first model; False at the end."""
        name = self._response.readline()
        data = self._response.readline()
        if not name:
            return False
        self.raw += data
        assert self._response.readline() == b"\n"
        told = json.loads(data.removeprefix(b"data: "))
        self.times_s.append(told["now_s"])
        model = told["models"][0]
        if name == b"event: state\n":
            self.num_states += 1
            self.states = [bytearray(base64.b64decode(text)) for text in model["states"]]
            self.requests, self.hits, self.history = {}, {}, model["history"]
        else:
            assert name == b"event: change\n"
            self.num_changes += 1
            for states, (block_ids, values) in zip(self.states, model["blocks"], strict=True):
                for block_id, value in zip(block_ids, values, strict=True):
                    states[block_id] = value
            self.evicted += model["evicted"]
            for key in model["gone"]:
                self.requests.pop(key, None)
        for row in model["requests"]:
            self.requests[row["key"]] = self.requests.get(row["key"], {}) | row
        self.hits |= dict(zip(*model["hits"], strict=True))
        self.counters = model["counters"]
        return True

    def read_until(self, is_so: Any) -> None:
        while not is_so():
            assert self.read()

    @property
    def num_done(self) -> int:
        return sum(row["phase"] == "done" for row in self.requests.values())


@contextmanager
def watching(server: KeptServer, key: str | None = None) -> Iterator[Watching]:
    """A stream of which the first message is read."""
    with server.caller(key).open("GET", "/v1/events") as response:
        found = Watching(response)
        assert found.read()
        yield found


def write(server: KeptServer, prompt: Any, num_tokens: int = 8, key: str | None = None, **others: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **others}
    return server.caller(key).post("/v1/completions", body)


@pytest.fixture
def server(tiny_llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(tiny_llm, kv_memory="1MiB")) as server:
        yield server


def assert_told(watch: Watching, server: KeptServer) -> None:
    cache = server.engine.cache
    pools = [cache.pool, *(group.pool for group in cache.twins.groups)]
    assert watch.states == [bytearray(state_of(pool, at) for at in range(pool.num_blocks)) for pool in pools]
    (told,) = server.caller().get("/v1/cache")["models"]
    assert watch.counters["held_blocks"] == told["blocks"]["held"]
    assert watch.counters["reusable_blocks"] == told["blocks"]["reusable"]
    assert watch.counters["free_blocks"] == told["blocks"]["free"]
    assert watch.counters["committed_bytes"] == told["bytes"]["committed"]
    assert watch.counters["evicted_blocks"] == told["num_evicted_blocks"]
    assert watch.counters["copied_blocks"] == told["num_copied_blocks"]
    assert watch.counters["found_tokens"] == told["prompt_tokens"]["cached"]


def test_what_is_told_is_what_the_engine_is(server: KeptServer) -> None:
    write(server, list(range(3, 90)))  # before anybody looks
    num_blocks = server.engine.cache.pool.num_blocks
    with watching(server) as watch:
        for at in range(num_blocks // 3 + 4):  # until blocks are evicted
            write(server, list(range(3 + at % 2, 90 + at % 7)) + [at] * 32, n=1 + at % 2, cache_salt=f"salt {at}")
        write(server, list(range(3, 90)))
        num = sum(1 + at % 2 for at in range(num_blocks // 3 + 4)) + 1
        watch.read_until(lambda: watch.num_done == num)
        watch.read_until(lambda: watch.counters["running"] == 0)
        assert watch.num_states == 1
        assert_told(watch, server)
        assert len(watch.evicted) == watch.counters["evicted_blocks"] > 0
        last = max(watch.requests)
        row = watch.requests[last]
        assert row["blocks"] == [[]]
        assert (row["num_prompt_tokens"], row["num_written_tokens"], row["finish_reason"]) == (87, 8, "length")
        assert row["num_cached_tokens"] + row["num_computed_tokens"] == 87 + 7
        times = [row[name] for name in ("submitted_s", "begun_s", "first_token_s", "last_token_s")]
        assert times == sorted(times)


def test_groups_of_layers_with_windows(tmp_path: Path) -> None:
    llm = LLM(golden_of("gemma3").write_folder(tmp_path / "model"))
    with KeptServer(llm) as server, watching(server) as watch:
        write(server, list(range(3, 120)), 40)
        watch.read_until(lambda: watch.num_done == 1)
        assert len(watch.states) == 2
        assert_told(watch, server)
        sealed = next(at for at, state in enumerate(watch.states[1]) if state)
        block = server.caller().get(f"/v1/cache/blocks/{sealed}?group=1")
        assert block["state"] == "reusable"
        assert block["num_tokens"] == 32


def test_what_is_on_disk_is_told_once_it_is(tiny_llm: LLM, tmp_path: Path) -> None:
    llm = with_engine(tiny_llm, kv_memory="1MiB", store=str(tmp_path / "store"))
    with KeptServer(llm) as server:
        write(server, list(range(3, 70)))
        assert server.engine.flush_store(PATIENCE_S)
        with watching(server) as watch:
            watch.read_until(lambda: watch.num_states == 1)
            stored = [at for at, state in enumerate(watch.states[0]) if state == STORED | 1]
            assert len(stored) == 2
            write(server, list(range(100, 170)))  # and while somebody looks
            watch.read_until(lambda: sum(state == STORED | 1 for state in watch.states[0]) == 4)
            server.engine.clear_cache()
            watch.read_until(lambda: not any(watch.states[0]))
        tier = server.engine.tier
        assert tier is not None
        wait_until(lambda: tier.newly_stored is None)  # nobody asks any more
    llm.close()


def test_nothing_is_done_for_nobody(server: KeptServer) -> None:
    engine, live = server.engine, server.state.live
    before = engine.observers
    for _ in range(2):
        with watching(server) as one, watching(server) as other:
            assert len(engine.observers) == len(before) + 1, "one for all"
            write(server, [5, 6, 7])
            for watch in (one, other):
                watch.read_until(lambda watch=watch: watch.num_done == 1)
        wait_until(lambda: engine.observers == before)
        assert engine.cache.pool.changed is None
        wait_until(lambda: live.num_watchers == 0)
        write(server, [5, 6, 7])


def test_ten_messages_a_second_at_most(tiny_llm: LLM) -> None:
    with KeptServer(with_engine(tiny_llm)) as server, watching(server) as watch:
        write(server, [5, 6, 7], 1500)
        watch.read_until(lambda: watch.num_done == 1)
        seconds = watch.times_s[-1] - watch.times_s[0]
        assert watch.num_changes <= seconds / INTERVAL_S + 2
        assert watch.counters["steps"] >= 1500


def test_who_reads_too_slowly_gets_the_newest_state(server: KeptServer) -> None:
    async def late() -> None:
        live = server.state.live
        watcher = Watcher(Viewer(None, sees_all=True, sees_text=True))
        assert (await watcher.read(live) or b"").startswith(b"event: state")
        watcher.send(b"one")
        assert await watcher.read(live) == b"one"
        for message in (b"two", b"three", b"four"):
            watcher.send(message)
        assert (await watcher.read(live) or b"").startswith(b"event: state"), "in place of all that was missed"
        watcher.send(b"five")
        assert await watcher.read(live) == b"five"
        watcher.end()
        assert await watcher.read(live) is None

    with watching(server):
        asyncio.run(late())


def test_ended_requests_are_forgotten(server: KeptServer) -> None:
    with watching(server) as watch:
        for _ in range(MAX_ENDED // 128 + 1):
            write(server, [7, 8, 9], 1, n=128)
        watch.read_until(lambda: watch.counters["generated_tokens"] == MAX_ENDED + 128 and watch.num_done == MAX_ENDED)
        assert len(watch.requests) == MAX_ENDED


def test_hits_of_blocks_are_counted(server: KeptServer) -> None:
    with watching(server) as watch:
        for _ in range(3):
            write(server, list(range(3, 80)))
        watch.read_until(lambda: watch.num_done == 3)
        assert list(watch.hits.values()) == [2, 2], "two blocks, read back twice"
        with watching(server) as later:
            assert later.hits == watch.hits
        server.caller().ask("DELETE", "/v1/cache")
        write(server, [5])
        watch.read_until(lambda: not any(watch.hits.values()))


def test_blocks_that_change_without_a_step_are_told(server: KeptServer) -> None:
    write(server, list(range(3, 90)))
    with watching(server) as watch:
        assert any(watch.states[0])
        server.caller().ask("DELETE", "/v1/cache")
        watch.read_until(lambda: not any(watch.states[0]))
        assert_told(watch, server)


def test_a_server_that_drains_ends_the_stream(server: KeptServer) -> None:
    with watching(server) as watch:
        server._server.loop.call_soon_threadsafe(server.state.live.close)  # type: ignore[union-attr]
        while watch.read():
            pass


def test_one_request_is_aborted_and_its_blocks_are_free(tiny_llm: LLM) -> None:
    llm, runner = gated(tiny_llm, kv_memory="1MiB")
    with KeptServer(llm) as server, watching(server) as watch:
        runner.close_after(20)
        sent = threading.Thread(target=lambda: server.caller().ask("POST", "/v1/completions", body))
        body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True}
        sent.start()
        watch.read_until(lambda: any(row["phase"] == "decode" for row in watch.requests.values()))
        wait_until(lambda: runner.is_closed)
        (row,) = watch.requests.values()
        assert row["blocks"][0]
        assert watch.states[0][row["blocks"][0][0]] == 2, "held by one, and open"
        ended = threading.Thread(target=lambda: server.caller().ask("DELETE", f"/v1/requests/{row['request_id']}"))
        inbox = next(iter(server.state.models)).async_llm._inbox
        num_waiting = inbox.qsize()
        ended.start()
        wait_until(lambda: inbox.qsize() > num_waiting)
        runner.open()
        for thread in (ended, sent):
            thread.join(PATIENCE_S)
        watch.read_until(lambda: watch.num_done == 1)
        (row,) = watch.requests.values()
        assert row["finish_reason"] == "abort"
        assert row["blocks"] == [[]]
        assert watch.counters["held_blocks"] == server.num_held == 0
        gone = server.caller().ask("DELETE", f"/v1/requests/{row['request_id']}", status=404)
        assert gone["error"]["code"] == "request_not_found"


def test_tenants_see_their_own(tiny_llm: LLM) -> None:
    with KeptServer(with_engine(tiny_llm), api_keys=KEYS) as server:
        anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
        with watching(server, "key-of-anna") as own, watching(server, "key-of-bert") as other:
            write(server, LONG, 40, "key-of-anna")
            own.read_until(lambda: own.num_done == 1)
            other.read_until(lambda: other.counters["generated_tokens"] == 40)
            assert b"swordfish" in own.raw
            assert other.requests == {}
            assert b"swordfish" not in other.raw
            assert own.states == other.states, "that blocks are taken is no secret"
        wait_until(lambda: server.state.live.num_watchers == 0)
        with watching(server, "key-of-anna") as later:
            assert later.requests == {}, "what nobody watched is not known"
        block = next(at for at, state in enumerate(own.states[0]) if state == 1)
        assert "sword" in "".join(anna.get(f"/v1/cache/blocks/{block}")["tokens"])
        assert "tokens" not in bert.get(f"/v1/cache/blocks/{block}")
        bert.get("/v1/cache/blocks/1000000", status=404)
        bert.get("/v1/cache/blocks/x", status=404)


def test_nobody_aborts_what_is_not_his_own(tiny_llm: LLM) -> None:
    llm, runner = gated(tiny_llm)
    with KeptServer(llm, api_keys=KEYS, shared_cache=True) as server, watching(server, "key-of-anna") as own:
        runner.close_after(5)
        sent = threading.Thread(target=lambda: write(server, [5, 6, 7], 9, "key-of-anna"))
        sent.start()
        own.read_until(lambda: bool(own.requests))
        (row,) = own.requests.values()
        server.caller("key-of-bert").ask("DELETE", f"/v1/requests/{row['request_id']}", status=404)
        runner.open()
        sent.join(PATIENCE_S)
        own.read_until(lambda: own.num_done == 1)
        assert [row["finish_reason"] for row in own.requests.values()] == ["length"]


def test_redacted_and_read_only(tiny_llm: LLM) -> None:
    with KeptServer(with_engine(tiny_llm), redact=True, read_only=True) as server, watching(server) as watch:
        write(server, LONG, 8)
        watch.read_until(lambda: watch.num_done == 1)
        assert b"swordfish" not in watch.raw
        assert not {"prompt", "written"} & {name for row in watch.requests.values() for name in row}
        block = next(at for at, state in enumerate(watch.states[0]) if state == 1)
        assert "tokens" not in server.caller().get(f"/v1/cache/blocks/{block}")
        assert not any("text" in row for row in server.caller().get("/v1/cache/tree")["data"])
        refused = server.caller().ask("DELETE", "/v1/requests/any", status=403)
        assert refused["error"]["code"] == "read_only"


def test_a_preempted_sequence_is_told_of_without_its_blocks(tiny_llm: LLM) -> None:
    served = ServedModel("model", with_engine(tiny_llm, kv_memory="128KiB", max_running=4))
    engine, watch = served.llm.engine, ModelWatch(served)
    watch.begin()
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    prompts = [[(17 * at + number) % 300 + 3 for number in range(40)] for at in range(4)]
    sequences = [engine.new_sequence(engine.new_request(prompt, params)) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    num_seen = 0
    while engine.step() is not None:
        watch.take()
        waiting = [each for each in sequences if each.costs.num_preemptions and not each.table.block_ids]
        num_seen += sum(each.finish_reason is None for each in waiting)
        told = {known.row["request_id"]: known for known in watch.told.values()}
        assert {name: known.blocks[0] for name, known in told.items()} == {
            each.request.request_id: list(each.table.block_ids) for each in sequences
        }
        assert all(told[each.request.request_id].row["phase"] in ("queued", "done") for each in waiting)
    assert num_seen > 0, "some waited without their blocks"
    watch.end()
    served.async_llm.stop(1.0)


def test_numbers_and_hits_are_kept_while_nobody_looks(server: KeptServer) -> None:
    for _ in range(3):
        write(server, list(range(3, 80)))
    with watching(server) as watch:
        assert list(watch.hits.values()) == [2, 2], "two blocks, read back twice before anybody looked"
        names, rows = watch.history["names"], watch.history["rows"]
        assert rows, "the first sample is the server's start"
        assert dict(zip(names, rows[0], strict=True))["generated_tokens"] == 0
        assert names[1:] == list(watch.counters)


def test_history_is_bounded() -> None:
    history = History()
    for at in range(MAX_SAMPLES + 5):
        history.add(at, {"steps": at, "run_s": at / 4})
    rows = json.loads(bytes(history.told()))
    assert len(rows) == MAX_SAMPLES
    assert (rows[0], rows[-1]) == ([5, 5, 1.25], [MAX_SAMPLES + 4, MAX_SAMPLES + 4, (MAX_SAMPLES + 4) / 4])


def test_a_whole_prompt_is_its_owners(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "The first words. " + LONG * 4
    with KeptServer(with_engine(tiny_llm), api_keys=KEYS) as server:
        anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
        with watching(server, "key-of-anna") as own:
            write(server, long, 2, "key-of-anna", n=2)
            own.read_until(lambda: own.num_done == 2)
            request_id = own.requests[min(own.requests)]["request_id"]
            assert "first" not in own.requests[min(own.requests)]["prompt"], "the events have its end"
            told = anna.get(f"/v1/requests/{request_id}")
            assert (told["prompt"], told["num_prompt_tokens"]) == (
                long,
                own.requests[min(own.requests)]["num_prompt_tokens"],
            )
            assert bert.get(f"/v1/requests/{request_id}", status=404)["error"]["code"] == "request_not_found"
            monkeypatch.setattr(watching_module, "MAX_PROMPT_TOKENS", 8)
            write(server, [5, 6, 7], 2, "key-of-anna")
            own.read_until(lambda: own.num_done == 3)
            newest = own.requests[max(own.requests)]["request_id"]
            anna.get(f"/v1/requests/{request_id}", status=404)
            assert anna.get(f"/v1/requests/{newest}")["num_prompt_tokens"] == 3
    with KeptServer(with_engine(tiny_llm), redact=True) as server, watching(server) as watch:
        write(server, long, 2)
        watch.read_until(lambda: watch.num_done == 1)
        (row,) = watch.requests.values()
        refused = server.caller().get(f"/v1/requests/{row['request_id']}", status=403)
        assert refused["error"]["code"] == "redacted"


def test_one_message_that_takes_long_does_not_hold_up_the_next() -> None:
    mean_s = smoothed(0.0002, 5.0)
    assert mean_s / MAX_SHARE <= INTERVAL_S
    for _ in range(60):
        mean_s = smoothed(mean_s, 0.05)
    assert mean_s == pytest.approx(0.05, rel=0.01), "many that take long make fewer of them"
