"""KV events: a consumer that hears them knows exactly what the cache holds and may be shared; over real sockets too."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from kvik.cache import Digest
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.server.settings import ServerConfig
from kvik.server.watch import event_socket
from kvik.server.watch.event_socket import END_OF_REPLAY, EventSocket
from kvik.server.watch.kv_events import Event, KVEventFeed, KVEvents, hash_of
from live_server import live
from models import tiny_model
from server_process import wait_until
from simulation import ALL, VOCAB, SimulatedEngine, Windows

BLOCK = 32


class Index:
    """What a router makes of the events: each block's parent and tokens. It takes no child whose parent it misses."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def take(self, events: list[Event]) -> bool:
        for event in msgspec.msgpack.decode(msgspec.msgpack.encode(events)):
            if event["type"] == "AllBlocksCleared":
                self.blocks.clear()
            elif event["type"] == "BlockRemoved":
                for each in event["block_hashes"]:
                    del self.blocks[each]
            else:
                self._store(event)
        return True

    def _store(self, event: Event) -> None:
        parent, tokens = event["parent_block_hash"], event["token_ids"]
        assert (event["block_size"], event["medium"]) == (BLOCK, "CPU")
        assert len(tokens) == BLOCK * len(event["block_hashes"])
        for at, each in enumerate(event["block_hashes"]):
            assert parent is None or parent in self.blocks
            assert each not in self.blocks
            self.blocks[each] = parent, tuple(tokens[at * BLOCK : (at + 1) * BLOCK])
            parent = each


def shared_blocks(engine: Engine) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    """What the cache holds, sealed and without a salt."""
    tree, found = engine.cache.tree, {}
    for namespace, edge in tree.edges():
        for block_id in edge.block_ids:
            digest, tokens = tree.digest_of(block_id), tree.tokens_of(block_id)
            if digest is None or tokens is None or namespace.salt is not None:
                continue
            _, previous = tree.place_of(block_id)
            above: Digest | None = None if previous is None else tree.digest_of(previous)
            of_block = tuple(np.frombuffer(tokens[2], np.int32).tolist())
            found[hash_of(digest)] = None if above is None else hash_of(above), of_block
    return found


def ask(engine: Engine, chance: random.Random, beginnings: list[list[int]]) -> None:
    prompt = chance.choice(beginnings)[: chance.randrange(1, 150)] + [
        chance.randrange(VOCAB - 1) for _ in range(chance.randrange(60))
    ]
    salt = chance.choice((None, None, "ada"))
    params = SamplingParams(max_tokens=chance.randrange(1, 50))
    engine.add(engine.new_sequence(engine.new_request(prompt, params, salt=salt)))


@pytest.mark.parametrize("windows", [ALL, (None, 40), (24,)])
@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_what_the_cache_holds(windows: Windows, seed: int) -> None:
    chance = random.Random(seed)
    engine = SimulatedEngine(num_blocks=24, windows=windows, token_budget=64, max_running=4)
    index = Index()
    KVEvents(engine, index.take)
    beginnings = [[chance.randrange(VOCAB - 1) for _ in range(150)] for _ in range(3)]
    num_evicted = 0
    for _ in range(40):
        ask(engine, chance, beginnings)
        if chance.random() < 0.05:
            engine.clear_cache()
        for _ in range(chance.randrange(12)):
            engine.step()
            if not engine.scheduler.has_work:
                break
            assert index.blocks == shared_blocks(engine)
        num_evicted = engine.cache.stats.num_evicted_blocks
    assert num_evicted > 50
    assert len(index.blocks) > 2


def test_what_is_not_taken_is_told_anew() -> None:
    chance = random.Random(7)
    engine = SimulatedEngine(num_blocks=24, windows=ALL, token_budget=64, max_running=4)
    index = Index()
    told = KVEvents(engine, lambda events: chance.random() < 0.5 and index.take(events))
    beginnings = [[chance.randrange(VOCAB - 1) for _ in range(150)] for _ in range(3)]
    for _ in range(20):
        ask(engine, chance, beginnings)
        while engine.scheduler.has_work:
            engine.step()
    assert told.num_dropped > 10
    while told._is_behind:
        ask(engine, chance, beginnings)
        while engine.scheduler.has_work:
            engine.step()
    assert index.blocks == shared_blocks(engine)
    assert len(index.blocks) > 2


