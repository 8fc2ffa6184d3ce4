"""Whether answers are what `/openapi.json` says, to the last field."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from kvik.server.app import ROUTES
from kvik.server.openapi import describe

Json = dict[str, Any]


def strict(document: Json) -> Json:
    """The same, where no object may have a field that its schema lacks."""
    made = copy.deepcopy(document)
    for schema in made["components"]["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return made


DOCUMENT = strict(describe(ROUTES, ()))


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema) | {"components": DOCUMENT["components"]})


def check(schema: Json, value: Any) -> None:
    """Raise `ValidationError` where the value is another."""
    _validator(json.dumps(schema)).validate(value)


def operation_of(method: str, path: str) -> tuple[str, Json]:
    """The template of a path, and what is said of it; the one with the fewest names where several match."""
    path = path.partition("?")[0]
    found = [
        template
        for template, methods in DOCUMENT["paths"].items()
        if method.lower() in methods and re.fullmatch(re.sub(r"\{\w+\}", ".+", template), path)
    ]
    template = min(found, key=lambda each: each.count("{"))
    return template, DOCUMENT["paths"][template][method.lower()]


def check_answer(method: str, path: str, status: int, content_type: str, data: bytes) -> tuple[str, str, int, str]:
    """Raise where an answer is not as described; else the path's template, method, status and content type of it."""
    template, operation = operation_of(method, path)
    media_type = content_type.partition(";")[0]
    schema = operation["responses"][str(status)]["content"][media_type]["schema"]
    if media_type == "application/json":
        check(schema, json.loads(data))
    elif media_type == "text/event-stream":
        for event in events_of(data):
            check(schema, event)
            if event["data"] != "[DONE]":
                check(schema["properties"]["data"]["contentSchema"], json.loads(event["data"]))
    else:
        check(schema, data.decode())
    return template, method, status, media_type


def events_of(data: bytes) -> list[dict[str, str]]:
    """The events of a stream by the names of their lines, without comments."""
    blocks = [
        dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        for block in data.decode().split("\n\n")
        if block
    ]
    return [block for block in blocks if block]
