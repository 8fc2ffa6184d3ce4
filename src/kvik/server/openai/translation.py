"""What the APIs that are translated to chats have in common: errors by the names of their own fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvik.server.errors import ApiError, api_error
from kvik.server.openai.chat_input import CHAT_FIELDS


@contextmanager
def own_names(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of a chat are told by the names that the request has for the chat's fields."""
    try:
        yield
    except Exception as error:
        told = api_error(error, CHAT_FIELDS)
        raise ApiError(
            told.status,
            _renamed(told.message, names),
            code=told.code,
            param=None if told.param is None else _renamed(told.param, names),
            headers=told.headers,
            details=told.details,
        ) from error


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """The text, which may begin with a field's name, with its own name."""
    name = re.match(r"[a-z_]*", text)
    assert name is not None
    if name[0] == "messages":  # a chat's are numbered otherwise
        return re.sub(r"messages(\[\d+\][\w.\[\]]*)?", names["messages"], text, count=1)
    return names.get(name[0], name[0]) + text[name.end() :]
