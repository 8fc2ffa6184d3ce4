"""What is refused: with an exact status, code and parameter, in one shape, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from looped import looped
from server_process import JSON, Client, Server, with_engine

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = {"role": "user", "content": "Hi"}
ASK = {"messages": [USER], "max_tokens": 1}
PROMPT = {"prompt": "Hi", "max_tokens": 1}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


def deep(depth: int) -> Any:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


# Path, fields beside a good request's, code and parameter; the status is 400.
REFUSED: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    # 3: numbers out of range and of the wrong type.
    "temperature negative": (CHAT, {"temperature": -1}, "invalid_value", "temperature"),
    "temperature text": (CHAT, {"temperature": "1"}, "invalid_type", "temperature"),
    "top_p 0": (TEXT, {"top_p": 0}, "invalid_value", "top_p"),
    "max_tokens 0": (TEXT, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    "max_tokens negative": (CHAT, {"max_tokens": -5}, "invalid_value", "max_tokens"),
    "max_tokens a fraction": (CHAT, {"max_tokens": 1.5}, "invalid_type", "max_tokens"),
    "max_tokens huge": (CHAT, {"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    "seed beyond 64 bits": (CHAT, {"seed": 2**64}, "invalid_value", "seed"),
    "seed text": (CHAT, {"seed": "1"}, "invalid_type", "seed"),
    "stream text": (CHAT, {"stream": "yes"}, "invalid_type", "stream"),
    # 4, 5, 6: too much.
    "n": (CHAT, {"n": 10**9}, "invalid_value", "n"),
    "n 0": (CHAT, {"n": 0}, "invalid_value", "n"),
    "best_of": (TEXT, {"best_of": 10**9}, "invalid_value", "best_of"),
    "best_of above n": (TEXT, {"best_of": 2}, "invalid_value", "best_of"),
    "work": (CHAT, {"n": 128, "max_tokens": 10_000}, "work_limit_exceeded", "max_tokens"),
    "min_tokens": (CHAT, {"min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens"),
    "min_tokens, no max": (CHAT, {"min_tokens": 2**30, "max_tokens": None}, "invalid_value", "min_tokens"),
    # 7: too long, streamed or not.
    "prompt over context": (TEXT, {"prompt": [1] * 9000}, "context_length_exceeded", "prompt"),
    "the same streamed": (TEXT, {"prompt": [1] * 9000, "stream": True}, "context_length_exceeded", "prompt"),
    "chat over context": (
        *(CHAT, {"messages": [{"role": "user", "content": "one two " * 9000}]}),
        *("context_length_exceeded", "messages"),
    ),
    # 9: prompts that are none.
    "empty prompt": (TEXT, {"prompt": ""}, "invalid_value", "prompt"),
    "no prompts": (TEXT, {"prompt": []}, "invalid_value", "prompt"),
    "an empty one of several": (TEXT, {"prompt": [[1], []]}, "invalid_value", "prompt"),
    "negative token id": (TEXT, {"prompt": [1, -1]}, "invalid_value", "prompt"),
    "token id of the vocabulary's size": (TEXT, {"prompt": [49152]}, "invalid_value", "prompt"),
    "token id beyond 31 bits": (TEXT, {"prompt": [2**31]}, "invalid_value", "prompt"),
    "token id beyond 64 bits": (TEXT, {"prompt": [[2**70]]}, "invalid_value", "prompt"),
    "token ids among prompts": (TEXT, {"prompt": [1, "a"]}, "invalid_value", "prompt"),
    "prompt null": (TEXT, {"prompt": None}, "invalid_type", "prompt"),
    "prompt an object": (TEXT, {"prompt": {}}, "invalid_type", "prompt"),
    "prompt of truths": (TEXT, {"prompt": [True]}, "invalid_type", "prompt[0]"),
    "too many prompts": (TEXT, {"prompt": ["a"] * 2049}, "invalid_value", "prompt"),
    "embedding of nothing": (EMBED, {"input": []}, "invalid_value", "input"),
    "embedding of a long text": (EMBED, {"input": [[1] * 9000]}, "context_length_exceeded", "input"),
    "embedding's dimensions": (EMBED, {"dimensions": 3}, "invalid_value", "dimensions"),
    "embedding's format": (EMBED, {"encoding_format": "x"}, "invalid_value", "encoding_format"),
    # 10: logprobs and biases.
    "top_logprobs 21": (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    "top_logprobs -1": (CHAT, {"logprobs": True, "top_logprobs": -1}, "invalid_value", "top_logprobs"),
    "top_logprobs without": (CHAT, {"top_logprobs": 1}, "invalid_value", "top_logprobs"),
    "logprobs 6": (TEXT, {"logprobs": 6}, "invalid_value", "logprobs"),
    "logprobs 6 streamed": (TEXT, {"logprobs": 6, "stream": True}, "invalid_value", "logprobs"),
    "logprobs true": (TEXT, {"logprobs": True}, "invalid_type", "logprobs"),
    "prompt_logprobs -1": (TEXT, {"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs"),
    "prompt_logprobs streamed": (TEXT, {"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
    "bias above 100": (CHAT, {"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    "bias text": (CHAT, {"logit_bias": {"5": "1"}}, "invalid_type", "logit_bias"),
    "bias of a word": (CHAT, {"logit_bias": {"hello": 1}}, "invalid_value", "logit_bias"),
    "bias beyond the vocabulary": (CHAT, {"logit_bias": {"49152": 1}}, "invalid_value", "logit_bias"),
    "bias twice": (CHAT, {"logit_bias": {"5": 1, "05": 2}}, "invalid_value", "logit_bias"),
    # 11: stops.
    "five stops": (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
    "empty stop": (CHAT, {"stop": [""]}, "invalid_value", "stop"),
    "stop of a megabyte": (CHAT, {"stop": "x" * 2**20}, "invalid_value", "stop"),
    "stop a number": (CHAT, {"stop": 3}, "invalid_type", "stop"),
    "stop token beyond": (CHAT, {"stop_token_ids": [49152]}, "invalid_value", "stop_token_ids"),
    # 12, 13: grammars.
    "schema with no type": (CHAT, schema_format({"type": "nothing"}), "invalid_json_schema", "response_format"),
    "schema left out": (
        *(CHAT, {"response_format": {"type": "json_schema"}}),
        *("invalid_value", "response_format.json_schema"),
    ),
    "recursive schema": (CHAT, schema_format({"$ref": "#"}), "invalid_json_schema", "response_format"),
    "schema of 100,000 nodes": (
        *(CHAT, schema_format({"enum": list(range(100_000))})),
        *("invalid_json_schema", "response_format"),
    ),
    "schema of 10,000 properties": (
        *(CHAT, schema_format({"properties": {f"p{at}": {"type": "integer"} for at in range(10_000)}})),
        *("grammar_too_complex", "response_format"),
    ),
    "deep schema": (CHAT, schema_format(deep(200)), "grammar_too_complex", "response_format"),
    "schema that would be weakened": (
        *(CHAT, schema_format({"type": "array", "uniqueItems": True})),
        *("invalid_json_schema", "response_format"),
    ),
    "remote reference": (
        *(CHAT, schema_format({"$ref": "http://169.254.169.254/"})),
        *("invalid_json_schema", "response_format"),
    ),
    "bad pattern": (CHAT, {"guided_regex": "(a"}, "invalid_grammar", "guided_regex"),
    "look-around": (TEXT, {"structured_outputs": {"regex": "(?=a)b"}}, "invalid_grammar", "structured_outputs.regex"),
    "bad grammar": (TEXT, {"guided_grammar": "start: ("}, "invalid_grammar", "guided_grammar"),
    "no choice": (TEXT, {"guided_choice": []}, "invalid_grammar", "guided_choice"),
    "guided_json of text": (TEXT, {"guided_json": "{"}, "invalid_json_schema", "guided_json"),
    "two formats": (
        *(CHAT, {"guided_regex": "a", "response_format": {"type": "json_object"}}),
        *("invalid_value", "response_format"),
    ),
    "unknown format": (CHAT, {"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    # 14: templates of strangers.
    "chat_template": (CHAT, {"chat_template": "{{ 1 }}"}, "unknown_field", "chat_template"),
    "chat_template smuggled": (
        *(CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        *("invalid_value", "chat_template_kwargs"),
    ),
    "messages smuggled": (
        *(CHAT, {"chat_template_kwargs": {"messages": []}}),
        *("invalid_value", "chat_template_kwargs"),
    ),
    # 16: messages that are none.
    "messages null": (CHAT, {"messages": None}, "invalid_type", "messages"),
    "messages text": (CHAT, {"messages": "Hi"}, "invalid_type", "messages"),
    "messages none": (CHAT, {"messages": []}, "invalid_value", "messages"),
    "a message that is a number": (CHAT, {"messages": [1]}, "invalid_type", "messages[0]"),
    "an empty message": (CHAT, {"messages": [{}]}, "missing_field", "messages[0].role"),
    "a second empty message": (CHAT, {"messages": [USER, {}]}, "missing_field", "messages[1].role"),
    "role a number": (CHAT, {"messages": [{"role": 123, "content": ""}]}, "invalid_type", "messages[0].role"),
    "role unknown": (CHAT, {"messages": [{"role": "boss", "content": ""}]}, "invalid_value", "messages[0].role"),
    "content a number": (CHAT, {"messages": [{"role": "user", "content": 1}]}, "invalid_type", "messages[0].content"),
    "content missing": (CHAT, {"messages": [{"role": "user"}]}, "invalid_value", "messages[0]"),
    "a field of a message": (
        *(CHAT, {"messages": [USER | {"colour": "red"}]}),
        *("unknown_field", "messages[0].colour"),
    ),
    # 17: what no model here reads.
    **{
        f"image at {url[:8]}": (
            CHAT,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}],
                    }
                ]
            },
            "unsupported_content",
            "messages[0].content[1]",
        )
        for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "data:image/png;base64,AAAA")
    },
    "audio": (
        *(CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
        *("unsupported_content", "messages[0].content[0]"),
    ),
    "audio out": (CHAT, {"modalities": ["text", "audio"]}, "invalid_value", "modalities[1]"),
    # 18: salts.
    "salt a number": (CHAT, {"cache_salt": 5}, "invalid_type", "cache_salt"),
    "salt huge": (CHAT, {"cache_salt": "x" * 1025}, "invalid_value", "cache_salt"),
    "salt with controls": (TEXT, {"cache_salt": "a\nb"}, "invalid_value", "cache_salt"),
    # Fields that nobody knows, or that kvik has nothing for.
    "misspelt field": (CHAT, {"repeat_penalty": 1.1}, "unknown_field", "repeat_penalty"),
    "unknown field": (CHAT, {"colour": "red"}, "unknown_field", "colour"),
    "block hashes": (CHAT, {"block_hashes": ["a"]}, "unknown_field", "block_hashes"),
    "request_id": (CHAT, {"request_id": "a"}, "unknown_field", "request_id"),
    "lora": (CHAT, {"lora": [{"id": 0}]}, "unknown_field", "lora"),
    "store": (CHAT, {"store": True}, "invalid_value", "store"),
    "suffix": (TEXT, {"suffix": "end"}, "invalid_value", "suffix"),
    "stream_options": (CHAT, {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    "include_usage null": (
        *(CHAT, {"stream": True, "stream_options": {"include_usage": None}}),
        *("invalid_type", "stream_options.include_usage"),
    ),
    "return_progress": (CHAT, {"return_progress": True}, "invalid_value", "return_progress"),
    # Tools.
    "required, no tools": (CHAT, {"tool_choice": "required"}, "invalid_value", "tool_choice"),
    "a choice that is none": (CHAT, {"tool_choice": "perhaps"}, "invalid_value", "tool_choice"),
    "an unknown tool": (
        *(CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}}),
        *("invalid_value", "tool_choice"),
    ),
    "a model without tools": (CHAT, {"tools": [TOOL]}, "tools_not_supported", "tools"),
    "a tool of another type": (CHAT, {"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    "a tool without a name": (
        *(CHAT, {"tools": [{"type": "function", "function": {}}]}),
        *("missing_field", "tools[0].function.name"),
    ),
}
GOOD: dict[str, dict[str, Any]] = {CHAT: ASK, TEXT: PROMPT, EMBED: {"input": "Hi"}}


@looped("name", REFUSED)
def test_refused(client: Client, name: str) -> None:
    path, fields, code, param = REFUSED[name]
    answer = client.post(path, GOOD[path] | fields)
    error = answer.error
    assert (answer.status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error")
    assert answer.headers["x-request-id"]
    assert "/tmp" not in error["message"]
    assert ".gguf" not in error["message"]
    assert " at 0x" not in error["message"]


def test_the_server_answers_afterwards(client: Client, server: Server) -> None:
    """And nothing of what was refused reached the engine."""
    num_steps = server.engine.scheduler.num_steps
    for path, fields, _, _ in REFUSED.values():
        client.post(path, GOOD[path] | fields)
    assert not server.streams
    assert server.engine.scheduler.num_steps == num_steps
    assert client.ok(CHAT, ASK)["choices"]


def test_numbers_of_a_long_prompt(client: Client) -> None:
    """Both in the message and as fields, by llama.cpp's names."""
    error = client.post(TEXT, {"prompt": [1] * 9000}).error
    assert error["message"].startswith("maximum context length is 8192 tokens; you sent 9000")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (9000, 8192)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b'{"prompt": "Hi"', b"nonsense", b'{"prompt": "Hi",}', b'{"prompt": "\xff"}'),
        *(b'{"prompt": "\\ud800"}', b'{"prompt": "Hi", "temperature": NaN}'),
        *(b'{"prompt": "Hi", "metadata": {"a": ' + b"[" * 50_000, b'{"prompt": "Hi", "temperature": Infinity}'),
    ],
    ids=lambda body: repr(body[:50]),
)
def test_broken_json(client: Client, body: bytes) -> None:
    answer = client.ask("POST", TEXT, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_json", None)
    assert client.ok(TEXT, PROMPT)


def test_a_number_that_no_float_holds(client: Client) -> None:
    answer = client.ask("POST", TEXT, b'{"prompt": "Hi", "temperature": 1e400}')
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_value", "temperature")


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"'])
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED, "/tokenize"])
def test_a_body_that_is_no_object(client: Client, path: str, body: bytes) -> None:
    answer = client.ask("POST", path, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_type", None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type(client: Client, kind: str) -> None:
    """A page of a stranger's can send these without asking first."""
    answer = client.ask("POST", CHAT, json.dumps(ASK).encode(), {"Content-Type": kind})
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(("path", "body"), [(CHAT, ASK), (TEXT, PROMPT), (EMBED, {"input": "Hi"}), ("/tokenize", {})])
def test_an_unknown_model(client: Client, path: str, body: Any) -> None:
    answer = client.post(path, body | {"model": "org/unknown"})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "smollm2" in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        *(("GET", "/nothing", 404, "not_found"), ("POST", "/v1/images/generations", 404, "not_found")),
        *(("GET", CHAT, 405, "method_not_allowed"), ("DELETE", "/v1/models", 405, "method_not_allowed")),
        *(("POST", CHAT + "/", 404, "not_found"), ("GET", "/v1/models/none/such", 404, "model_not_found")),
    ],
)
def test_unknown_routes_and_methods(client: Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.ask(method, path)
    assert (answer.status, answer.error["code"]) == (status, code)


# Size.


@pytest.fixture(scope="module")
def strict(tool_server: Server) -> Iterator[Server]:
    """A server with a small limit for bodies, and with keys."""
    keys = {"key-of-one-user": "one", "key-of-another": "other"}
    with Server(
        {"tools": with_engine(tool_server.served.llm)}, max_body_bytes=2000, api_keys=keys, work_limit=64
    ) as server:
        yield server
        server.assert_idle()


def test_a_body_over_the_limit(strict: Server) -> None:
    """With its length declared, or sent in chunks: refused before it is read."""
    large = json.dumps({"prompt": "x" * 3000}).encode()
    chunks = iter([large[:1500], large[1500:]])
    declared = strict.client.ask("POST", TEXT, large)
    chunked = strict.client.ask("POST", TEXT, chunks)
    for answer in (declared, chunked):
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.headers["connection"] == "close"
    lying = strict.client.ask("POST", TEXT, large[:100], JSON | {"Content-Length": str(2**50)})
    assert lying.status == 413
    assert strict.client.ok(TEXT, PROMPT)["choices"]


def test_the_work_limit_counts_prompts_completions_and_tokens(strict: Server) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 16, "ignore_eos": True}
    assert strict.client.ok(TEXT, body)["usage"]["completion_tokens"] == 64
    error = strict.client.post(TEXT, body | {"max_tokens": 17}).error
    assert error["code"] == "work_limit_exceeded"
    assert "68" in error["message"]
    assert "64" in error["message"]


