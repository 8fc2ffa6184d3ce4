"""`/v1/sessions`: the server keeps messages and cache, and says what a request with all messages would say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from kept_server import CHAT, KEYS, Caller, KeptServer
from kvik.config import SamplingParams
from kvik.engine.lease import Lease
from kvik.engine.llm import LLM
from kvik.errors import CacheTooSmall
from server_process import wait_until, with_engine
from tool_model import write_tool_model

SESSIONS = "/v1/sessions"
QUESTIONS = ("What is the colour of the sky at noon?", "And at night?", "Thank you very much for all of that.")


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path, kv_memory="96MiB", threads=2)


@pytest.fixture
def server(llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(llm), api_keys=KEYS, max_sessions=4) as server:
        yield server


@pytest.fixture
def anna(server: KeptServer) -> Caller:
    return server.caller("key-of-anna")


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def expected(llm: LLM, messages: Any) -> str:
    return with_engine(llm).chat(messages, SamplingParams(max_tokens=6), plain_content=True).text


@pytest.mark.parametrize("streams", [False, True])
def test_turns_say_what_all_messages_would(anna: Caller, llm: LLM, streams: bool) -> None:
    session = anna.post(SESSIONS, {"system": "You are terse."})
    assert session == anna.get(SESSIONS)["data"][0]
    messages: list[Any] = [{"role": "system", "content": "You are terse."}]
    before = 0  # tokens whose keys and values the turn before left
    for number, question in enumerate(QUESTIONS, start=1):
        messages += user(question)
        if streams:
            chunks = anna.stream(user(question), session_id=session["id"])
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            told, timings = chunks[-1]["session"], chunks[-1]["timings"]
        else:
            answer = anna.chat(user(question), session_id=session["id"])
            text, told, timings = answer["choices"][0]["message"]["content"], answer["session"], answer["timings"]
        assert text == expected(llm, messages)
        messages.append({"role": "assistant", "content": text})
        assert told == {"id": session["id"], "num_messages": len(messages), "num_turns": number}
        assert timings["cache_n"] >= before - 2  # the answer may be cut between tokens that the template joins
        before = timings["cache_n"] + timings["prompt_n"]
    shown = anna.get(f"{SESSIONS}/{session['id']}")
    assert shown["messages"] == messages
    assert (shown["num_turns"], shown["is_busy"]) == (3, False)
    assert shown["cached_tokens"] >= before


def test_bits_are_those_of_the_library(anna: Caller, llm: LLM) -> None:
    """Of a turn that goes on from a session's blocks, and of a prompt that goes on from a breakpoint's."""
    begun: list[dict[str, Any]] = [{"role": "system", "content": "You are a terse clerk. " * 5}, *user(QUESTIONS[0])]
    others = {"logprobs": True, "top_logprobs": 3}

    def compare(answer: Any, messages: Any) -> None:
        params = SamplingParams(max_tokens=6, logprobs=3)
        wanted = with_engine(llm).chat(messages, params, plain_content=True)
        entries = answer["choices"][0]["logprobs"]["content"]
        assert answer["timings"]["cache_n"] > 0
        assert wanted.logprobs is not None
        found = [(each["logprob"], [top["logprob"] for top in each["top_logprobs"]]) for each in entries]
        assert found == [(each.logprob, [*each.top.values()]) for each in wanted.logprobs[: len(entries)]]

    session = anna.post(SESSIONS, {})
    first = anna.chat(begun, session_id=session["id"])["choices"][0]["message"]["content"]
    history = [*begun, {"role": "assistant", "content": first}]
    compare(anna.chat(user(QUESTIONS[1]), session_id=session["id"], **others), [*history, *user(QUESTIONS[1])])
    part = {"type": "text", "text": begun[0]["content"], "prompt_cache_breakpoint": {"mode": "explicit"}}
    (told,) = anna.chat([{"role": "system", "content": [part]}], cache_salt="a")["prompt_cache_breakpoints"]
    assert told["position"] % 32
    messages = [begun[0], *user(QUESTIONS[2])]
    compare(anna.chat(messages, cache_salt="a", **others), messages)


def test_forks_go_their_own_ways_and_a_rewind_forgets(anna: Caller, llm: LLM) -> None:
    session = anna.post(SESSIONS, {"messages": user(QUESTIONS[0])})
    anna.chat(user(QUESTIONS[1]), session_id=session["id"])
    history = anna.get(f"{SESSIONS}/{session['id']}")["messages"]
    forks = [
        anna.post(f"{SESSIONS}/{session['id']}/fork", None),
        anna.post(SESSIONS, {"fork": session["id"], "ttl": "5m"}),
    ]
    assert [fork["forked_from"] for fork in forks] == [session["id"]] * 2
    assert forks[1]["ttl_s"] == 300
    for fork, question in zip(forks, QUESTIONS[1:], strict=True):
        answer = anna.chat(user(question), session_id=fork["id"])
        assert answer["choices"][0]["message"]["content"] == expected(llm, [*history, *user(question)])
        assert answer["timings"]["cache_n"] > 32
    assert anna.get(f"{SESSIONS}/{session['id']}")["messages"] == history
    rewound = anna.post(f"{SESSIONS}/{forks[0]['id']}/rewind", {"num_messages": 4})
    assert rewound["num_messages"] == 1
    answer = anna.chat(user(QUESTIONS[1]), session_id=forks[0]["id"])
    assert answer["choices"][0]["message"]["content"] == history[-1]["content"]
    error = anna.post(f"{SESSIONS}/{forks[0]['id']}/rewind", {"num_messages": 9}, status=400)["error"]
    assert error["param"] == "num_messages"


def test_a_fork_has_the_session_to_itself(server: KeptServer, anna: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed with what it holds or not at all, and an error leaves nothing behind."""
    session = anna.post(SESSIONS, None)
    path = f"{SESSIONS}/{session['id']}"
    anna.chat(user(QUESTIONS[0]), session_id=session["id"])
    engine = server.llm.engine
    real_fork, is_forking, may_go_on = engine.fork_lease, threading.Event(), threading.Event()

    def slow_fork(lease: Lease) -> Lease:
        is_forking.set()
        assert may_go_on.wait(60)
        return real_fork(lease)

    monkeypatch.setattr(engine, "fork_lease", slow_fork)
    with ThreadPoolExecutor(1) as pool:
        try:
            forked = pool.submit(anna.post, f"{path}/fork", None)
            assert is_forking.wait(60)
            assert [(each["id"], each["is_busy"]) for each in anna.get(SESSIONS)["data"]] == [(session["id"], True)]
            assert anna.post(f"{path}/rewind", {}, status=409)["error"]["code"] == "session_busy"
        finally:
            may_go_on.set()
        assert forked.result()["cached_tokens"] > 0
    assert not anna.get(path)["is_busy"]

    def failing_fork(lease: Lease) -> Lease:
        raise CacheTooSmall("no block is left", hint="give it more")

    monkeypatch.setattr(engine, "fork_lease", failing_fork)
    assert anna.post(f"{path}/fork", None, status=400)["error"]["code"] == "kv_capacity_exceeded"
    assert len(anna.get(SESSIONS)["data"]) == 2
    assert not anna.get(path)["is_busy"]


