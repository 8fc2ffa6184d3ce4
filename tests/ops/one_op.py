"""Native ops alone: programs of one op, as `NativeOps` makes them, for the tests of arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvik import _native

NOTHING = object()


def _width(x: Any) -> int:
    if not isinstance(x, np.ndarray) or x.ndim != 2:
        raise TypeError("no matrix")
    return int(x.shape[1])


def run(
    pool: _native.ThreadPool,
    append: Callable[..., Any],
    inputs: Sequence[Any],
    out: Any,
    *,
    int16_activations: bool = False,
    kept: Sequence[Any] | None = None,
    **step: Any,
) -> None:
    """`append(program, *ids of the inputs)` gives the op's value, or values for `kept`, or none (`out` is NOTHING)."""
    program = _native.Program(pool, int16_activations)
    ids = [program.input(_width(x)) for x in inputs]
    value = append(program, *ids)
    has_output = kept is None and out is not NOTHING
    program.finish(value if has_output else None, value if kept is not None else [])
    num_tokens = len(inputs[0]) if inputs else len(step["token_ids"])
    zeros, none = np.zeros(num_tokens, np.int32), np.zeros(0, np.int32)
    arrays = {"token_ids": zeros, "positions": zeros, "kv_index": zeros, "kv_bounds": zeros + np.int32(1)}
    arrays |= {"sequence_index": zeros, "logit_rows": none}
    groups = [(step.pop("slots", zeros), step.pop("block_tables", np.zeros((1, 1), np.int32)))]
    arguments: dict[str, Any] = arrays | step
    program.run(
        **arguments, groups=groups, out=out if has_output else None, first=0, last=1, timed=False, inputs=list(inputs)
    )
    for each, to in zip(value if kept is not None else [], [] if kept is None else kept, strict=True):
        program.copy_value(each, to)


def project(pool: Any, x: Any, linears: Any, outs: Any, int16_activations: Any) -> None:
    run(
        pool, lambda program, at: program.project(at, linears), [x], NOTHING, int16_activations=int16_activations,
        kept=list(outs),
    )  # fmt: skip


def embed_rows(weight: Any, row_ids: Any, scale: Any, out: Any) -> None:
    zeros = np.zeros(np.size(row_ids), np.int32)
    step: dict[str, Any] = dict.fromkeys(("positions", "kv_index", "sequence_index", "slots"), zeros)
    step |= {"token_ids": row_ids, "kv_bounds": zeros + np.int32(1)}
    run(_native.ThreadPool(1), lambda program: program.embed(weight, "token_ids", scale), [], out, **step)


def norm(pool: Any, x: Any, norm: Any, out: Any) -> None:
    run(pool, lambda program, at: program.norm(at, norm), [x], out)


def activate(pool: Any, activation: Any, x: Any, up: Any, out: Any) -> None:
    inputs = [x] if up is None else [x, up]
    run(pool, lambda program, *ids: program.activate(ids[0], activation, (*ids, None)[1]), inputs, out)


def experts(pool: Any, x: Any, logits: Any, weights: Any, activation: Any, out: Any) -> None:
    run(pool, lambda program, *ids: program.experts(*ids, weights, activation), [x, logits], out)


def gate(pool: Any, x: Any, gates: Any, out: Any) -> None:
    run(pool, lambda program, *ids: program.gate(*ids), [x, gates], out)


def soft_cap(pool: Any, x: Any, cap: Any, out: Any) -> None:
    run(pool, lambda program, at: program.soft_cap(at, cap), [x], out)


def xielu(pool: Any, x: Any, alpha_p: Any, alpha_n: Any, beta: Any, eps: Any, out: Any) -> None:
    run(pool, lambda program, at: program.xielu(at, alpha_p, alpha_n, beta, eps), [x], out)


def scale_by_position(pool: Any, x: Any, positions: Any, factors: Any, out: Any) -> None:
    scales = _native.PositionScales(factors)
    run(
        pool, lambda program, at: program.scale_by_position(at, "positions", scales), [x], out, positions=positions
    )  # fmt: skip


def rope(pool: Any, x: Any, positions: Any, table: Any, half: Any, head_dim: Any, out: Any) -> None:
    rotations = _native.Rope(table, half)
    run(
        pool, lambda program, at: program.rope(at, "positions", rotations, head_dim), [x], out, positions=positions
    )  # fmt: skip


def write_kv(pool: Any, kv: Any, k: Any, v: Any, slots: Any) -> None:
    run(pool, lambda program, *ids: program.write_kv(kv, *ids, "slot_mapping"), [k, v], NOTHING, slots=slots)


def attend(
    pool: Any, q: Any, kv: Any, block_tables: Any, sequence_index: Any, kv_index: Any, kv_bounds: Any, scale: Any,
    soft_cap: Any, out: Any, window: Any = None,
) -> None:  # fmt: skip
    run(
        pool, lambda program, at: program.attend(at, kv, scale, soft_cap, window, None), [q], out,
        block_tables=block_tables, sequence_index=sequence_index, kv_index=kv_index, kv_bounds=kv_bounds,
    )  # fmt: skip
