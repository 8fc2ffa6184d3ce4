"""What a race shows: the texts, tables of time and work, how they grow, and the verdict; as text, JSON and curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kvik.cli.plot import Line, Panel
from kvik.cli.terminal import columns, rate, seconds
from kvik.measure.growth import CONFIDENCE, Growth, fit_growth
from kvik.measure.lanes import RaceLane, TokenCost, Verdict
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.measure.lengths import LengthCost
    from kvik.models.work import StepWork

VERSION = 1
"""Of the JSON: docs/schemas/race-1.json."""

SMOOTHED_STEPS = 8  # newest ones, the median of whose times is shown

Lanes = tuple[RaceLane, RaceLane]


def result_lines(lanes: Lanes, verdict: Verdict, costs: Sequence[LengthCost]) -> list[str]:
    """The texts, tables and the verdict."""
    parts = [[*text_lines(lanes), "", *table_lines(lanes)]]
    if all(lane.costs for lane in lanes):
        parts.append([*curve_lines(lanes), repeated_line(lanes[0])])
        parts.append(growth_lines(lanes, costs))
    if costs:
        parts.append(length_lines(costs))
    parts.append([f"ratio: {ratio(lanes)}", verdict_line(verdict)])
    return "\n\n".join("\n".join(part) for part in parts if part).split("\n")


def text_lines(lanes: Lanes) -> list[str]:
    """What was written: once if it is the same."""
    first, second = (lane.sequence.text.text for lane in lanes)
    if first == second:
        return ["both lanes wrote:", first]
    return [f"{lanes[0].name}:", first, "", f"{lanes[1].name}:", second]


def table_lines(lanes: Lanes) -> list[str]:
    """A line for each lane under a line of headings."""
    rows = [("lane", "tokens", "time", "tok/s", "first token", "tokens computed", "KV kept")]
    rows += [
        (
            lane.name,
            f"{lane.num_tokens:,}",
            f"{lane.elapsed_s:,.2f} s",
            rate(lane.tokens_per_s),
            "-" if lane.time_to_first_token_s is None else seconds(lane.time_to_first_token_s),
            f"{lane.sequence.costs.num_computed_tokens:,}",
            amount(lane.kv_kept_bytes),
        )
        for lane in lanes
    ]
    return columns(rows)


def curve_lines(lanes: Lanes) -> list[str]:
    """Time and work of one token as the text grows, at powers of two and at the end."""
    rows: list[tuple[str, ...]] = [
        ("token", "length", "ms", "·", "multiply-adds", "·", "weights+KV read", "·", "time so far")
    ]
    count = min(lane.num_tokens for lane in lanes)
    shown = sorted({1 << power for power in range(count.bit_length()) if 1 << power <= count} | {count})
    for number in shown:
        (without, without_s), (with_cache, with_s) = (cost_of_token(lane, number) for lane in lanes)
        cells = [f"{number:,}", f"{without.length:,}"]
        cells += [f"{smoothed_s(lane, number) * 1e3:,.1f}" for lane in lanes]
        cells += [big(one.work.multiply_adds / one.num_tokens) for one in (without, with_cache)]
        cells += [big(one.work.read_bytes / one.num_tokens, "B") for one in (without, with_cache)]
        rows.append((*cells, f"{without_s / with_s:.1f}:1"))
    return [f"one token of the text, {lanes[0].name} · {lanes[1].name}:", *columns(rows)]


def cost_of_token(lane: RaceLane, number: int) -> tuple[TokenCost, float]:
    """The cost that the token's step had, for all tokens that it brought, and the lane's seconds when it was there."""
    num_tokens, so_far_s = 0, 0.0
    for cost in lane.costs:
        num_tokens += cost.num_tokens
        so_far_s += cost.seconds
        if num_tokens >= number:
            return cost, so_far_s
    raise AssertionError(f"the lane has {num_tokens} tokens")


def smoothed_s(lane: RaceLane, number: int) -> float:
    """Seconds of one token, by the newest few steps; the first is the prompt's and stands alone."""
    cost, _ = cost_of_token(lane, number)
    at = lane.costs.index(cost) + 1
    newest = lane.costs[max(1, at - SMOOTHED_STEPS) : at] or [cost]
    return statistics.median(cost.seconds / cost.num_tokens for cost in newest)


def repeated_line(lane: RaceLane) -> str:
    """How much of its work the lane had done before: counted."""
    repeated = sum(cost.repeated.num_tokens for cost in lane.costs)
    tokens = sum(cost.work.num_tokens for cost in lane.costs)
    return (
        f"{lane.name}, {repeated:,} of {tokens:,} computed tokens ({repeated / tokens:.1%}) were computed before:"
        f" {repeated_share(lane):.1%} of its multiply-adds"
    )