def test_a_fork_too_many_holds_nothing(server: KeptServer, anna: Caller) -> None:
    sessions = [anna.post(SESSIONS, {}) for _ in range(4)]
    anna.chat(user(QUESTIONS[0]), session_id=sessions[0]["id"])
    path = f"{SESSIONS}/{sessions[0]['id']}"
    assert anna.post(f"{path}/fork", None, status=429)["error"]["code"] == "too_many_sessions"
    anna.ask("DELETE", path)
    assert server.num_held == 0


def test_others_have_none_of_it(server: KeptServer, anna: Caller) -> None:
    bert = server.caller("key-of-bert")
    session = anna.post(SESSIONS, {})
    path = f"{SESSIONS}/{session['id']}"
    anna.chat(user("Hello."), session_id=session["id"])
    assert bert.get(SESSIONS)["data"] == []
    for method, where, body in (
        ("GET", path, None),
        ("DELETE", path, None),
        *(("POST", f"{path}/{action}", {}) for action in ("fork", "rewind", "pin", "unpin")),
        ("POST", SESSIONS, {"fork": session["id"]}),
        ("POST", CHAT, {"messages": user("Hello."), "session_id": session["id"]}),
        ("POST", f"{CHAT}/input_tokens", {"messages": user("Hello."), "session_id": session["id"]}),
    ):
        assert bert.ask(method, where, body, status=404)["error"]["code"] == "session_not_found"
    assert anna.get(path)["num_messages"] == 2
    assert bert.get("/v1/cache")["models"][0]["sessions"] == []


