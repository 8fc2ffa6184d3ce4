"""What the answers of `/v1/sessions` and `/v1/cache` hold, and what other answers say of the cache."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from kvik.server.answers import Answer


class FirstDifference(Answer, frozen=True, kw_only=True):
    """The texts around the first token that differs from the earlier prompt's."""

    position: int
    before: str
    expected: str
    found: str


class Findings(Answer, frozen=True, kw_only=True):
    """What kvik adds to a diagnosis."""

    engine_reason: str | UnsetType = UNSET
    changed_fields: list[str] | UnsetType = UNSET
    first_difference: FirstDifference | UnsetType = UNSET


class CacheDiagnostics(Findings, frozen=True, kw_only=True):
    """Why a prompt was not found in the cache, or that it was."""

    type: Literal["cache_hit", "cache_miss", "comparison_response_not_found", "unavailable"]
    reason: (
        Literal["model_changed", "prompt_cache_key_changed", "tools_changed", "context_compacted", "input_changed"]
        | UnsetType
    ) = UNSET
    cache_missed_tokens: int | UnsetType = UNSET
    comparison_reusable_tokens: int | UnsetType = UNSET


class CacheBreakpoint(Answer, frozen=True, kw_only=True):
    """A breakpoint of the request's, and what became of it."""

    param: str
    status: Literal["written", "kept", "skipped", "not_found", "not_cached", "no_room", "over_limit", "too_short"]
    position: int | None
    ttl: str
    expires_at: int | None


class SessionTurn(Answer, frozen=True, kw_only=True):
    """The session that an answer is a turn of, with it."""

    id: str
    num_messages: int
    num_turns: int


class OfCache(Answer, frozen=True, kw_only=True):
    """What a whole answer says of the cache, where it was asked for."""

    prompt_cache_diagnostics: CacheDiagnostics | UnsetType = UNSET
    prompt_cache_breakpoints: list[CacheBreakpoint] | UnsetType = UNSET


class SessionPin(Answer, frozen=True, kw_only=True):
    """What is kept of a session."""

    tokens: int
    expires_at: int


class SessionAnswer(Answer, frozen=True, kw_only=True):
    """A session."""

    id: str
    object: Literal["session"]
    model: str
    created: int
    expires_at: int
    ttl_s: float
    num_messages: int
    num_turns: int
    cached_tokens: int
    is_busy: bool
    forked_from: str | None
    pin: SessionPin | None


class SessionWithMessages(SessionAnswer, frozen=True, kw_only=True):
    """A session and its messages, as chat requests have them."""

    messages: list[dict[str, Any]]


class SessionList(Answer, frozen=True, kw_only=True):
    """The caller's sessions."""

    object: Literal["list"]
    data: list[SessionAnswer]


class SessionDeleted(Answer, frozen=True, kw_only=True):
    """A session has ended."""

    id: str
    object: Literal["session"]
    deleted: Literal[True]


class SavedSessionAnswer(Answer, frozen=True, kw_only=True):
    """A session that was saved, and how many of the blocks computed of it are stored."""

    name: str
    object: Literal["saved_session"]
    model: str
    created: int
    num_messages: int
    num_tokens: int
    num_blocks: int
    num_stored_blocks: int


class SavedSessionName(Answer, frozen=True, kw_only=True):
    """What a saved session is called."""

    name: str
    object: Literal["saved_session"]


class SavedSessionList(Answer, frozen=True, kw_only=True):
    """The caller's saved sessions of a model."""

    object: Literal["list"]
    data: list[SavedSessionName]


class SavedSessionDeleted(SavedSessionName, frozen=True, kw_only=True):
    """A saved session is forgotten."""

    deleted: Literal[True]


class CacheBlocks(Answer, frozen=True, kw_only=True):
    """How many blocks are in which state."""

    total: int
    held: int
    reusable: int
    free: int
    pinned: int
    pinned_limit: int


class CacheBytes(Answer, frozen=True, kw_only=True):
    """Memory of a cache, and of one token in it."""

    reserved: int
    committed: int
    token: int


class CacheLookups(Answer, frozen=True, kw_only=True):
    """Tokens that were looked for in a cache, and found."""

    queried: int
    cached: int
    hit_rate: float


class StoreState(Answer, frozen=True, kw_only=True):
    """Blocks that outlive the server; `blocks` and `bytes` are of all models in the folder, null before a count."""

    blocks: int | None
    bytes: int | None
    hit_tokens: int
    num_loads: int
    num_declined_loads: int
    read_bytes: int
    written_bytes: int
    num_evicted_blocks: int
    num_errors: int
    misses: dict[str, int]


class OwnPin(Answer, frozen=True, kw_only=True):
    """What the caller keeps."""

    kind: Literal["breakpoint", "session"]
    tokens: int
    expires_at: int


class ModelCache(Answer, frozen=True, kw_only=True):
    """A model's cache, and the caller's own pins and sessions in it."""

    id: str
    block_size: int
    kv_dtype: str
    blocks: CacheBlocks
    bytes: CacheBytes
    prompt_tokens: CacheLookups
    num_queries: int
    num_evicted_blocks: int
    num_copied_blocks: int
    store: StoreState | None
    pins: list[OwnPin]
    sessions: list[str]


class CacheState(Answer, frozen=True, kw_only=True):
    """The caches of all models."""

    object: Literal["cache"]
    models: list[ModelCache]


class CacheCleared(Answer, frozen=True, kw_only=True):
    """Blocks that each model's cache has forgotten."""

    object: Literal["cache"]
    cleared_blocks: dict[str, int]


class CacheTreeRow(Answer, frozen=True, kw_only=True):
    """A run of tokens; its text only where it is the caller's own."""

    level: int
    first_token: int
    num_tokens: int
    num_blocks: int
    last_block: int
    num_holders: int
    num_children: int
    is_own: bool
    text: str | UnsetType = UNSET
    is_cut: bool | UnsetType = UNSET


class CacheTree(Answer, frozen=True, kw_only=True):
    """A model's prefix tree, or the part of it that begins with one run, by depth first."""

    object: Literal["list"]
    model: str
    data: list[CacheTreeRow]
    has_more: bool
    max_level: int
    has_deeper: bool
    above: int | None
