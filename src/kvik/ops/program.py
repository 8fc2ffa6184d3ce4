"""A captured step of the native backend: one call runs all of its ops, and each can be looked at alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import _native
from kvik.ops.base import (
    XIELU,
    AttentionRule,
    Batch,
    ExpertsWeights,
    Forward,
    IntArray,
    KVIndex,
    Linear,
    Norm,
    PositionScales,
    QKVWeights,
    RopeTable,
)
from kvik.ops.capture import Field, capture
from kvik.ops.fusion import Call
from kvik.ops.table import OPS, Value

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
        return [_profile(call, op_seconds, batch) for call, op_seconds in zip(self.ops, seconds, strict=True)]

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
            return getattr(batch if argument.kv_group is None else batch.groups[argument.kv_group], argument.name)
        return batch if isinstance(argument, Batch) else argument

    def _read(self, value: Value, batch: Batch, out: FloatArray) -> FloatArray:
        if value.id == self._output.id:
            return out.copy()
        number = self._ids[value.id]
        rows = len(batch.logit_rows) if value.of_logits else len(batch.token_ids)
        content = np.empty((rows, value.width), np.float32)
        self._program.copy_value(number, content)
        return content.reshape(rows, *value.shape)


def _profile(call: Call, seconds: float, batch: Batch) -> OpProfile:
    of_logits = any(value.of_logits for value in call.results)
    num_bytes, operations = OPS[call.name].cost(*call.arguments).at(batch, of_logits=of_logits)
    first, last = (values[0].width if values else 0 for values in (call.inputs, call.results))
    return OpProfile(call.name, (first, last), seconds, num_bytes, operations, _is_integer(call))


def _is_integer(call: Call) -> bool:
    """Whether a matrix among the arguments is quantised; projections stand alone, in tuples, or in what has some."""
    for argument in call.arguments:
        linears = argument.linears if isinstance(argument, QKVWeights | ExpertsWeights) else argument
        for linear in linears if isinstance(linears, tuple) else (linears,):
            matrix = linear.matrix if isinstance(linear, Linear) else None
            if isinstance(matrix, _native.PackedWeight) and matrix.quantized:
                return True
    return False


def _arrays(batch: Batch) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, list[Any]]:
    return (
        batch.token_ids,
        batch.positions,
        batch.kv_index,
        batch.kv_bounds,
        batch.sequence_index,
        batch.logit_rows,
        [group.arrays for group in batch.groups],
    )


def run_once(pool: _native.ThreadPool, name: str, arguments: tuple[Any, ...], *, int16_activations: bool) -> Any:
    """One op alone: a program of one op, whose inputs are the float arrays among the arguments."""
    program, inputs, fields = _native.Program(pool, int16_activations), list[FloatArray](), dict[str, IntArray]()
    batch: Batch | None = None

    def captured(at: int, argument: Any) -> Any:
        """What stands for an argument in a program."""
        nonlocal batch
        if isinstance(argument, Batch):
            batch = argument
        elif isinstance(argument, np.ndarray):
            if argument.dtype == np.float32:
                width = math.prod(argument.shape[1:])
                inputs.append(argument.reshape(len(argument), width))
                return Value(program.input(width), argument.shape[1:])
            field = _FIELDS[name]
            fields["recent_slots" if field in fields else field] = argument
            return Field(field)
        return argument

    seen = tuple(captured(at, argument) for at, argument in enumerate(arguments))
    shapes = OPS[name].shapes(*seen)
    call = Call(name, seen, tuple(Value(at, shape) for at, shape in enumerate(shapes)))
    numbers = _append(program, {value.id: value.id for value in call.inputs}, call)
    program.finish(None, numbers)
    num_tokens = len(inputs[0]) if inputs else len(fields[_FIELDS[name]])
    if batch is None:
        batch = _batch_of(
            num_tokens, fields, next((one for one in arguments if isinstance(one, _native.LayerKV)), None)
        )
    program.run(*_arrays(batch), None, 0, 1, False, inputs)
    results = []
    for number, shape in zip(numbers, shapes, strict=True):
        out = np.empty((num_tokens, math.prod(shape)), np.float32)
        program.copy_value(number, out)
        results.append(out.reshape(num_tokens, *shape))
    return tuple(results) if name == "project" else results[0] if results else None


_FIELDS = {"embed": "token_ids", "rope": "positions", "scale_by_position": "positions", "write_kv": "slot_mapping"}
"""Which array of the batch an op takes."""


def _batch_of(num_tokens: int, fields: Mapping[str, IntArray], kv: _native.LayerKV | None) -> Batch:
    """A batch of which one op looks at some arrays."""
    zeros, none = np.zeros(num_tokens, np.int32), np.zeros(0, np.int32)
    positions, tables = fields.get("positions", zeros), np.zeros((1, 1), np.int32)
    kv_group, recent = (0, None) if kv is None else (kv.kv_group, kv.recent_group)
    groups = [KVIndex(fields.get("slot_mapping", zeros), tables)] * (max(kv_group, recent or 0) + 1)
    if recent is not None:
        groups[recent] = KVIndex(fields.get("recent_slots", zeros), tables)
    return Batch(fields.get("token_ids", zeros), positions, zeros, zeros + np.int32(1), zeros, none, tuple(groups))


def native_norm(norm: Norm) -> _native.Norm:
    """The norm for the native core."""
    return _native.Norm(norm.weight, norm.eps, norm.bias, norm.kind == "layer")


def native_linear(linear: Linear) -> _native.Linear:
    """The projection for the native core."""
    assert isinstance(linear.matrix, _native.PackedWeight)
    return _native.Linear(linear.matrix, linear.bias, linear.scale)


def native_experts(weights: ExpertsWeights) -> _native.Experts:
    """The experts for the native core."""
    routing, experts = weights.routing, weights.experts
    return _native.Experts(
        gates=[native_linear(expert.gate) for expert in experts if expert.gate is not None],
        ups=[native_linear(expert.up) for expert in experts],
        downs=[native_linear(expert.down) for expert in experts],
        num_chosen=routing.num_chosen,
        scores=routing.scores,
        renormalize=routing.renormalize,
        min_sum=routing.min_sum,
        scale=routing.scale,
        num_groups=routing.num_groups,
        num_chosen_groups=routing.num_chosen_groups,
        choice_bias=weights.choice_bias,
        scales=weights.scales,
    )


def _native_forms(argument: Any, ids: Mapping[int, int]) -> tuple[Any, ...]:
    """What a program's method takes for an argument of an op."""
    match argument:
        case Value():
            return (ids[argument.id],)
        case Field():
            return (argument.name,)
        case Batch():
            return ()
        case Norm():
            return (native_norm(argument),)
        case Linear():
            return (native_linear(argument),)
        case RopeTable():
            return (_native.Rope(argument.cos_sin, argument.half),)
        case QKVWeights():
            linears = argument.query, argument.key, argument.value
            norms = argument.query_norm, argument.key_norm, argument.value_norm
            parts = (*linears, *norms, argument.norm_after_rope)
            return tuple(form for part in parts for form in _native_forms(part, ids))
        case ExpertsWeights():
            return (native_experts(argument),)
        case PositionScales():
            return (_native.PositionScales(argument.factors),)
        case XIELU():
            return argument.alpha_p, argument.alpha_n, argument.beta, argument.eps
        case AttentionRule():
            return argument.scale, argument.soft_cap or 0.0, argument.window, argument.sinks
        case tuple():
            return ([native_linear(linear) for linear in argument],)
    return (argument,)


def _append(program: _native.Program, ids: Mapping[int, int], call: Call) -> list[int]:
    """Append one op to the program and give the numbers of its values."""
    given = [form for argument in call.arguments for form in _native_forms(argument, ids)]
    if call.name == "rope":
        given.append(call.results[0].shape[-1])  # where a head ends
    numbers = getattr(program, call.name)(*given)
    return numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
