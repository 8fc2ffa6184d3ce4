"""Why a prompt was not found in the cache: it is compared with that of an earlier answer, token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest

from kvik.cache import MissReason, packed
from kvik.cache.radix import common_bytes
from kvik.server.cache.remembered import Asked
from kvik.server.generation import Generation, Running
from kvik.server.state import ServerState, tenant_of

SHOWN_TOKENS = 8
"""Tokens of each text around the first difference."""

_encode = msgspec.json.Encoder(order="sorted").encode


Reason = Literal[
    "model_changed", "prompt_cache_key_changed", "tools_changed", "context_compacted", "system_changed", "input_changed"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the comparison found. `reason` is the first thing that the client changed and that cost cached tokens."""

    kind: Literal["hit", "miss", "not_found", "unavailable"]
    reason: Reason | None = None
    num_common: int = 0  # tokens at the beginning that are those of the earlier prompt
    num_missed: int = 0  # tokens behind them
    num_lost: int = 0  # tokens that the earlier prompt would have spared, and did not
    first_difference: Mapping[str, Any] | None = None
    engine_reason: str | None = None  # the cache's own, why the match went no further
    changed: Sequence[str] = field(default_factory=list)  # names of fields that differ, whatever they did

    def openai(self) -> dict[str, Any]:
        """As Responses has it; chats and completions have it too."""
        told: dict[str, Any]
        if self.kind == "not_found":
            return {"prompt_cache_diagnostics": {"type": "comparison_response_not_found"}}
        if self.kind == "hit":
            told = {"type": "cache_hit"}
        elif self.kind == "unavailable":
            told = {"type": "unavailable"}
        else:
            told = {
                "type": "cache_miss",
                "reason": "input_changed" if self.reason == "system_changed" else self.reason,
                "cache_missed_tokens": self.num_missed,
                "comparison_reusable_tokens": self.num_common,
            }
        return {"prompt_cache_diagnostics": told | self._own()}

    def anthropic(self) -> dict[str, Any]:
        """As Messages has it; there is no word for a hit."""
        if self.kind == "hit":
            return {"diagnostics": None}
        if self.kind == "not_found":
            return {"diagnostics": {"cache_miss_reason": {"type": "previous_message_not_found"}}}
        if self.kind == "unavailable" or self.reason == "prompt_cache_key_changed":
            return {"diagnostics": {"cache_miss_reason": {"type": "unavailable", **self._own()}}}
        is_named = self.reason in ("model_changed", "system_changed", "tools_changed")
        kind = self.reason if is_named else "messages_changed"
        told = {"type": kind, "cache_missed_input_tokens": self.num_lost, **self._own()}
        return {"diagnostics": {"cache_miss_reason": told}}

    def _own(self) -> dict[str, Any]:
        own = {
            "engine_reason": self.engine_reason,
            "changed_fields": list(self.changed) or None,
            "first_difference": self.first_difference,
        }
        return {name: value for name, value in own.items() if value is not None}


def digest(value: Any) -> bytes:
    """Names a JSON value."""
    return hashlib.blake2b(_encode(value), digest_size=12).digest()


def with_diagnostics(
    state: ServerState,
    request: HttpRequest,
    generation: Generation,
    *,
    compared_id: str | None,
    fields: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]] = (),
    tell: Callable[[Diagnosis], dict[str, Any]] = Diagnosis.openai,
) -> Generation:
    """The generation, remembered by its response id, and compared with an earlier one where that is asked for.

    `fields` are those whose change may be a reason, by the names that answers call them by: `tools` is one of them, and
    `template`, whatever else the prompt is rendered with. `messages` are those of the prompt, the system's among them.
    """
    if len(generation.prompts) != 1:
        return generation
    tenant, responses = tenant_of(request), state.kept.responses
    now = Asked(
        model=generation.served.id,
        salt=generation.options.get("salt"),
        tokens=packed(generation.prompts[0]),
        facts={name: digest(value) for name, value in fields.items() if value is not None},
        messages=[(message["role"], digest(message)) for message in messages],
    )
    before = None if compared_id is None else responses.find(tenant, compared_id)

    def note(running: Running) -> None:
        if running.response_id:  # else nobody has seen it
            responses.note(tenant, running.response_id, now)

    def extras(running: Running) -> dict[str, Any]:
        note(running)
        if compared_id is None:
            return {}
        if before is None:
            return tell(Diagnosis(kind="not_found"))
        return tell(diagnose(running, before, now, tells_salts=state.is_operator_alone))

    # An answer whose client stopped it has no extras, but the client knows its id.
    return replace(generation, extras=[*generation.extras, extras], on_end=[*generation.on_end, note])


