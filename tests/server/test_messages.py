"""Anthropic's Messages API, through its own client where it has a word for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anthropic
import msgspec
import pytest
from anthropic.types import Message

from api_servers import serving
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.errors import TemplateError
from kvik.server.anthropic.messages import MessageWriter
from kvik.server.anthropic.messages_input import CountRequest, MessagesRequest
from kvik.server.errors import ApiError, api_error
from kvik.server.generation import Running, Usage
from kvik.server.openai.responses_input import ResponsesRequest
from kvik.server.origin import Origin
from kvik.server.preparing import ignored_header
from tool_model import write_tool_model

QUESTION = "Name three colours of the rainbow."
USER: Any = {"role": "user", "content": QUESTION}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "weather", "description": "Of a city", "input_schema": WEATHER},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
KEEP = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
ONE_CALL: dict[str, Any] = {
    "model": "tools",
    "messages": [{"role": "user", "content": "?"}],
    "tools": TOOLS,
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tools = write_tool_model(tmp_path_factory.mktemp("tools"))
    with serving(
        *("smollm2", f"tools={tools}", "--kv-memory", "128MiB", "--context", "2048", "--drop-billing-line")
    ) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "smollm2", "messages": [USER], "temperature": 0, "max_tokens": 24} | fields


def ask(client: anthropic.Anthropic, **fields: Any) -> Message:
    """A message, which must be all that Anthropic's types ask for."""
    return Message.model_validate(client.post("/v1/messages", body=with_defaults(fields), cast_to=object))


def events_of(client: anthropic.Anthropic, **fields: Any) -> list[Any]:
    given = with_defaults(fields)
    create: Any = client.messages.create
    body = {name: given.pop(name) for name in list(given) if name in ("temperature", "top_k")}
    return list(create(**given, extra_body=body, stream=True))


def count(client: anthropic.Anthropic, **fields: Any) -> int:
    body = {"model": "smollm2", "messages": [USER]} | fields
    answer: Any = client.post("/v1/messages/count_tokens", body=body, cast_to=object)
    return int(answer["input_tokens"])


def num_prompt_tokens(message: Any) -> int:
    usage = message.usage
    return int(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens)


def text_of(message: Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_same_bits_as_chat(client: anthropic.Anthropic, default_model_path: Path) -> None:
    """The text is that of `LLM.chat`, streamed or not, cached or not, with its system prompt as text or as blocks."""
    llm = LLM(str(default_model_path), kv_memory=64 << 20)
    messages = [{"role": "system", "content": "Be short."}, USER]
    expected = llm.chat(messages, SamplingParams(max_tokens=24))
    blocks = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    for system in ("Be short.", blocks):
        assert text_of(ask(client, system=system)) == expected.text
        events = events_of(client, system=system)
        assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == expected.text
        assert count(client, system=system) == len(llm.render_chat(messages))


def test_events(client: anthropic.Anthropic) -> None:
    """Their order, by their names, and their usage."""
    ask(client)
    events = events_of(client)
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        *("message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop")
    ]
    start, delta = events[0], events[-2]
    assert start.message.id.startswith("msg_")
    assert start.message.content == []
    assert start.message.usage.cache_read_input_tokens == delta.usage.cache_read_input_tokens > 0
    assert delta.delta.stop_reason == "max_tokens"
    assert delta.usage.output_tokens == 24
    assert num_prompt_tokens(delta) == count(client)
    with client.messages.with_streaming_response.create(
        model="smollm2", messages=[USER], max_tokens=2, stream=True
    ) as raw:
        names = [line[7:] for line in raw.iter_lines() if line.startswith("event: ")]
    assert names[:2] == ["message_start", "ping"]
    assert raw.headers["request-id"]


def test_stream_helper(client: anthropic.Anthropic) -> None:
    body = {"temperature": 0}
    with client.messages.stream(model="smollm2", messages=[USER], max_tokens=400, extra_body=body) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = ask(client, max_tokens=400)
    assert text == text_of(whole)
    assert final.stop_reason == whole.stop_reason == "end_turn"


