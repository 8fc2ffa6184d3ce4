"""A captured step of the native backend: one call runs all of its ops, and each can be looked at alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.ops.base import Batch, Forward, IntArray, Linear, Norm, QKVWeights
from kvik.ops.capture import Call, Field, Value, capture

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What the machine can do with a pool's threads, as measured."""

    bytes_per_s: float  # reading
    integer_operations_per_s: float  # 8-bit; a multiply-add is two
    float_operations_per_s: float

    def or_better(self, other: MachineLimits) -> MachineLimits:
        """Of each limit the higher: other work on the machine only lowers what is measured."""
        return MachineLimits(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class OpProfile:
    """What one op of a step cost."""

    name: str
    widths: tuple[int, int]  # of a row that goes in, and of one that comes out; 0 where there is none
    seconds: float
    bytes: float  # weights, keys and values that it has to read, each once
    operations: float  # arithmetic; a multiply-add is two
    is_integer: bool  # whether its arithmetic is that of quantised products

    def least_seconds(self, limits: MachineLimits) -> float:
        """The time that the machine's limits allow: that of its reading or of its arithmetic, whichever is longer."""
        throughput = limits.integer_operations_per_s if self.is_integer else limits.float_operations_per_s
        return max(self.bytes / limits.bytes_per_s, self.operations / throughput)


@dataclass(frozen=True, slots=True)
class OpReplay:
    """One op of a step with what went in and what came out."""

    call: Call
    arguments: tuple[Any, ...]  # as in `Ops`: values and batch fields are arrays now
    results: tuple[FloatArray, ...]


class CapturedStep:
    """The ops of a forward pass, noted once; calling it with a batch gives the logits (R, vocab_size).

    Threads may share it: they take turns. `with_hidden` and `replay` take several: no other thread may come between.
    """

    def __init__(self, forward: Forward, pool: _native.ThreadPool, *, int16_activations: bool) -> None:
        self.ops, self._output, self._hidden = capture(forward)
        self._program = _native.Program(pool, int16_activations)
        self._ids: dict[int, int] = {}  # of a captured value: the program's
        for call in self.ops:
            results = _append(self._program, self._ids, call)
            self._ids |= {value.id: number for value, number in zip(call.results, results, strict=True)}
        kept = [] if self._hidden is None else [self._ids[self._hidden.id]]
        self._program.finish(self._ids[self._output.id], kept)

    def __call__(self, batch: Batch) -> FloatArray:
        """Run the step."""
        out = self._new_output(batch)
        self._run(batch, out, 0, len(self.ops))
        return out

    def with_hidden(self, batch: Batch) -> tuple[FloatArray, FloatArray]:
        """Run the step; its logits, and hidden states (H, hidden_size) of the batch's `hidden_rows`."""
        assert self._hidden is not None, "the forward pass gives logits alone"
        logits, rows = self(batch), batch.hidden_rows
        hidden = np.empty((rows.max(initial=-1) + 1, *self._hidden.shape), np.float32)
        if len(rows):
            self._program.copy_value(self._ids[self._hidden.id], hidden)
        return logits, hidden[rows]

    def profile(self, batch: Batch) -> list[OpProfile]:
        """Run the step with a clock beside it: one entry an op."""
        out = self._new_output(batch)
        seconds = self._run(batch, out, 0, len(self.ops), timed=True)
        costs = self._program.costs(*_arrays(batch))
        return [
            OpProfile(name, _widths(call), op_seconds, num_bytes, operations, _is_integer(call))
            for call, (name, num_bytes, operations), op_seconds in zip(self.ops, costs, seconds, strict=True)
        ]

    @property
    def attend_plans(self) -> list[tuple[int, int, int]]:
        """How the last run cut its attention, one entry for each shape of layer: units, those shared, chunks.

        A unit is a segment for the rows of one KV head; several neighbouring sequences share it where they hold the
        same blocks there.
        """
        return self._program.attend_plans

    def replay(self, batch: Batch) -> Iterator[OpReplay]:
        """Run the step op by op and show each one's inputs and outputs, to be compared with another backend's."""
        out = self._new_output(batch)
        for index, call in enumerate(self.ops):
            arguments = tuple(self._resolve(argument, batch, out) for argument in call.arguments)
            self._run(batch, out, index, index + 1)
            yield OpReplay(call, arguments, tuple(self._read(value, batch, out) for value in call.results))

    def _run(self, batch: Batch, out: FloatArray, first: int, last: int, *, timed: bool = False) -> list[float]:
        return self._program.run(*_arrays(batch), out, first, last, timed)

    def _new_output(self, batch: Batch) -> FloatArray:
        return np.empty((len(batch.logit_rows), *self._output.shape), np.float32)

    def _resolve(self, argument: Any, batch: Batch, out: FloatArray) -> Any:
        if isinstance(argument, Value):
            return self._read(argument, batch, out)
        if isinstance(argument, Field):
            return getattr(batch.places(argument.kv_group) if argument.kv_group else batch, argument.name)
        return batch if isinstance(argument, Batch) else argument

    def _read(self, value: Value, batch: Batch, out: FloatArray) -> FloatArray:
        if value.id == self._output.id:
            return out.copy()
        number = self._ids[value.id]
        rows = len(batch.logit_rows) if self._program.is_of_logits(number) else len(batch.token_ids)
        content = np.empty((rows, math.prod(value.shape)), np.float32)
        self._program.copy_value(number, content)
        return content.reshape(rows, *value.shape)


def _widths(call: Call) -> tuple[int, int]:
    inputs = [argument for argument in call.arguments if isinstance(argument, Value)]
    first, last = (math.prod(values[0].shape) if values else 0 for values in (inputs, call.results))
    return first, last


def _is_integer(call: Call) -> bool:
    """Whether a matrix among the arguments is quantised; projections stand alone, in tuples, or in `QKVWeights`."""
    for argument in call.arguments:
        linears = argument.linears if isinstance(argument, QKVWeights) else argument
        for linear in linears if isinstance(linears, tuple) else (linears,):
            matrix = linear.matrix if isinstance(linear, Linear) else None
            if isinstance(matrix, _native.PackedWeight) and matrix.quantized:
                return True
    return False


def _arrays(batch: Batch) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, list[Any]]:
    return (
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.sequence_index,
        batch.block_tables,
        batch.logit_rows,
        [(places.slot_mapping, places.block_tables) for places in batch.windows],
    )