@pytest.fixture
def heard() -> Iterator[tuple[EventSocket, Any, Any]]:
    """A socket, one that subscribes to it, and one that asks for what was missed."""
    events = EventSocket("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "kv@pod@tiny")
    context = zmq.Context()
    subscriber, asker = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    for each in (subscriber, asker):
        each.setsockopt(zmq.RCVTIMEO, 30_000)
    subscriber.connect(events.address)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv@")
    assert events.replay_address is not None
    asker.connect(events.replay_address)
    yield events, subscriber, asker
    context.destroy(linger=0)
    events.close()
    assert not events._thread.is_alive()


def subscribed(events: EventSocket, subscriber: Any) -> int:
    """Publish until the subscription stands; the number of the last batch that came."""
    while True:
        events.put([{"type": "AllBlocksCleared"}])
        if subscriber.poll(100):
            break
    last = -1
    while subscriber.poll(200):
        last = int.from_bytes(subscriber.recv_multipart()[1], "big")
    return last


def test_frames_are_those_that_routers_read(heard: tuple[EventSocket, Any, Any]) -> None:
    events, subscriber, _ = heard
    last = subscribed(events, subscriber)
    before_s = time.time()
    assert events.put([{"type": "BlockRemoved", "block_hashes": [2**64 - 1], "medium": "CPU"}])
    topic, number, payload = subscriber.recv_multipart()
    assert (topic, int.from_bytes(number, "big")) == (b"kv@pod@tiny", last + 1)
    sent_s, batch, rank = msgspec.msgpack.decode(payload)
    assert before_s <= sent_s <= time.time()
    assert (batch, rank) == ([{"type": "BlockRemoved", "block_hashes": [2**64 - 1], "medium": "CPU"}], 0)


def test_what_was_missed_is_repeated(heard: tuple[EventSocket, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    events, subscriber, asker = heard
    monkeypatch.setattr(event_socket, "NUM_KEPT", 5)
    last = subscribed(events, subscriber)
    for number in range(8):
        assert events.put([{"type": "BlockRemoved", "block_hashes": [number], "medium": "CPU"}])
    while int.from_bytes(subscriber.recv_multipart()[1], "big") < last + 8:
        pass

    for start, wanted in ((last + 7, [6, 7]), (0, [3, 4, 5, 6, 7]), (last + 9, [])):
        asker.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while (frames := asker.recv_multipart())[1] != END_OF_REPLAY:
            found.append(msgspec.msgpack.decode(frames[2])[1][0]["block_hashes"][0])
        assert found == wanted
    asker.send_multipart([b"", b"what?"])  # nobody answers, nobody ends
    asker.send_multipart([b"", (last + 8).to_bytes(8, "big")])
    assert msgspec.msgpack.decode(asker.recv_multipart()[2])[1][0]["block_hashes"] == [7]


def test_too_many_that_wait_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_socket, "MAX_QUEUED", 0)
    events = EventSocket("tcp://127.0.0.1:*")
    assert not events.put([])
    events.close()
    assert not events.put([])


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1", "udp://*:1", "", "tcp://nowhere.invalid:*", "127.0.0.1:5557"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(InvalidInput, match="KV events") as caught:
        EventSocket(endpoint)
    assert "tcp://127.0.0.1:*" in caught.value.hint


def test_who_else_may_read_it_is_known() -> None:
    for endpoint, is_exposed in (
        ("tcp://127.0.0.1:*", False),
        ("tcp://[::1]:5557", False),
        ("tcp://192.0.2.1:5557", True),
    ):
        events = EventSocket(endpoint)
        assert events.is_exposed == is_exposed, endpoint
        events.close()


def test_replay_and_topic_need_events() -> None:
    for fields in ({"kv_events_replay": "tcp://127.0.0.1:*"}, {"kv_events_topic": "pod"}):
        with pytest.raises(InvalidInput, match="no KV events") as caught:
            ServerConfig(**fields)  # type: ignore[arg-type]
        assert "--kv-events" in caught.value.hint


def test_a_server_tells_and_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=2048).path
    llm = LLM(path, kv_memory="8MiB", threads=1)
    feed = KVEventFeed(EventSocket("tcp://127.0.0.1:*"))
    feed.watch(llm.engine)
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVTIMEO, 30_000)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "")
    subscriber.connect(feed.socket.address)
    index = Index()
    with live({"tiny": llm}) as server:
        server.state.events = feed
        subscribed(feed.socket, subscriber)
        prompt = [index * 7 % 300 for index in range(100)]
        body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}
        server.ask("POST", "/v1/completions", body)
        while len(index.blocks) < 3:
            index.take(msgspec.msgpack.decode(subscriber.recv_multipart()[2])[1])
        assert [tokens for _, tokens in index.blocks.values()] == [
            tuple(prompt[at : at + BLOCK]) for at in range(0, 96, BLOCK)
        ]
        server.ask("POST", "/v1/completions", {**body, "prompt": prompt[::-1], "cache_salt": "ada"})
        wait_until(lambda: llm.engine.scheduler.has_work is False)
        assert not subscriber.poll(200), "what is salted is told to nobody"
        samples = server.samples()
        assert samples["kvik_kv_events_total"] == 2  # cleared at the start, and stored
        assert samples["kvik_kv_events_dropped_batches_total"] == 0
    context.destroy(linger=0)
    feed.close()
