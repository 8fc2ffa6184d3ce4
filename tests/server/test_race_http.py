"""`/v1/race` and `/v1/explain`: lanes that write the same and end with their reader, pages of their owners alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from kept_server import KEYS, KeptServer
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.measure.lanes import make_lanes, run_race
from kvik.server.live.explained import MAX_KEPT
from server_process import PATIENCE_S, wait_until, with_engine

PATH = "/v1/race"


@pytest.fixture
def server(tiny_llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(tiny_llm)) as server:
        yield server


def messages_of(response: HTTPResponse) -> Iterator[tuple[str, Any]]:
    while line := response.readline():
        name = line.decode().removeprefix("event: ").rstrip()
        yield name, json.loads(response.readline().removeprefix(b"data: "))
        response.readline()


def test_the_lanes_are_those_of_kvik_race(server: KeptServer) -> None:
    with server.caller().open("POST", PATH, {"prompt": "hello there", "max_tokens": 40}) as response:
        *others, (name, told) = messages_of(response)
    assert name == "verdict"
    assert {each for each, _ in others} == {"lanes"}
    assert told["is_same"] is True
    assert (told["num_compared"], told["token_difference"], told["logits_difference"]) == (40, None, None)
    lanes = make_lanes(server.llm, server.llm.encode("hello there"), SamplingParams(max_tokens=40, ignore_eos=True))
    assert run_race(lanes, lambda: None)
    for lane, found in zip(lanes, told["lanes"], strict=True):
        works = [cost.work for cost in lane.costs]
        assert (found["name"], found["text"]) == (lane.name, lane.sequence.text.text)
        assert found["num_computed_tokens"] == sum(work.num_tokens for work in works)
        assert found["multiply_adds"] == sum(work.multiply_adds for work in works)
        assert found["read_bytes"] == sum(work.read_bytes for work in works)


def test_what_is_stored_is_neither_read_nor_written(tiny_llm: LLM, tmp_path: Path) -> None:
    llm = with_engine(tiny_llm, store=str(tmp_path / "store"))
    prompt = list(range(3, 100))
    with KeptServer(llm) as server:
        server.caller().post("/v1/completions", {"prompt": prompt, "max_tokens": 2})
        assert server.engine.flush_store(PATIENCE_S)
        text = llm.model.tokenizer.decode(prompt)
        num_prompt = len(llm.encode(text))
        assert server.engine.tier is not None
        num_kept = server.engine.tier.store.stats.num_kept
        with server.caller().open("POST", PATH, {"prompt": text, "max_tokens": 40}) as response:
            *_, (name, told) = messages_of(response)
        assert (name, told["is_same"]) == ("verdict", True)
        assert told["lanes"][1]["num_computed_tokens"] == num_prompt + 39, "both lanes begin with nothing"
        made = server.caller().post("/v1/explain", {"prompt": "hello", "max_tokens": 3})
        assert made["bytes"] > 0
        assert server.engine.tier.store.stats.num_kept == num_kept
    llm.close()


def test_a_race_ends_with_its_reader_and_runs_alone(server: KeptServer) -> None:
    long = {"prompt": "a", "max_tokens": 360}
    with server.caller().open("POST", PATH, long) as response:
        assert next(messages_of(response))[0] == "lanes"
        refused = server.caller().post(PATH, long, status=429)
        assert refused["error"]["code"] == "rate_limit_exceeded"
    wait_until(lambda: not server.state.live.racing.locked())
    with server.caller().open("POST", PATH, {"prompt": "a", "max_tokens": 2}) as response:
        assert list(messages_of(response))[-1][0] == "verdict"


def test_what_is_too_much_is_refused(server: KeptServer) -> None:
    refused = server.caller().post(PATH, {"prompt": "hello " * 60, "max_tokens": 500}, status=400)
    assert refused["error"]["code"] == "work_limit_exceeded"
    server.caller().post(PATH, {"max_tokens": 5}, status=400)
    assert not server.state.live.racing.locked()


def test_a_page_for_others_races_nobody(tiny_llm: LLM) -> None:
    with KeptServer(with_engine(tiny_llm), read_only=True) as server:
        for path in (PATH, "/v1/explain"):
            assert server.caller().post(path, {"prompt": "a"}, status=403)["error"]["code"] == "read_only"


def test_explained_pages_are_their_owners(tiny_llm: LLM) -> None:
    with KeptServer(with_engine(tiny_llm), api_keys=KEYS) as server:
        anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
        told = anna.post("/v1/explain", {"prompt": "hello", "max_tokens": 3})
        with anna.open("GET", told["url"]) as response:
            assert response.status == 200
            assert "sandbox allow-scripts;" in (response.headers["content-security-policy"] or "")
            assert len(response.read()) == told["bytes"]
        bert.get(told["url"], status=404)
        bert.post(f"{told['url']}/link", {}, status=404)
        linked = anna.post(f"{told['url']}/link", {})
        nobody = server.caller()
        nobody.get(told["url"], status=401)
        nobody.get(linked["url"] + "x", status=404)
        with nobody.open("HEAD", linked["url"]) as response:
            assert (response.status, response.read()) == (200, b"")
        with nobody.open("GET", linked["url"]) as response:
            assert "sandbox allow-scripts;" in (response.headers["content-security-policy"] or "")
            assert len(response.read()) == told["bytes"]
        nobody.get(linked["url"], status=404)
        late = anna.post(f"{told['url']}/link", {})
        server.now_s += late["expires_s"]
        nobody.get(late["url"], status=404)
        for _ in range(MAX_KEPT):
            bert.post("/v1/explain", {"prompt": "a", "max_tokens": 1})
        anna.get(told["url"], status=404)
        refused = anna.post("/v1/explain", {"prompt": "hello " * 200, "max_tokens": 100}, status=400)
        assert "the page draws 256" in refused["error"]["message"]