def test_why_it_stopped(client: anthropic.Anthropic) -> None:
    whole = text_of(ask(client, max_tokens=400))
    word = whole.split()[3]
    stopped = ask(client, max_tokens=400, stop_sequences=["never", word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert text_of(stopped) == whole[: whole.index(word)]
    cut = ask(client, max_tokens=5)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    # A bound beyond the context is none, and the answer says what ended it.
    full = ask(client, model="tools", messages=[{"role": "user", "content": "a" * 2000}], max_tokens=1 << 30)
    assert full.stop_reason == "model_context_window_exceeded"
    assert num_prompt_tokens(full) + full.usage.output_tokens == 2048


def test_calls(client: anthropic.Anthropic) -> None:
    """Whole and streamed they are the same call, with input of its schema."""
    whole = ask(client, **ONE_CALL)
    (call,) = whole.content
    assert call.type == "tool_use"
    assert whole.stop_reason == "tool_use"
    assert set(call.input) == ({"city", "days"} if call.name == "weather" else set())
    events = events_of(client, **ONE_CALL)
    parts = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert json.loads("".join(parts)) == call.input
    (started,) = (event for event in events if event.type == "content_block_start")
    assert (started.content_block.name, started.content_block.input) == (call.name, {})
    assert events[-2].delta.stop_reason == "tool_use"
    named = ask(client, **ONE_CALL | {"tool_choice": {"type": "tool", "name": "clock"}})
    assert [block.type == "tool_use" and block.name for block in named.content] == ["clock"]


def test_history(client: anthropic.Anthropic) -> None:
    """Calls and their results go back in any of their forms; thoughts are left out."""
    (call,) = ask(client, **ONE_CALL).content
    assert call.type == "tool_use"
    use = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    parts = [{"type": "text", "text": "3"}]
    user = {"role": "user", "content": "?"}
    counts = {
        count(client, model="tools", tools=TOOLS, messages=messages)
        for messages in (
            [user, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}],
            [user, {"role": "assistant", "content": [THOUGHT, use]}, {"role": "ctx", "content": [result]}],
            [
                user,
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [{**result, "content": parts}]},
            ],
        )
    }
    assert len(counts) == 1
    text: Any = {"type": "text", "text": QUESTION}
    turns = [{"role": "user", "content": [text]}, {"role": "msg", "content": [text]}]
    assert count(client, messages=turns) == count(client, messages=[{"role": "user", "content": [text, text]}])


def test_answer_that_has_begun_goes_on(client: anthropic.Anthropic) -> None:
    whole = text_of(ask(client))
    begun = whole[: whole.index(" ", 8)]
    rest = text_of(ask(client, messages=[USER, {"role": "assistant", "content": begun}]))
    assert (begun + rest).startswith(whole[:40])


def test_output_format(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=100)
    assert set(json.loads(text_of(answer))) == {"a"}


def test_prewarm(client: anthropic.Anthropic) -> None:
    """`max_tokens` of 0 computes the prompt, and writes nothing."""
    messages = [{"role": "user", "content": "The dog sat on the mat. " * 40}]
    warm = ask(client, messages=messages, max_tokens=0)
    assert (warm.content, warm.stop_reason, warm.usage.output_tokens) == ([], "max_tokens", 0)
    after = ask(client, messages=messages)
    assert after.usage.cache_read_input_tokens is not None
    assert after.usage.cache_read_input_tokens >= (num_prompt_tokens(warm) - 1) // 32 * 32


def test_billing_line(client: anthropic.Anthropic) -> None:
    """It is left out where the operator asks for that, and the answer says so."""
    lines = [f"x-anthropic-billing-header: cc_version=2.1; cch={number}" for number in range(3)]
    plain = count(client, system="Be short.")
    systems: tuple[Any, ...] = (
        f"{lines[0]}\nBe short.",
        [{"type": "text", "text": lines[1]}, {"type": "text", "text": "Be short."}],
        [{"type": "text", "text": f"{lines[2]}\nBe short."}],
    )
    for system in systems:
        raw = client.messages.with_raw_response.create(model="smollm2", messages=[USER], max_tokens=1, system=system)
        assert raw.headers["x-kvik-ignored"] == "billing_line"
        assert num_prompt_tokens(raw.parse()) == plain == count(client, system=system)
    body = MessagesRequest(messages=[], max_tokens=1, system=lines[0])
    assert body.has_billing_line
    assert body.chat().messages[0].content == lines[0]