def test_more_than_the_cache_holds(tiny_llm: Any) -> None:
    """Row 8: it fits the context, and can never fit the pool; the message says how much would do."""
    with Server({"tiny": with_engine(tiny_llm, kv_memory="128KiB")}) as server:
        answer = server.client.post(TEXT, {"prompt": [5] * 3000, "max_tokens": 1000})
        assert (answer.status, answer.error["code"]) == (400, "kv_capacity_exceeded")
        assert "--kv-memory" in answer.error["message"]
        assert answer.error["param"] == "prompt"
        assert server.client.ok(TEXT, {"prompt": [5] * 30})["choices"]
        server.assert_idle()


# Who may call.


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-key-of-one"}, {"X-Api-Key": "key-of-one-use"}])
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/models", "/tokenize", "/nothing", "/version", "/health/"])
def test_no_route_without_a_key(strict: Server, path: str, headers: dict[str, str]) -> None:
    answer = Client(strict.port).ask("POST", path, b"{}", JSON | headers)
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        401,
        "invalid_api_key",
        "authentication_error",
    )


@pytest.mark.parametrize("headers", [{"Authorization": "bearer key-of-another"}, {"X-Api-Key": "key-of-another"}])
def test_both_headers_for_keys(strict: Server, headers: dict[str, str]) -> None:
    assert Client(strict.port).get("/v1/models", **headers).status == 200


