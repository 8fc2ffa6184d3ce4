"""`/docs`: every route and every field on one page, which loads nothing and runs nothing."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvik import __version__
from kvik.server.openapi import describe

Json = dict[str, Any]

MAX_SHOWN = 2**31 - 1
"""Bounds from here on are those of the machine's numbers, and say nothing to a reader."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b646d; --line: #dfe3e7; --paper: #fff; --well: #f5f7f8;
  --post: #0b62c4; --get: #0a7a45; --delete: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ad; --line: #32393f; --paper: #14171a;
  --well: #1c2125; --post: #6db1ff; --get: #58c48c; --delete: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } p { margin: .4rem 0; }
code, pre, .path { font-family: ui-monospace, monospace; font-size: .875rem; }
pre { background: var(--well); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; overflow-x: auto; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .45rem 0; }
summary { cursor: pointer; padding: .5rem .7rem; display: flex; flex-wrap: wrap; gap: .1rem .7rem; }
summary:hover { background: var(--well); } details > div { padding: 0 .7rem .7rem; }
.method { font-weight: 700; min-width: 3.6rem; font-size: .875rem; line-height: 1.5rem; }
.post { color: var(--post); } .get { color: var(--get); } .delete { color: var(--delete); }
.path { font-weight: 600; overflow-wrap: anywhere; line-height: 1.5rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line); }
th { border: 0; color: var(--soft); font-weight: 500; } td:first-child { white-space: nowrap; }
a { color: var(--post); }
"""


async def docs(request: Request) -> Response:
    """All routes and fields of the API on one page."""
    # Without the names of models, which are for those who have a key.
    page = render(describe(request.app.routes, ()))
    headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(page, media_type="text/html", headers=headers)


def render(document: Json) -> str:
    """The page of an OpenAPI document."""
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            groups.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    routes = "".join(f"<h2>{escape(group)}</h2>{''.join(found)}" for group, found in groups.items())
    schemas = document["components"]["schemas"]
    structs = "".join(
        f'<details id="{escape(name)}"><summary><span class="path">{escape(name)}</span>'
        f'<span class="soft">{_text(schema.get("description", ""))}</span></summary>'
        f"<div>{_fields(schema)}</div></details>"
        for name, schema in schemas.items()
        if "properties" in schema
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kvik: the API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>kvik <span class="soft">{escape(__version__)}</span></h1>'
        "<p>All routes of this server. Where it was started with keys, send one as"
        " <code>Authorization: Bearer KEY</code>. An error is always"
        ' <code>{"error": {"message", "type", "param", "code"}}</code>, and each answer has an'
        " <code>x-request-id</code>. Programs read the same in <a href='/openapi.json'>/openapi.json</a>.</p>"
        f"{routes}<h2>Objects</h2>{structs}</body></html>"
    )


def _operation(path: str, method: str, operation: Json) -> str:
    body = ""
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        body = f"<p>Body: {_kind(schema)}</p>"
    parameters = "".join(
        f"<p>In the path: <code>{escape(each['name'])}</code></p>" for each in operation.get("parameters", ())
    )
    answers = "".join(
        f"<tr><td>{status}</td><td>{_content(told['content'])}</td><td>{_text(told['description'])}</td></tr>"
        for status, told in operation["responses"].items()
    )
    return (
        f'<details><summary><span class="method {method}">{method.upper()}</span>'
        f'<span class="path">{escape(path)}</span><span class="soft">{_text(operation["summary"])}</span></summary>'
        f'<div>{parameters}{body}<div class="scroll"><table><tr><th>Status<th>Holds<th>When</tr>{answers}</table>'
        "</div></div></details>"
    )


def _content(content: Json) -> str:
    """What an answer holds, by content type; of a stream, what the data of its events are."""
    told = []
    for media_type, media in content.items():
        data = media["schema"].get("properties", {}).get("data", {}).get("contentSchema")
        kind = _kind(media["schema"]) if data is None else f"events of {_kind(data)}"
        told.append(f'{kind} <span class="soft">{escape(media_type)}</span>')
    return "<br>".join(told)


def _text(text: str) -> str:
    """With `code` as such."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))


def _fields(schema: Json) -> str:
    required = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_kind(field)}</td>"
        f"<td>{'required' if name in required else _default(field)}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f'<div class="scroll"><table><tr><th>Field<th>Type<th>Default</tr>{rows}</table></div>'


def _default(field: Json) -> str:
    value = field.get("default")
    return "" if value is None else f"<code>{escape(json.dumps(value))}</code>"


def _kind(schema: Json) -> str:
    """A type in a few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        is_left_out = "default" in schema  # which null says as well
        kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"} or not is_left_out]
        return " or ".join(dict.fromkeys(_kind(kind) for kind in kinds))
    if "enum" in schema:
        return " | ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"] if value is not None)
    kind = schema.get("type", "any")
    if kind == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    words = " or ".join(kind) if isinstance(kind, list) else kind
    bounds = [
        f"{sign} {schema[name]:,}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if abs(schema.get(name, MAX_SHOWN)) < MAX_SHOWN
    ]
    if "maxLength" in schema:
        bounds.append(f"up to {schema['maxLength']:,} characters")
    return escape(" ".join([words, ", ".join(bounds)]).strip())
