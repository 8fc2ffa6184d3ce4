"""Each route's answers and streams are what `/openapi.json` says of them, without a field more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

from answer_schemas import DOCUMENT, check_answer
from kvik.engine.batch import ScheduledBatch
from kvik.engine.llm import LLM
from kvik.engine.runner import StepOutput
from kvik.server.app import ROUTES
from kvik.server.endpoint import Endpoint, plain_path
from kvik.server.errors import ApiError
from server_process import Answer, Client, Server, with_engine

TOOL: dict[str, Any] = {
    "name": "look",
    "description": "Look something up.",
    "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]},
}
FUNCTION = {"type": "function", "function": TOOL}
MARK = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "5m"}}
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
ASK: list[dict[str, Any]] = [{"role": "user", "content": LONG}]
MARKED: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": LONG, **MARK}]}]
CONTROLLED = [{"role": "user", "content": [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}]}]
FEW = {"max_tokens": 4, "ignore_eos": True}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}

CHATS: list[dict[str, Any]] = [
    {**FEW},
    {**FEW, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    {"max_tokens": 200, "tools": [FUNCTION], "tool_choice": "required"},
    {**FEW, "messages": MARKED},
]
COMPLETIONS: list[dict[str, Any]] = [
    {**FEW},
    {**FEW, "prompt": [[1, 2], [3, 4]], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True},
]
RESPONSES: list[dict[str, Any]] = [
    {"max_output_tokens": 4, "instructions": "Be short.", "metadata": {"a": "b"}, "user": "me"},
    {"max_output_tokens": 4, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"max_output_tokens": 200, "tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
    {
        "max_output_tokens": 4,
        "tools": [{"type": "function", **TOOL}],
        "tool_choice": {"type": "function", "name": "look"},
    },
    {"max_output_tokens": 4, "text": {"format": {"type": "json_object"}}},
    {"prewarm": True},
]
MESSAGES: list[dict[str, Any]] = [
    {"max_tokens": 4},
    {"max_tokens": 4, "messages": CONTROLLED},
    {"max_tokens": 0},
    {
        "max_tokens": 200,
        "tools": [{"name": "look", "input_schema": TOOL["parameters"]}],
        "tool_choice": {"type": "any"},
    },
]

GENERATING: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {
    # What a body begins with, how it goes on, and what else it may have where it is streamed.
    "/v1/chat/completions": ({"messages": ASK}, CHATS, [WITH_USAGE, {"stream": True, "return_progress": True}]),
    "/v1/completions": ({"prompt": LONG}, COMPLETIONS, [WITH_USAGE, {"stream": True, "return_progress": True}]),
    "/v1/responses": ({"input": LONG}, RESPONSES, [{"stream": True, "return_progress": True}]),
    "/v1/messages": ({"messages": ASK}, MESSAGES, [{"stream": True}]),
}


class Asker:
    """Asks, checks each answer, and keeps what it was: template of the path, method, status and content type."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen = set[tuple[str, str, int, str]]()

    def __call__(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        data = None if body is None else json.dumps(body).encode()
        answer = self.server.client.ask(method, path, data)
        assert answer.status == status, answer.data
        self.seen.add(checked(method, path, answer))
        return answer.body if answer.headers["content-type"].startswith("application/json") else None


def checked(method: str, path: str, answer: Answer) -> tuple[str, str, int, str]:
    return check_answer(method, path, answer.status, answer.headers["content-type"], answer.data)


def generate(ask: Asker, path: str) -> None:
    begin, variants, streams = GENERATING[path]
    for fields in variants:
        ask("POST", path, begin | fields)
        for stream in streams:
            ask("POST", path, begin | fields | stream)
    if path == "/v1/completions":
        ask("POST", path, begin | FEW | {"prompt_logprobs": 2})


def compare(ask: Asker, path: str) -> None:
    begin, (fields, *_), streams = GENERATING[path]
    first = ask("POST", path, begin | fields)["id"]
    other = {next(iter(begin)): "Hello" if "messages" not in begin else [{"role": "user", "content": "Hello"}]}
    for compared in (first, "unknown"):
        named = {"comparison_response_id": compared}
        if path == "/v1/messages":
            named = {"diagnostics": {"previous_message_id": compared}}
        for body in (begin, other, begin | {"cache_prompt": False}):
            if path != "/v1/messages" or "cache_prompt" not in body:
                ask("POST", path, body | fields | named)
                ask("POST", path, body | fields | named | streams[-1])


def count_and_embed(ask: Asker) -> None:
    ask("POST", "/v1/chat/completions/input_tokens", {"messages": ASK})
    ask("POST", "/v1/responses/input_tokens", {"input": LONG})
    ask("POST", "/v1/messages/count_tokens", {"messages": ASK})
    for fields in ({}, {"with_pieces": True}, {"return_token_strs": True}):
        ask("POST", "/tokenize", {"prompt": "é 日本", **fields})
    ask("POST", "/detokenize", {"tokens": [1, 2]})
    ask("GET", "/tokenizer_info")
    for encoding in ("float", "base64"):
        ask("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": encoding})