def test_keys_share_no_cache(strict: Server) -> None:
    body = {"prompt": [7] * 100, "max_tokens": 1}
    strict.client.ok(TEXT, body)
    assert strict.client.ok(TEXT, body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    other = Client(strict.port, **{"X-Api-Key": "key-of-another"})
    assert other.ok(TEXT, body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        *(({"Host": "evil.example"}, "host_not_allowed"), ({"Host": "127.0.0.1.evil.example:80"}, "host_not_allowed")),
        *(({"Origin": "http://evil.example"}, "origin_not_allowed"), ({"Origin": "null"}, "origin_not_allowed")),
    ],
)
def test_forged_hosts_and_origins(client: Client, headers: dict[str, str], code: str) -> None:
    answer = client.post(CHAT, ASK, **headers)
    assert (answer.status, answer.error["code"]) == (403, code)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8000"])
def test_names_of_this_machine(client: Client, host: str) -> None:
    assert client.get("/v1/models", Host=host).status == 200


# Request ids.


def test_request_ids(client: Client) -> None:
    """The client's comes back, ours where there is none or it is too strange to be a header; neither is a key."""
    assert client.get("/version", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/version").headers["x-request-id"].startswith("req-")
    assert client.get("/version", **{"X-Request-Id": "a b;" + "c" * 200}).headers["x-request-id"].startswith("req-")
    first, second = (client.post(CHAT, ASK, **{"X-Request-Id": "same"}) for _ in range(2))
    assert first.body["id"] != second.body["id"]
    assert (
        client.post(CHAT, {}, **{"X-Request-Id": "of an error".replace(" ", "-")}).headers["x-request-id"]
        == "of-an-error"
    )
