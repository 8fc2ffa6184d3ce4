"""From an HTTP request to its body, and from a result to an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from kvik.server.errors import ApiError, client_left
from kvik.server.fields import decode
from kvik.server.origin import Origin, told_origin
from kvik.server.state import ServerState

LARGE_BYTES = 1 << 16
"""A body above this is read elsewhere than on the event loop, where all streams would wait for it."""

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as a struct; the scope's state gets the `origin` of the answer. Raises `ApiError`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(
            415,
            f"the content type is {content_type[:100]!r} (hint: send `Content-Type: application/json`)",
            code="unsupported_media_type",
        )
    try:
        body = await request.body()
    except ClientDisconnect:
        raise client_left() from None
    origin = Origin()
    if ServerState.of(request).config.is_replica:
        origin, body = told_origin(request, body)
    request.scope["state"]["origin"] = origin
    return decode(kind, body) if len(body) < LARGE_BYTES else await asyncio.to_thread(decode, kind, body)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(_encode(content), status, headers, media_type="application/json")
