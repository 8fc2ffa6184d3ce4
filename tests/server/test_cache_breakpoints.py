"""Breakpoints: a prompt up to a place stays in the cache for a time, to the token, and changes no answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kept_server import KEYS, Caller, KeptServer
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from server_process import with_engine

SYSTEM = "You are a terse clerk. " * 9
COUNT = "One two three four five six seven eight nine ten eleven twelve."
PARAMS = SamplingParams(max_tokens=6)


def marked(text: str, ttl: str | None = None) -> dict[str, Any]:
    breakpoint_ = {"mode": "explicit"} if ttl is None else {"mode": "explicit", "ttl": ttl}
    return {"role": "system", "content": [{"type": "text", "text": text, "prompt_cache_breakpoint": breakpoint_}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path, kv_memory="96MiB", threads=2)


@pytest.fixture
def server(llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(llm), api_keys=KEYS) as server:
        yield server


@pytest.fixture
def anna(server: KeptServer) -> Caller:
    return server.caller("key-of-anna")


def test_what_follows_goes_on_from_the_very_token(anna: Caller, llm: LLM) -> None:
    """The position is no multiple of a block, and the answers are those of the library."""
    first = anna.chat([marked(SYSTEM), user("Hello.")])
    (told,) = first["prompt_cache_breakpoints"]
    plain = [{"role": "system", "content": SYSTEM}]
    end = len(llm.render_chat(plain, add_generation_prompt=False)) - 2  # <|im_end|> and the line's end
    assert told == {**told, "param": "messages[0].content[0]", "status": "written", "position": end, "ttl": "30m"}
    assert end % 32
    details = first["usage"]["prompt_tokens_details"]
    assert details["cache_write_tokens_details"] == {"ttl_30m_tokens": end, "ttl_12h_tokens": 0}
    other = [*plain, user("What is the colour of a lemon, and why?")]
    second = anna.chat(other)
    # The end of the system's turn and the head of the next are the same in both, so that a few more may be found.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= end
    assert second["choices"][0]["message"]["content"] == llm.chat(other, PARAMS, plain_content=True).text
    third = [{"role": "system", "content": SYSTEM + "Never laugh."}, user("Hello.")]
    answer = anna.chat(third)
    prompts = [llm.render_chat(messages, plain_content=True) for messages in ([marked(SYSTEM), user("Hello.")], third)]
    common = next(at for at, (one, two) in enumerate(zip(*prompts, strict=False)) if one != two)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == common
    assert answer["choices"][0]["message"]["content"] == llm.chat(third, PARAMS, plain_content=True).text


def test_an_open_block_is_kept_where_others_are_not(server: KeptServer, anna: Caller, llm: LLM) -> None:
    """Without a breakpoint, nobody holds the block in which a request ended."""
    messages = [user(COUNT)]

    def num_cached() -> int:
        cached: int = anna.chat(messages, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    num_prompt = anna.chat(messages, max_tokens=1)["usage"]["prompt_tokens"]
    assert num_cached() == num_prompt - 1
    server.llm.cache.clear()
    assert num_cached() == 0
    part = {"type": "text", "text": COUNT, "prompt_cache_breakpoint": {"mode": "explicit"}}
    (told,) = anna.chat([{"role": "user", "content": [part]}], max_tokens=1)["prompt_cache_breakpoints"]
    server.llm.cache.clear()
    assert num_cached() == told["position"] > num_prompt // 32 * 32


def test_another_key_finds_nothing(server: KeptServer, anna: Caller) -> None:
    bert = server.caller("key-of-bert")
    anna.chat([marked(SYSTEM), user("Hello.")])
    answer = bert.chat([marked(SYSTEM), user("Hello.")])
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [pin["kind"] for pin in bert.get("/v1/cache")["models"][0]["pins"]] == ["breakpoint"]
    assert anna.chat([marked(SYSTEM), user("Hi.")])["prompt_cache_breakpoints"][0]["status"] == "kept"


def test_it_ends_with_its_time_unless_it_is_used(server: KeptServer, anna: Caller) -> None:
    anna.chat([marked(SYSTEM, ttl="5m"), user("Hello.")])
    held = server.num_held
    assert held > 0
    server.now_s += 299
    anna.chat([{"role": "system", "content": SYSTEM}, user("Hello again.")])
    server.now_s += 299
    assert anna.get("/v1/cache")["models"][0]["blocks"]["pinned"] == held
    server.now_s += 2
    cache = anna.get("/v1/cache")["models"][0]
    assert (cache["blocks"]["pinned"], cache["blocks"]["held"], cache["pins"]) == (0, 0, [])


@pytest.mark.parametrize(("explicit", "num_written"), [(False, 3), (True, 4)])
def test_no_more_are_written_than_the_latest(anna: Caller, explicit: bool, num_written: int) -> None:
    messages = [marked(SYSTEM), *(marked(f"Rule {at}. " * 12) for at in range(5)), user("Hello.")]
    options = {"prompt_cache_options": {"mode": "explicit"}} if explicit else {}
    told = anna.chat(messages, **options)["prompt_cache_breakpoints"]
    assert [each["status"] for each in told] == ["skipped"] * (6 - num_written) + ["written"] * num_written
    positions = [each["position"] for each in told if each["position"] is not None]
    assert positions == sorted(set(positions))


def test_explicit_without_any_is_no_caching(server: KeptServer, anna: Caller, llm: LLM) -> None:
    messages = [{"role": "system", "content": SYSTEM}, user("Hello.")]
    anna.chat(messages)
    before = server.llm.cache.num_reusable
    other = [{"role": "system", "content": SYSTEM}, user("Hello. " * 40)]
    answer = anna.chat(other, prompt_cache_options={"mode": "explicit"})
    details = answer["usage"]["prompt_tokens_details"]
    assert (details["cached_tokens"], details["cache_write_tokens"]) == (0, 0)
    assert server.llm.cache.num_reusable == before
    assert answer["choices"][0]["message"]["content"] == llm.chat(other, PARAMS, plain_content=True).text


def test_above_the_bound_the_oldest_goes(llm: LLM) -> None:
    with KeptServer(with_engine(llm), pin_share=0.06) as server:
        caller = server.caller()
        limit = caller.get("/v1/cache")["models"][0]["blocks"]["pinned_limit"]
        texts = [f"Clerk number {at}. " * 16 for at in range(8)]
        for text in texts:
            (told,) = caller.chat([marked(text), user("Hello.")])["prompt_cache_breakpoints"]
            assert told["status"] == "written"
            assert 0 < caller.get("/v1/cache")["models"][0]["blocks"]["pinned"] <= limit
        assert caller.chat([marked(texts[-1]), user("Hi.")])["prompt_cache_breakpoints"][0]["status"] == "kept"
        assert caller.chat([marked(texts[0]), user("Hi.")])["prompt_cache_breakpoints"][0]["status"] == "written"
        too_long = [marked("Very long. " * 32 * limit), user("Hello.")]
        assert caller.chat(too_long)["prompt_cache_breakpoints"][0]["status"] == "over_limit"


def test_it_outlives_what_evicts_everything_else(llm: LLM) -> None:
    with KeptServer(with_engine(llm, kv_memory="12MiB")) as server:
        caller = server.caller()
        (told,) = caller.chat([marked(SYSTEM), user("Hello.")])["prompt_cache_breakpoints"]
        for at in range(6):
            caller.chat([user(f"Number {at}. " * 80)], max_tokens=1)
        assert server.llm.cache.stats.num_evicted_blocks > 0
        answer = caller.chat([marked(SYSTEM), user("Hello.")])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= told["position"]


def test_a_stream_tells_the_same(anna: Caller) -> None:
    last = anna.stream([marked(SYSTEM), user("Hello.")], stream_options={"include_usage": True})[-1]
    assert last["prompt_cache_breakpoints"][0]["status"] == "written"
    details = last["usage"]["prompt_tokens_details"]["cache_write_tokens_details"]
    assert details["ttl_30m_tokens"] == last["prompt_cache_breakpoints"][0]["position"]


@pytest.mark.parametrize("ttl", ["", "0s", "25h", "5 m", "forever", "-5m"])
def test_a_time_that_is_none_is_refused(anna: Caller, ttl: str) -> None:
    messages = [marked(SYSTEM, ttl=ttl), user("Hello.")]
    error = anna.post("/v1/chat/completions", {"messages": messages}, status=400)["error"]
    assert error["param"] == "messages[0].content[0]"
