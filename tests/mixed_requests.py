"""Requests of every kind to every generating route, and what of their answers may not depend on who writes them."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

PATIENCE_S = 120.0
TOOL = {
    "name": "look_up",
    "description": "Looks a word up",
    "parameters": {"type": "object", "properties": {"word": {"type": "string", "maxLength": 20}}, "required": ["word"]},
}
CHANGING = frozenset({"id", "call_id", "item_id", "created", "created_at", "completed_at", "usage", "timings"})
ENDS = ("[DONE]", '{"type":"message_stop"}')


def mixed_request(number: int) -> tuple[str, dict[str, Any]]:
    """A path and a body whose answer is always the same."""
    drawn = random.Random(number)
    path = drawn.choice(("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"))
    text = " ".join(drawn.choices(("one", "word", "of", "many", "others", "here"), k=drawn.randrange(3, 60)))
    num_tokens = drawn.randrange(50, 800)
    body: dict[str, Any] = {"stream": drawn.random() < 0.6}
    has_tool = drawn.random() < 0.3
    messages = [{"role": "user", "content": text}]
    if path == "/v1/messages":
        body |= {"messages": messages, "max_tokens": num_tokens, "temperature": 0}
        if has_tool:
            tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
            body |= {"tools": [tool], "tool_choice": {"type": "any"}}
        return path, body
    body["temperature"] = drawn.choice((0, 1.0))
    if path == "/v1/responses":
        body |= {"input": text, "max_output_tokens": num_tokens, "temperature": 0}
        if has_tool:
            body |= {"tools": [{"type": "function", **TOOL}], "tool_choice": "required"}
        return path, body
    body |= {"max_tokens": num_tokens, "seed": number, "n": drawn.choice((1, 1, 2))}
    if path == "/v1/completions":
        body |= {"prompt": [text, "another"] if drawn.random() < 0.2 else text, "ignore_eos": True}
        body |= drawn.choice(({}, {"logprobs": 2}, {"echo": True}, {"return_token_ids": True}))
        return path, body
    body["messages"] = messages
    if has_tool:
        body |= {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    else:
        body |= drawn.choice(({}, {"logprobs": True, "top_logprobs": 2}, {"frequency_penalty": 0.7}))
    if body["stream"] and drawn.random() < 0.3:
        body["stream_options"] = {"include_usage": True}
    return path, body


def ask(
    url: str, path: str, body: Mapping[str, Any] | None = None, on_event: Callable[[int], None] = lambda count: None
) -> Any:
    """The JSON of an answer, or of all events of a stream, which must have an end; `on_event` is told how many came."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return json.load(answer)
        events, last = [], ""
        for line in answer:
            if line.startswith(b"data: "):
                last = line[6:].decode().strip()
                if last != "[DONE]":
                    events.append(json.loads(last))
                    on_event(len(events))
    is_over = last in ENDS or events[-1]["type"] in ("response.completed", "response.incomplete")
    assert is_over, f"a stream ended silently after {len(events)} events"
    assert not any("error" in event or event.get("type") == "error" for event in events), events[-2:]
    return events


def lasting(answer: Any) -> Any:
    """What may not differ; of a stream, the events of each choice in their order."""
    if isinstance(answer, list):
        by_choice: dict[int, list[Any]] = {}
        for event in answer:
            choices = event.get("choices", [])
            by_choice.setdefault(choices[0]["index"] if choices else -1, []).append(_stripped(event))
        return by_choice
    return _stripped(answer)


def ids_of(answer: Any) -> set[str]:
    """The ids that the events of a stream name its answer by."""
    return {event["id"] for event in answer if "choices" in event}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(each) for name, each in value.items() if name not in CHANGING}
    return [_stripped(each) for each in value] if isinstance(value, list) else value