def keep_sessions(ask: Asker) -> None:
    path = f"/v1/sessions/{ask('POST', '/v1/sessions', {'system': 'Be short.'})['id']}"
    name = path.rpartition("/")[2]
    ask("POST", f"{path}/pin", {}, 409)
    ask("POST", "/v1/chat/completions", {"messages": ASK, "session_id": name, **FEW})
    ask("POST", "/v1/chat/completions", {"messages": ASK, "session_id": name, "stream": True, **FEW})
    ask("POST", f"{path}/pin", {"ttl": "1h"})
    ask("GET", "/v1/cache")
    ask("GET", path)
    ask("GET", "/v1/sessions")
    fork = ask("POST", f"{path}/fork", {"ttl": "5m"})
    ask("POST", f"{path}/rewind", {"num_messages": 1})
    ask("POST", f"{path}/unpin")
    ask("GET", "/v1/cache/tree")
    ask("POST", f"{path}/save", {"name": "kept"})
    ask("GET", "/v1/saved_sessions")
    loaded = ask("POST", "/v1/sessions", {"load": "kept"})
    ask("DELETE", f"/v1/sessions/{loaded['id']}")
    ask("DELETE", "/v1/saved_sessions/kept")
    ask("DELETE", "/v1/saved_sessions/kept", status=404)
    for each in (name, fork["id"]):
        ask("DELETE", f"/v1/sessions/{each}")
    ask("DELETE", "/v1/cache")


def operate(ask: Asker) -> None:
    for path in ("/v1/models", "/v1/models/tools", "/version", "/openapi.json", "/docs", "/metrics"):
        ask("GET", path)
    for path in ("/health", "/health/decode", "/ready"):
        ask("GET", path)
        ask.server.state.is_draining = True
        try:
            ask("GET", path, status=503)
        finally:
            ask.server.state.is_draining = False


def look_at_the_page(ask: Asker) -> None:
    for path in ("/", "/page/main.js", "/v1/plan/models", "/v1/plan", "/v1/plan?model=llama-2-7b&users=8&kv=int8"):
        ask("GET", path)
    ask("POST", "/v1/completions", {"prompt": LONG, **FEW})
    found = ask("POST", "/v1/cache/match", {"prompt": f"{LONG} and more"})
    ask("GET", f"/v1/cache/blocks/{found['block_ids'][0]}")
    ask("GET", f"/v1/cache/blocks/{ask.server.engine.cache.pool.num_blocks - 1}")
    page = ask("POST", "/v1/explain", {"prompt": "Hello there", "max_tokens": 2})
    ask("GET", page["url"])
    ask("GET", ask("POST", f"{page['url']}/link", {})["url"])
    ask("POST", "/v1/race", {"prompt": "Hello there", "max_tokens": 3})
    client = ask.server.client
    with client.connected("GET", "/v1/events", None) as response:
        told = b"".join(iter(response.readline, b"\n")) + b"\n"
        kind = response.headers["content-type"]
        ask.seen.add(check_answer("GET", "/v1/events", response.status, kind, told))
        with client.connected("POST", "/v1/completions", json.dumps({"prompt": LONG, **FEW}).encode()) as answer:
            answer.read()
        while b'"phase":"done"' not in response.readline():
            pass
        ask("GET", f"/v1/requests/{answer.headers['x-request-id']}")
    body = json.dumps({"prompt": LONG, "stream": True, "max_tokens": 3000, "ignore_eos": True}).encode()
    with client.connected("POST", "/v1/completions", body) as response:
        response.readline()
        ask("DELETE", f"/v1/requests/{response.headers['x-request-id']}")
        response.read()


