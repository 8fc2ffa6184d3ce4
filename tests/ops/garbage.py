"""Makers of arguments for every function of the native module, right ones and wrong ones."""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from kvik import _native

POOL, ARENA = _native.ThreadPool(2), _native.WeightArena()
PACKED = _native.pack("F32", np.zeros(8 * 32 * 4, np.uint8), 8, 32, ARENA, POOL)
FILE = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as tests run
FILE.truncate(8192)
BLOCKS, KV_HEADS, HEADS, HEAD_DIM = 4, 2, 4, 16
TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "IQ4_NL",
    "MXFP4",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
)
INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 8, 32, 33, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**70)
SIZES = (0, 1, 2, 3, 4, 8, 16, 32, 33, 64)
FLOATS = (0.0, -0.0, 1e-5, 1.0, -1.0, 1e38, 1e-45, float("inf"), float("-inf"), float("nan"), 1e300)
ODDITIES: tuple[Any, ...] = (None, object(), "text", "", b"bytes", 1.5, 7, -1, True, [], [1.0], {}, (), 2**70, Ellipsis)
ARRAY_TYPES = (np.float32, np.int32, np.uint8, np.float64, np.int64, np.float16, np.int8, np.bool_, np.complex64)

Maker = Callable[[random.Random], Any]
Arguments = dict[str, Maker]


# Makers of one argument. Most of what they make is right in kind and wrong in some size, which is what checks are for:
# a call whose every argument is nonsense is refused at the first.


def one_of(*values: Any) -> Maker:
    return lambda chance: chance.choice(values)


def numbers(shape: tuple[int, ...], dtype: Any, chance: random.Random) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(chance.randrange(2**32))
    if dtype is np.int32:
        high = chance.choice((1, 3, 8, 95, 2**31 - 1))
        return rng.integers(-1 if chance.random() < 0.1 else 0, high, shape, np.int32)
    if dtype is np.float32:
        array = rng.normal(0, 10.0 ** chance.randint(-30, 30), shape).astype(np.float32)
        if array.size and chance.random() < 0.3:
            array.flat[chance.randrange(array.size)] = chance.choice(FLOATS[:-1])
        return array
    return rng.integers(0, 256, shape).astype(dtype)


def array_of(dtype: Any, *good: tuple[int, ...]) -> Maker:
    """An array of one of the good shapes, or with one thing wrong."""

    def make(chance: random.Random) -> Any:
        shape = chance.choice(good)
        if chance.random() < 0.25:
            axis = chance.randrange(len(shape))
            shape = (*shape[:axis], chance.choice(SIZES), *shape[axis + 1 :])
        array = numbers(shape, dtype, chance)
        return spoiled(array, chance) if chance.random() < 0.12 else array

    return make


