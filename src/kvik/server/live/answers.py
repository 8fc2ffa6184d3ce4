"""What the answers of the live page's routes hold."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from kvik.server.answers import Answer


class BlockAnswer(Answer, frozen=True, kw_only=True):
    """A block of the cache; its tokens are told to whom they belong."""

    object: Literal["cache.block"]
    model: str
    id: int
    state: str
    num_holders: int
    is_sealed: bool
    first_token: int | None
    num_tokens: int
    num_evicted_before: int | None
    is_own: bool
    tokens: list[str] | UnsetType = UNSET


class MatchAnswer(Answer, frozen=True, kw_only=True):
    """How far a prompt is found in the cache, and the tokens around the place where it ends."""

    object: Literal["cache.match"]
    model: str
    num_tokens: int
    num_cached_tokens: int
    num_blocks: int
    block_ids: list[int]
    miss_reason: str
    before: list[str] | UnsetType = UNSET
    found: list[str] | UnsetType = UNSET
    expected: list[str] | UnsetType = UNSET


class RequestAborted(Answer, frozen=True, kw_only=True):
    """How many sequences of a request were ended."""

    id: str
    object: Literal["request"]
    aborted: int


class RequestPrompt(Answer, frozen=True, kw_only=True):
    """The whole prompt of a request, as text with its control tokens."""

    id: str
    object: Literal["request"]
    model: str
    num_prompt_tokens: int
    prompt: str


class ExplainedLink(Answer, frozen=True, kw_only=True):
    """An address of a page that a browser can open without a key: once, and soon."""

    url: str
    expires_s: float


class ExplainedPage(Answer, frozen=True, kw_only=True):
    """Where the page is."""

    id: str
    object: Literal["explained"]
    url: str
    bytes: int


class PlannableModel(Answer, frozen=True, kw_only=True):
    """A model that can be planned with."""

    id: str
    is_served: bool


class PlannableModels(Answer, frozen=True, kw_only=True):
    """All of them."""

    object: Literal["list"]
    data: list[PlannableModel]


class PlanBytes(Answer, frozen=True, kw_only=True):
    """Bytes of a plan's parts, and of the memory that there is."""

    token: int
    sequence: int
    kv: int
    weights: int | None
    others: int
    needed: int
    memory: int


class DoubledContext(Answer, frozen=True, kw_only=True):
    """Twice the context, and what it needs beside."""

    context: int
    more_bytes: int


class PlanAnswer(Answer, frozen=True, kw_only=True):
    """What a model needs, and what fits."""

    object: Literal["plan"]
    model: str
    served: str
    attention: str
    max_context: int
    kv_dtypes: list[str]
    context: int
    users: int
    kv_dtype: str
    bytes: PlanBytes
    fits: bool
    most_users: int | None
    largest_context: int | None
    doubled: DoubledContext | None
    advice: list[str]
