"""Tool calls: forced ones of a random model that writes them as Hermes does, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import validate

from server_process import Client, Server

CHAT = "/v1/chat/completions"
PARAMETERS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "clock": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Tells it.", "parameters": schema, "strict": True}}
    for name, schema in PARAMETERS.items()
]
USER = {"role": "user", "content": "What is the weather in Oslo?"}
ASK: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 300}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def client(tool_server: Server) -> Client:
    return tool_server.client


def call_token(server: Server) -> str:
    """The id of the token that begins a call."""
    (token_id,) = server.served.llm.encode("<tool_call>")
    return str(token_id)


def merged(chunks: list[Any]) -> dict[str, Any]:
    """The message that the deltas make; id, type and name of a call come once, its arguments in parts."""
    calls: list[dict[str, Any]] = []
    content = ""
    for delta in (choice["delta"] for chunk in chunks for choice in chunk["choices"]):
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                assert call["function"]["arguments"] == ""
                calls.append({"type": call["type"], "function": dict(call["function"])})
            else:
                assert call["index"] == len(calls) - 1
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return {"content": content or None, "tool_calls": calls}


def check(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        assert call["type"] == "function"
        validate(json.loads(call["function"]["arguments"]), PARAMETERS[call["function"]["name"]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_matches_its_schema(client: Client, choice: Any, seed: int) -> None:
    """And is the same streamed."""
    body = ASK | {"tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
    (found,) = client.ok(CHAT, body)["choices"]
    chunks = client.stream(CHAT, body)
    message = found["message"]
    (call,) = message["tool_calls"]
    check([call])
    assert call["id"].startswith("call_")
    assert message["content"] is None
    assert found["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["choices"][0]["delta"] == {}
    if choice is NAMED:
        assert call["function"]["name"] == "weather"
    assert merged(chunks) == {"content": None, "tool_calls": [{key: call[key] for key in ("type", "function")}]}


def test_several_calls(client: Client, tool_server: Server) -> None:
    """The token that begins another call is made likely; the context ends it."""
    body = ASK | {"tool_choice": "required", "seed": 1, "max_tokens": 500}
    found = [client.ok(CHAT, body | {"seed": seed})["choices"][0] for seed in range(6)]
    several = next(choice for choice in found if len(choice["message"]["tool_calls"]) > 1)
    if several["finish_reason"] == "tool_calls":
        check(several["message"]["tool_calls"])
    else:
        check(several["message"]["tool_calls"][:-1])
    ids = [call["id"] for call in several["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("seed", range(3))
def test_auto_calls_where_the_model_begins_to(client: Client, tool_server: Server, seed: int) -> None:
    """Its first token is that of a call because it is made likely; all behind it is forced."""
    body = ASK | {"logit_bias": {call_token(tool_server): 100}, "parallel_tool_calls": False, "seed": seed}
    (found,) = client.ok(CHAT, body)["choices"]
    check(found["message"]["tool_calls"])
    assert len(found["message"]["tool_calls"]) == 1
    assert merged(client.stream(CHAT, body))["tool_calls"] == [
        {key: call[key] for key in ("type", "function")} for call in found["message"]["tool_calls"]
    ]


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_text_where_nothing_forces_a_call(client: Client, tool_server: Server, choice: str) -> None:
    body = ASK | {"tool_choice": choice, "max_tokens": 12, "seed": 3, "logit_bias": {call_token(tool_server): -100}}
    (found,) = client.ok(CHAT, body)["choices"]
    assert "tool_calls" not in found["message"]
    assert merged(client.stream(CHAT, body)) == {"content": found["message"]["content"] or None, "tool_calls": []}


def test_what_looks_like_a_call_is_text_without_tools(client: Client, tool_server: Server) -> None:
    body = {"messages": [USER], "max_tokens": 8, "logit_bias": {call_token(tool_server): 100}, "temperature": 0}
    (found,) = client.ok(CHAT, body)["choices"]
    assert found["message"]["content"] == "<tool_call>" * 8
    assert found["finish_reason"] == "length"
    assert "tool_calls" not in found["message"]
    choices = client.ok(CHAT, body | {"tools": TOOLS, "tool_choice": "none"})["choices"]
    assert choices[0]["message"]["content"] == "<tool_call>" * 8


def test_a_call_that_is_cut_off(client: Client) -> None:
    """It is told as far as it came, and that it ended early."""
    body = ASK | {"tool_choice": NAMED, "seed": 1}
    whole = client.ok(CHAT, body)
    arguments = whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    seen = set()
    for max_tokens in range(1, whole["usage"]["completion_tokens"]):
        (found,) = client.ok(CHAT, body | {"max_tokens": max_tokens})["choices"]
        chunks = client.stream(CHAT, body | {"max_tokens": max_tokens})
        assert found["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "length"
        calls = found["message"].get("tool_calls", [])
        assert [call["function"] for call in merged(chunks)["tool_calls"]] == [call["function"] for call in calls]
        assert all(arguments.startswith(call["function"]["arguments"]) for call in calls)
        seen.add(len(calls))
    assert seen == {0, 1}


def test_several_choices_with_calls(client: Client) -> None:
    body = ASK | {"tool_choice": "required", "n": 3, "seed": 5, "parallel_tool_calls": False}
    choices = client.ok(CHAT, body)["choices"]
    chunks = client.stream(CHAT, body)
    for choice in choices:
        check(choice["message"]["tool_calls"])
        mine = [
            {"choices": [each for each in chunk["choices"] if each["index"] == choice["index"]]} for chunk in chunks
        ]
        assert merged(mine)["tool_calls"][0]["function"] == choice["message"]["tool_calls"][0]["function"]


def test_results_are_rendered(client: Client, tool_server: Server) -> None:
    """A history with a call, whose content is null, and its result."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Oslo","days":1}'},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain, 4 degrees."},
    ]
    body = client.ok(CHAT, {"messages": messages, "tools": TOOLS, "max_tokens": 1, "return_token_ids": True})
    text = tool_server.served.llm.model.tokenizer.decode(body["prompt_token_ids"], skip_special=False)
    assert "<|im_start|>tool\nRain, 4 degrees.<|im_end|>" in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call>' in text


def test_a_format_and_tools_contradict_each_other(client: Client) -> None:
    answer = client.post(CHAT, ASK | {"response_format": {"type": "json_object"}})
    assert (answer.status, answer.error["code"]) == (400, "unsupported_combination")
    (found,) = client.ok(CHAT, ASK | {"guided_regex": "[ab]{3}", "tool_choice": "none"})["choices"]
    assert len(found["message"]["content"]) == 3


def test_a_prompt_with_tools_is_looked_for(client: Client, tool_server: Server) -> None:
    asked = {"messages": [{"role": "user", "content": "Look at the sky, please. " * 8}], "tools": TOOLS}
    tool_server.streams  # noqa: B018  # forget those of others
    client.ok(CHAT, {**asked, "max_tokens": 2})
    prompt_ids = tool_server.wait_for_stream().branches[0].request.prompt_ids
    told = client.ok("/v1/cache/match", asked)
    assert (told["num_tokens"], told["miss_reason"]) == (len(prompt_ids), "all")
    assert told["num_cached_tokens"] == len(prompt_ids) - 1
    without = client.ok("/v1/cache/match", {"messages": asked["messages"]})
    assert without["num_tokens"] < told["num_tokens"]
    refused = client.post("/v1/cache/match", {"prompt": "a", "tools": TOOLS})
    assert (refused.status, refused.error["param"]) == (400, "tools")
