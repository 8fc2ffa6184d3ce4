"""Every native function refuses what does not fit with an exception; it never reads or writes outside its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvik import _native
from looped import looped
from ops import one_op
from subprocesses import python

pytestmark = pytest.mark.sanitize

Call = Callable[..., Any]
REFUSALS = (ValueError, TypeError, IndexError, MemoryError, OverflowError)

POOL = _native.ThreadPool(2)
ARENA = _native.WeightArena()
TOKENS, COLUMNS, ROWS = 3, 64, 10
HEADS, KV_HEADS, HEAD_DIM, BLOCKS, SEQUENCES, WIDTH = 4, 2, 16, 8, 2, 3


def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(shape, np.float32)


def integers(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(values, np.int32)


def weight(type_name: str = "Q8_0") -> _native.PackedWeight:
    item_bytes = {"Q8_0": COLUMNS // 32 * 34, "F32": COLUMNS * 4}[type_name]
    return _native.pack(type_name, np.zeros(ROWS * item_bytes, np.uint8), ROWS, COLUMNS, ARENA, POOL)


def linear(type_name: str = "Q8_0") -> _native.Linear:
    return _native.Linear(weight(type_name), floats(ROWS), 1.0)


def norm() -> _native.Norm:
    return _native.Norm(floats(COLUMNS), 1e-5, floats(COLUMNS), True)


def linear_of(rows: int, columns: int) -> _native.Linear:
    matrix = _native.pack("F32", np.zeros(rows * columns * 4, np.uint8), rows, columns, ARENA, POOL)
    return _native.Linear(matrix, None, 1.0)


def experts() -> _native.Experts:
    return _native.Experts(**{key: make() for key, make in GOOD["Experts"][1].items()})


def layer(dtype: str = "f32") -> _native.LayerKV:
    return _native.KVArrays(1, BLOCKS, KV_HEADS, HEAD_DIM, dtype, dtype).layer(0)


def arrays() -> _native.KVArrays:
    """One superblock that is full, and one that is not."""
    return _native.KVArrays(2, BLOCKS + 1, KV_HEADS, HEAD_DIM, "int8", "int8")


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


# A call that works, by argument; each test changes one.
GOOD: dict[str, tuple[Call, dict[str, Callable[[], Any]]]] = {
    "pack": (
        _native.pack,
        {
            "type": lambda: "Q8_0",
            "source": lambda: np.zeros(ROWS * 68, np.uint8),
            "rows": lambda: ROWS,
            "columns": lambda: COLUMNS,
            "arena": lambda: ARENA,
            "pool": lambda: POOL,
        },
    ),
    "WeightPacker": (
        _native.WeightPacker,
        {"type": lambda: "Q8_0", "rows": lambda: ROWS, "columns": lambda: COLUMNS, "arena": lambda: ARENA},
    ),
    "add": (
        lambda source, pool: _native.WeightPacker("Q8_0", 20, COLUMNS, ARENA).add(source, pool),
        {"source": lambda: np.zeros(16 * 68, np.uint8), "pool": lambda: POOL},
    ),
    "project": (
        one_op.project,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "linears": lambda: [linear(), linear("F32")],
            "outs": lambda: [floats(TOKENS, ROWS), floats(TOKENS, ROWS)],
            "int16_activations": lambda: False,
        },
    ),
    "embed_rows": (
        one_op.embed_rows,
        {
            "weight": weight,
            "row_ids": lambda: integers(0, ROWS - 1, 3),
            "scale": lambda: 1.0,
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "Norm": (
        _native.Norm,
        {"weight": lambda: floats(9), "eps": lambda: 1e-5, "bias": lambda: floats(9), "layer": lambda: True},
    ),
    "Linear": (_native.Linear, {"matrix": weight, "bias": lambda: floats(ROWS), "scale": lambda: 1.0}),
    "norm": (
        one_op.norm,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "norm": norm,
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "activate": (
        one_op.activate,
        {
            "pool": lambda: POOL,
            "activation": lambda: "gelu",
            "x": lambda: floats(TOKENS, COLUMNS),
            "up": lambda: floats(TOKENS, COLUMNS),
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "Experts": (
        _native.Experts,
        {
            "gates": lambda: [linear_of(ROWS, COLUMNS)] * 4,
            "ups": lambda: [linear_of(ROWS, COLUMNS)] * 4,
            "downs": lambda: [linear_of(COLUMNS, ROWS)] * 4,
            "num_chosen": lambda: 2,
            "scores": lambda: "sigmoid",
            "renormalize": lambda: True,
            "min_sum": lambda: 1e-6,
            "scale": lambda: 1.5,
            "num_groups": lambda: 2,
            "num_chosen_groups": lambda: 1,
            "choice_bias": lambda: floats(4),
            "scales": lambda: floats(4),
        },
    ),
    "experts": (
        one_op.experts,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "logits": lambda: floats(TOKENS, 4),
            "weights": experts,
            "activation": lambda: "silu",
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "gate": (
        one_op.gate,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "gates": lambda: floats(TOKENS, COLUMNS),
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "soft_cap": (
        one_op.soft_cap,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "cap": lambda: 30.0,
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "xielu": (
        one_op.xielu,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, COLUMNS),
            "alpha_p": lambda: 0.8,
            "alpha_n": lambda: 0.9,
            "beta": lambda: 0.5,
            "eps": lambda: -1e-6,
            "out": lambda: floats(TOKENS, COLUMNS),
        },
    ),
    "scale_by_position": (
        one_op.scale_by_position,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, HEADS * HEAD_DIM),
            "positions": lambda: integers(0, 9, 3),
            "factors": lambda: floats(10),
            "out": lambda: floats(TOKENS, HEADS * HEAD_DIM),
        },
    ),
    "rope": (
        one_op.rope,
        {
            "pool": lambda: POOL,
            "x": lambda: floats(TOKENS, HEADS * HEAD_DIM),
            "positions": lambda: integers(0, 9, 3),
            "table": lambda: floats(10, HEAD_DIM // 2, 2),
            "half": lambda: 0,
            "head_dim": lambda: HEAD_DIM,
            "out": lambda: floats(TOKENS, HEADS * HEAD_DIM),
        },
    ),
    "write_kv": (
        one_op.write_kv,
        {
            "pool": lambda: POOL,
            "kv": layer,
            "k": lambda: floats(TOKENS, KV_HEADS * HEAD_DIM),
            "v": lambda: floats(TOKENS, KV_HEADS * HEAD_DIM),
            "slots": lambda: integers(0, BLOCKS * 32 - 1, 5),
        },
    ),
    "attend": (
        one_op.attend,
        {
            "pool": lambda: POOL,
            "q": lambda: floats(TOKENS, HEADS * HEAD_DIM),
            "kv": layer,
            "block_tables": lambda: np.asarray([[0, 7, 3], [1, 2, 4]], np.int32),
            "sequence_index": lambda: integers(0, 1, 1),
            "kv_index": lambda: integers(0, 95, 31),
            "kv_bounds": lambda: integers(1, 96, 32),
            "scale": lambda: 0.25,
            "soft_cap": lambda: 0.0,
            "out": lambda: floats(TOKENS, HEADS * HEAD_DIM),
            "window": lambda: 2**62,
        },
    ),
    "KVArrays": (
        _native.KVArrays,
        {
            "num_layers": lambda: 2,
            "num_blocks": lambda: BLOCKS,
            "num_kv_heads": lambda: KV_HEADS,
            "head_dim": lambda: HEAD_DIM,
            "key": lambda: "f16",
            "value": lambda: "int8",
            "kv_group": lambda: 0,
        },
    ),
    "copy_blocks": (
        _native.copy_blocks,
        {"pool": lambda: POOL, "arrays": arrays, "copies": lambda: [(0, BLOCKS - 1), (3, 2)]},
    ),
    "discard_superblocks": (_native.discard_superblocks, {"arrays": arrays, "superblocks": lambda: [1, 0, 0]}),
    "read_blocks": (_native.read_blocks, {"arrays": arrays, "blocks": lambda: [0, BLOCKS - 1, 0]}),
    "write_blocks": (
        _native.write_blocks,
        {
            "arrays": arrays,
            "blocks": lambda: [0, BLOCKS - 1],
            "data": lambda: np.zeros(2 * arrays().block_bytes, np.uint8),
        },
    ),
    "layer": (_native.KVArrays(2, BLOCKS, KV_HEADS, HEAD_DIM, "f16", "f16").layer, {"index": lambda: 1}),
    "ThreadPool": (_native.ThreadPool, {"num_threads": lambda: 2}),
}

HUGE = (-1, 0, 2**31, 2**62, -(2**63), 2**63, 2**70)

# By function and argument: values that do not fit. What is wrong with the kind of any argument is added below.
BAD: dict[str, dict[str, list[Any]]] = {
    "pack": {
        "type": ["", "IQ3_S", "q8_0", "Q8_0\0", "Q9_9", "F64"],
        "source": [np.zeros(0, np.uint8), np.zeros(ROWS * 68 - 1, np.uint8), np.zeros(ROWS * 68 + 1, np.uint8)],
        "rows": [*HUGE, ROWS + 1, ROWS - 1, 2**31 - 1],
        "columns": [*HUGE, COLUMNS + 32, COLUMNS - 32, COLUMNS + 1, 31, 2**31 - 32],
    },
    "WeightPacker": {
        "type": ["", "IQ3_S", "q8_0", "Q8_0\0", "Q9_9", "F64"],
        "rows": [*HUGE],
        "columns": [*HUGE, COLUMNS + 1, 31],
    },
    "add": {
        "source": [np.zeros(size, np.uint8) for size in (8 * 68 - 1, 8 * 68 + 1, 7 * 68, 19 * 68, 21 * 68, 24 * 68)]
    },
    "project": {
        "x": [floats(TOKENS, COLUMNS + 32), floats(TOKENS, 0), floats(COLUMNS, TOKENS)],
        "linears": [[], [linear()], [linear()] * 3, [linear(), 1], linear(), [weight(), weight()]],
        "outs": [
            [],
            [floats(TOKENS, ROWS)],
            [floats(TOKENS, ROWS), floats(TOKENS, ROWS + 1)],
            [floats(ROWS, TOKENS), floats(ROWS, TOKENS)],
            [floats(TOKENS, ROWS), None],
            [read_only(floats(TOKENS, ROWS)), read_only(floats(TOKENS, ROWS))],
        ],
    },
    "embed_rows": {
        "row_ids": [integers(0, 1, ROWS), integers(-1, 0, 1), integers(0, 1, 2**31 - 1), integers(0, 1), integers()],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS), floats(TOKENS + 1, COLUMNS)],
    },
    "Norm": {"weight": [floats(0), floats(8)], "bias": [floats(8), floats(10), floats(0)]},
    "Linear": {"bias": [floats(ROWS - 1), floats(ROWS + 1), floats(0)]},
    "norm": {
        "x": [floats(TOKENS, COLUMNS + 1), floats(TOKENS + 1, COLUMNS), floats(TOKENS, COLUMNS // 2)],
        "norm": [_native.Norm(floats(COLUMNS - 1), 1e-5, None, False)],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "activate": {
        "activation": ["", "swish", "gelu\0", "SILU"],
        "x": [floats(TOKENS, COLUMNS + 1), floats(TOKENS + 1, COLUMNS), floats(COLUMNS, TOKENS)],
        "up": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "Experts": {
        "gates": [[linear_of(ROWS, COLUMNS)], [linear_of(COLUMNS, ROWS)] * 4, [weight()] * 4, linear()],
        "ups": [[], [linear_of(ROWS, COLUMNS)] * 1025, [linear_of(COLUMNS, ROWS)] * 4],
        "downs": [[], [linear_of(COLUMNS, ROWS)] * 5, [linear_of(ROWS, COLUMNS)] * 4],
        "num_chosen": [*HUGE, 3],
        "scores": ["", "best", "softmax\0"],
        "num_groups": [*HUGE, 3, 4],
        "num_chosen_groups": [*HUGE, 3],
        "choice_bias": [floats(3), floats(5)],
        "scales": [floats(0), floats(5)],
    },
    "experts": {
        "x": [floats(TOKENS, COLUMNS + 1), floats(TOKENS + 1, COLUMNS)],
        "logits": [floats(TOKENS, 3), floats(TOKENS + 1, 4)],
        "weights": [linear(), [linear()]],
        "activation": ["", "swish"],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "gate": {
        "x": [floats(TOKENS, COLUMNS - 1)[:-1], floats(TOKENS + 1, COLUMNS)],
        "gates": [floats(TOKENS, 2), floats(TOKENS, COLUMNS - 1)],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "soft_cap": {
        "x": [floats(TOKENS, COLUMNS + 1), floats(TOKENS + 1, COLUMNS)],
        "cap": [0.0, -1.0, float("nan")],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "xielu": {
        "x": [floats(TOKENS, COLUMNS + 1), floats(TOKENS + 1, COLUMNS)],
        "out": [floats(TOKENS, COLUMNS - 1), floats(TOKENS - 1, COLUMNS)],
    },
    "scale_by_position": {
        "x": [floats(TOKENS, HEADS * HEAD_DIM + 1), floats(TOKENS + 1, HEADS * HEAD_DIM)],
        "positions": [integers(0, 1, 10), integers(-1, 0, 1), integers(0, 1), integers(0, 0, 2**31 - 1)],
        "factors": [floats(9), floats(0), floats(10, 1)],
        "out": [floats(TOKENS, HEADS * HEAD_DIM - 1), floats(TOKENS - 1, HEADS * HEAD_DIM)],
    },
    "rope": {
        "x": [floats(TOKENS, HEADS * HEAD_DIM - 2), floats(TOKENS + 1, HEADS * HEAD_DIM)],
        "positions": [integers(0, 1, 10), integers(-1, 0, 1), integers(0, 1), integers(0, 0, 2**31 - 1)],
        "table": [floats(9, HEAD_DIM // 2, 2), floats(10, HEAD_DIM // 2 + 1, 2), floats(10, HEAD_DIM // 2, 3)],
        "out": [floats(TOKENS, HEADS * HEAD_DIM + 1), floats(TOKENS, HEAD_DIM), floats(1, HEADS * HEAD_DIM)],
        "half": [-1, 1, HEAD_DIM // 2 - 1, HEAD_DIM // 2 + 1, 2**31, 2**70],
        "head_dim": [0, -1, HEAD_DIM - 1, 2**62, 2**70],
    },
    "write_kv": {
        "k": [floats(TOKENS, KV_HEADS * HEAD_DIM - 1), floats(TOKENS, HEAD_DIM), floats(2, KV_HEADS * HEAD_DIM)],
        "v": [floats(TOKENS, KV_HEADS * HEAD_DIM + 1), floats(TOKENS, HEAD_DIM), floats(4, KV_HEADS * HEAD_DIM)],
        "slots": [integers(0, 1, BLOCKS * 32), integers(-1, 0, 1), integers(0, 1), integers(0, 0, 2**31 - 1)],
    },
    "attend": {
        "q": [
            floats(TOKENS, HEADS * HEAD_DIM + 8),
            floats(TOKENS, (HEADS + 1) * HEAD_DIM),
            floats(TOKENS, HEAD_DIM),
            floats(TOKENS + 1, HEADS * HEAD_DIM),
        ],
        "block_tables": [
            np.full((2, 3), BLOCKS, np.int32),
            np.full((2, 3), -1, np.int32),
            np.asarray([[0, 7, 3], [1, 2, 2**31 - 1]], np.int32),
            np.zeros((2, 2), np.int32),
            np.zeros((1, 3), np.int32),
            np.zeros((0, 3), np.int32),
            np.zeros((2, 0), np.int32),
        ],
        "sequence_index": [integers(0, 1, 2), integers(0, -1, 0), integers(0, 1), integers(2**31 - 1, 0, 0)],
        "kv_index": [integers(0, 96, 0), integers(-1, 0, 0), integers(0, 1), integers(0, 0, 2**31 - 1)],
        "kv_bounds": [integers(1, 97, 32), integers(1, 95, 32), integers(1, 96), integers(1, 96, 2**31 - 1)],
        "out": [
            floats(TOKENS, HEADS * HEAD_DIM - 1),
            floats(TOKENS, 2 * HEADS * HEAD_DIM),
            floats(2, HEADS * HEAD_DIM),
        ],
        "soft_cap": [-1.0, float("nan")],
        "window": [0, -1, -(2**63), 2**63, 2**70],
    },
    "KVArrays": {
        "num_layers": [*HUGE, 2**26],
        "num_blocks": [*HUGE, 2**26],
        "num_kv_heads": [*HUGE, 2**26],
        "head_dim": [*HUGE, 4, 12, 1032, 2**40],
        "key": ["", "f64", "F16", "q8", "f16\0"],
        "value": ["", "f64", "F16", "q8", "f16\0"],
        "kv_group": [-1, 64, 2**31, 2**62, 2**63, 2**70],
    },
    "copy_blocks": {
        "copies": [
            [(0, 0)],
            [(0, BLOCKS + 1)],
            [(-1, 0)],
            [(1, 2), (3, 3)],
            [(0, 2**62)],
            [(0, 2**70)],
            [(0, 1, 2)],
            [0, 1],
            [(0,)],
            [None],
            [(0.0, 1.0)],
            [("0", "1")],
        ],
    },
    "read_blocks": {"blocks": [[BLOCKS + 1], [-1], [0, BLOCKS + 1], [2**62], [2**70], [(0,)], [None], [0.0], ["0"]]},
    "write_blocks": {
        "blocks": [[BLOCKS + 1, 0], [-1, 0], [0], [0, 1, 2], [0, 2**62], [0, 2**70], [(0,)], [None], [0.0], ["0"]],
        "data": [np.zeros(count, np.uint8) for count in (0, 1, 2 * arrays().block_bytes - 1)],
    },
    "discard_superblocks": {"superblocks": [[2], [-1], [0, 2], [2**62], [2**70], [(0,)], [None], [0.0], ["0"]]},
    "layer": {"index": [-1, 2, 2**31, 2**62, 2**70]},
    "ThreadPool": {"num_threads": [2**31, 2**70, -(2**40)]},
}

MAY_BE_NONE = ("window", "bias", "up", "choice_bias", "scales")
WRONG_KINDS: list[Any] = [None, object(), "text", b"bytes", 1.5, [1.0, 2.0], {}, np.zeros(3, complex)]


def variants(value: Any) -> list[Any]:
    """The same content as no kernel may take it: other types, orders, numbers of dimensions, places in memory."""
    if not isinstance(value, np.ndarray):
        return []
    wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    other_types = [value.astype(kind) for kind in (np.float64, np.float16, np.int64, np.int8, np.uint32, np.bool_)]
    swapped = value.astype(value.dtype.newbyteorder(">")) if value.dtype.itemsize > 1 else value.astype(np.int16)
    result = [*other_types, swapped, wide[..., ::2], value[None], value.reshape(-1)[0], value.tolist()]
    if value.dtype.itemsize > 1:
        result.append(np.zeros(value.nbytes + 1, np.uint8)[1:].view(value.dtype).reshape(value.shape))  # not aligned
    if value.ndim > 1:
        result += [np.asfortranarray(value), value.reshape(-1), value[..., ::-1], value[:0][:, :0]]
    return result


def bad_values() -> list[Any]:
    """Values of the table: right in kind, wrong in content."""
    return [
        pytest.param(name, argument, bad, id=f"{name}-{argument}-{index}")
        for name, arguments in BAD.items()
        for argument, values in arguments.items()
        for index, bad in enumerate(values)
    ]


def wrong_kinds() -> list[tuple[str, str, Any]]:
    """Of every argument: other types, and its own content as no kernel may take it."""
    found = []
    for name, (_, arguments) in GOOD.items():
        for argument, make in arguments.items():
            value = make()
            values = variants(value)
            if not isinstance(value, (bool, float)):  # those are read from any number
                kinds = [kind for kind in WRONG_KINDS if not (isinstance(kind, str) and isinstance(value, str))]
                values += kinds[1:] if argument in MAY_BE_NONE else kinds
            found += [(name, argument, bad) for bad in values]
    return found


@looped("name", GOOD)
def test_the_call_that_the_others_differ_from_works(name: str) -> None:
    call, arguments = GOOD[name]
    call(**{key: make() for key, make in arguments.items()})


def refuse(name: str, argument: str, bad: Any) -> None:
    call, arguments = GOOD[name]
    good = {key: make() for key, make in arguments.items()}
    with pytest.raises(REFUSALS):
        call(**good | {argument: bad})


@pytest.mark.parametrize(("name", "argument", "bad"), bad_values())
def test_one_argument_that_does_not_fit(name: str, argument: str, bad: Any) -> None:
    refuse(name, argument, bad)


@looped("case", wrong_kinds(), lambda case: f"{case[0]}({case[1]}={case[2]!r:.60})")
def test_one_argument_of_a_wrong_kind(case: tuple[str, str, Any]) -> None:
    refuse(*case)


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, arguments) in GOOD.items() for argument in arguments if argument == "out"],
)
def test_a_read_only_output_is_refused(name: str, argument: str) -> None:
    call, arguments = GOOD[name]
    good = {key: make() for key, make in arguments.items()}
    with pytest.raises(TypeError):
        call(**good | {argument: read_only(good[argument])})


def test_inputs_may_be_read_only() -> None:
    """Weights are views of a mapped file."""
    for call, arguments in GOOD.values():
        good = {key: make() for key, make in arguments.items()}
        for key, value in good.items():
            if isinstance(value, np.ndarray) and key != "out":
                read_only(value)
        call(**good)


@pytest.mark.parametrize("kind", [_native.LayerKV, _native.PackedWeight])
def test_what_only_the_core_makes_cannot_be_made_outside(kind: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        kind()


@pytest.mark.parametrize("linears", ["[None]", "[linear, None]", "(None,)"])
def test_none_among_the_projections_is_refused(linears: str) -> None:
    """In a process of its own, which a null pointer may end."""
    script = f"""
