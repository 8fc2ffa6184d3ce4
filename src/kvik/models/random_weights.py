"""A decoder with random weights: its speed and its memory are those of its shape, what it writes is noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from kvik.errors import InvalidInput
from kvik.models.decoder import Decoder
from kvik.models.spec import DecoderSpec
from kvik.models.weights import read_weights
from kvik.ops.base import Ops, Vector, Weight

SAMPLE_ROWS = 8  # that are drawn; the others repeat them, each in its own memory, but for a router's

_FLOATS = {"F32": np.float32, "F16": np.float16}


class RandomWeights:
    """Tensors of a decoder, drawn from a seed, by the types that `types` has for their names (`default` for others)."""

    def __init__(self, spec: DecoderSpec, ops: Ops, types: Mapping[str, str], default: str, seed: int = 0) -> None:
        self._shapes = spec.tensors()
        self._ops = ops
        self._types = types
        self._default = default
        self._rng = np.random.default_rng(seed)

    def matrix(self, name: str) -> Weight:
        """Normal values of the size that keeps rows as long as they were."""
        rows, columns = self._shapes[name]
        kind = self._types.get(name, self._default)
        if kind not in _FLOATS and columns % 32:
            kind = "F16"
        num_drawn = rows if ".ffn_gate_inp." in name else SAMPLE_ROWS  # equal rows would be chosen together
        drawn = self._rng.normal(0.0, columns**-0.5, (num_drawn, columns)).astype(np.float32)
        sample: npt.NDArray[np.uint8]
        if kind in _FLOATS:
            sample = drawn.astype(_FLOATS[kind]).view(np.uint8)
        else:
            sample = quantize(drawn, GGMLQuantizationType[kind])
        return self._ops.load_weight(kind, np.resize(sample, (rows, sample.shape[1])).reshape(-1), rows, columns)

    def table(self, name: str) -> Weight:
        """Zeros, which take no memory until rows are read."""
        rows, columns = self._shapes[name]
        return self._ops.map_rows("F16", np.zeros(2 * rows * columns, np.uint8), rows, columns)

    def vector(self, name: str) -> Vector:
        """Ones for norms and scales, zeros for biases."""
        return np.full(self._shapes[name], not name.endswith(".bias"), np.float32)


def with_kv_heads(spec: DecoderSpec, num_kv_heads: int) -> DecoderSpec:
    """The same shape with so many KV heads. Raises `InvalidInput`."""
    if not 1 <= num_kv_heads <= spec.num_heads or spec.num_heads % num_kv_heads:
        fits = ", ".join(str(count) for count in range(1, spec.num_heads + 1) if spec.num_heads % count == 0)
        raise InvalidInput(
            f"{spec.num_heads} query heads do not divide among {num_kv_heads} KV heads", hint=f"give some of {fits}"
        )
    layers = tuple(replace(layer, num_kv_heads=None) for layer in spec.layers)
    return replace(spec, num_kv_heads=num_kv_heads, layers=layers)


def random_decoder(like: Decoder, num_kv_heads: int, types: Mapping[str, str], default: str) -> Decoder:
    """A decoder of another's shape, with so many KV heads and random weights. Raises `InvalidInput`."""
    spec = with_kv_heads(like.spec, num_kv_heads)
    weights = read_weights(spec, RandomWeights(spec, like.ops, types, default))
    return Decoder(spec, weights, like.ops, like.num_positions)