def diagnose(running: Running, before: Asked, now: Asked, *, tells_salts: bool) -> Diagnosis:
    """Compare a whole answer's prompt with an earlier one; `tells_salts`: also that others have a beginning like it."""
    sequence = running.stream.sequences[0]
    num_cached, miss = sequence.costs.num_cached_tokens, sequence.costs.miss_reason
    is_same_model, is_same_salt = before.model == now.model, before.salt == now.salt
    if miss is MissReason.OTHER_SALT and not tells_salts:
        miss = MissReason.UNSEEN
    num_common = common_bytes(now.tokens, 0, before.tokens) // 4 if is_same_model else 0
    num_before, num_now = len(before.tokens) // 4, len(now.tokens) // 4
    names = sorted(name for name in before.facts.keys() | now.facts if before.facts.get(name) != now.facts.get(name))
    differs_at = next(
        (at for at, message in enumerate(before.messages) if [message] != list(now.messages[at : at + 1])), None
    )
    changed = [
        *([] if is_same_model else ["model"]),
        *([] if is_same_salt else ["cache_salt"]),
        *names,
        *([] if differs_at is None else ["messages"]),
    ]
    found = Diagnosis(
        kind="miss",
        num_common=num_common,
        num_missed=num_now - num_common,
        num_lost=max(0, min(num_before, num_now - 1) - num_cached),
        engine_reason=None if miss is None else miss.name.lower(),
        changed=changed,
        first_difference=_first_difference(running, before, now, num_common)
        if is_same_model and is_same_salt
        else None,
    )
    if not is_same_model:
        return replace(found, reason="model_changed")
    if not is_same_salt:
        return replace(found, reason="prompt_cache_key_changed", num_common=0, num_missed=num_now)
    if num_common < num_before and (reason := _reason(before, now, names, differs_at)) is not None:
        return replace(found, reason=reason)
    block_size = running.served.llm.engine.kv_spec.block_size
    wanted = min(num_common, num_now - 1) // block_size * block_size  # an earlier answer that runs has sealed no more
    return replace(found, kind="hit" if num_cached >= wanted else "unavailable")


def _reason(before: Asked, now: Asked, changed: Sequence[str], differs_at: int | None) -> Reason | None:
    """What of the client's made the prompts differ; None where it only went on, and the template wrote it otherwise."""
    if "tools" in changed:
        return "tools_changed"
    if before.messages and differs_at is None:
        return "input_changed" if "template" in changed else None
    if differs_at is None:
        return "input_changed"
    role = before.messages[differs_at][0]
    if role == "system":
        return "system_changed"
    later = set(before.messages[differs_at + 1 :])
    is_shorter = len(now.messages) < len(before.messages)
    return "context_compacted" if is_shorter and later & {*now.messages[differs_at:]} else "input_changed"


def _first_difference(running: Running, before: Asked, now: Asked, position: int) -> dict[str, Any] | None:
    """The texts around the first token that differs; None where the later prompt begins with the earlier one."""
    if 4 * position == len(before.tokens):
        return None
    decode = running.served.llm.model.tokenizer.decode

    def text(tokens: bytes, first: int, end: int) -> str:
        return decode(np.frombuffer(tokens[4 * first : 4 * end], np.int32).tolist(), skip_special=False)

    end = position + SHOWN_TOKENS
    return {
        "position": position,
        "before": text(now.tokens, max(0, position - SHOWN_TOKENS), position),
        "expected": text(before.tokens, position, end),
        "found": text(now.tokens, position, end),
    }