import numpy as np
from kvik import _native
pool = _native.ThreadPool(1)
weight = _native.pack("F32", np.zeros(8 * 32 * 4, np.uint8), 8, 32, _native.WeightArena(), pool)
linear = _native.Linear(weight, None, 1.0)
linears = {linears}
program = _native.Program(pool, False)
try:
    program.project(program.input(32), linears)
except (TypeError, ValueError):
    print("refused")
"""
    result = python("-c", script)
    assert result.stdout.strip() == "refused", f"exit status {result.returncode}: {result.stderr}"


def test_more_memory_than_there_are_addresses_is_an_exception() -> None:
    with pytest.raises(MemoryError):
        _native.KVArrays(2**20, 2**20, 64, 1024, "f32", "f32")
    with pytest.raises(MemoryError):
        _native.KVArrays(2**13, 2**20, 64, 256, "f16", "f16")  # 2**49 bytes: it reaches the system, which has 2**47


@pytest.mark.filterwarnings("ignore:nanobind:RuntimeWarning")
def test_an_object_that_was_never_made_is_refused() -> None:
    kv: _native.LayerKV = _native.LayerKV.__new__(_native.LayerKV)
    packed: _native.PackedWeight = _native.PackedWeight.__new__(_native.PackedWeight)
    empty = floats(0, KV_HEADS * HEAD_DIM)
    with pytest.raises(TypeError):
        one_op.write_kv(POOL, kv, empty, empty, integers())
    with pytest.raises(TypeError):
        one_op.embed_rows(packed, integers(), 1.0, floats(0, COLUMNS))
    with pytest.raises(TypeError):
        _native.Linear(packed, None, 1.0)


def test_a_layer_outlives_the_name_of_its_arrays() -> None:
    kv = layer()  # nothing else holds the arrays
    _, arguments = GOOD["attend"]
    good = {key: make() for key, make in arguments.items()} | {"kv": kv}
    assert not good["out"].any()
    width = KV_HEADS * HEAD_DIM
    one_op.write_kv(POOL, kv, floats(1, width), np.ones((1, width), np.float32), integers(0))
    one_op.attend(**good)
    assert (good["out"][0] == 1).all()


def test_int8_takes_no_head_whose_integer_scores_could_overflow() -> None:
    assert _native.KVArrays(1, 8, 1, 512, "int8", "int8").num_bytes == 8 * 32 * 2 * (512 + 4)
    with pytest.raises(ValueError, match="int8 takes a head_dim up to 512"):
        _native.KVArrays(1, 8, 1, 520, "f16", "int8")


def test_block_ids_before_the_window_are_never_read() -> None:
    """Neighbours, and a token whose neighbour before it saw less."""
    _, arguments = GOOD["attend"]
    good = {key: make() for key, make in arguments.items()}
    good |= {"block_tables": np.asarray([[-1, 7, 3], [1, 2, 4]], np.int32), "window": 32}
    one_op.attend(**good | {"kv_index": integers(63, 95, 31), "kv_bounds": integers(64, 96, 32)})
    for places in ((62, 95, 31), (95, 95, 31)):
        call = good | {"kv_index": integers(*places), "kv_bounds": integers(*places) + np.int32(1)}
        call |= {"sequence_index": integers(0, 0, 0)}
        with pytest.raises(ValueError, match="block id"):
            one_op.attend(**call)


def test_block_ids_past_the_last_position_are_never_read() -> None:
    """Unused places of a block table may hold anything."""
    _, arguments = GOOD["attend"]
    good = {key: make() for key, make in arguments.items()}
    tables = np.asarray([[0, -1, BLOCKS], [1, 2, 4]], np.int32)
    one_op.attend(**good | {"block_tables": tables})
    with pytest.raises(ValueError, match="block id"):
        one_op.attend(**good | {"block_tables": tables, "sequence_index": integers(0, 0, 1)})
