"""`kvik plan --plot`: memory by context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvik.cli.plot import Line, Panel, save_plot
from kvik.planner.memory import kv_memory
from kvik.planner.plan import Plan
from kvik.planner.shape import ModelShape

MIN_TOKENS = 256


def draw(path: Path, plans: Sequence[Plan]) -> None:
    """One model: its types of keys and values, its what-ifs and its weights; several: a line each."""
    first = plans[0]
    label = "GB" if first.users == 1 else f"GB, {first.users:,} users"
    title = f"KV cache of {first.model.name}" if len(plans) == 1 else "KV cache by context"
    lines = model_lines(first) if len(plans) == 1 else [_line(plan, plan.model.name) for plan in plans]
    save_plot(path, title, [Panel("memory by context", "tokens of a sequence", label, lines, log=True)])


def model_lines(plan: Plan) -> list[Line]:
    """What one model's cache takes, might take, and its weights beside it."""
    lines = [_line(plan, f"{dtype} keys and values", dtype=dtype) for dtype in plan.kv_by_dtype]
    for what_if in plan.what_ifs:
        if not what_if.as_it_is:
            shape = plan.model.with_kv_heads(what_if.num_kv_heads)
            lines.append(_line(plan, f"{plan.kv.dtype}, were it {what_if.attention}", shape=shape))
    if plan.weights is not None:
        ends = [MIN_TOKENS, plan.model.max_context]
        lines.append(Line(f"{plan.weights.format} weights", ends, [plan.weights.held_bytes / 1e9] * 2, dashed=True))
    return lines


def _line(plan: Plan, name: str, *, shape: ModelShape | None = None, dtype: str | None = None) -> Line:
    contexts = [plan.model.max_context]
    while contexts[0] // 2 >= MIN_TOKENS:
        contexts.insert(0, contexts[0] // 2)
    caches = [
        kv_memory(
            shape or plan.model, dtype or plan.kv.dtype, tokens, users=plan.users, prefix=min(plan.prefix, tokens)
        )
        for tokens in contexts
    ]
    return Line(name, contexts, [cache.num_bytes / 1e9 for cache in caches], dashed=shape is not None)
