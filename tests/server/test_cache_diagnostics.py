"""`prompt_cache_diagnostics`: why a prompt was not found in the cache, decided by its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kept_server import KEYS, Caller, KeptServer
from kvik.engine.llm import LLM
from kvik.server.cache.diagnostics import Diagnosis, Reason
from kvik.server.cache.remembered import Asked, ResponseMemory
from server_process import wait_until, with_engine
from tool_model import write_tool_model

SYSTEM = {"role": "system", "content": "You are a terse clerk. " * 9}
HISTORY = [
    SYSTEM,
    {"role": "user", "content": "What is the colour of the sky at noon? " * 3},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And at night? " * 6},
]


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


def diagnosis(caller: Caller, messages: Any, before: str, **others: Any) -> Any:
    return caller.chat(messages, comparison_response_id=before, **others)["prompt_cache_diagnostics"]


def changed(at: int, content: str) -> list[dict[str, Any]]:
    return [message | {"content": content} if index == at else message for index, message in enumerate(HISTORY)]


def test_a_history_that_goes_on_is_a_hit(anna: Caller) -> None:
    first = anna.chat(HISTORY)
    answer = first["choices"][0]["message"]["content"]
    longer = [*HISTORY, {"role": "assistant", "content": answer}, {"role": "user", "content": "Thanks."}]
    told = diagnosis(anna, longer, first["id"])
    assert told == {"type": "cache_hit", "engine_reason": told["engine_reason"]}
    assert "prompt_cache_diagnostics" not in anna.chat(HISTORY)


def test_an_answer_that_was_stopped_can_be_compared_with(anna: Caller) -> None:
    told = b""
    body = {"messages": HISTORY, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with anna.open("POST", "/v1/chat/completions", body) as response:
        while b'"id":"' not in told:
            told += response.readline()
    response_id = told.partition(b'"id":"')[2].partition(b'"')[0].decode()

    def is_known() -> bool:
        kind: str = diagnosis(anna, HISTORY, response_id, max_tokens=1)["type"]
        return kind == "cache_hit"

    wait_until(is_known)


def test_the_first_token_that_differs_is_shown(anna: Caller, llm: LLM) -> None:
    first = anna.chat(HISTORY)
    other = changed(1, "What is the colour of the sea at noon?")
    told = diagnosis(anna, other, first["id"])
    prompts = [llm.render_chat(messages, plain_content=True) for messages in (HISTORY, other)]
    position = next(at for at, (one, two) in enumerate(zip(*prompts, strict=False)) if one != two)
    assert told["type"] == "cache_miss"
    assert told["reason"] == "input_changed"
    assert told["comparison_reusable_tokens"] == position
    assert told["cache_missed_tokens"] == len(prompts[1]) - position
    assert told["changed_fields"] == ["messages"]
    difference = told["first_difference"]
    assert difference["position"] == position
    assert difference["expected"].startswith(" sky at noon?")
    assert difference["found"].startswith(" sea at noon?")
    assert difference["before"].endswith("What is the colour of the")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (changed(0, "Today is Monday. " + SYSTEM["content"]), "input_changed"),
        (changed(3, "And in the evening?"), "input_changed"),
        ([SYSTEM, {"role": "user", "content": "In short: the sky is blue."}, HISTORY[3]], "context_compacted"),
        ([SYSTEM, HISTORY[3]], "context_compacted"),
        (HISTORY[:2], "input_changed"),
    ],
)
def test_what_changed_is_named(anna: Caller, messages: Any, reason: str) -> None:
    first = anna.chat(HISTORY)
    told = diagnosis(anna, messages, first["id"])
    assert (told["type"], told["reason"]) == ("cache_miss", reason)


def test_another_model_is_named(llm: LLM) -> None:
    with KeptServer(with_engine(llm), with_engine(llm)) as server:
        caller = server.caller()
        first = caller.chat(HISTORY)
        told = diagnosis(caller, HISTORY, first["id"], model="model-2")
        assert (told["reason"], told["comparison_reusable_tokens"]) == ("model_changed", 0)
        assert told["changed_fields"] == ["model"]


def test_other_tools_are_named(tmp_path: Path) -> None:
    def tool(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}

    with KeptServer(LLM(write_tool_model(tmp_path), kv_memory="16MiB", threads=1)) as server:
        caller = server.caller()
        first = caller.chat(HISTORY, tools=[tool("clock")], tool_choice="none")
        again = diagnosis(caller, HISTORY, first["id"], tools=[tool("clock")], tool_choice="none")
        assert again["type"] == "cache_hit"
        told = diagnosis(caller, HISTORY, first["id"], tools=[tool("clock"), tool("bell")], tool_choice="none")
        assert (told["reason"], told["changed_fields"]) == ("tools_changed", ["tools"])


def test_another_salt_is_another_key(anna: Caller) -> None:
    first = anna.chat(HISTORY, cache_salt="one")
    told = diagnosis(anna, HISTORY, first["id"], cache_salt="two")
    assert (told["type"], told["reason"], told["comparison_reusable_tokens"]) == (
        "cache_miss",
        "prompt_cache_key_changed",
        0,
    )
    assert told["changed_fields"] == ["cache_salt"]
    assert told["engine_reason"] == "unseen"


def test_what_changes_no_token_is_no_miss(anna: Caller) -> None:
    first = anna.chat(HISTORY, prompt_cache_key="one", service_tier="auto")
    told = diagnosis(anna, HISTORY, first["id"], prompt_cache_key="two", response_format={"type": "json_object"})
    assert told["type"] == "cache_hit"
    assert told["changed_fields"] == ["prompt_cache_key", "service_tier", "text_format"]


def test_what_was_evicted_is_no_change_of_the_clients(llm: LLM) -> None:
    with KeptServer(with_engine(llm, kv_memory="12MiB")) as server:
        caller = server.caller()
        first = caller.chat(HISTORY)
        for at in range(6):
            caller.chat([{"role": "user", "content": f"Number {at}. " * 80}], max_tokens=1)
        told = diagnosis(caller, HISTORY, first["id"])
        assert (told["type"], told["engine_reason"]) == ("unavailable", "evicted")
        assert "reason" not in told


def test_answers_of_other_keys_are_not_found(server: KeptServer, anna: Caller) -> None:
    first = anna.chat(HISTORY)
    bert = server.caller("key-of-bert")
    assert diagnosis(bert, HISTORY, first["id"]) == {"type": "comparison_response_not_found"}
    assert diagnosis(bert, HISTORY, "chatcmpl-nobody") == {"type": "comparison_response_not_found"}


def test_that_others_begin_alike_is_told_to_the_operator_alone(server: KeptServer, anna: Caller, llm: LLM) -> None:
    anna.chat(HISTORY)
    bert = server.caller("key-of-bert")
    mine = bert.chat([{"role": "user", "content": "Hm."}], cache_salt="one")
    assert diagnosis(bert, HISTORY, mine["id"])["engine_reason"] == "unseen"
    with KeptServer(with_engine(llm)) as alone:
        caller = alone.caller()
        first = caller.chat(HISTORY, cache_salt="one")
        assert diagnosis(caller, HISTORY, first["id"], cache_salt="two")["engine_reason"] == "other_salt"


def test_streams_and_completions_have_it_too(anna: Caller) -> None:
    first = anna.chat(HISTORY)
    other = changed(0, "Nobody.")
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = anna.stream(other, prompt_cache_options={"comparison_response_id": first["id"]}, **options)
        assert chunks[-1]["prompt_cache_diagnostics"]["reason"] == "input_changed"
        assert not any("prompt_cache_diagnostics" in chunk for chunk in chunks[:-1])
    body = {"prompt": "One two three " * 30, "max_tokens": 1}
    first = anna.post("/v1/completions", body)
    body |= {"prompt": "One two four " * 30, "comparison_response_id": first["id"]}
    told = anna.post("/v1/completions", body)["prompt_cache_diagnostics"]
    assert (told["reason"], told["first_difference"]["expected"][:6]) == ("input_changed", " three")
    streamed = anna.stream(HISTORY)[-1]["id"]
    assert diagnosis(anna, HISTORY, streamed)["type"] == "cache_hit"


def test_the_memory_is_bounded_for_each_tenant() -> None:
    def asked(num_tokens: int) -> Asked:
        return Asked("model", None, bytes(4 * num_tokens), {}, [])

    memory = ResponseMemory(max_entries=3, max_tokens=100)
    for name in "abcd":
        memory.note("anna", name, asked(10))
    assert memory.find("anna", "a") is None
    assert memory.find("anna", "b") is not None  # and used last now
    memory.note("bert", "a", asked(10))
    memory.note("anna", "e", asked(85))
    assert [memory.find("anna", name) is not None for name in "abcde"] == [False, True, False, False, True]
    memory.note("anna", "f", asked(101))
    assert memory.find("anna", "f") is None
    assert memory.find("bert", "a") is not None
    assert memory.find("bert", "b") is None


def miss(reason: Reason) -> Diagnosis:
    return Diagnosis(kind="miss", reason=reason, num_lost=7)


def missed(kind: str) -> dict[str, Any]:
    return {"type": kind, "cache_missed_input_tokens": 7}


@pytest.mark.parametrize(
    ("diagnosis", "told"),
    [
        (Diagnosis(kind="hit"), None),
        (Diagnosis(kind="not_found"), {"type": "previous_message_not_found"}),
        (Diagnosis(kind="unavailable", engine_reason="evicted"), {"type": "unavailable", "engine_reason": "evicted"}),
        (miss("model_changed"), missed("model_changed")),
        (miss("system_changed"), missed("system_changed")),
        (miss("tools_changed"), missed("tools_changed")),
        (miss("input_changed"), missed("messages_changed")),
        (miss("context_compacted"), missed("messages_changed")),
        (miss("prompt_cache_key_changed"), {"type": "unavailable"}),
    ],
)
def test_anthropics_words(diagnosis: Diagnosis, told: Any) -> None:
    assert diagnosis.anthropic()["diagnostics"] == (None if told is None else {"cache_miss_reason": told})
