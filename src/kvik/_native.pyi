"""kvik's native core: packed weights, thread pool and kernels."""

from collections.abc import Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray

isa: str = "generic"

def usable_isas() -> list[str]:
    """
    Names of the instruction sets that can be used here: the best first, an emulation that tests use last.
    """

def amx_obstacle() -> str:
    """Why AMX's tile instructions cannot be used here; empty where they can."""

def compiler() -> str:
    """What compiled this module."""

BLOCK_SIZE: int = 32

SEGMENT: int = 256

PACKED_VERSION: int = 1

PACKED_ALIGNMENT: int = 64

PACKED_REGION_BYTES: int = 262144

class ThreadPool:
    """Threads that share the work of one op at a time."""

    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

class WeightPlace:
    """Room for one matrix."""

class WeightArena:
    """Memory for packed weights, in large pages."""

    def __init__(self) -> None: ...
    def places_together(self, sizes: Sequence[int]) -> list[WeightPlace]:
        """
        Room for matrices of so many packed bytes, one behind the other, the first at a page's beginning.
        """

class PackedWeight:
    """A weight matrix (rows, columns) in kvik's packed layout."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def quantized(self) -> bool:
        """Whether activations are quantised for it."""

    @property
    def data(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)]:
        """The packed bytes, read-only."""

    def checksums(self, pool: ThreadPool) -> list[int]:
        """One for each PACKED_REGION_BYTES of the packed bytes."""

class PackedFile:
    """A file with packed weights, mapped read-only."""

    def __init__(self, file: int, num_bytes: int, on_demand: bool) -> None: ...
    def weight(self, type: str, rows: int, columns: int, offset: int) -> PackedWeight:
        """The matrix whose packed bytes begin there, as they are."""

class MappedTable:
    """A GGUF tensor's rows, looked up where they lie."""

    def __init__(
        self,
        type: str,
        source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        rows: int,
        columns: int,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class WeightPacker:
    """Packs a GGUF tensor's rows without loss, as they come."""

    def __init__(
        self, type: str, rows: int, columns: int, arena: WeightArena, place: WeightPlace | None = None
    ) -> None: ...
    def add(
        self,
        source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        pool: ThreadPool,
    ) -> None:
        """
        Takes more whole rows: a multiple of 16 of them, or all that are missing.
        """

    def finish(self) -> PackedWeight:
        """The matrix, once no rows are missing."""

class Norm:
    """RMS norm, or layer norm where `layer`."""

    def __init__(
        self,
        weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        eps: float,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        layer: bool,
    ) -> None: ...

class Linear:
    """(x @ matrix.T + bias) * scale."""

    def __init__(
        self,
        matrix: PackedWeight,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        scale: float,
    ) -> None: ...

class Rope:
    """Cosine and sine by position: (positions, pairs, 2)."""

    def __init__(
        self,
        cos_sin: Annotated[
            NDArray[numpy.float32], dict(shape=(None, None, None), order="C", device="cpu", writable=False)
        ],
        half: int,
    ) -> None: ...

class PositionScales:
    """What queries are multiplied with, by position."""

    def __init__(
        self, factors: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
    ) -> None: ...

class LayerKV:
    """One layer's keys and values; keep its KVArrays alive."""

    @property
    def kv_group(self) -> int:
        """Which block tables of a step are its own."""

    @property
    def recent_group(self) -> int | None:
        """
        The same of what is read as it was written; None where there are no codes.
        """

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's key and value take."""

    def with_recent(self, recent: LayerKV) -> LayerKV:
        """
        The same of a layer with codes, and where tokens of the same segment and the first block are as written.
        """

class KVArrays:
    """Keys and values of all layers, in blocks of 32 tokens."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        key: str,
        value: str,
        kv_group: int = 0,
    ) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""

    def layer(self, index: int) -> LayerKV: ...

def pack(
    type: str,
    source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    rows: int,
    columns: int,
    arena: WeightArena,
    pool: ThreadPool,
) -> PackedWeight:
    """Packs a GGUF tensor's bytes without loss."""

def packed_bytes(type: str, rows: int, columns: int) -> int:
    """Bytes that such a matrix packs to."""

def copy_blocks(pool: ThreadPool, arrays: KVArrays, copies: Sequence[tuple[int, int]]) -> None:
    """
    Copies keys and values of all layers from block to block: (source, target) pairs, in order.
    """

def discard_superblocks(arrays: KVArrays, superblocks: Sequence[int]) -> None:
    """
    Gives the memory of superblocks (8 blocks, all layers) back to the system; what they held is lost.
    """

def read_blocks(arrays: KVArrays, blocks: Sequence[int]) -> bytes:
    """
    The bytes of whole blocks, one after the other: in each layer after layer, head after head, keys and values.
    """

def write_blocks(
    arrays: KVArrays,
    blocks: Sequence[int],
    data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
) -> None:
    """Puts bytes that `read_blocks` gave into blocks."""

def read_bandwidth(pool: ThreadPool, num_bytes: int) -> float:
    """
    Bytes a second that the threads read from an array of num_bytes, in whole MiB.
    """

def integer_throughput(pool: ThreadPool) -> float:
    """Multiply-adds of 8-bit integers a second, of operands in registers."""

def float_throughput(pool: ThreadPool) -> float:
    """Fused multiply-adds of float32 a second, of operands in registers."""

class Program:
    """
    A captured step: ops are appended, each giving the id of its value, then run.
    """

    def __init__(self, pool: ThreadPool, int16_activations: bool) -> None: ...
    @overload
    def embed(self, table: PackedWeight, ids: str, scale: float) -> int: ...
    @overload
    def embed(self, table: MappedTable, ids: str, scale: float) -> int: ...
    def norm(self, x: int, norm: Norm) -> int: ...
    def rope(self, x: int, positions: str, rope: Rope, head_dim: int) -> int: ...
    def scale_by_position(self, x: int, positions: str, scales: PositionScales) -> int: ...
    def activate(self, x: int, activation: str, up: int | None) -> int: ...
    def gate(self, x: int, gates: int) -> int: ...
    def xielu(self, x: int, alpha_p: float, alpha_n: float, beta: float, eps: float) -> int: ...
    def soft_cap(self, x: int, cap: float) -> int: ...
    def add(self, x: int, y: int, scale: float) -> int: ...
    def take_columns(self, x: int, start: int, count: int) -> int: ...
    def take_rows(self, x: int, rows: str) -> int: ...
    def experts(self, x: int, logits: int, experts: Experts, activation: str) -> int: ...
    def project(self, x: int, linears: list[Linear]) -> list[int]: ...
    def linear(self, x: int, linear: Linear, residual: int | None) -> int: ...
    def norm_linear(self, x: int, norm: Norm | None, linear: Linear) -> int: ...
    def norm_gated(self, x: int, norm: Norm | None, gate: Linear, up: Linear, activation: str) -> int: ...
    def norm_qkv(
        self,
        x: int,
        norm: Norm | None,
        query: Linear,
        key: Linear,
        value: Linear | None,
        query_norm: Norm | None,
        key_norm: Norm | None,
        value_norm: Norm | None,
        norm_after_rope: bool,
        rope: Rope | None,
        kv: LayerKV,
    ) -> int: ...
    def write_kv(self, kv: LayerKV, k: int, v: int, slots: str, recent_slots: str | None = None) -> None: ...
    def attend(
        self,
        q: int,
        kv: LayerKV,
        scale: float | None,
        soft_cap: float,
        window: int | None,
        sinks: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> int: ...
    def input(self, width: int) -> int:
        """A value that each run is given, with a row for each token."""

    def finish(self, output: int | None, kept: Sequence[int] = []) -> None:
        """
        No op can follow; the memory of values that are kept is not reused within a step.
        """

    def run(
        self,
        token_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        kv_index: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        kv_bounds: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        sequence_index: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        logit_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        groups: Sequence[
            tuple[
                Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
                Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
            ]
        ],
        out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")] | None,
        first: int,
        last: int,
        timed: bool,
        inputs: Sequence[
            Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)]
        ] = [],
    ) -> list[float]:
        """
        Runs ops [first, last) on one step; gives each op's seconds where timed.
        """

    @property
    def attend_plans(self) -> list[tuple[int, int, int]]:
        """
        How the last run cut its attention, by shape of layer: units, those that are shared, chunks.
        """

    def copy_value(
        self, value: int, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")]
    ) -> None:
        """
        Copies the first rows of a value of the last run, if it is kept or no later op has reused its memory.
        """

class Experts:
    """The experts of a layer, by their ids, and how a row chooses some."""

    def __init__(
        self,
        gates: list[Linear],
        ups: list[Linear],
        downs: list[Linear],
        num_chosen: int,
        scores: str,
        renormalize: bool,
        min_sum: float,
        scale: float,
        num_groups: int,
        num_chosen_groups: int,
        choice_bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> None: ...

SAMPLE_ROW_BYTES: int = 152

def uniform_bits(seed: int, position: int) -> int:
    """
    The first 53 bits of Philox with this key and counter, as NumPy draws them.
    """

class Sampler:
    """Chooses tokens from rows of logits; one call at a time."""

    def __init__(self, pool: ThreadPool) -> None: ...
    def argmax(
        self,
        logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        out: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu")],
    ) -> None:
        """
        out[i] = the first of the highest logits of row rows[i]; -1 where that row is not finite.
        """

    def sample(
        self,
        logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        biases: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        masks: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        chosen: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu")],
        totals: Annotated[NDArray[numpy.int64], dict(shape=(None,), order="C", device="cpu")],
        top_ids: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu")],
        top_logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
        highest_and_own: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None:
        """
        chosen[i] = the token of rows[i] (native/sample.h has the layout), -1 where there is none.
        """