def test_each_route_answers_as_described(tool_llm: LLM, tmp_path: Path) -> None:
    with Server({"tools": with_engine(tool_llm, store=tmp_path)}) as server:
        check_routes(Asker(server))


def check_routes(ask: Asker) -> None:
    for path in GENERATING:
        generate(ask, path)
        compare(ask, path)
    count_and_embed(ask)
    keep_sessions(ask)
    operate(ask)
    look_at_the_page(ask)
    for route in ROUTES:
        assert isinstance(route, Endpoint)
        kinds = ["application/json" if isinstance(route.answer, type) else route.answer]
        kinds += ["text/event-stream"] if route.event is not None else []
        for method in (route.methods or set()) - {"HEAD"}:
            for kind in kinds:
                assert (plain_path(route.path), method, 200, kind) in ask.seen, (
                    f"{method} {route.path}: no test of {kind}"
                )


def test_errors(tool_server: Server) -> None:
    ask = Asker(tool_server)
    for path, (begin, (fields, *_), _) in GENERATING.items():
        assert ask("POST", path, begin | fields | {"surprise": 1}, 400)
        assert ask("POST", path, begin | fields | {"model": "none"}, 404)
    told = ask("POST", "/v1/completions", {"prompt": [1] * 5000}, 400)["error"]
    assert {"n_prompt_tokens", "n_ctx"} <= told.keys()
    ask("GET", "/v1/sessions/sess_none", status=404)
    ask("GET", "/v1/models/none", status=404)
    ask("GET", "/v1/cache/tree?max_rows=x", status=400)
    ask("GET", "/v1/cache/tree?model=none", status=404)
    ask("GET", "/tokenizer_info?model=none", status=404)


def test_a_key_is_asked_for_in_both_shapes(tool_llm: LLM) -> None:
    with Server({"tools": with_engine(tool_llm)}, api_keys={"key-of-anna": "anna", "key-of-bob": "bob"}) as server:
        stranger = Client(server.port)
        for path in ("/v1/models", "/v1/messages"):
            method = "GET" if path == "/v1/models" else "POST"
            answer = stranger.ask(method, path, None if method == "GET" else b"{}")
            assert checked(method, path, answer)[2] == 401
        answer = server.client.ask("DELETE", "/v1/cache")
        assert checked("DELETE", "/v1/cache", answer)[2] == 403


@pytest.mark.parametrize("path", GENERATING)
def test_a_stream_that_fails(tool_server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tool_server.served.llm.engine.runner
    run = runner.run

    def slowly(batch: ScheduledBatch) -> StepOutput:
        time.sleep(0.02)  # so that it goes wrong before it has ended
        return run(batch)

    monkeypatch.setattr(runner, "run", slowly)
    begin, _, _ = GENERATING[path]
    length = {"max_output_tokens": 3000} if path == "/v1/responses" else {"max_tokens": 3000}
    if path in ("/v1/chat/completions", "/v1/completions"):
        length["ignore_eos"] = True
    loop = tool_server._server.loop
    assert loop is not None
    body = json.dumps(begin | length | {"stream": True}).encode()
    with tool_server.client.connected("POST", path, body) as response:
        data = response.read(400)
        error = ApiError(503, "the server stops", code="shutting_down")
        loop.call_soon_threadsafe(tool_server.served.async_llm.fail_all, error)
        data += response.read()
    assert b"the server stops" in data
    check_answer("POST", path, 200, "text/event-stream", data)


def test_a_field_that_nobody_described_is_seen(tool_server: Server) -> None:
    answer = tool_server.client.ask("GET", "/v1/models")
    body = answer.body
    body["data"][0]["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        check_answer("GET", "/v1/models", 200, "application/json", json.dumps(body).encode())
    del body["data"][0]["surprise"], body["data"][0]["chat"]
    with pytest.raises(ValidationError, match="chat"):
        check_answer("GET", "/v1/models", 200, "application/json", json.dumps(body).encode())
    chunk = b'data: {"id": "x", "surprise": 1}\n\n'
    with pytest.raises(ValidationError, match="not valid under any"):
        check_answer("POST", "/v1/chat/completions", 200, "text/event-stream", chunk)


def test_no_two_schemas_have_one_name() -> None:
    assert all(name.isalnum() for name in DOCUMENT["components"]["schemas"]), "else msgspec adds the module's name"