def test_one_turn_at_a_time_and_an_answer_that_is_left_counts_as_far_as_it_came(
    server: KeptServer, anna: Caller
) -> None:
    session = anna.post(SESSIONS, {"system": "You are terse."})
    path = f"{SESSIONS}/{session['id']}"
    body = {"messages": user("Count to a thousand."), "session_id": session["id"], "max_tokens": 900}
    with anna.open("POST", CHAT, {**body, "ignore_eos": True, "stream": True}) as response:
        assert b"assistant" in response.readline()
        for _ in range(8):
            response.readline()
        error = anna.post(CHAT, body, status=409)["error"]
        assert error["code"] == "session_busy"
        assert anna.post(f"{path}/rewind", {}, status=409)["error"]["code"] == "session_busy"
        assert anna.get(path)["is_busy"]
    wait_until(lambda: not anna.get(path)["is_busy"])
    shown = anna.get(path)
    assert [message["role"] for message in shown["messages"]] == ["system", "user", "assistant"]
    assert shown["messages"][-1]["content"]
    answer = anna.chat(user("Go on."), session_id=session["id"])
    assert answer["session"]["num_messages"] == 5


def test_a_whole_answer_that_nobody_waits_for_counts_too(server: KeptServer, anna: Caller) -> None:
    session = anna.post(SESSIONS, {})
    path = f"{SESSIONS}/{session['id']}"
    body = {"messages": user("Count to a thousand."), "session_id": session["id"], "max_tokens": 900}
    connection = HTTPConnection("127.0.0.1", server.port)
    headers = {"Authorization": "Bearer key-of-anna", "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps({**body, "ignore_eos": True}), headers)
    wait_until(lambda: any(sequence.num_completion_tokens for sequence in server.llm.engine.scheduler.running))
    assert anna.get(path)["num_messages"] == 0
    connection.close()
    wait_until(lambda: not anna.get(path)["is_busy"])
    assert anna.get(path)["num_messages"] == 2


def test_a_turn_of_which_nothing_came_changes_nothing(server: KeptServer, anna: Caller) -> None:
    session = anna.post(SESSIONS, {})
    body = {"messages": user("Hello. " * 1500), "session_id": session["id"], "stream": True}
    with anna.open("POST", CHAT, {**body, "return_progress": True}) as response:
        response.readline()
    wait_until(lambda: not anna.get(f"{SESSIONS}/{session['id']}")["is_busy"])
    assert anna.get(f"{SESSIONS}/{session['id']}")["num_messages"] == 0


def test_a_refused_turn_changes_nothing(anna: Caller) -> None:
    session = anna.post(SESSIONS, {"system": "You are terse."})
    for others in ({"n": 2}, {"cache_salt": "salt"}, {"add_generation_prompt": False}, {"model": "none"}):
        body = {"messages": user("Hello."), "session_id": session["id"], **others}
        with anna.open("POST", CHAT, body) as response:
            assert response.status in (400, 404)
            assert json.loads(response.read())["error"]["param"] == next(iter(others))
    too_long = {"messages": user("word " * 9000), "session_id": session["id"]}
    assert anna.post(CHAT, too_long, status=400)["error"]["code"] == "context_length_exceeded"
    assert anna.get(f"{SESSIONS}/{session['id']}")["num_messages"] == 1
    assert not anna.get(f"{SESSIONS}/{session['id']}")["is_busy"]


def test_a_pin_outlives_what_evicts_everything_else(llm: LLM) -> None:
    with KeptServer(with_engine(llm, kv_memory="12MiB"), pin_share=0.5) as server:
        caller = server.caller()
        session = caller.post(SESSIONS, {"system": "You are a terse clerk. " * 9})
        path = f"{SESSIONS}/{session['id']}"
        assert caller.post(f"{path}/pin", {}, status=409)["error"]["code"] == "session_not_cached"
        caller.chat(user("Hello."), session_id=session["id"])
        pinned = caller.post(f"{path}/pin", {"ttl": "10m"})
        assert pinned["pin"]["tokens"] == pinned["cached_tokens"] > 64
        assert pinned["pin"]["tokens"] % 32
        for at in range(6):
            caller.chat(user(f"Number {at}. " * 80), max_tokens=1)
        with server.llm.engine.lock:
            server.llm.engine.cache.take_back()
        assert caller.get(path)["cached_tokens"] == 0  # the lease is gone, the pin is not
        answer = caller.chat(user("What is the time?"), session_id=session["id"])
        assert answer["timings"]["cache_n"] == pinned["pin"]["tokens"]
        server.now_s += 601
        assert caller.get("/v1/cache")["models"][0]["blocks"]["pinned"] == 0
        assert caller.get(path)["pin"] is None
        caller.post(f"{path}/pin", {})
        assert caller.post(f"{path}/unpin", {})["pin"] is None
        assert caller.get("/v1/cache")["models"][0]["blocks"]["pinned"] == 0


def test_they_end_when_nobody_uses_them_or_is_told_to(server: KeptServer, anna: Caller) -> None:
    first, second = (anna.post(SESSIONS, {"ttl": "10m"}) for _ in range(2))
    for session in (first, second):
        anna.chat(user("Hello."), session_id=session["id"])
    assert server.num_held > 0
    server.now_s += 500
    anna.chat(user("Hello."), session_id=first["id"])
    server.now_s += 500
    assert [session["id"] for session in anna.get(SESSIONS)["data"]] == [first["id"]]
    assert anna.get(f"{SESSIONS}/{second['id']}", status=404)["error"]["code"] == "session_not_found"
    deleted = anna.ask("DELETE", f"{SESSIONS}/{first['id']}")
    assert deleted == {"id": first["id"], "object": "session", "deleted": True}
    assert server.num_held == 0


def test_there_are_no_more_than_may_be(server: KeptServer, anna: Caller) -> None:
    for _ in range(4):
        anna.post(SESSIONS, {})
    assert anna.post(SESSIONS, {}, status=429)["error"]["code"] == "too_many_sessions"
    assert server.caller("key-of-bert").post(SESSIONS, {})["num_messages"] == 0


@pytest.mark.parametrize("streams", [False, True])
def test_calls_are_appended_with_the_ids_that_were_sent(tmp_path: Path, streams: bool) -> None:
    parameters = {"type": "object", "properties": {"days": {"enum": [1, 2, 3]}}, "required": ["days"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    with KeptServer(LLM(write_tool_model(tmp_path), kv_memory="16MiB", threads=1)) as server:
        caller = server.caller()
        session = caller.post(SESSIONS, {"tools": [tool]})
        others = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}
        others |= {"session_id": session["id"]}
        if streams:
            chunks = caller.stream(user("Weather?"), **others)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
            calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        else:
            calls = caller.chat(user("Weather?"), **others)["choices"][0]["message"]["tool_calls"]
        (kept,) = caller.get(f"{SESSIONS}/{session['id']}")["messages"][-1]["tool_calls"]
        assert kept["id"] == calls[0]["id"]
        assert kept["function"]["arguments"] == "".join(call["function"].get("arguments", "") for call in calls)
        result = [{"role": "tool", "tool_call_id": kept["id"], "content": "Rain."}]
        answer = caller.chat(result, session_id=session["id"], tool_choice="none")
        assert answer["session"]["num_messages"] == 4
