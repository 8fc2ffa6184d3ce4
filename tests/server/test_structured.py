"""Answers that follow a format: by every name that clients have for it, alone and beside others."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jsonschema import validate

from server_process import Client

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Describe a person in JSON."}],
    "max_tokens": 80,
    "temperature": 0,
}
GRAMMAR = 'start: "<" /[a-f]{2,4}/ ">"'


def answer_of(client: Client, fields: dict[str, Any]) -> str:
    """The text, which is the same streamed, and which ended by itself."""
    (choice,) = client.ok(CHAT, ASK | fields)["choices"]
    chunks = client.stream(CHAT, ASK | fields)
    text: str = choice["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert choice["finish_reason"] == "stop"
    return text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=["response_format", "guided_json", "text", "structured_outputs"],
)
def test_a_schema_is_followed(client: Client, fields: dict[str, Any], seed: int) -> None:
    validate(json.loads(answer_of(client, fields | {"temperature": 1.2, "seed": seed})), SCHEMA)


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object(client: Client, fields: dict[str, Any]) -> None:
    """Whatever it is: a text that is cut off says so."""
    (choice,) = client.ok(CHAT, ASK | fields | {"max_tokens": 120})["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("name", ["guided_", "structured_outputs"])
@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[0-9]{3}-[a-z]{2}", "[0-9]{3}-[a-z]{2}"),
        ("choice", ["yes", "no", "maybe so"], "yes|no|maybe so"),
        ("grammar", GRAMMAR, "<[a-f]{2,4}>"),
    ],
)
def test_patterns_choices_and_grammars(client: Client, name: str, kind: str, value: Any, pattern: str) -> None:
    fields = {name + kind: value} if name == "guided_" else {name: {kind: value}}
    assert re.fullmatch(pattern, answer_of(client, fields))
    (choice,) = client.ok(TEXT, {"prompt": "Say:", "max_tokens": 40, "temperature": 0, **fields})["choices"]
    assert re.fullmatch(pattern, choice["text"])


def test_one_that_is_cut_off_says_so(client: Client) -> None:
    (choice,) = client.ok(CHAT, ASK | {"response_format": FORMAT, "max_tokens": 4})["choices"]
    assert choice["finish_reason"] == "length"


def test_every_completion_follows_it(client: Client) -> None:
    body = client.ok(CHAT, ASK | {"response_format": FORMAT, "n": 3, "temperature": 1, "seed": 2})
    for choice in body["choices"]:
        validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_logprobs_are_the_model_s_own(client: Client) -> None:
    """Finite, though most tokens are forbidden."""
    body = client.ok(CHAT, ASK | {"guided_regex": "[xyz]{4}", "logprobs": True, "top_logprobs": 3})
    for entry in body["choices"][0]["logprobs"]["content"]:
        assert all(-9999 <= each["logprob"] <= 0 for each in (entry, *entry["top_logprobs"]))


def test_others_beside_it_never_notice(client: Client) -> None:
    plain = ASK | {"return_token_ids": True, "max_tokens": 24}
    formats: list[dict[str, Any]] = [{"response_format": FORMAT}, {"guided_regex": "[ab]{20}"}, {}]
    alone = [client.ok(CHAT, plain | fields)["choices"] for fields in formats]
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda at: client.ok(CHAT, plain | formats[at % 3])["choices"], range(9)))
    assert together == alone * 3
