"""Thoughts before an answer or a call, on every route that has them; the models write what their scripts say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from anthropic.types import Message
from anthropic.types import RawMessageStreamEvent as MessageEvent
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from kvik.engine.llm import LLM
from kvik.server.openai.responses_input import LOGPROBS
from scripted import have_written
from server_process import Client, Server, with_engine
from thought_templates import HARMONY, THINKING
from tool_model import write_tool_model
from tool_templates import ToolTemplate

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
THOUGHT, ANSWER = "Hm, the user asks for 寒 rain.", "Rain, <b>4</b> degrees ☂."
ARGUMENTS = '{"city": "Oslo", "days": 3}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "Of a city", "parameters": SCHEMA, "strict": True}
USER = {"role": "user", "content": "What is the weather in Oslo?"}


@dataclass(frozen=True)
class Family:
    """How a model's answers look.

    `counted` is what of a thought counts as such. A call that is cut off before it has a name may be told as text, as
    the model wrote it, of which `head` is the longest.
    """

    template: ToolTemplate
    answer: str
    call: str
    counted: str
    head: str = ""

    def text(self, ends_in: str) -> str:
        return self.answer if ends_in == "text" else self.call

    def said(self, ends_in: str) -> str:
        return ANSWER if ends_in == "text" else self.head


CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
ANALYSIS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
FAMILIES = {
    name: Family(
        THINKING[name].template,
        f"{begin}{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>",
        f"{begin}{THOUGHT}\n</think>\n\n{CALL}",
        f"{begin}{THOUGHT}\n</think>",
        CALL[: CALL.index(ARGUMENTS)],
    )
    for name, begin in {"qwen3": "<think>\n", "deepseek r1": ""}.items()
} | {
    "harmony": Family(
        HARMONY,
        f"{ANALYSIS}<|channel|>final<|message|>{ANSWER}<|return|>",
        f"{ANALYSIS} to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}",
        f"<|message|>{THOUGHT}<|end|>",
    )
}
CASES = [(name, ends_in) for name in FAMILIES for ends_in in ("text", "call")]
WHOLE = 300  # tokens, more than any script has


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The server of a family's model."""
    started: list[Server] = []

    @cache
    def server(name: str) -> Server:
        path = write_tool_model(tmp_path_factory.mktemp("model"), FAMILIES[name].template)
        started.append(Server({"thinker": with_engine(LLM(path, kv_memory="16MiB", threads=1))}).__enter__())
        return started[-1]

    yield server
    for each in started:
        each.__exit__(None, None, None)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def case(
    request: pytest.FixtureRequest, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Family, str]]:
    """A server whose model writes a thought, and then an answer or a call."""
    name, ends_in = request.param
    have_written(monkeypatch, FAMILIES[name].text(ends_in))
    yield servers(name), FAMILIES[name], ends_in
    servers(name).assert_idle()


def count(server: Server, text: str) -> int:
    return len(server.served.llm.model.tokenizer.encode(text, add_special=False))


def lengths(server: Server, family: Family, ends_in: str, step: int = 1) -> range:
    """Of a whole answer, and of some that are cut off."""
    return range(count(server, family.text(ends_in)), 0, -step)


def is_part(text: str | None, whole: str) -> bool:
    """Whether it may be told of a text before its end, where a character is cut or a line break may yet be its own."""
    return whole.startswith((text or "").rstrip("\ufffd\n"))


# Chat.


