"""The engine's log: a line for each completion that has ended, which says what it cost and nothing of what it says."""

from __future__ import annotations

import logging
import time

from kvik.engine.events import StepEvent

log = logging.getLogger("kvik.engine")


def log_ends(model_id: str, event: StepEvent) -> None:
    """Write those of one step; an observer of the engine that serves `model_id`."""
    if not event.ended or not log.isEnabledFor(logging.INFO):
        return
    for sequence in event.ended:
        costs, request = sequence.costs, sequence.request
        reason = sequence.finish_reason if sequence.error is None else type(sequence.error).__name__
        begun_s = costs.submitted_s
        last_s = time.perf_counter() if costs.last_token_s is None else costs.last_token_s  # it may have no token
        log.info(
            "%s: %d tokens after %d, %d of them cached: %s",
            model_id,
            sequence.num_completion_tokens,
            sequence.num_prompt_tokens,
            costs.num_cached_tokens,
            reason,
            extra={
                "request_id": request.request_id,
                "model": model_id,
                "finish_reason": reason,
                "prompt_tokens": sequence.num_prompt_tokens,
                "cached_tokens": costs.num_cached_tokens,
                "completion_tokens": sequence.num_completion_tokens,
                "seconds": 0.0 if begun_s is None else round(last_s - begun_s, 4),
            },
        )
