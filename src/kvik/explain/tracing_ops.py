"""Ops that pass each call on to others and note what came back: how a step is watched without a word in the decoder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec
from kvik.models.decoder import Decoder
from kvik.ops.base import Array, LayerKV, Ops, WeightPlace

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OpCall:
    """One op that ran."""

    name: str  # as in `Ops`
    place: str  # "embedding", "layer 0", ..., "head"
    weights: str  # names of the matrices or of the norm, where it has some
    started_s: float  # by time.perf_counter
    seconds: float
    shapes: tuple[tuple[int, ...], ...]  # of its results
    bits: str  # names the last row of its results: rows with the same one are the same to the last bit; "" without one


class TracingOps(Ops):
    """Runs one forward pass on `inner`, op by op, and keeps what passes by."""

    name = "tracing"

    def __init__(self, inner: Ops, weight_names: Mapping[int, tuple[str, str]]) -> None:
        self._inner = inner
        self._weight_names = weight_names
        self._place = "embedding"
        self._written: dict[int, tuple[FloatArray, FloatArray]] = {}  # keys and values of this step
        self.calls: list[OpCall] = []
        # By layer: (T, heads, head_dim) each.
        self.queries: list[FloatArray] = []
        self.keys: list[FloatArray] = []  # as they are computed, before the cache rounds them
        self.values: list[FloatArray] = []
        self.attended: list[FloatArray] = []
        self.hidden: FloatArray | None = None  # (T, hidden_size) behind the last layer

    def run(self, name: str, *arguments: Any) -> Any:
        weights = [known for argument in arguments for known in self._known(argument)]
        if weights:
            self._place = weights[0][0]
        elif name == "take_rows":
            self._place = "head"
        started_s = time.perf_counter()
        result = self._inner.run(name, *arguments)
        seconds = time.perf_counter() - started_s
        parts = result if isinstance(result, tuple) else () if result is None else (result,)
        arrays = [self._inner.to_numpy(part) for part in parts]
        names = ", ".join(weight for _, weight in weights)
        shapes = tuple(array.shape for array in arrays)
        self.calls.append(OpCall(name, self._place, names, started_s, seconds, shapes, _bits_of_last_row(arrays)))
        self._keep(name, arguments, arrays)
        return result

    def _known(self, argument: Any) -> Iterator[tuple[str, str]]:
        for weight in argument if isinstance(argument, tuple) else (argument,):
            known = self._weight_names.get(id(weight))
            if known is not None:
                yield known

    def _keep(self, name: str, arguments: tuple[Any, ...], results: Sequence[FloatArray]) -> None:
        if name == "write_kv":
            kv, k, v, *_ = arguments
            self._written[id(kv)] = self._inner.to_numpy(k), self._inner.to_numpy(v)
        elif name == "attend":
            q, kv, *_ = arguments
            keys, values = self._written[id(kv)]
            self.queries.append(self._inner.to_numpy(q))
            self.keys.append(keys)
            self.values.append(values)
            self.attended.append(results[0])
        elif name == "take_rows":
            self.hidden = self._inner.to_numpy(arguments[0])

    def split_heads(self, x: Array, head_dim: int) -> Array:
        return self._inner.split_heads(x, head_dim)

    def merge_heads(self, x: Array) -> Array:
        return self._inner.merge_heads(x)

    def load_rows(
        self,
        type_name: str,
        parts: Iterable[npt.NDArray[np.uint8]],
        rows: int,
        columns: int,
        place: WeightPlace | None = None,
    ) -> NoReturn:
        raise AssertionError("weights are loaded before a step is watched")

    def map_rows(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> NoReturn:
        raise AssertionError("tables are mapped before a step is watched")

    def allocate_kv(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> NoReturn:
        raise AssertionError("KV arrays are allocated before a step is watched")

    def copy_blocks(
        self, kv_cache: Sequence[LayerKV], copies: Sequence[tuple[int, int]], kv_group: int = 0
    ) -> NoReturn:
        raise AssertionError("blocks are copied before a step, not in it")

    def discard_blocks(self, kv_cache: Sequence[LayerKV], superblocks: Sequence[int], kv_group: int = 0) -> NoReturn:
        raise AssertionError("memory is given back between steps, not in one")

    def read_blocks(self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], kv_group: int = 0) -> NoReturn:
        raise AssertionError("blocks are read between steps, not in one")

    def write_blocks(
        self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], data: memoryview | bytes, kv_group: int = 0
    ) -> NoReturn:
        raise AssertionError("blocks are written back between steps, not in one")

    def to_numpy(self, x: Array) -> FloatArray:
        return self._inner.to_numpy(x)


def weight_names(decoder: Decoder) -> dict[int, tuple[str, str]]:
    """The place ("embedding", "layer 0" ..., "head") and name of each matrix and norm of a decoder, by `id`.

    Of one that stands in several places the first counts.
    """
    weights = decoder.weights
    # A tied head multiplies with the embedding's matrix, but in a projection of its own.
    named: list[tuple[object, str, str]] = [
        (weights.embedding, "embedding", "embedding"), (weights.positions, "embedding", "positions"),
        (weights.norm, "head", "norm"), (weights.lm_head, "head", "lm_head"),
    ]  # fmt: skip
    if (of_layers := weights.layer_embeddings) is not None:
        named += [(getattr(of_layers, field.name), "embedding", f"layers_{field.name}") for field in fields(of_layers)]
    for index, layer in enumerate(weights.layers):
        qkv, place = layer.qkv, f"layer {index}"
        named += [(qkv.query, place, "q_proj"), (qkv.key, place, "k_proj"), (qkv.value, place, "v_proj")]
        named += [(getattr(qkv, name), place, name) for name in ("query_norm", "key_norm", "value_norm")]
        if (own := layer.embedding) is not None:
            named += [(getattr(own, field.name), place, f"embedding_{field.name}") for field in fields(own)]
        apart = ("qkv", "embedding", "scale")
        names = {field.name: field.name for field in fields(layer) if field.name not in apart}
        if layer.experts is not None:
            names |= {name: f"shared_{name}" for name in ("gate_proj", "up_proj", "down_proj")}
        named += [(getattr(layer, name), place, shown) for name, shown in names.items()]
    return {id(weight): (place, name) for weight, place, name in reversed(named) if weight is not None}


def _bits_of_last_row(arrays: Sequence[FloatArray]) -> str:
    """A short hash: 64 bits, enough to tell the rows of a trace apart."""
    if not arrays:
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array[-1:].tobytes())
    return digest.hexdigest()
