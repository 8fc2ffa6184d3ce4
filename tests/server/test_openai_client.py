"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from kvik.engine.llm import LLM
from kvik.errors import TemplateError
from server_process import Server, wait_until, with_engine

MESSAGES: Any = [{"role": "user", "content": "Say hello."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
WORDS = {"guided_regex": "[A-Z][a-z ]{20}[.]"}  # for the helper, which raises where an answer is cut off
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def tools_client(tool_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=tool_server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(tiny_llm: LLM) -> Iterator[Server]:
    """A server with a key, that runs one sequence and lets one wait."""
    llm = with_engine(tiny_llm, max_running=1, max_waiting=1)
    with Server({"tiny": llm}, api_keys={"a-secret-key": "tests"}) as server:
        yield server


@pytest.fixture
def guarded_client(guarded: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=guarded.url, api_key="a-secret-key", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == "smollm2"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.system_fingerprint is not None
    assert answer._request_id


def test_a_chat_streamed_by_chunks_and_by_the_helper(client: OpenAI) -> None:
    """All of them tell the same."""
    options: Any = {"model": "smollm2", "messages": MESSAGES, "temperature": 0, "extra_body": WORDS}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole
    assert final.choices[0].message.role == "assistant"
    assert final.usage == chunks[-1].usage


def test_several_choices_by_the_helper(client: OpenAI) -> None:
    options: Any = {"model": "smollm2", "messages": MESSAGES, "n": 3, "seed": 5, "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(**options, extra_body=WORDS) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**options, extra_body=WORDS)
    assert [choice.message.content for choice in final.choices] == [choice.message.content for choice in whole.choices]
    for streamed, choice in zip(final.choices, whole.choices, strict=True):
        assert streamed.logprobs is not None
        assert choice.logprobs is not None
        assert streamed.logprobs.content == choice.logprobs.content


def test_a_format(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="smollm2", messages=MESSAGES, max_tokens=40, response_format=FORMAT)
    assert 0 <= int((answer.choices[0].message.content or "").split(":")[1].strip(" }\n")) <= 99
    with client.chat.completions.stream(
        model="smollm2", messages=MESSAGES, max_tokens=40, response_format=FORMAT, temperature=0
    ) as stream:
        assert (stream.get_final_completion().choices[0].message.content or "").startswith("{")


def test_an_answer_that_is_cut_off_is_no_format(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="smollm2", messages=MESSAGES, max_tokens=1, response_format=FORMAT)


def test_completions(client: OpenAI) -> None:
    options: Any = {"model": "smollm2", "prompt": ["One two", "A b"], "max_tokens": 5, "temperature": 0, "logprobs": 2}
    answer = client.completions.create(**options, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("One two")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    parts = ["", ""]
    for chunk in client.completions.create(**options, echo=True, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in answer.choices]


def test_models(client: OpenAI) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == ["smollm2"]
    assert client.models.retrieve("org/smol").id == "smollm2"
    assert client.chat.completions.create(model="org/smol", messages=MESSAGES, max_tokens=1).model == "smollm2"


def test_embeddings(client: OpenAI) -> None:
    """The client asks for base64 by itself, and decodes it."""
    answer = client.embeddings.create(model="smollm2", input=["The sea", "A train"])
    plain = client.embeddings.create(model="smollm2", input=["The sea", "A train"], encoding_format="float")
    assert [item.embedding for item in answer.data] == [item.embedding for item in plain.data]
    assert [item.index for item in answer.data] == [0, 1]
    assert sum(value * value for value in answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


# Tools.


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("seed", range(2))
def test_forced_tools(tools_client: OpenAI, choice: Any, seed: int) -> None:
    options: Any = {
        **{"model": "tools", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": seed},
        **{"max_tokens": 200, "parallel_tool_calls": False},
    }
    whole = tools_client.chat.completions.create(**options).choices[0]
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    with tools_client.chat.completions.stream(**options) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls is not None
    (other,) = streamed.message.tool_calls
    assert (other.type, other.function.name, other.function.arguments) == (
        ("function", call.function.name, call.function.arguments)
    )
    assert other.id.startswith("call_")
    assert other.function.parsed_arguments in ({"city": "Oslo"}, {"city": "Rome"})
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert "tool_calls.function.arguments.delta" in kinds
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"


def test_auto_with_a_call_that_the_model_begins(tools_client: OpenAI, tool_server: Server) -> None:
    (token_id,) = tool_server.served.llm.encode("<tool_call>")
    answer = tools_client.chat.completions.create(
        model="tools",
        messages=MESSAGES,
        tools=TOOLS,
        max_tokens=200,
        parallel_tool_calls=False,
        logit_bias={str(token_id): 100},
        seed=1,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls


# Errors.


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        *(({"temperature": 9e9}, "temperature", "invalid_value"), ({"seed": 2**70}, "seed", "invalid_value")),
        *(({"extra_body": {"colour": 1}}, "colour", "unknown_field"), ({"stop": ["a"] * 5}, "stop", "invalid_value")),
        ({"messages": [{"role": "user", "content": "one two " * 9000}]}, "messages", "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: OpenAI, fields: Any, param: str, code: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "smollm2", "messages": MESSAGES, **fields}, stream=stream)
    assert (raised.value.param, raised.value.code, raised.value.type) == (param, code, "invalid_request_error")
    assert raised.value.request_id == raised.value.response.headers["x-request-id"]


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-none", messages=MESSAGES)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-none")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat")


def test_a_wrong_key(guarded: Server) -> None:
    with OpenAI(base_url=guarded.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"


def test_request_ids(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="smollm2", messages=MESSAGES, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"


def fill(client: OpenAI, server: Server) -> list[Any]:
    """Streams that take the one place to run and the one to wait."""
    options: Any = {"model": "tiny", "prompt": "x", "max_tokens": 8000, "stream": True}
    extra = {"ignore_eos": True}
    running = client.completions.create(**options, extra_body=extra)
    next(iter(running))
    threads = [threading.Thread(target=lambda: waiting.append(client.completions.create(**options, extra_body=extra)))]
    waiting: list[Any] = [running]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.engine.scheduler.waiting) == 1)
    return [running, threads[0], waiting]


def test_a_full_queue(guarded: Server, guarded_client: OpenAI) -> None:
    """It is a RateLimitError; a client that retries comes again after the time it was told, and is served."""
    running, thread, waiting = fill(guarded_client, guarded)
    responses, refused = guarded.state.http.responses, ("POST", "/v1/completions", 429)
    before = responses[refused]
    with pytest.raises(openai.RateLimitError) as raised:
        guarded_client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.response.headers["retry-after"] == "1"
    answers: list[Any] = []
    patient = threading.Thread(
        target=lambda: answers.append(
            guarded_client.with_options(max_retries=5).completions.with_raw_response.create(
                model="tiny", prompt="x", max_tokens=1
            )
        )
    )
    patient.start()
    wait_until(lambda: responses[refused] >= before + 2)  # that from above, counted once it is sent, and its first try
    running.close()
    thread.join()
    waiting[-1].close()
    patient.join()
    assert answers[0].parse().choices[0].finish_reason == "length"
    assert answers[0].retries_taken >= 1
    guarded.assert_idle()


def test_a_failure_that_comes_again_is_not_retried(
    client: OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def render(*_: object, **__: object) -> list[int]:
        calls.append(1)
        raise TemplateError("the chat template ran longer than 2 s", hint="take another")

    monkeypatch.setattr(server.served.llm, "render_chat", render)
    with pytest.raises(openai.InternalServerError) as raised:
        client.with_options(max_retries=2).chat.completions.create(model="smollm2", messages=MESSAGES)
    assert raised.value.code == "template_error"
    assert len(calls) == 1


def test_an_error_within_a_stream(client: OpenAI, server: Server) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("boom")

    stream = client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=200, stream=True)
    next(iter(stream))
    server.wait_for_stream().branches[0].text.add = fail  # type: ignore[method-assign]
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert raised.value.code == "internal_error"
    assert "boom" not in raised.value.message


def test_a_stream_that_the_client_closes(client: OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.assert_idle()
    assert server.wait_for_stream().branches[0].finish_reason == "abort"
