"""The Responses API, through OpenAI's own client where it has a word for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from api_servers import serving
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.server.errors import ApiError
from kvik.server.generation import Running
from kvik.server.openai.responses import ResponseWriter
from kvik.server.openai.responses_input import LOGPROBS, ResponsesRequest
from kvik.server.origin import Origin
from tool_model import write_tool_model

QUESTION = "Name three colours of the rainbow."
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "Of a city", "parameters": WEATHER, "strict": True},
    {"type": "function", "name": "clock", "parameters": NOTHING, "strict": True},
]
ONE_CALL: dict[str, Any] = {"model": "tools", "input": "?", "tools": TOOLS, "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tools = write_tool_model(tmp_path_factory.mktemp("tools"))
    with serving("smollm2", f"tools={tools}", "--kv-memory", "128MiB", "--context", "2048") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Response:
    """A response, which must be all that OpenAI's types ask for."""
    fields = {"model": "smollm2", "input": QUESTION, "temperature": 0, "max_output_tokens": 24} | fields
    raw = client.post("/responses", body=fields, cast_to=object)
    return Response.model_validate(raw)


def events_of(client: openai.OpenAI, **fields: Any) -> list[Any]:
    fields = {"model": "smollm2", "input": QUESTION, "temperature": 0, "max_output_tokens": 24} | fields
    create: Any = client.responses.create
    return list(create(**fields, stream=True))


def count(client: openai.OpenAI, **fields: Any) -> int:
    return client.responses.input_tokens.count(**{"model": "smollm2", **fields}).input_tokens


def test_same_bits_as_chat(client: openai.OpenAI, default_model_path: Path) -> None:
    """Text and logprobs are those of `LLM.chat`, streamed or not, cached or not."""
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    llm = LLM(str(default_model_path), kv_memory=64 << 20)
    expected = llm.chat(messages, SamplingParams(max_tokens=24, logprobs=2))
    assert expected.logprobs is not None
    fields: dict[str, Any] = {"instructions": "Be short.", "include": [LOGPROBS], "top_logprobs": 2}
    for _ in range(2):
        response = ask(client, **fields)
        assert response.output_text == expected.text
        events = events_of(client, **fields)
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected.text
        (item,) = response.output
        assert item.type == "message"
        (part,) = item.content
        assert part.type == "output_text"
        assert part.logprobs is not None
        logprobs = [entry for entry in expected.logprobs if llm.model.tokenizer.token_bytes(entry.token_id)]
        assert [told.logprob for told in part.logprobs] == [entry.logprob for entry in logprobs]
        assert [[top.logprob for top in told.top_logprobs] for told in part.logprobs] == [
            list(entry.top.values()) for entry in logprobs
        ]
        streamed = [told for e in events if e.type == "response.output_text.delta" for told in e.logprobs]
        assert [(told.token, told.logprob) for told in streamed] == [
            (told.token, told.logprob) for told in part.logprobs
        ]
        assert "".join(told.token for told in part.logprobs) == expected.text


def test_events(client: openai.OpenAI) -> None:
    """They are numbered, every item that is added is done, and ids and texts agree."""
    events = events_of(client)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * deltas,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    last = events[-1].response
    assert {event.response.id for event in (*events[:2], events[-1])} == {last.id}
    (item,) = last.output
    assert item.id.startswith("msg_")
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id}
    assert {event.item.id for event in events if hasattr(event, "item")} == {item.id}
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == last.output_text == events[-4].text == events[-3].part.text
    assert Response.model_validate(last.model_dump(exclude_unset=True)) == last
    whole = ask(client)
    assert (whole.output_text, whole.status, whole.usage and whole.usage.output_tokens) == (
        last.output_text,
        "incomplete",
        last.usage.output_tokens,
    )


def test_stream_helper(client: openai.OpenAI) -> None:
    """The client's helper finds the same answer, whole."""
    with client.responses.stream(model="smollm2", input=QUESTION, temperature=0, max_output_tokens=400) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == text == ask(client, max_output_tokens=400).output_text


