"""`kvik bench`: tokens per second of prefill and decode, and where a step's time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from kvik.cli.options import EngineOptions, flag, spell_out, value
from kvik.cli.report import write_report
from kvik.cli.terminal import Interrupt, is_terminal, note, rate, write
from kvik.errors import InvalidInput

if TYPE_CHECKING:
    from kvik.cli.measure import StepProfile
    from kvik.engine.engine import Engine

CASES = "What is measured"


@spell_out
def bench(
    *,
    prompt_tokens: Annotated[int, value(CASES, "N", "Length of the prompt.", show_default=True)] = 512,
    tokens: Annotated[int, value(CASES, "N", "Tokens to write.", show_default=True)] = 128,
    depth: Annotated[int, value(CASES, "N", "Tokens in the cache before them.", show_default=True)] = 0,
    rounds: Annotated[int, value(CASES, "N", "Measure so often; the median counts.", show_default=True)] = 5,
    profile: Annotated[
        bool, flag(CASES, "--profile", "Show each op's time, and how near the machine's limit.")
    ] = False,
    as_json: Annotated[bool, flag(CASES, "--json", "Print one JSON object when done.")] = False,
    engine: EngineOptions,
) -> None:
    """Measure prefill and decode on this machine, with random tokens.

    Every round measures each case once, so that a slow spell of the machine hits all alike.
    """
    for name, number, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--tokens", tokens, 1),
        ("--depth", depth, 0),
        ("--rounds", rounds, 1),
    ):
        if number < least:
            raise InvalidInput(f"{name} is {number}", hint=f"give a whole number from {least}")
    from kvik.cli import measure

    llm = engine.load(prefix_cache=False)  # each round computes all of its prompt
    measure.check_room(llm.engine, max(prompt_tokens + 1, max(1, depth) + tokens + 1))
    cases: dict[str, Callable[[Engine], float]] = {
        f"prefill, {prompt_tokens:,} tokens": lambda engine: measure.prefill_rate(engine, prompt_tokens),
        f"decode, {tokens:,} tokens at depth {depth:,}": lambda engine: measure.decode_rate(
            engine, tokens, depth=depth
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    with Interrupt() as interrupted:
        for index in range(rounds):
            for name, case in cases.items():
                if is_terminal(sys.stderr):
                    note(f"round {index + 1} of {rounds}: {name}")
                rates[name].append(case(llm.engine))
                if interrupted():
                    raise KeyboardInterrupt
        profiles: list[StepProfile] = []
        if profile:
            profiles.append(measure.profile_prefill(llm.engine, prompt_tokens, rounds=rounds))
            if interrupted():
                raise KeyboardInterrupt
            profiles.append(measure.profile_decode(llm.engine, depth=depth, rounds=8 * rounds))
            if interrupted():
                raise KeyboardInterrupt
    import statistics  # slow to load, and every command imports this module

    if as_json:
        write_report(
            {
                "model": {"name": engine.model, "path": str(llm.model.path)},
                "engine": asdict(llm.config) | {"context": llm.model.context},
                "tokens_per_s": {name: {"median": statistics.median(of), "rounds": of} for name, of in rates.items()},
                "profiles": [profile_report(one) for one in profiles],
            }
        )
        return
    width = max(map(len, rates))
    for name, of in rates.items():
        spread = f"({rate(min(of))} … {rate(max(of))})"
        write(f"{name:<{width}}  {rate(statistics.median(of)):>6} tok/s  {spread}\n")
    for one in profiles:
        write("\n" + "\n".join(profile_lines(one)) + "\n")


def profile_lines(profile: StepProfile) -> list[str]:
    """A table: each kind of op, its time and share, what it moved and computed, how near the limit it came."""
    limits, total_s = profile.limits, sum(op.seconds for op in profile.ops)
    rows = [("op", "in → out", "times", "ms", "share", "GB/s", "GOP/s", "of the limit")]
    for op, count in zip(profile.ops, profile.counts, strict=True):
        rows.append(
            (
                op.name,
                " → ".join(f"{width:,}" if width else "·" for width in op.widths),
                f"{count}",
                f"{op.seconds * 1e3:.3f}",
                f"{op.seconds / total_s:.1%}",
                f"{op.bytes / op.seconds / 1e9:.1f}",
                f"{op.operations / op.seconds / 1e9:.0f}",
                f"{op.least_seconds(limits) / op.seconds:.0%}",
            )
        )
    least_s = sum(op.least_seconds(limits) for op in profile.ops)
    rows.append(
        ("all", "", f"{sum(profile.counts)}", f"{total_s * 1e3:.3f}", "100.0%", "", "", f"{least_s / total_s:.0%}")
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [profile.title]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.append(
        f"limits, measured now: {limits.bytes_per_s / 1e9:.1f} GB/s read from an array as large as the weights, "
        f"{limits.integer_operations_per_s / 1e9:,.0f} GOP/s of int8, "
        f"{limits.float_operations_per_s / 1e9:,.0f} GFLOP/s of float32"
    )
    return lines


def profile_report(profile: StepProfile) -> dict[str, Any]:
    """The same for machines."""
    return {
        "title": profile.title,
        "limits": asdict(profile.limits),
        "ops": [
            asdict(op) | {"count": count, "least_seconds": op.least_seconds(profile.limits)}
            for op, count in zip(profile.ops, profile.counts, strict=True)
        ],
    }
