"""Events of a kvik server, as its `/v1/events` tells them, made up for tests of what reads them."""

from __future__ import annotations

import base64
import json
from typing import Any

from kvik.client.live import LiveState

COUNTERS = {
    "steps": 9, "cached_tokens": 700, "computed_tokens": 300, "generated_tokens": 50, "queried_tokens": 1000,
    "found_tokens": 700, "evicted_blocks": 3, "copied_blocks": 2, "preemptions": 1, "running": 1, "waiting": 1,
    "held_blocks": 2, "pinned_blocks": 4, "committed_bytes": 5 << 20, "miss_all": 0, "miss_unseen": 2,
    "miss_differs": 7, "run_s": 0.5,
}  # fmt: skip


def row(key: int, phase: str, **others: Any) -> dict[str, Any]:
    """A request of which everything is told."""
    return {
        "key": key, "request_id": f"req-{key}", "choice": 0, "kind": "generate", "phase": phase, "is_own": True,
        "num_prompt_tokens": 1200, "num_cached_tokens": 1024, "num_computed_tokens": 180, "num_written_tokens": 5,
        "max_total_tokens": 1300, "num_preemptions": 0, "kv_bytes": 3 << 20, "miss_reason": "differs",
        "finish_reason": "stop" if phase == "done" else None, "error": None, "submitted_s": 100.0, "begun_s": 100.25,
        "first_token_s": 100.5, "last_token_s": 100.9, "prompt": "Once", "written": "upon a time",
        "blocks": [[0, 1]], "first_blocks": [0],
    } | others  # fmt: skip


def model(states: bytes, rows: list[dict[str, Any]], *, name: str = "smol", **others: Any) -> dict[str, Any]:
    """A model in a `state`."""
    return {
        "id": name, "is_chat": True, "context": 8192, "block_size": 32, "token_bytes": 1000, "kv_dtype": "f16",
        "num_bytes": 64 << 20, "weight_bytes": 90 << 20,
        "groups": [{"kind": "full", "layers": 30, "block_bytes": 32_000, "num_blocks": len(states)}],
        "states": [base64.b64encode(states).decode()], "requests": rows, "hits": [[], []], "counters": COUNTERS,
        "history": {"names": ["at_s", *COUNTERS], "rows": []},
    } | others  # fmt: skip


def state(*models: dict[str, Any], now_s: float = 101.0, **others: Any) -> bytes:
    """The data of a `state`."""
    return json.dumps({"now_s": now_s, "sees_text": True, "models": models} | others).encode()


def change(now_s: float = 102.0, *, name: str = "smol", **others: Any) -> bytes:
    """The data of a `change` of one model."""
    told = {
        "id": name, "counters": COUNTERS, "blocks": [[[], []]], "requests": [], "hits": [[], []], "gone": [],
        "evicted": [], "copied": [],
    } | others  # fmt: skip
    return json.dumps({"now_s": now_s, "models": [told]}).encode()


def told(*models: dict[str, Any], **others: Any) -> LiveState:
    """The state after a `state`."""
    found = LiveState()
    found.take(b"state", state(*models, **others))
    return found
