"""Every refusal and failure as an HTTP answer: a status, a code that programs read, and a message that people do.

The shapes are those of the OpenAI API (`error` with message, type, param and code) and of the Anthropic API.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from kvik.errors import (
    CacheTooSmall,
    EngineDead,
    EngineHung,
    GrammarFailed,
    InvalidInput,
    KvikError,
    ModelError,
    ModelNotFound,
    NotEnoughMemory,
    PromptTooLong,
    QueueFull,
    RequestsFailed,
    SlowReader,
    TemplateError,
    ToolsNotSupported,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_FINAL = frozenset({"template_error"})
"""Failures of the server's that the same request meets again: OpenAI's clients are told not to repeat it."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_CODES: tuple[tuple[type[KvikError], int, str], ...] = (
    (PromptTooLong, 400, "context_length_exceeded"),
    (CacheTooSmall, 400, "kv_capacity_exceeded"),
    (QueueFull, 429, "rate_limit_exceeded"),
    (SlowReader, 500, "slow_reader"),
    (EngineDead, 503, "engine_dead"),
    (EngineHung, 503, "engine_hung"),
    (NotEnoughMemory, 503, "not_enough_memory"),
    (ToolsNotSupported, 400, "tools_not_supported"),
    (GrammarFailed, 400, "grammar_too_complex"),
    (TemplateError, 500, "template_error"),
    (ModelNotFound, 404, "model_not_found"),
    (ModelError, 400, "unsupported_by_model"),
)

# What messages call fields, and the fields that they may be.
_SUBJECTS = (
    ("stop string", ("stop",)),
    ("the salt", ("cache_salt",)),
    ("template_vars", ("chat_template_kwargs",)),
    ("tools", ("tools",)),
    ("messages", ("messages",)),
    ("the chat template failed", ("messages",)),
    ("prompt", ("prompt", "input", "messages")),
    ("token", ("tokens",)),
)


def is_anthropic_path(path: str) -> bool:
    """Whether a route's errors have Anthropic's shape."""
    return path.startswith("/v1/messages")


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})  # further keys of the error's object
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))
        if code in _FINAL:
            self.headers.setdefault("x-should-retry", "false")

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.details,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        kind = "invalid_request_error" if self.status < 500 else "api_error"
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(self.status, kind), "message": self.message}}

    def body(self, *, is_anthropic: bool = False) -> bytes:
        """The JSON of either shape."""
        return msgspec.json.encode(self.anthropic() if is_anthropic else self.openai())


def client_left() -> ApiError:
    """Nobody reads it: it is what the log and the metrics say of a request whose answer never began."""
    return ApiError(499, "the client left", code="client_left")


def bad_request(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, code=code, param=param)


def own_error() -> ApiError:
    """What a client is told of an error that is no client's business."""
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


def api_error(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError:
    """What a client is told of an error of kvik's: never a path, an address or a traceback.

    `fields` are the names of the request's fields, for messages that begin with one.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestsFailed):
        return api_error(next(iter(error.errors.values())), fields)
    if not isinstance(error, KvikError):
        log.error("a request failed in a way of its own", exc_info=error)
        return own_error()
    text = f"{error.message} (hint: {error.hint})"
    otherwise = (400, "invalid_value") if isinstance(error, InvalidInput) else (500, "internal_error")
    status, code = next(((status, code) for kind, status, code in _CODES if isinstance(error, kind)), otherwise)
    code = getattr(error, "code", code)
    if isinstance(error, TemplateError) and "refuses the messages" in error.message:
        status, code = 400, "template_refused"
        text = text[text.index("the chat template refuses") :]  # before it stands the name of a file
    elif isinstance(error, TemplateError) and "the chat template failed" in error.message:
        status, code = 400, "template_failed"  # on these messages; on others it may not
        said = error.message[error.message.index("the chat template failed") :]
        text = f"{said} (hint: these messages have what it does not expect: check their roles, content and calls)"
    if isinstance(error, CacheTooSmall):
        text += "; `kvik plan MODEL --context N` shows what fits"
    if isinstance(error, EngineDead):
        text = "the engine has ended, and this model serves no more requests (hint: the server must be started again)"
    elif status == 500 and not isinstance(error, TemplateError | SlowReader):
        text = f"{error.message.split(':')[0]} (hint: {error.hint})"  # what follows is Python's own
    details: dict[str, Any] = {}
    if isinstance(error, PromptTooLong):
        # In the words of OpenAI's API, which programs look for, and with llama.cpp's fields.
        text = f"maximum context length is {error.context} tokens; you sent {error.num_tokens}: {text}"
        details = {"n_prompt_tokens": error.num_tokens, "n_ctx": error.context}
    return ApiError(status, text, code=code, param=_param(error.message, fields), details=details)


def _param(message: str, fields: frozenset[str]) -> str | None:
    """The field that a message is about: it begins with its name, or with words that stand for it."""
    match = re.match(r"[a-z_]+(\[\d+\])?(?![\w.])", message)
    if match is not None and match[0].split("[")[0] in fields:
        return match[0]
    named = (name for words, names in _SUBJECTS if words in message for name in names)
    return next((name for name in named if name in fields), None)