def repeated_share(lane: RaceLane) -> float:
    """The part of the multiply-adds that was done before for the same tokens."""
    repeated = sum(cost.repeated.multiply_adds for cost in lane.costs)
    return repeated / sum(cost.work.multiply_adds for cost in lane.costs)


def growth_lines(lanes: Lanes, costs: Sequence[LengthCost]) -> list[str]:
    """The fitted exponents, each with its confidence."""
    lines = []
    for what, (without, with_cache) in growths(lanes, costs).items():
        if without is not None and with_cache is not None:
            lines.append((what, exponent(without), exponent(with_cache), f"{without.num_points:,}"))
    if not lines:
        return []
    heading = (f"growth with the length n, {CONFIDENCE:.0%} sure", lanes[0].name, lanes[1].name, "points")
    return columns([heading, *lines])


def growths(lanes: Lanes, costs: Sequence[LengthCost]) -> dict[str, tuple[Growth | None, Growth | None]]:
    """Fits of what a token costs, of both lanes: over the text's later tokens, and over the timed lengths above 1."""

    def of_text(cost_of: Callable[[TokenCost], float]) -> tuple[Growth | None, Growth | None]:
        without, with_cache = (
            fit_growth([cost.length for cost in lane.costs[1:]], [cost_of(cost) for cost in lane.costs[1:]])
            for lane in lanes
        )
        return without, with_cache

    found = {
        "time of a token of the text": of_text(lambda cost: cost.seconds / cost.num_tokens),
        "its multiply-adds": of_text(lambda cost: cost.work.multiply_adds / cost.num_tokens),
    }
    timed = [cost for cost in costs if cost.length > 1]
    lengths = [cost.length for cost in timed]
    found["time of a token at the lengths below"] = (
        fit_growth(lengths, [cost.median_first_s for cost in timed]),
        fit_growth(lengths, [cost.median_later_s for cost in timed]),
    )
    found["its multiply-adds at them"] = (
        fit_growth(lengths, [cost.first_work.multiply_adds for cost in timed]),
        fit_growth(lengths, [cost.later_work.multiply_adds for cost in timed]),
    )
    return found


def exponent(growth: Growth) -> str:
    """As in `n^1.02 (1.01 … 1.03)`."""
    return f"n^{growth.exponent:.2f} ({growth.low:.2f} … {growth.high:.2f})"


def length_lines(costs: Sequence[LengthCost]) -> list[str]:
    """Prefill against decode at each length, and texts written from their first token to there."""
    from kvik.measure.lengths import whole_text_s

    rows = [("length", "first token", "later token", "ratio", "text without", "text with", "ratio")]
    for cost in costs:
        if cost.length == 1:
            continue
        first_s, later_s = cost.median_first_s, cost.median_later_s
        without_s, with_s = whole_text_s(costs, cost.length)
        texts = (seconds(without_s), seconds(with_s), f"{without_s / with_s:.1f}")
        times = (f"{first_s * 1e3:,.1f} ms", f"{later_s * 1e3:,.1f} ms", f"{first_s / later_s:.1f}")
        rows.append((f"{cost.length:,}", *times, *texts))
    rounds = len(costs[0].later_token_s)
    return [
        f"first token: all of the length computed; later ones: with the cache (random tokens, medians of {rounds});",
        "a text of that length, without the cache and with it, summed over costs between those timed:",
        *columns(rows),
    ]


def ratio(lanes: Lanes) -> str:
    """What the cache saves, where both lanes wrote equally much."""
    without, with_cache = lanes
    if not without.num_tokens or without.num_tokens != with_cache.num_tokens:
        return "not known, the lanes did not come equally far"
    faster = without.elapsed_s / with_cache.elapsed_s
    fewer = without.sequence.costs.num_computed_tokens / with_cache.sequence.costs.num_computed_tokens
    return f"{faster:.1f} × faster, {fewer:.1f} × fewer tokens computed"  # noqa: RUF001


def verdict_line(verdict: Verdict) -> str:
    """Whether both lanes did the same, and if not, from where on."""
    if not verdict.num_compared:
        return "same tokens: nothing to compare"
    count = f"{verdict.num_compared}/{verdict.num_compared}"
    tokens = f"yes ({count})" if verdict.token_difference is None else _difference(verdict.token_difference)
    logits = "bit for bit" if verdict.logits_difference is None else _difference(verdict.logits_difference)
    return f"same tokens: {tokens}, same logits: {logits}"


