"""What the requests of a load come to: counts, rates and percentiles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from kvik.errors import RemoteError
from kvik.measure.load import LoadResult, Record

MAX_TIMINGS = 32  # of one Server-Timing header

Distribution = dict[str, float]


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of the ascending values that so many percent do not exceed: one that was measured, nothing between."""
    return values[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Of those that are known; None where none is."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    percentiles = {f"p{percent}": percentile(known, percent) for percent in (50, 90, 99)}
    return {"count": len(known), "mean": math.fsum(known) / len(known), **percentiles, "max": known[-1]}


def summarise(result: LoadResult) -> dict[str, Any]:
    """All figures, those of time and tokens over requests that were answered; a figure is None where none is known."""
    records, workload = result.records, result.workload
    answered = [record for record in records if record.outcome == "ok"]
    replies = [record.reply for record in answered]
    counts = [reply.num_completion_tokens for reply in replies]
    # Where a server does not count, its chunks stand for tokens; `num_uncounted` says how many answers that is.
    num_tokens = sum(
        len(reply.text_times_s) if count is None else count for reply, count in zip(replies, counts, strict=True)
    )
    prompts = [reply for reply in replies if None not in (reply.num_prompt_tokens, reply.num_cached_tokens)]
    num_prompt_tokens = sum(reply.num_prompt_tokens or 0 for reply in prompts)
    num_cached_tokens = sum(reply.num_cached_tokens or 0 for reply in prompts)
    gaps = (later - earlier for reply in replies for earlier, later in pairwise(reply.text_times_s))
    duration_s = result.duration_s
    return {
        "num_requests": len(records),
        "num_answered": len(answered),
        "num_interrupted": sum(record.outcome == "interrupted" for record in records),
        "errors": dict(Counter(_error_kind(record) for record in records if record.outcome == "failed").most_common()),
        "duration_s": duration_s,
        "requests_per_s": len(answered) / duration_s,
        "completion_tokens_per_s": num_tokens / duration_s,
        "num_completion_tokens": num_tokens,
        "num_uncounted": counts.count(None),
        "num_ended_early": sum(count is not None and count < workload.max_tokens for count in counts),
        "finish_reasons": dict(Counter(reply.finish_reason or "none" for reply in replies).most_common()),
        "prompt_tokens": distribution(reply.num_prompt_tokens for reply in replies),
        "cached_share": num_cached_tokens / num_prompt_tokens if num_prompt_tokens else None,
        "time_to_first_token_s": {
            "all": distribution(record.time_to_first_token_s for record in answered),
            "first_turn": distribution(record.time_to_first_token_s for record in answered if record.turn == 0),
            "later_turns": distribution(record.time_to_first_token_s for record in answered if record.turn > 0),
        },
        "time_per_output_token_s": distribution(reply.time_per_token_s for reply in replies),
        "time_between_chunks_s": distribution(gaps),
        "latency_s": distribution(record.ended_s - record.due_s for record in answered),
        "send_delay_s": distribution(record.begun_s - record.due_s for record in records),
        "server_timing_s": _server_timings(answered),
    }


def parse_server_timing(header: str) -> dict[str, float]:
    """Seconds by name, from `queue;dur=1.5, prefill;dur=20;desc="…"`; entries without a duration are left out."""
    found = {}
    for entry in header.split(",")[:MAX_TIMINGS]:
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() != "dur":
                continue
            try:
                milliseconds = float(value.strip().strip('"'))
            except ValueError:
                continue
            if math.isfinite(milliseconds):
                found[name[:40]] = milliseconds / 1e3
    return found


def _server_timings(records: Sequence[Record]) -> dict[str, Distribution | None]:
    parsed = [parse_server_timing(record.reply.server_timing or "") for record in records]
    names = list(dict.fromkeys(name for one in parsed for name in one))[:MAX_TIMINGS]
    return {name: distribution(one.get(name) for one in parsed) for name in names}


def _error_kind(record: Record) -> str:
    return record.error.kind if isinstance(record.error, RemoteError) else type(record.error).__name__
