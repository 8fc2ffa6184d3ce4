"""Every error kvik raises on purpose.

    KvikError
    ├── ModelError              a model file or name that cannot be used
    │   ├── ModelNotFound       no such name, path or Hub id
    │   ├── DownloadError       the network, the disk or a checksum stood in the way
    │   ├── TermsNotAccepted    the model comes under terms that nobody accepted here
    │   └── TemplateError       the model's chat template failed or ran too long
    ├── InvalidInput            a value the caller chose (also a ValueError)
    │   ├── PromptTooLong       more tokens than the context holds
    │   ├── ToolsNotSupported   the model's chat template takes no tools, or writes calls in a way kvik cannot read
    │   ├── CacheTooSmall       more blocks than the cache has free
    │   └── InvalidGrammar      a schema, pattern or grammar that is wrong, or too complex to be followed
    ├── GrammarFailed           a text went where its grammar cannot be followed any further
    ├── NotEnoughMemory         the machine cannot hold what was asked for
    ├── QueueFull               more requests wait than the engine takes
    ├── SlowReader              a stream was not read while its tokens kept coming
    ├── RequestsFailed          some of several requests failed; it has the completions of the others
    ├── RemoteError             a server that kvik asked cannot be reached, refuses, fails or breaks off
    ├── StepFailed              the step that computed the request failed, or was interrupted half way
    ├── EngineHung              a step takes so long that it will hardly ever end
    └── EngineDead              the engine has ended; nothing more will come

Each carries one line that names the thing with its numbers, and a `hint` that says what to do about it.
"""

from __future__ import annotations

from typing import Any


class KvikError(Exception):
    """One clear line (`message`) and what to do about it (`hint`)."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"


class ModelError(KvikError):
    """The model file is damaged, hostile or of a kind kvik does not run."""


class ModelNotFound(ModelError):
    """No model goes by this name, path or Hub id."""


class DownloadError(ModelError):
    """The model could not be brought to this machine whole."""


class TermsNotAccepted(ModelError):
    """The model is fetched only for those who accept its terms."""


class TemplateError(ModelError):
    """The model's chat template refused the messages, failed or ran too long."""


class InvalidInput(KvikError, ValueError):
    """A value that the caller chose is outside what is allowed."""


class PromptTooLong(InvalidInput):
    """The prompt has more tokens than the context; kvik never truncates it."""

    def __init__(self, message: str, *, hint: str, num_tokens: int, context: int) -> None:
        super().__init__(message, hint=hint)
        self.num_tokens = num_tokens
        self.context = context


class ToolsNotSupported(InvalidInput):
    """The model's chat template takes no tools, or writes calls in a way that kvik cannot read."""


class CacheTooSmall(InvalidInput):
    """The cache has too few free blocks for the request."""


class InvalidGrammar(InvalidInput):
    """A schema, pattern or grammar is wrong, or too complex to be followed."""

    def __init__(self, message: str, *, hint: str, code: str) -> None:
        super().__init__(message, hint=hint)
        self.code = code  # "invalid_json_schema", "invalid_grammar" or "grammar_too_complex"


class GrammarFailed(KvikError):
    """A text went where its grammar cannot be followed any further; the request ends."""


class NotEnoughMemory(KvikError):
    """The machine has less memory than the request needs."""


class SlowReader(KvikError):
    """A stream was not read while tokens kept coming."""


class EngineHung(KvikError):
    """A step takes so long that it will hardly ever end."""


class QueueFull(KvikError):
    """More requests wait than the engine takes."""


class RequestsFailed(KvikError):
    """Some of several requests failed while they ran; the first failure is its cause."""

    def __init__(self, message: str, *, hint: str, completions: list[Any], errors: dict[int, Exception]) -> None:
        super().__init__(message, hint=hint)
        self.completions = completions  # or embeddings, in the order of the requests; None where one failed
        self.errors = errors  # by that order


class RemoteError(KvikError):
    """A server that was asked over HTTP cannot be reached, refuses, fails or breaks off."""

    def __init__(self, message: str, *, hint: str, kind: str, status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind  # a short name to count by: connect, timeout, disconnected, HTTP 429 …
        self.status = status  # of HTTP, where it was that


class StepFailed(KvikError):
    """The step that computed the request failed, or was interrupted half way; its cause tells how."""


class EngineDead(KvikError):
    """The engine has ended, by `close` or after steps that failed one after the other; nothing more will come."""