def test_cut_off(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    (item,) = response.output
    assert item.type == "message"
    assert item.status == "incomplete"


class Person(BaseModel):
    name: str
    is_old: bool


def test_parse(client: openai.OpenAI) -> None:
    """`text.format` with a schema, in the client's own form of it."""
    response = client.responses.parse(
        model="smollm2", input="Give a JSON object for Ann, 9.", text_format=Person, temperature=0
    )
    assert isinstance(response.output_parsed, Person)
    assert isinstance(
        json.loads(ask(client, text={"format": {"type": "json_object"}}, seed=1, max_output_tokens=400).output_text),
        dict,
    )


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "name": "clock"}, {"clock"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}, {"clock"}),
    ],
)
def test_calls(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    """Whole and streamed they are the same call, with arguments of its schema."""
    response = ask(client, **ONE_CALL, tool_choice=choice, max_output_tokens=200)
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name in names
    assert call.status == "completed"
    assert call.id is not None
    assert call.id.startswith("fc_")
    arguments = json.loads(call.arguments)
    assert set(arguments) == ({"city", "days"} if call.name == "weather" else set())
    with client.responses.stream(**ONE_CALL, tool_choice=choice, temperature=0, max_output_tokens=200) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (streamed,) = final.output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert [event.type for event in events if "delta" not in event.type] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_prompt_lists_all_tools_whichever_are_allowed(client: openai.OpenAI) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    assert count(client, **ONE_CALL, tool_choice=allowed) == count(client, **ONE_CALL)


def test_allowed_tools_of_a_chat(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
    names: Any = [{"type": "function", "function": {"name": "clock"}}]
    answer = client.chat.completions.create(
        model="tools",
        messages=[{"role": "user", "content": "?"}],
        tools=tools,
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}},
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert [call.type == "function" and call.function.name for call in calls] == ["clock"]


def test_history(client: openai.OpenAI) -> None:
    """What was answered goes back as it came, with or without ids, and begins the next prompt."""
    first = ask(client, **ONE_CALL, tool_choice="required", max_output_tokens=200)
    (call,) = first.output
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    user: Any = {"role": "user", "content": "?"}
    bare = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    counts = {
        count(client, **ONE_CALL | {"input": [user, *items]})
        for items in (
            [bare, result],
            [call.model_dump(exclude_unset=True), {**result, "id": None, "status": "completed"}],
            [reasoning, bare, {**result, "output": [{"type": "input_text", "text": "3"}]}],
        )
    }
    assert len(counts) == 1
    second = ask(client, **ONE_CALL | {"input": [user, bare, result]}, tool_choice="none")
    assert second.usage is not None
    assert second.usage.input_tokens == counts.pop()
    assert second.usage.input_tokens_details.cached_tokens > 32


def test_forms_of_messages(client: openai.OpenAI) -> None:
    """A message is the same prompt in all of its forms."""
    text = {"type": "input_text", "text": QUESTION}
    system = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be short."}]}
    counts = {
        count(client, **fields)
        for fields in (
            {"input": QUESTION, "instructions": "Be short."},
            {"input": [{"role": "user", "content": QUESTION}], "instructions": "Be short."},
            {
                "input": [
                    system,
                    {"type": "message", "id": "m", "status": "completed", "role": "user", "content": [text]},
                ]
            },
        )
    }
    assert len(counts) == 1
    usage = ask(client, input=QUESTION, instructions="Be short.").usage
    assert usage is not None
    assert usage.input_tokens == counts.pop()


def test_prewarm(client: openai.OpenAI) -> None:
    """The prompt is computed and nothing written; the next request finds all that a cache can have of it."""
    text = "The cat sat on the mat. " * 40
    for is_streamed in (False, True):
        fields: dict[str, Any] = {"input": f"{is_streamed} {text}", "extra_body": {"prewarm": True}}
        if is_streamed:
            *_, last = events_of(client, **fields)
            assert last.type == "response.completed"
            warm = last.response
        else:
            warm = client.responses.create(model="smollm2", **fields)
        assert warm.status == "completed"
        assert warm.output == []
        assert warm.usage.output_tokens == 0
        after = ask(client, input=fields["input"]).usage
        assert after is not None
        assert after.input_tokens == warm.usage.input_tokens
        assert after.input_tokens_details.cached_tokens >= (after.input_tokens - 1) // 32 * 32


def test_progress(client: openai.OpenAI) -> None:
    events = events_of(client, input="One two three. " * 200, extra_body={"return_progress": True})
    reports = [event.prompt_progress for event in events if hasattr(event, "prompt_progress")]
    assert reports[0]["processed"] == reports[0]["cache"]
    assert reports[-1]["processed"] == reports[-1]["total"] == events[-1].response.usage.input_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"no_such": 1}, "no_such", "unknown_field"),
        ({"n": 2}, "n", "unknown_field"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"prewarm": True, "cache_prompt": False}, "prewarm", "invalid_value"),
        ({"input": [{"role": "user", "content": "a", "x": 1}]}, "input[0].x", "unknown_field"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "item_reference"}]}, "input[1].type", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "unsupported_content",
        ),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "invalid_value"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": TOOLS}, "tools", "tools_not_supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "invalid_value"),
        ({"max_output_tokens": 1 << 30}, "max_output_tokens", "work_limit_exceeded"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "invalid_value"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, fields: Any, param: str | None, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_ignored_is_said(client: openai.OpenAI) -> None:
    """What Codex sends and kvik has nothing for is named, and no tool of the server's is in the prompt."""
    fields: dict[str, Any] = {
        "input": [{"role": "user", "content": "?"}, {"type": "reasoning", "summary": []}],
        "tools": [*TOOLS, {"type": "namespace", "name": "x", "tools": []}, {"type": "web_search", "a": 1}],
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "store": True,
        "prompt_cache_key": "k",
    }
    raw = client.responses.with_raw_response.create(model="tools", max_output_tokens=1, **fields)
    assert raw.headers["x-kvik-ignored"].split(",") == [
        *("store", "include", "input.reasoning", "reasoning", "tools.namespace", "tools.web_search")
    ]
    response = raw.parse()
    assert response.model_extra is not None
    assert response.model_extra["store"] is False
    assert response.usage is not None
    assert response.usage.input_tokens == count(client, **ONE_CALL)


def test_error_within_a_stream() -> None:
    """It is an event of its own, and the response has failed."""
    served = SimpleNamespace(id="m")
    running = SimpleNamespace(served=served, parsers=None, created=1, new_id=Origin().new_ids(), response_id="")
    writer = ResponseWriter(cast(Running, running), ResponsesRequest(input="a"))
    lines = (writer.begin() + writer.error(ApiError(503, "gone", code="engine_dead"))).decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [e["type"] for e in events]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]
    assert events[2] == {"type": "error", "sequence_number": 2, "code": "engine_dead", "message": "gone", "param": None}
    failed = Response.model_validate(events[3]["response"])
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.message == "gone"