def test_ignored_is_said(client: anthropic.Anthropic) -> None:
    fields = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "x"},
        "context_management": {"edits": []},
        "output_config": {"effort": "low"},
        "messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER],
        "cache_control": {"type": "ephemeral"},
        "diagnostics": {"previous_message_id": None},
    }
    headers = {"anthropic-version": "2099-01-01"}
    for given, expected in (
        (fields, "context_management,metadata,thinking,output_config.effort,messages.thinking"),
        ({"thinking": {"type": "disabled"}}, None),
    ):
        answer = client.messages.with_raw_response.create(
            model="smollm2", max_tokens=1, messages=[USER], extra_body=given, extra_headers=headers
        )
        assert answer.headers.get("x-kvik-ignored") == expected


def test_tokens_of_a_whole_request_are_counted(client: anthropic.Anthropic) -> None:
    """Open WebUI has each request counted as it stands; what changes no token of the prompt is named."""
    options = {"max_tokens": 5, "metadata": {}, "stream": True, "temperature": 0.5, "top_k": 3, "stop_sequences": ["x"]}
    answer = client.messages.with_raw_response.count_tokens(model="smollm2", messages=[USER], extra_body=options)
    assert answer.parse().input_tokens == count(client)
    assert answer.headers["x-kvik-ignored"].split(",") == sorted(options)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        count(client, max_tokens=-1)


def test_cache_control_marks_text_wherever_it_stands() -> None:
    """On the whole request the last text; on calls and results that of their message."""
    use = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a"}
    text = {"type": "text", "text": "x"}
    asked = {"role": "user", "content": "?"}

    def marks(*messages: Any, **others: Any) -> list[tuple[int, int, str | None]]:
        body = msgspec.convert({"messages": messages, "max_tokens": 1, **others}, MessagesRequest)
        assert body.ignored() == []
        return [(mark.message, mark.part, mark.ttl) for mark in body.chat().marks(0)]

    assert marks(asked, **KEEP) == [(0, 0, "1h")]
    assert marks(asked, system="Be short.", **KEEP) == [(1, 0, "1h")]
    assert marks({"role": "user", "content": [text, {**text, "cache_control": {"type": "ephemeral"}}]}, **KEEP) == [
        (0, 1, "5m")
    ]
    assert marks(asked, {"role": "assistant", "content": [text, use]}, **KEEP) == [(1, 0, "1h")]
    assert marks(asked, {"role": "assistant", "content": [use]}, **KEEP) == [(0, 0, "1h")]
    assert marks(asked, {"role": "assistant", "content": [text, text, {**use, **KEEP}]}) == [(1, 1, "1h")]
    for content in ("3", [text]):
        assert marks({"role": "user", "content": [{**result, **KEEP, "content": content}]}) == [(0, 0, "1h")]
    assert marks({"role": "user", "content": [{**result, **KEEP, "content": [text, {**text, **KEEP}]}, text]}) == [
        (0, 1, "1h")
    ]


def test_the_whole_requests_cache_control_is_kept(client: anthropic.Anthropic) -> None:
    """To the token, and named by nobody as ignored."""
    messages = [{"role": "user", "content": "The cat is on the mat. " * 20}]
    body = {"model": "smollm2", "messages": messages, "max_tokens": 1, "temperature": 0, **KEEP}
    raw = client.post("/v1/messages", body=body, cast_to=anthropic.APIResponse[Any])
    assert "x-kvik-ignored" not in raw.headers
    (told,) = json.loads(raw.text())["prompt_cache_breakpoints"]
    assert (told["status"], told["ttl"]) == ("written", "1h")
    begun = [*messages, {"role": "assistant", "content": "The cat"}]
    assert count(client, messages=begun, **KEEP) == count(client, messages=begun)
    assert text_of(ask(client, messages=begun, **KEEP)) == text_of(ask(client, messages=begun))


