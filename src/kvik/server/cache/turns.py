"""One turn of a session in a chat request: new messages in, and the answer appended, whole or as far as it came."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from kvik.errors import EngineDead
from kvik.server.cache.sessions import Session, Sessions
from kvik.server.generation import Generation, Running, in_background

log = logging.getLogger(__name__)


MessageOf = Callable[[Running], Mapping[str, Any]]
"""The answer as a message."""


class Turn:
    """Has a session to itself, from before its request is prepared until its answer is appended.

    A context manager that lets the session go where an error leaves it.
    """

    def __init__(self, sessions: Sessions, session: Session) -> None:
        self.session = session
        self._sessions = sessions
        self._new: list[dict[str, Any]] = []
        self._message_of: MessageOf
        self._is_over = False
        session.is_busy = True

    def __enter__(self) -> Turn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._end(None)

    def begin(self, generation: Generation, new: Sequence[dict[str, Any]], message_of: MessageOf) -> Generation:
        """The generation that answers the session's messages and the new ones, and goes on from its lease."""
        self._new = list(new)
        self._message_of = message_of
        return replace(
            generation,
            on_whole=[*generation.on_whole, self._whole],
            on_end=[*generation.on_end, self._given_up],
            extras=[*generation.extras, self._extras],
        )

    async def _whole(self, running: Running) -> None:
        self._end(running)

    def _given_up(self, running: Running) -> None:
        """The answer has ended; where it was not whole, the engine ends it within a step."""
        if not self._is_over:
            in_background(self._end_aborted(running))

    async def _end_aborted(self, running: Running) -> None:
        try:
            await running.served.async_llm.abort(running.branches)
        except EngineDead:
            log.warning("session %s: the engine has ended in the middle of a turn", self.session.id)
        finally:
            self._end(running)

    def _extras(self, running: Running) -> dict[str, Any]:
        session = self.session
        return {"session": {"id": session.id, "num_messages": len(session.messages), "num_turns": session.num_turns}}

    def _end(self, running: Running | None) -> None:
        """Append what came; a turn of which nothing came changes nothing."""
        if self._is_over:
            return
        self._is_over = True
        session = self.session
        session.is_busy = False
        self._sessions.touch(session)
        branch = None if running is None else running.branches[0]
        if running is None or branch is None or branch.finish_reason is None or session.is_closed:
            return
        if branch.lease is not None and branch.lease.num_tokens:
            session.lease, old, branch.lease = branch.lease, session.lease, None
            if old is not None:
                old.close_later()
        if branch.num_completion_tokens:
            session.messages += [*self._new, dict(self._message_of(running))]
            session.num_turns += 1


def as_history(text: str, calls: Sequence[Mapping[str, Any]], thought: str | None) -> dict[str, Any]:
    """An answer as a message of the history; a call that was cut off is no call that a template could write."""
    whole = [call for call in calls if _is_json(call["function"]["arguments"])]
    message: dict[str, Any] = {"role": "assistant"}
    if text or not whole:
        message["content"] = text
    if thought is not None:
        message["reasoning_content"] = thought
    if whole:
        message["tool_calls"] = whole
    return message


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