def native_norm(norm: Norm) -> _native.Norm:
    """The norm for the native core."""
    return _native.Norm(norm.weight, norm.eps, norm.bias, norm.kind == "layer")


def native_linear(linear: Linear) -> _native.Linear:
    """The projection for the native core."""
    assert isinstance(linear.matrix, _native.PackedWeight)
    return _native.Linear(linear.matrix, linear.bias, linear.scale)


def _native_form(argument: Any) -> Any:
    if isinstance(argument, Norm):
        return native_norm(argument)
    return native_linear(argument) if isinstance(argument, Linear) else argument


def _append(program: _native.Program, ids: dict[int, int], call: Call) -> list[int]:
    """Append one op to the program and give the numbers of its values."""
    given: list[Any] = [
        ids[argument.id] if isinstance(argument, Value) else _native_form(argument) for argument in call.arguments
    ]
    match call.name, given:
        case "norm_qkv", (x, norm, weights, rope, kv, _):
            query, key, value = map(native_linear, weights.linears)
            query_norm, key_norm = map(_native_form, (weights.query_norm, weights.key_norm))
            cos_sin, adjacent_pairs = (None, False) if rope is None else (rope.cos_sin, rope.adjacent_pairs)
            return [program.norm_qkv(x, norm, query, key, value, query_norm, key_norm, cos_sin, adjacent_pairs, kv)]
        case "project", (x, linears):
            return program.project(x, [native_linear(linear) for linear in linears])
        case "rope", (x, _, rope):
            return [program.rope(x, rope.cos_sin, rope.adjacent_pairs, call.results[0].shape[-1])]
        case "write_kv", (kv, k, v, _):
            program.write_kv(kv, k, v)
            return []
        case "attend", (q, kv, _, rule):
            scale = rule.scale_for(call.results[0].shape[-1])
            return [program.attend(q, kv, scale, rule.soft_cap or 0.0, rule.window)]
        case "embed", (table, ids_of, scale):
            return [program.embed(table, ids_of.name == "positions", scale)]
        case "take_rows", (x, _):
            return [program.take_rows(x)]
        case "norm" | "norm_linear" | "norm_gated" | "linear" | "activate" | "soft_cap" | "add", _:
            return [getattr(program, call.name)(*given)]
    raise AssertionError(f"no captured form of {call.name}")