@pytest.mark.parametrize(
    ("block", "role", "named"),
    [
        ({"type": "tool_use", "id": "a", "name": "b", "input": {}, **KEEP}, "assistant", "messages.cache_control"),
        ({"type": "tool_result", "tool_use_id": "a", "content": "", **KEEP}, "user", "messages.cache_control"),
        ({"type": "text", "text": "x", "citations": [{"cited_text": "y"}]}, "assistant", "messages.citations"),
        (
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x", "citations": [{}]}]},
            "user",
            "messages.citations",
        ),
        (
            {"type": "tool_use", "id": "a", "name": "b", "input": {}, "caller": {"type": "direct"}},
            "assistant",
            "messages.caller",
        ),
    ],
)
def test_what_cannot_be_honoured_of_a_block_is_named(block: Any, role: str, named: str) -> None:
    body = msgspec.convert({"messages": [{"role": role, "content": [block]}], "max_tokens": 1}, MessagesRequest)
    assert body.ignored() == [named]


def test_what_cannot_be_honoured_of_tools_and_system_is_named() -> None:
    given = {
        "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}],
        "max_tokens": 1,
        "tools": [TOOLS[0] | KEEP | {"eager_input_streaming": True}, {"type": "web_search_20250305", "name": "w"}],
        **KEEP,
    }
    body = msgspec.convert(given, MessagesRequest)
    told = ["cache_control", "tools.cache_control", "tools.eager_input_streaming", "tools.web_search_20250305"]
    assert body.ignored() == told
    system = [{"type": "text", "text": "x", "citations": [{}]}]
    assert msgspec.convert({"messages": [], "system": system}, CountRequest).ignored() == ["system.citations"]
    streams = {"input": "x", "stream": True, "stream_options": {"include_obfuscation": True}}
    assert msgspec.convert(streams, ResponsesRequest).ignored() == ["stream_options.include_obfuscation"]


def test_the_header_takes_no_signs_of_its_own() -> None:
    assert ignored_header(["a.b_1", "c\r\nset-cookie: d=e", "\u20ac"]) == {"x-kvik-ignored": "a.b_1"}
    assert ignored_header(["\u20ac"]) == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"no_such": 1}, "no_such: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"tools": [{"name": "a", "input_schema": {}, "x": 1}]}, "tools[0].x: "),
        ({"tools": [{"name": "a", "type": "bash_20250124"}]}, "tools[0]."),
        ({"tools": TOOLS}, "the model's chat template ignores tools"),
        ({"messages": []}, "messages must"),
        ({"messages": [{"role": "user", "content": []}]}, "messages have no text"),
        ({"messages": [{"role": "assistant", "content": [THOUGHT]}], "system": "Be short."}, "messages have no text"),
        ({"tools": [{"type": "web_search_\u20ac", "name": "web_search"}]}, "tools[0]."),
        ({"tools": [{"type": "web_search_\r\nset-cookie: a=b", "name": "web_search"}]}, "tools[0]."),
        ({"tools": [{"type": "web_search_20250305\n", "name": "web_search"}]}, "tools[0]."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0] is image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            "messages[0].content[0] is tool_use in",
        ),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences has 17"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "maximum context length is"),
    ],
)
def test_refusals(client: anthropic.Anthropic, fields: Any, said: str) -> None:
    """In Anthropic's shape, with the field by its name."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(said)


def test_error_within_a_stream() -> None:
    usage = Usage(3, 0, 0, 0)
    served, new_id = SimpleNamespace(id="m"), Origin().new_ids()
    running = SimpleNamespace(served=served, parsers=None, new_id=new_id, response_id="", usage=lambda: usage)
    writer = MessageWriter(cast(Running, running), MessagesRequest(messages=[], max_tokens=1))
    *_, name, data = writer.error(ApiError(503, "gone", code="engine_dead")).decode().split("\n", 1)
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "gone"},
    }


@pytest.mark.parametrize(
    ("what", "code"), [("failed", "template_failed"), ("refuses the messages", "template_refused")]
)
def test_a_template_that_fails_names_no_file(what: str, code: str) -> None:
    failed = TemplateError(f"model: x.gguf: the chat template {what}: no 'b' in c: d", hint="take another file")
    told = api_error(failed, frozenset({"messages"}))
    assert (told.status, told.code, told.param) == (400, code, "messages")
    assert told.message.startswith(f"the chat template {what}")
    assert "no 'b' in c: d" in told.message
    assert ("another file" in told.message) == (code == "template_refused")
