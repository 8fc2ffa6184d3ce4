"""A route that knows what it takes, so that the description of the API follows from the table of routes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.routing import Route


def plain_path(path: str) -> str:
    """The template without Starlette's converters, as OpenAPI and metrics have it."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


class Endpoint(Route):
    """A path, who answers it, and the structs that describe it; its summary is the handler's docstring.

    `answer` is what a 200 holds, or the content type of one that is not JSON.
    """

    def __init__(
        self,
        path: str,
        handler: Callable[[Request], Awaitable[Any]],
        *,
        methods: Collection[str],
        answer: type | str,
        body: type | None = None,  # that it is read into
        event: type | None = None,  # of a stream, where the body asks for one
        statuses: Collection[int] = (),  # beside 200 and those that any route may have
    ) -> None:
        super().__init__(path, handler, methods=methods)
        self.body = body
        self.event = event
        self.answer = answer
        self.statuses = tuple(statuses)

    @property
    def summary(self) -> str:
        """One line."""
        return (inspect.getdoc(self.endpoint) or "").partition("\n")[0]

    @property
    def group(self) -> str:
        """Whose words it speaks: those of the APIs that clients know, or the server's own."""
        return "API" if self.path.startswith("/v1/") else "Server"
