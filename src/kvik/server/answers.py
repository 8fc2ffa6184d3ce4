"""What answers hold, as `/openapi.json` and `/docs` tell it; nothing is made of these structs but that description."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from kvik.server.watch.health import Condition


class Answer(Struct, frozen=True, kw_only=True):
    """An answer, or a part of one; a field that may be missing has `UNSET`."""


class ErrorDetails(Answer, frozen=True, kw_only=True):
    """What is wrong: `code` is for programs, `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str
    n_prompt_tokens: int | UnsetType = UNSET  # where the prompt is too long
    n_ctx: int | UnsetType = UNSET


class Error(Answer, frozen=True, kw_only=True):
    """Every answer that is no success, and the last event but one of a stream that fails."""

    error: ErrorDetails


class AnthropicErrorDetails(Answer, frozen=True, kw_only=True):
    """What is wrong."""

    type: str
    message: str


class AnthropicError(Answer, frozen=True, kw_only=True):
    """The same on the routes of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetails


class TokenCount(Answer, frozen=True, kw_only=True):
    """How many tokens a request's prompt has."""

    object: Literal["chat.completion.input_tokens", "response.input_tokens"]
    input_tokens: int


class ModelCard(Answer, frozen=True, kw_only=True):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    max_model_len: int
    chat: bool


class ModelList(Answer, frozen=True, kw_only=True):
    """All models; the first serves requests that name none."""

    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(Answer, frozen=True, kw_only=True):
    """Tokens of the prompt that were read back instead of computed."""

    cached_tokens: int


class EmbeddingUsage(Answer, frozen=True, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class EmbeddingItem(Answer, frozen=True, kw_only=True):
    """One input's vector: numbers, or with `encoding_format` base64 the bytes of its float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Answer, frozen=True, kw_only=True):
    """One vector for each input."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
    note: str


class TokenPiece(Answer, frozen=True, kw_only=True):
    """A token and its text, or its bytes where they are no text alone."""

    id: int
    piece: str | list[int]


class Tokenized(Answer, frozen=True, kw_only=True):
    """Token ids of a text or of a conversation."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Answer, frozen=True, kw_only=True):
    """The text of token ids, by vLLM's and by llama.cpp's name."""

    prompt: str
    content: str


class TokenizerInfo(Answer, frozen=True, kw_only=True):
    """What a client needs to know of the tokenizer."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    eos_token_ids: list[int]
    pad_token: str | None
    model_max_length: int
    chat_template: str | None


class Version(Answer, frozen=True, kw_only=True):
    """kvik's."""

    version: str


class Health(Answer, frozen=True, kw_only=True):
    """How the server is, and each of its models."""

    status: Condition
    models: dict[str, Condition]