def chat_body(ends_in: str, max_tokens: int = WHOLE) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [USER], "max_completion_tokens": max_tokens, "logprobs": True}
    if ends_in == "call":
        body |= {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
    return body


def chat_parts(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return {"thought": message.get("reasoning_content"), "text": message["content"] or "", "calls": calls}


def streamed_chat(chunks: list[Any]) -> dict[str, Any]:
    """The same of a stream, in which thoughts come first; and its logprobs."""
    found: dict[str, Any] = {"thought": None, "text": "", "calls": [], "logprobs": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"]
        found["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        if "reasoning_content" in delta:
            assert not found["text"]
            assert not found["calls"]
            found["thought"] = (found["thought"] or "") + delta["reasoning_content"]
        found["text"] += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                found["calls"].append(dict(call["function"]))
            else:
                found["calls"][-1]["arguments"] += call["function"]["arguments"]
    return found


def test_chat(case: tuple[Server, Family, str]) -> None:
    server, family, ends_in = case
    body = chat_body(ends_in)
    whole = server.client.ok(CHAT, body)
    ChatCompletion.model_validate(whole)
    (choice,) = whole["choices"]
    calls = [] if ends_in == "text" else [{"name": "weather", "arguments": ARGUMENTS}]
    text = ANSWER if ends_in == "text" else ""
    assert chat_parts(choice["message"]) == {"thought": THOUGHT, "text": text, "calls": calls}
    assert choice["finish_reason"] == ("stop" if ends_in == "text" else "tool_calls")
    assert whole["usage"]["completion_tokens"] == count(server, family.text(ends_in))
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": count(server, family.counted)}
    *_, last = chunks = server.client.stream(CHAT, body | {"stream_options": {"include_usage": True}})
    assert "error" not in last, last
    assert last["usage"]["completion_tokens_details"] == whole["usage"]["completion_tokens_details"]
    logprobs = choice["logprobs"]["content"]
    assert streamed_chat(chunks) == chat_parts(choice["message"]) | {"logprobs": logprobs}
    assert len(logprobs) == count(server, family.text(ends_in).removesuffix(family.template.ends[0]))


def test_a_chat_that_is_cut_off_anywhere(case: tuple[Server, Family, str]) -> None:
    """It has no more than parts of the whole, and no word of what is around them; streamed and not."""
    server, family, ends_in = case
    for max_tokens in lengths(server, family, ends_in):
        body = chat_body(ends_in, max_tokens)
        (choice,) = server.client.ok(CHAT, body)["choices"]
        found = chat_parts(choice["message"])
        streamed = streamed_chat(server.client.stream(CHAT, body))
        assert streamed == found | {"logprobs": choice["logprobs"]["content"]}, max_tokens
        assert is_part(found["thought"], THOUGHT), found
        assert is_part(found["text"], family.said(ends_in)), found
        assert not (found["text"] or found["calls"]) or found["thought"] == THOUGHT
        assert not found["text"] or not found["calls"]
        for call in found["calls"]:
            assert call["name"] == "weather"
            assert is_part(call["arguments"], ARGUMENTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_of_a_schema_behind_a_thought(
    name: str, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    have_written(monkeypatch, FAMILIES[name].answer.partition(ANSWER)[0] + ARGUMENTS)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    (choice,) = servers(name).client.ok(CHAT, chat_body("text") | {"response_format": wanted})["choices"]
    assert chat_parts(choice["message"]) == {"thought": THOUGHT, "text": ARGUMENTS, "calls": []}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_schema_does_not_have_may_not_follow_a_thought(
    name: str, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests' scripts are held to the request's own grammar."""
    have_written(monkeypatch, FAMILIES[name].answer)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert servers(name).client.post(CHAT, chat_body("text") | {"response_format": wanted}).status == 500


# Responses.


def responses_body(ends_in: str, max_tokens: int = WHOLE, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"input": USER["content"], "max_output_tokens": max_tokens, **fields}
    if ends_in == "call":
        body |= {"tools": [{"type": "function", **WEATHER}], "tool_choice": "required"}
    return body


def events_of(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.streaming(path, body) as events:
        return [json.loads(each) for each in events if each != "[DONE]"]


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_responses(case: tuple[Server, Family, str]) -> None:
    server, family, ends_in = case
    whole = server.client.ok(RESPONSES, responses_body(ends_in))
    Response.model_validate(whole)
    thought, item = whole["output"]
    assert thought["id"].startswith("rs_")
    part = {"type": "reasoning_text", "text": THOUGHT}
    assert without_ids([thought]) == [{"type": "reasoning", "summary": [], "content": [part], "status": "completed"}]
    if ends_in == "text":
        assert item["content"] == [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]
    else:
        assert (item["type"], item["name"], item["arguments"]) == ("function_call", "weather", ARGUMENTS)
    assert whole["status"] == item["status"] == "completed"
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": count(server, family.counted)}


def test_events_of_responses(case: tuple[Server, Family, str]) -> None:
    """Items are added, grow and are done, one after the other, and make what is answered whole."""
    server, _, ends_in = case
    events = events_of(server.client, RESPONSES, responses_body(ends_in))
    for event in events:
        TypeAdapter[Any](ResponseStreamEvent).validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    if ends_in == "text":
        parts = ["content_part.added", "output_text.done", "content_part.done"]
    else:
        parts = ["function_call_arguments.done"]
    assert [kind for kind in kinds if "delta" not in kind] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.done"),
        *("content_part.done", "output_item.done", "output_item.added", *parts, "output_item.done", "completed"),
    ]
    first = [event for event in events if event.get("output_index") == 0]
    thought = events[-1]["response"]["output"][0]
    assert {event.get("item_id") or event["item"]["id"] for event in first} == {thought["id"]}
    assert "".join(event["delta"] for event in first if "delta" in event) == THOUGHT
    told = next(event for event in first if event["type"] == "response.reasoning_text.done")
    assert told["text"] == THOUGHT
    assert first[-1]["item"] == thought
    whole = server.client.ok(RESPONSES, responses_body(ends_in))
    assert without_ids(events[-1]["response"]["output"]) == without_ids(whole["output"])
    assert events[-1]["response"]["usage"]["output_tokens_details"] == whole["usage"]["output_tokens_details"]


def test_a_response_that_is_cut_off_anywhere(case: tuple[Server, Family, str]) -> None:
    server, family, ends_in = case
    for max_tokens in lengths(server, family, ends_in, step=3):
        body = responses_body(ends_in, max_tokens)
        whole = server.client.ok(RESPONSES, body)
        streamed = events_of(server.client, RESPONSES, body)[-1]["response"]
        assert without_ids(streamed["output"]) == without_ids(whole["output"]), max_tokens
        for item in whole["output"]:
            text, wanted = {
                "reasoning": lambda item: (item["content"][0]["text"], THOUGHT),
                "message": lambda item: (item["content"][0]["text"], family.said(ends_in)),
                "function_call": lambda item: (item["arguments"], ARGUMENTS),
            }[item["type"]](item)
            assert is_part(text, wanted), item
        is_cut = whole["status"] == "incomplete"
        assert is_cut == (max_tokens < count(server, family.text(ends_in)))


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_of_items(name: str, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's stand at one item, a call's at the call; the deltas have them as the items do."""
    family, server = FAMILIES[name], servers(name)
    have_written(monkeypatch, family.call)
    body = responses_body("call", include=[LOGPROBS], top_logprobs=2)
    *_, last = events = events_of(server.client, RESPONSES, body)
    chat = server.client.ok(CHAT, chat_body("call") | {"top_logprobs": 2})["choices"][0]
    call = next(item for item in last["response"]["output"] if item["type"] == "function_call")
    (done,) = (event["item"] for event in events if event["type"].endswith("item.done") and event["output_index"] == 1)
    by_item: dict[int, list[Any]] = {}
    for event in events:
        if "delta" in event["type"]:
            by_item.setdefault(event["output_index"], []).extend(event["logprobs"])
    assert call["logprobs"] == done["logprobs"] == by_item[1]
    assert by_item[0] + by_item[1] == chat["logprobs"]["content"]
    for at, text in enumerate((THOUGHT, ARGUMENTS)):
        assert text.encode() in b"".join(bytes(each["bytes"]) for each in by_item[at])
    assert all(len(each["top_logprobs"]) == 2 for each in call["logprobs"])
    whole = server.client.ok(RESPONSES, body)
    assert without_ids(whole["output"]) == without_ids(last["response"]["output"])
    plain = server.client.ok(RESPONSES, responses_body("call"))
    assert "logprobs" not in plain["output"][-1]


# Messages.


def messages_body(ends_in: str, max_tokens: int = WHOLE) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [USER], "max_tokens": max_tokens}
    if ends_in == "call":
        body |= {"tools": [{"name": "weather", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    return body


def streamed_blocks(events: list[Any]) -> list[dict[str, Any]]:
    """The blocks that the deltas make, each begun, grown and stopped before the next."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert (event["index"], is_open) == (len(blocks), False)
                blocks.append(dict(event["content_block"]) | {"json": ""})
                is_open = True
            case "content_block_delta":
                assert (event["index"], is_open) == (len(blocks) - 1, True)
                delta = event["delta"]
                kind = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
                key = kind[delta["type"]]
                blocks[-1]["json" if key == "partial_json" else key] += delta[key]
            case "content_block_stop":
                assert (event["index"], is_open) == (len(blocks) - 1, True)
                is_open = False
    assert not is_open
    return blocks


def parsed(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Streamed blocks as whole ones are; those without an id, which is another each time."""
    found = []
    for block in blocks:
        block = {key: value for key, value in block.items() if key != "id"}
        text = block.pop("json", "")
        if text:
            with suppress(ValueError):
                block["input"] = json.loads(text)
        found.append(block)
    return found


def test_messages(case: tuple[Server, Family, str]) -> None:
    server, _, ends_in = case
    whole = server.client.ok(MESSAGES, messages_body(ends_in))
    Message.model_validate(whole)
    call = {"type": "tool_use", "name": "weather", "input": json.loads(ARGUMENTS)}
    last = {"type": "text", "text": ANSWER} if ends_in == "text" else call
    assert parsed(whole["content"]) == [{"type": "thinking", "thinking": THOUGHT, "signature": ""}, last]
    assert whole["stop_reason"] == ("end_turn" if ends_in == "text" else "tool_use")
    events = events_of(server.client, MESSAGES, messages_body(ends_in))
    for event in events:
        if event["type"] != "ping":
            TypeAdapter[Any](MessageEvent).validate_python(event)
    assert parsed(streamed_blocks(events)) == parsed(whole["content"])


def test_a_message_that_is_cut_off_anywhere(case: tuple[Server, Family, str]) -> None:
    server, family, ends_in = case
    for max_tokens in lengths(server, family, ends_in, step=3):
        body = messages_body(ends_in, max_tokens)
        whole = server.client.ok(MESSAGES, body)
        streamed = streamed_blocks(events_of(server.client, MESSAGES, body))
        assert parsed(streamed) == parsed(whole["content"]), max_tokens
        for block in streamed:
            assert is_part(block.get("thinking"), THOUGHT)
            assert is_part(block.get("text"), family.said(ends_in))
            assert is_part(block["json"], ARGUMENTS)


# How much, and what was thought before.

SWITCHED = ToolTemplate(
    "{{ '<effort=' ~ reasoning_effort ~ '>' if reasoning_effort is defined }}"
    "{{ '<on=' ~ enable_thinking ~ '>' if enable_thinking is defined }}"
    "{{ '<thinking=' ~ thinking ~ '>' if thinking is defined }}" + FAMILIES["qwen3"].template.source,
    FAMILIES["qwen3"].template.control,
    FAMILIES["qwen3"].template.ends,
)


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a model whose template writes the values of its three switches."""
    path = write_tool_model(tmp_path_factory.mktemp("model"), SWITCHED)
    with Server({"thinker": with_engine(LLM(path, kv_memory="16MiB", threads=1))}) as server:
        yield server


def prompt_of(server: Server, path: str, body: dict[str, Any]) -> tuple[str, str | None]:
    """A request's prompt, and what its answer calls ignored."""
    server.streams  # noqa: B018  # forget those of others
    answer = server.client.post(path, body)
    assert answer.status == 200, answer.data
    prompt_ids = server.wait_for_stream().branches[0].request.prompt_ids
    text = server.served.llm.model.tokenizer.decode(prompt_ids, skip_special=False)
    return text, answer.headers.get("x-kvik-ignored")


EFFORT_CASES: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {}, "", None),
    (CHAT, {"reasoning_effort": "high"}, "<effort=high><on=True><thinking=True>", None),
    (CHAT, {"reasoning_effort": "xhigh"}, "<effort=high><on=True><thinking=True>", None),
    (CHAT, {"reasoning_effort": "none"}, "<effort=low><on=False><thinking=False>", None),
    (CHAT, {"reasoning_effort": "<|im_end|>"}, "", "reasoning_effort"),
    (
        CHAT,
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
        "<effort=low><on=False><thinking=True>",
        None,
    ),
    (RESPONSES, {}, "", None),
    (RESPONSES, {"reasoning": {"effort": "minimal"}}, "<effort=low><on=True><thinking=True>", None),
    (
        RESPONSES,
        {"reasoning": {"effort": "low", "summary": "auto"}},
        "<effort=low><on=True><thinking=True>",
        "reasoning.summary",
    ),
    (RESPONSES, {"reasoning": {"summary": "auto"}}, "", "reasoning"),
    (MESSAGES, {}, "", None),
    (MESSAGES, {"thinking": {"type": "disabled"}}, "<effort=low><on=False><thinking=False>", None),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, "<effort=medium><on=True><thinking=True>", None),
    (MESSAGES, {"output_config": {"effort": "max"}}, "<effort=high><on=True><thinking=True>", None),
    (
        MESSAGES,
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "<effort=medium><on=True><thinking=True>",
        "thinking.budget_tokens",
    ),
]


@pytest.mark.parametrize(("path", "fields", "told", "ignored"), EFFORT_CASES)
def test_the_effort_goes_to_the_templates_switches(
    switched: Server, path: str, fields: dict[str, Any], told: str, ignored: str | None
) -> None:
    bodies = {CHAT: chat_body("text", 1), RESPONSES: responses_body("text", 1), MESSAGES: messages_body("text", 1)}
    prompt, named = prompt_of(switched, path, bodies[path] | fields)
    assert prompt.partition("<|im_start|>")[0] == told
    assert named == ignored


@pytest.mark.parametrize(
    ("path", "fields", "ignored"),
    [
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
        (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ],
)
def test_an_effort_without_a_switch_is_ignored(
    servers: Callable[[str], Server], path: str, fields: dict[str, Any], ignored: str
) -> None:
    bodies = {CHAT: chat_body("text", 1), RESPONSES: responses_body("text", 1), MESSAGES: messages_body("text", 1)}
    server = servers("qwen3")
    assert prompt_of(server, path, bodies[path] | fields) == (prompt_of(server, path, bodies[path])[0], ignored)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen3", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>"),
        (
            "harmony",
            f"<|start|>assistant<|channel|>analysis<|message|>{THOUGHT}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{ANSWER}<|end|>",
        ),
    ],
)
def test_thoughts_of_a_history_go_to_the_template(servers: Callable[[str], Server], name: str, written: str) -> None:
    """The same on every route; what is encrypted is left out, and named."""
    server = servers(name)
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]}
    hidden = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    blocks = [{"type": "thinking", "thinking": THOUGHT, "signature": ""}, {"type": "text", "text": ANSWER}]
    said = {"role": "assistant", "content": ANSWER}
    chat = chat_body("text", 1) | {"messages": [USER, said | {"reasoning_content": THOUGHT}, USER]}
    items = responses_body("text", 1) | {"input": [USER, thought, said, USER]}
    message = messages_body("text", 1) | {"messages": [USER, {"role": "assistant", "content": blocks}, USER]}
    prompt, ignored = prompt_of(server, CHAT, chat)
    assert written in prompt
    assert ignored is None
    assert prompt_of(server, RESPONSES, items) == prompt_of(server, MESSAGES, message) == (prompt, None)
    messages = {"messages": chat["messages"]}
    count = server.client.ok("/v1/chat/completions/input_tokens", messages)["input_tokens"]
    assert server.client.ok("/tokenize", messages)["count"] == count
    assert server.client.ok("/v1/cache/match", messages)["num_tokens"] == count
    without = chat_body("text", 1) | {"messages": [USER, said, USER]}
    plain, _ = prompt_of(server, CHAT, without)
    for others in ([USER, hidden, said, USER], [USER, said, USER, hidden]):
        found = prompt_of(server, RESPONSES, items | {"input": others})
        assert found == (plain, "input.reasoning")
    # One that nothing came of is no message.
    assert prompt_of(server, RESPONSES, items | {"input": [USER, said, thought, USER]})[0] == plain


@pytest.mark.parametrize("name", ["qwen3", "harmony"])
def test_a_thought_before_a_call_of_a_history(servers: Callable[[str], Server], name: str) -> None:
    server = servers(name)
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]}
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "Rain."}
    body = responses_body("text", 1) | {"input": [USER, thought, call, result]}
    told = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    said = {"role": "assistant", "content": None, "reasoning_content": THOUGHT, "tool_calls": [told]}
    messages = [USER, said, {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}]
    prompt, ignored = prompt_of(server, RESPONSES, body)
    assert ignored is None
    assert (THOUGHT in prompt) is (name == "qwen3")  # the small template of harmony has none before calls
    assert prompt_of(server, CHAT, chat_body("text", 1) | {"messages": messages}) == (prompt, None)