def big(number: float, unit: str = "") -> str:
    """Three digits and a power of a thousand: `134 M`, `98.3 MB`."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:,.{digits}f} {letter}{unit}"
    return f"{number:,.0f} {unit}".rstrip()


def race_report(lanes: Lanes, verdict: Verdict, costs: Sequence[LengthCost]) -> dict[str, Any]:
    """The race as JSON has it."""
    return {
        "kind": "kvik race",
        "version": VERSION,
        "lanes": [lane_report(lane) for lane in lanes],
        "num_compared_tokens": verdict.num_compared,
        "same_tokens": verdict.token_difference is None,
        "same_logits": verdict.logits_difference is None,
        "first_token_difference": verdict.token_difference,
        "first_logits_difference": verdict.logits_difference,
        "growth": [
            {"cost": what, "lane": lane.name, **asdict(growth)}
            for what, fits in growths(lanes, costs).items()
            for lane, growth in zip(lanes, fits, strict=True)
            if growth is not None
        ],
        "lengths": [length_report(cost, costs) for cost in costs],
    }


def lane_report(lane: RaceLane) -> dict[str, Any]:
    """One lane as JSON has it."""
    return {
        "name": lane.name,
        "use_cache": lane.sequence.request.use_cache,
        "text": lane.sequence.text.text,
        "token_ids": lane.sequence.completion_ids,
        "seed": lane.sequence.seed,
        "num_completion_tokens": lane.num_tokens,
        "num_cached_prompt_tokens": lane.sequence.costs.num_cached_tokens,
        "num_computed_tokens": lane.sequence.costs.num_computed_tokens,
        "num_repeated_tokens": sum(cost.repeated.num_tokens for cost in lane.costs),
        "repeated_multiply_adds": sum(cost.repeated.multiply_adds for cost in lane.costs),
        "multiply_adds": sum(cost.work.multiply_adds for cost in lane.costs),
        "total_s": lane.elapsed_s,
        "time_to_first_token_s": lane.time_to_first_token_s,
        "tokens_per_s": lane.tokens_per_s,
        "kv_kept_bytes": lane.kv_kept_bytes,
        "weight_bytes": lane.sequence.costs.weight_bytes,
        "tokens": [
            {"length": cost.length, "num_tokens": cost.num_tokens, "seconds": cost.seconds, **work_report(cost.work)}
            for cost in lane.costs
        ],
    }


def length_report(cost: LengthCost, costs: Sequence[LengthCost]) -> dict[str, Any]:
    """One length as JSON has it."""
    from kvik.measure.lengths import whole_text_s

    without_s, with_s = whole_text_s(costs, cost.length)
    return {
        "length": cost.length,
        "first_token_s": cost.first_token_s,
        "later_token_s": cost.later_token_s,
        "first_token": work_report(cost.first_work),
        "later_token": work_report(cost.later_work),
        "whole_text_without_cache_s": without_s,
        "whole_text_with_cache_s": with_s,
    }


def work_report(work: StepWork) -> dict[str, int]:
    """Counts as JSON has them."""
    return {
        "num_steps": work.num_steps,
        "num_computed_tokens": work.num_tokens,
        "weight_multiply_adds": work.weight_multiply_adds,
        "attention_multiply_adds": work.attention_multiply_adds,
        "weight_bytes": work.weight_bytes,
        "kv_bytes": work.kv_bytes,
    }


def plot_panels(lanes: Lanes, costs: Sequence[LengthCost]) -> list[Panel]:
    """The curves: a token's time and the time so far by position, and a token's time at the timed lengths."""

    def of_text(of_lane: Callable[[RaceLane], Sequence[float]]) -> list[Line]:
        return [Line(lane.name, [cost.length for cost in lane.costs[1:]], of_lane(lane)) for lane in lanes]

    panels = [
        Panel(
            "One token of the text", "length, tokens", "ms",
            of_text(lambda lane: [cost.seconds / cost.num_tokens * 1e3 for cost in lane.costs[1:]]),
        ),
        Panel(
            "The text so far", "length, tokens", "s",
            of_text(lambda lane: list(accumulate(cost.seconds for cost in lane.costs))[1:]),
        ),
    ]  # fmt: skip
    timed = [cost for cost in costs if cost.length > 1]
    if timed:
        lengths = [cost.length for cost in timed]
        lines = [
            Line("first token (all computed)", lengths, [cost.median_first_s * 1e3 for cost in timed]),
            Line("later token (cached)", lengths, [cost.median_later_s * 1e3 for cost in timed]),
        ]
        panels.append(Panel("One token at each length", "length, tokens", "ms", lines, log=True))
    return panels


def _difference(number: int) -> str:
    return f"no (first difference at token {number:,})"