def spoiled(array: np.ndarray[Any, Any], chance: random.Random) -> Any:
    """The array as a kernel must not take it."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    read_only = array.copy()
    read_only.flags.writeable = False
    with np.errstate(all="ignore"):
        other = array.astype(chance.choice(ARRAY_TYPES))
    unaligned = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    swapped = array.astype(array.dtype.newbyteorder()) if array.dtype.itemsize > 1 else array.astype(np.int16)
    broadcast = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return chance.choice(
        (wide[..., ::2], array[::-1], array.T, array[None], array.reshape(-1), read_only, other, unaligned, swapped,
         broadcast, array.tolist(), array.data, np.asfortranarray(array))
    )  # fmt: skip


def weight(chance: random.Random) -> Any:
    """Packed from random bytes: its scales may be infinite or no numbers."""
    kind = chance.choice(TYPES)
    rows, columns = chance.choice((1, 8, 9, 20)), 256 if kind.endswith(("K", "XS")) else chance.choice((32, 64))
    return _native.pack(kind, numbers((rows * row_bytes(kind, columns),), np.uint8, chance), rows, columns, ARENA, POOL)


def table(chance: random.Random) -> Any:
    """A matrix, or one that is not packed."""
    if chance.random() < 0.5:
        return weight(chance)
    kind = chance.choice(TYPES)
    columns = 256 if kind.endswith(("K", "XS")) else 64
    return _native.MappedTable(kind, numbers((9 * row_bytes(kind, columns),), np.uint8, chance), 9, columns)


def row_bytes(kind: str, columns: int) -> int:
    sizes = {
        "F32": 128,
        "F16": 64,
        "BF16": 64,
        "Q4_0": 18,
        "Q4_1": 20,
        "Q5_0": 22,
        "Q5_1": 24,
        "Q8_0": 34,
        "IQ4_NL": 18,
        "MXFP4": 17,
    }
    of_256 = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}
    return columns // 256 * of_256[kind] if kind in of_256 else columns // 32 * sizes[kind]


def list_of(maker: Maker) -> Maker:
    return lambda chance: [maker(chance) for _ in range(chance.choice((0, 1, 1, 2, 3)))]


def arrays(chance: random.Random) -> Any:
    key, value = (chance.choice(("f16", "f32", "int8")) for _ in range(2))
    return _native.KVArrays(1, BLOCKS, KV_HEADS, HEAD_DIM, key, value)


def layer(chance: random.Random) -> Any:
    return coded_layer() if chance.random() < 0.2 else arrays(chance).layer(0)


def coded_layer() -> Any:
    """Of heads as wide together as the others are."""
    recent = _native.KVArrays(1, BLOCKS, 1, KV_HEADS * HEAD_DIM, "f16", "f16", 1).layer(0)
    return _native.KVArrays(1, BLOCKS, 1, KV_HEADS * HEAD_DIM, "k4", "v4").layer(0).with_recent(recent)


def part_of_layer(chance: random.Random) -> Any:
    """What may be codes, and may have been written as it is."""
    key, value = chance.choice((("k4", "v4"), ("k4", "f16"), ("f16", "f16"), ("f16", "v4"), ("int8", "v4")))
    kv_heads, head_dim, kv_group = chance.choice((1, 1, 2)), chance.choice((32, 32, 64)), chance.choice((0, 1))
    return _native.KVArrays(1, BLOCKS, kv_heads, head_dim, key, value, kv_group).layer(0)


def matrices(*widths: int) -> Maker:
    return array_of(np.float32, *[(tokens, width) for tokens in (1, 3) for width in widths])


def heads_of(count: int) -> Maker:
    return array_of(np.float32, (3, count, HEAD_DIM), (3, count, HEAD_DIM), (1, count, HEAD_DIM))


pool = one_of(POOL)
per_token = array_of(np.int32, (3,), (3,), (1,))
whole = one_of(*INTEGERS)


def q8_0(rows: int, columns: int) -> Any:
    return _native.pack("Q8_0", np.zeros(rows * columns // 32 * 34, np.uint8), rows, columns, ARENA, POOL)


def linear_of(matrix: Any) -> Any:
    return _native.Linear(matrix, None, 1.0)


WIDTH = HEADS * HEAD_DIM
TABLE, ROPE = q8_0(40, WIDTH), _native.Rope(np.zeros((96, 8, 2), np.float32), 0)
NORM = _native.Norm(np.ones(WIDTH, np.float32), 1e-5, None, False)


# A step of three tokens that fits, by argument.
GOOD_STEP: dict[str, Callable[[], Any]] = {
    "token_ids": lambda: np.array([0, 39, 7], np.int32),
    "positions": lambda: np.array([0, 1, 2], np.int32),
    "kv_index": lambda: np.array([0, 1, 2], np.int32),
    "kv_bounds": lambda: np.array([1, 2, 3], np.int32),
    "sequence_index": lambda: np.zeros(3, np.int32),
    "logit_rows": lambda: np.array([1, 2], np.int32),
    "groups": lambda: [(np.array([0, 1, 2], np.int32), np.array([[0, 1]], np.int32))],
    "out": lambda: np.empty((2, 20), np.float32),
    "first": lambda: 0,
    "last": lambda: 5,
}


def new_program() -> _native.Program:
    """One that has a value, 0: rows of width 64."""
    program = _native.Program(POOL, False)
    program.embed(TABLE, "token_ids", 1.0)
    return program


def whole_program() -> _native.Program:
    """A step from tokens to logits."""
    program = new_program()
    query, key = (linear_of(q8_0(rows, WIDTH)) for rows in (WIDTH, KV_HEADS * HEAD_DIM))
    kv = _native.KVArrays(1, BLOCKS, KV_HEADS, HEAD_DIM, "f16", "f16").layer(0)
    q = program.norm_qkv(0, NORM, query, key, key, None, None, None, False, ROPE, kv)
    attended = program.attend(q, kv, 0.25, 0.0, None, None)
    program.finish(program.norm_linear(program.take_rows(attended, "logit_rows"), NORM, linear_of(q8_0(20, WIDTH))))
    return program


def run_program() -> _native.Program:
    """The same, run once: its values have rows."""
    program = whole_program()
    run: Callable[..., Any] = program.run
    run(**{name: make() for name, make in GOOD_STEP.items()}, timed=False)
    return program


def sum_program() -> _native.Program:
    """One op, whose inputs are given."""
    program = _native.Program(POOL, False)
    program.finish(program.add(program.input(WIDTH), program.input(WIDTH), 1.0))
    return program


def on_program(method: str, make: Callable[[], _native.Program] = new_program) -> Callable[..., Any]:
    return lambda **arguments: getattr(make(), method)(**arguments)


def wide_program() -> _native.Program:
    """With value 1, as wide as the keys of a token."""
    program = new_program()
    program.linear(0, linear_of(q8_0(KV_HEADS * HEAD_DIM, WIDTH)), None)
    return program


def rows_program() -> _native.Program:
    """With value 1, a row for each logit row."""
    program = new_program()
    program.take_rows(0, "logit_rows")
    return program


def routed_program() -> _native.Program:
    """With value 1, the logits of four experts."""
    program = new_program()
    program.linear(0, linear_of(q8_0(4, WIDTH)), None)
    return program


UP, DOWN = (linear_of(q8_0(*shape)) for shape in ((32, WIDTH), (WIDTH, 32)))
EXPERTS = _native.Experts(
    gates=[UP] * 4, ups=[UP] * 4, downs=[DOWN] * 4, num_chosen=2, scores="sigmoid", renormalize=True, min_sum=0.0,
    scale=1.0, num_groups=2, num_chosen_groups=1, choice_bias=None, scales=None,
)  # fmt: skip

value = one_of(0, 0, 0, 1, -1, 5, *INTEGERS)


def rope_of(chance: random.Random) -> Any:
    pairs = chance.choice((HEAD_DIM // 2, HEAD_DIM // 2, 3, 40))
    half = chance.choice((0, pairs, pairs, max(pairs, HEAD_DIM // 2), max(pairs, HEAD_DIM)))
    return _native.Rope(np.zeros((chance.choice((8, 96)), pairs, 2), np.float32), half)


def scales_of(chance: random.Random) -> Any:
    return _native.PositionScales(np.ones(chance.choice((8, 96)), np.float32))


activation = one_of("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu", "", "swish", "\0")


def norm_of(*widths: int) -> Maker:
    """A norm that often fits."""

    def make(chance: random.Random) -> Any:
        width = chance.choice(widths) if chance.random() < 0.9 else chance.choice(SIZES[1:])
        weight, bias = (numbers((width,), np.float32, chance) for _ in range(2))
        return _native.Norm(weight, chance.choice(FLOATS), chance.choice((None, bias)), chance.random() < 0.5)

    return make


product = {"x": value, "norm": lambda chance: None if chance.random() < 0.2 else norm_of(WIDTH)(chance)}
step: Arguments = {
    "token_ids": per_token,
    "positions": per_token,
    "kv_index": per_token,
    "kv_bounds": per_token,
    "sequence_index": per_token,
    "logit_rows": array_of(np.int32, (2,), (2,), (0,)),
    "groups": list_of(lambda chance: (per_token(chance), array_of(np.int32, (1, 2), (2, 3), (4, 1))(chance))),
}


def any_linear(chance: random.Random) -> Any:
    return with_bias(weight(chance), chance)


def with_bias(matrix: Any, chance: random.Random) -> Any:
    bias = numbers((matrix.rows,), np.float32, chance) if chance.random() < 0.5 else None
    return _native.Linear(matrix, bias, chance.choice((1.0, *FLOATS)))


def fitting(*shapes: tuple[int, int]) -> Maker:
    """A projection that often fits."""
    return lambda chance: with_bias(q8_0(*chance.choice(shapes)) if chance.random() < 0.8 else weight(chance), chance)


def linears_of(shape: tuple[int, int]) -> Maker:
    """Four projections that fit as a rule."""
    return lambda chance: [fitting(shape)(chance) for _ in range(4 if chance.random() < 0.9 else chance.choice((0, 3)))]


SAMPLER = _native.Sampler(POOL)
SAMPLE_VOCAB, SAMPLE_IDS, SAMPLE_MASK_BYTES = 19, 12, 8
# As native/sample.h has the fields: good values, and one that does not fit in one of forty.
SAMPLE_FIELDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "row": ("q", (0, 1, 2)),
    "seed": ("Q", (0, 7, 2**64 - 1)),
    "position": ("q", (0, 1, 2**63 - 1)),
    "history": ("q", (0, 1)),
    "completion": ("q", (1, 4)),
    "history_end": ("q", (4, 12)),
    "forbidden": ("q", (3, 5)),
    "forbidden_end": ("q", (5, 6)),
    "bias": ("q", (0, 1)),
    "bias_end": ("q", (1, 4)),
    "mask": ("q", (-1, -1, 0, 5)),
    "given": ("q", (-1, -1, -1, 0, 18)),
    "scale": ("d", (0.0, 1.0, 1e-310, 1e300)),
    "presence": ("d", (0.0, 1.0, -1e300)),
    "frequency": ("d", (0.0, 1.0, 1e308)),
    "top_p": ("Q", (2**53, 2**53, 1, 2**52)),
    "top_k": ("q", (0, 0, 1, 5, 19, 2**63 - 1)),
    "min_weight": ("q", (0, 0, 1, 2**40)),
    "repetition": ("f", (1.0, 1.0, 1e-30, 1e38)),
    "num_top": ("i", (-1, 0, 3)),
}
ODD_FIELDS: dict[str, tuple[float, ...]] = {
    "q": tuple(n for n in INTEGERS if -(2**63) <= n < 2**63),
    "Q": tuple(n for n in INTEGERS if 0 <= n < 2**64),
    "i": tuple(n for n in INTEGERS if -(2**31) <= n < 2**31),
    "d": FLOATS,
    "f": FLOATS[:-1],
}


def sample_row(**values: float) -> bytes:
    """The first of the good values of each field, but for those that are given."""
    layout = "=" + "".join(kind for kind, _ in SAMPLE_FIELDS.values())
    return struct.pack(layout, *(values.get(name, good[0]) for name, (_, good) in SAMPLE_FIELDS.items()))


def sample_rows(chance: random.Random) -> Any:
    """Rows that mostly fit; sometimes bytes that mean nothing."""
    count = chance.choice((3, 3, 3, 1))
    if chance.random() < 0.05:
        return numbers((count, _native.SAMPLE_ROW_BYTES), np.uint8, chance)
    rows = b""
    for _ in range(count):
        values = {
            name: chance.choice(good if chance.random() < 0.975 else ODD_FIELDS[kind])
            for name, (kind, good) in SAMPLE_FIELDS.items()
        }
        rows += sample_row(**values)
    return np.frombuffer(rows, np.uint8).reshape(count, -1)


def sample_ids(chance: random.Random) -> Any:
    ids = np.array([chance.randrange(SAMPLE_VOCAB) for _ in range(SAMPLE_IDS)], np.int32)
    if chance.random() < 0.05:
        ids[chance.randrange(SAMPLE_IDS)] = chance.choice((-1, SAMPLE_VOCAB, 2**31 - 1))
    return ids


# A call for three rows that fits, by argument.
GOOD_SAMPLE: dict[str, Callable[[], Any]] = {
    "logits": lambda: np.zeros((3, SAMPLE_VOCAB), np.float32),
    "rows": lambda: np.frombuffer(3 * sample_row(), np.uint8).reshape(3, -1),
    "ids": lambda: np.arange(SAMPLE_IDS, dtype=np.int32),
    "biases": lambda: np.ones(4, np.float32),
    "masks": lambda: np.full(SAMPLE_MASK_BYTES, 255, np.uint8),
    "chosen": lambda: np.empty(3, np.int32),
    "totals": lambda: np.empty(3, np.int64),
    "top_ids": lambda: np.empty((3, 3), np.int32),
    "top_logits": lambda: np.empty((3, 3), np.float32),
    "highest_and_own": lambda: np.empty((3, 2), np.float32),
}

# By name: a constructor, function or method, and its arguments.
CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    # Not a real number of threads: they would be started. Everything that a C int does not hold is refused.
    "ThreadPool": (_native.ThreadPool, {"num_threads": one_of(*(n for n in INTEGERS if not 3 < n < 2**31))}),
    "KVArrays": (
        _native.KVArrays,
        {
            "num_layers": one_of(1, 2, 3, *INTEGERS),
            "num_blocks": one_of(1, 8, 9, 100, *INTEGERS),
            "num_kv_heads": one_of(1, 2, 3, *INTEGERS),
            "head_dim": one_of(8, 16, 24, 64, 1024, *INTEGERS),
            "key": one_of("f16", "f16", "f32", "f32", "F16", "", "\0", "f16\0", "int8", "k4", "v4", "é" * 100),
            "value": one_of("f16", "f16", "f32", "f32", "F16", "", "\0", "f16\0", "int8", "v4", "k4", "é" * 100),
            "kv_group": one_of(0, 1, 63, *INTEGERS),
        },
    ),
    "KVArrays.layer": (
        lambda index: _native.KVArrays(2, BLOCKS, KV_HEADS, HEAD_DIM, "f16", "f16").layer(index),
        {"index": whole},
    ),
    "LayerKV.with_recent": (
        lambda kv, recent: _native.LayerKV.with_recent(kv, recent),
        {"kv": part_of_layer, "recent": part_of_layer},
    ),
    "pack": (
        _native.pack,
        {
            "type": one_of(*TYPES, "", "Q9_9", "q4_0", "IQ3_S", "\0", "F32\0", "x" * 10_000),
            "source": array_of(np.uint8, *[(8 * row_bytes(kind, 256),) for kind in TYPES], (0,), (1,), (17,)),
            "rows": one_of(8, 8, 8, *INTEGERS),
            "columns": one_of(256, 256, 256, 32, *INTEGERS),
            "arena": one_of(ARENA),
            "pool": pool,
        },
    ),
    "WeightPacker": (
        _native.WeightPacker,
        {
            "type": one_of(*TYPES, "", "Q9_9", "\0", "x" * 10_000),
            "rows": one_of(8, 8, *INTEGERS),
            "columns": one_of(256, 256, 32, *INTEGERS),
            "arena": one_of(ARENA),
            "place": lambda chance: None if chance.random() < 0.5 else ARENA.places_together([544])[0],
        },
    ),
    "WeightPacker.add": (
        lambda **arguments: _native.WeightPacker("Q8_0", 20, 64, ARENA).add(**arguments),
        {"source": array_of(np.uint8, (8 * 68,), (16 * 68,), (20 * 68,), (4 * 68,), (0,)), "pool": pool},
    ),
    "packed_bytes": (
        _native.packed_bytes,
        {
            "type": one_of(*TYPES, "", "Q9_9", "\0", "x" * 10_000),
            "rows": one_of(8, *INTEGERS),
            "columns": one_of(256, 32, *INTEGERS),
        },
    ),
    "PackedWeight.checksums": (lambda pool: PACKED.checksums(pool), {"pool": one_of(POOL, None, 1)}),
    "PackedFile": (
        _native.PackedFile,
        {
            "file": one_of(FILE.fileno(), -1, *INTEGERS),
            "num_bytes": one_of(1, 8192, 8193, *INTEGERS),
            "on_demand": one_of(True, False),
        },
    ),
    "PackedFile.weight": (
        lambda **arguments: _native.PackedFile(FILE.fileno(), 8192, False).weight(**arguments),
        {
            "type": one_of(*TYPES, "", "Q9_9"),
            "rows": one_of(8, 8, *INTEGERS),
            "columns": one_of(256, 32, *INTEGERS),
            "offset": one_of(0, 64, 4096, *INTEGERS),
        },
    ),
    "WeightPacker.finish": (lambda: _native.WeightPacker("Q8_0", 20, 64, ARENA).finish(), {}),
    "Norm": (
        _native.Norm,
        {
            "weight": array_of(np.float32, (33,), (64,)),
            "eps": one_of(*FLOATS),
            "bias": lambda chance: None if chance.random() < 0.3 else array_of(np.float32, (33,), (64,))(chance),
            "layer": one_of(True, False),
        },
    ),
    "Rope": (
        _native.Rope,
        {
            "cos_sin": array_of(np.float32, (8, HEAD_DIM // 2, 2), (96, 3, 2), (8, 8, 3)),
            "half": one_of(0, 3, HEAD_DIM // 2, *INTEGERS),
        },
    ),
    "MappedTable": (
        _native.MappedTable,
        {
            "type": one_of(*TYPES),
            "source": array_of(np.uint8, (8 * 34,), (8 * 128,), (1,)),
            "rows": one_of(8, *INTEGERS),
            "columns": one_of(32, *INTEGERS),
        },
    ),
    "Linear": (
        _native.Linear,
        {"matrix": weight, "bias": array_of(np.float32, (8,), (9,), (1,)), "scale": one_of(*FLOATS)},
    ),
    "copy_blocks": (
        _native.copy_blocks,
        {
            "pool": pool,
            "arrays": arrays,
            "copies": list_of(
                one_of((0, 1), (3, 2), [1, 0], (1, 1), (1, 2, 3), (1,), 2, *zip(INTEGERS, INTEGERS[::-1], strict=True))
            ),
        },
    ),
    "discard_superblocks": (
        _native.discard_superblocks,
        {"arrays": arrays, "superblocks": list_of(one_of(0, 0, 0, *INTEGERS))},
    ),
    "read_blocks": (_native.read_blocks, {"arrays": arrays, "blocks": list_of(one_of(0, 0, 0, *INTEGERS))}),
    "write_blocks": (
        _native.write_blocks,
        {
            "arrays": arrays,
            "blocks": list_of(one_of(0, 0, 0, *INTEGERS)),
            "data": array_of(np.uint8, (0,), (1,), (4096,)),
        },
    ),
    "WeightArena": (_native.WeightArena, {}),
    "WeightArena.places_together": (
        lambda sizes: _native.WeightArena().places_together(sizes),
        {"sizes": list_of(one_of(1, 64, 4097, *INTEGERS))},
    ),
    "Program": (_native.Program, {"pool": one_of(POOL, None, 1), "int16_activations": one_of(True, False, None, 2)}),
    "Program.embed": (
        on_program("embed"),
        {"table": table, "ids": one_of("token_ids", "positions", "", "\0"), "scale": one_of(*FLOATS)},
    ),
    "Program.norm": (on_program("norm"), {"x": value, "norm": norm_of(WIDTH, HEAD_DIM)}),
    "Program.project": (on_program("project"), {"x": value, "linears": list_of(fitting((8, WIDTH), (9, WIDTH)))}),
    "Program.linear": (
        on_program("linear"),
        {"x": value, "linear": fitting((WIDTH, WIDTH), (8, WIDTH)), "residual": one_of(None, 0, *INTEGERS)},
    ),
    "Program.norm_linear": (on_program("norm_linear"), product | {"linear": fitting((8, WIDTH))}),
    "Program.norm_gated": (
        on_program("norm_gated"),
        product
        | {
            "gate": fitting((9, WIDTH), (16, WIDTH)),
            "up": fitting((9, WIDTH), (16, WIDTH)),
            "activation": activation,
        },
    ),
    "Program.norm_qkv": (
        on_program("norm_qkv"),
        product
        | {
            "query": fitting((WIDTH, WIDTH), (2 * WIDTH, WIDTH)),
            "key": fitting((KV_HEADS * HEAD_DIM, WIDTH)),
            "value": lambda chance: None if chance.random() < 0.3 else fitting((KV_HEADS * HEAD_DIM, WIDTH))(chance),
            "query_norm": lambda chance: None if chance.random() < 0.5 else norm_of(HEAD_DIM, WIDTH)(chance),
            "key_norm": lambda chance: None if chance.random() < 0.5 else norm_of(HEAD_DIM)(chance),
            "value_norm": lambda chance: None if chance.random() < 0.5 else norm_of(HEAD_DIM)(chance),
            "norm_after_rope": one_of(True, False, None, 2),
            "rope": lambda chance: None if chance.random() < 0.3 else rope_of(chance),
            "kv": layer,
        },
    ),
    "Program.rope": (
        on_program("rope"),
        {
            "x": value,
            "positions": one_of("positions", "positions", "token_ids", ""),
            "rope": rope_of,
            "head_dim": one_of(HEAD_DIM, *INTEGERS),
        },
    ),
    "PositionScales": (_native.PositionScales, {"factors": array_of(np.float32, (8,), (96,), (0,))}),
    "Program.scale_by_position": (
        on_program("scale_by_position"),
        {"x": value, "positions": one_of("positions", "positions", "token_ids", ""), "scales": scales_of},
    ),
    "Program.xielu": (
        on_program("xielu"),
        {"x": value, **dict.fromkeys(("alpha_p", "alpha_n", "beta", "eps"), one_of(0.8, *FLOATS))},
    ),
    "Program.write_kv": (
        lambda **arguments: wide_program().write_kv(**arguments),
        {
            "kv": layer,
            "k": one_of(1, 1, *INTEGERS),
            "v": one_of(1, 1, *INTEGERS),
            "slots": one_of("slot_mapping", "slot_mapping", ""),
            "recent_slots": one_of(None, None, "slot_mapping", ""),
        },
    ),
    "Program.attend": (
        on_program("attend"),
        {
            "q": value,
            "kv": layer,
            "scale": one_of(None, *FLOATS),
            "soft_cap": one_of(0.0, *FLOATS),
            "window": one_of(None, 1, *INTEGERS),
            "sinks": lambda chance: None if chance.random() < 0.3 else array_of(np.float32, (HEADS,))(chance),
        },
    ),
    "Program.activate": (
        on_program("activate"),
        {"x": value, "activation": activation, "up": one_of(None, 0, *INTEGERS)},
    ),
    "Experts": (
        _native.Experts,
        {
            "gates": linears_of((32, WIDTH)),
            "ups": linears_of((32, WIDTH)),
            "downs": linears_of((WIDTH, 32)),
            "num_chosen": one_of(1, 2, *INTEGERS),
            "scores": one_of("softmax", "sigmoid", "logits", "", "\0"),
            "renormalize": one_of(True, False),
            "min_sum": one_of(*FLOATS),
            "scale": one_of(*FLOATS),
            "num_groups": one_of(1, 1, 2, *INTEGERS),
            "num_chosen_groups": one_of(1, 1, 2, *INTEGERS),
            "choice_bias": lambda chance: None if chance.random() < 0.5 else numbers((4,), np.float32, chance),
            "scales": lambda chance: None if chance.random() < 0.5 else numbers((4,), np.float32, chance),
        },
    ),
    "Program.experts": (
        lambda **arguments: routed_program().experts(**arguments),
        {
            "x": one_of(0, 0, 0, 1, *INTEGERS),
            "logits": one_of(1, 1, 1, 0, *INTEGERS),
            "experts": lambda chance: EXPERTS,
            "activation": activation,
        },
    ),
    "Program.gate": (on_program("gate"), {"x": value, "gates": value}),
    "Program.soft_cap": (on_program("soft_cap"), {"x": value, "cap": one_of(30.0, *FLOATS)}),
    "Program.add": (on_program("add"), {"x": value, "y": value, "scale": one_of(*FLOATS)}),
    "Program.take_columns": (
        on_program("take_columns"),
        {"x": value, "start": one_of(0, 8, *INTEGERS), "count": one_of(8, WIDTH, *INTEGERS)},
    ),
    "Program.take_rows": (on_program("take_rows"), {"x": value, "rows": one_of("logit_rows", "logit_rows", "")}),
    "Program.input": (lambda width: _native.Program(POOL, False).input(width), {"width": one_of(1, 64, *INTEGERS)}),
    "Program.finish": (
        lambda **arguments: rows_program().finish(**arguments),
        {"output": one_of(0, 1, 1, *INTEGERS), "kept": list_of(one_of(0, 1, *INTEGERS))},
    ),
    "Program.run": (
        lambda **given: (
            sum_program() if isinstance(given.get("inputs"), list) and given["inputs"] else whole_program()
        ).run(**given),
        step
        | {
            "out": matrices(20, WIDTH),
            "first": one_of(0, 0, *INTEGERS),
            "last": one_of(5, 5, *INTEGERS),
            "timed": one_of(True, False),
            "inputs": lambda chance: [] if chance.random() < 0.5 else list_of(matrices(WIDTH))(chance),
        },
    ),
    "Program.copy_value": (on_program("copy_value", run_program), {"value": value, "out": matrices(WIDTH)}),
    "Sampler": (_native.Sampler, {"pool": one_of(POOL, None, 1)}),
    "Sampler.argmax": (
        SAMPLER.argmax,
        {
            "logits": matrices(1, 64, 1100),
            "rows": array_of(np.int32, (3,), (0,)),
            "out": array_of(np.int32, (3,), (0,)),
        },
    ),
    "Sampler.sample": (
        SAMPLER.sample,
        {
            "logits": array_of(np.float32, (3, SAMPLE_VOCAB), (3, SAMPLE_VOCAB), (1, 600)),
            "rows": sample_rows,
            "ids": sample_ids,
            "biases": array_of(np.float32, (4,), (SAMPLE_IDS,)),
            "masks": array_of(np.uint8, (SAMPLE_MASK_BYTES,), (2,)),
            "chosen": array_of(np.int32, (3,), (1,)),
            "totals": array_of(np.int64, (3,), (1,)),
            "top_ids": array_of(np.int32, (3, 3), (3, 0)),
            "top_logits": array_of(np.float32, (3, 3), (3, 0)),
            "highest_and_own": array_of(np.float32, (3, 2), (1, 2)),
        },
    ),
    "uniform_bits": (_native.uniform_bits, {"seed": whole, "position": whole}),
    # What is allowed is read: not the largest of it, a thousand times.
    "read_bandwidth": (
        _native.read_bandwidth,
        {"pool": pool, "num_bytes": one_of(*(n for n in INTEGERS if not 33 < n <= 2**30))},
    ),
    "integer_throughput": (_native.integer_throughput, {"pool": one_of(None, 1, "")}),
    "float_throughput": (_native.float_throughput, {"pool": one_of(None, 1, "")}),
    "usable_isas": (_native.usable_isas, {}),
    "amx_obstacle": (_native.amx_obstacle, {}),
    "compiler": (_native.compiler, {}),
}

NOT_MADE_OUTSIDE = {"PackedWeight", "LayerKV", "WeightPlace"}
