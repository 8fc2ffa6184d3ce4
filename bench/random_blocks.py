"""Random weights in the blocks of any of GGUF's weight formats, drawn as such: nothing is quantised.

A block's integers are random bytes; its scales are set so that the values have the size that is asked for. So billions
of weights take seconds, and no part of a file repeats another.

Source: the block structs in ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

Bytes = npt.NDArray[np.uint8]
Kind = GGMLQuantizationType

FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
SCALES: Mapping[GGMLQuantizationType, tuple[int, ...]] = {
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}
"""Where the float16 scale of a block stands, and that of its minimum, where it has one."""

SAMPLE_BLOCKS = 4096
EXPONENT_BIAS = 127  # of MXFP4's scale, a power of two in its block's first byte


def draw(kind: GGMLQuantizationType, num_values: int, size: float, rng: np.random.Generator) -> Bytes:
    """Values in whole blocks, 0 on average, of such a deviation. Raises `ValueError` for a format unknown here."""
    if kind in FLOATS:
        drawn = rng.standard_normal(num_values, np.float32) * np.float32(size)
        return np.ascontiguousarray(quantize(drawn, kind)).view(np.uint8)
    values, _ = GGML_QUANT_SIZES[kind]
    blocks = _random_blocks(kind, num_values // values, rng)
    if kind == Kind.MXFP4:
        # Two neighbouring powers in such shares that the squares are right on average.
        wanted = size / _deviation(kind)
        power = int(np.floor(np.log2(wanted)))
        share = ((wanted / 2.0**power) ** 2 - 1) / 3
        blocks[:, 0] = EXPONENT_BIAS + power + (rng.random(len(blocks)) < share)
    elif len(SCALES[kind]) == 2:
        scale = size / _deviation(kind)
        _set_scales(kind, blocks, scale, scale * _minimum(kind))
    else:
        # Integers and tables reach farther below 0 than above: scales of both signs make up for it.
        _set_scales(kind, blocks, size / _deviation(kind) * (2.0 * rng.integers(0, 2, len(blocks)) - 1.0))
    return blocks.reshape(-1)


def _random_blocks(kind: GGMLQuantizationType, count: int, rng: np.random.Generator) -> Bytes:
    if kind not in SCALES and kind != Kind.MXFP4:
        raise ValueError(f"{kind.name}: no random weights are drawn in this format")
    _, size = GGML_QUANT_SIZES[kind]
    words = rng.integers(0, 1 << 64, (count * size + 7) // 8, np.uint64)
    return words.view(np.uint8)[: count * size].reshape(count, size)


def _set_scales(kind: GGMLQuantizationType, blocks: Bytes, *scales: npt.ArrayLike) -> None:
    for offset, value in zip(SCALES[kind], scales, strict=True):
        blocks[:, offset : offset + 2].view(np.float16)[:] = np.reshape(value, (-1, 1))


def _sample(kind: GGMLQuantizationType, *scales: float) -> npt.NDArray[np.float32]:
    blocks = _random_blocks(kind, SAMPLE_BLOCKS, np.random.default_rng(0))
    if kind == Kind.MXFP4:
        blocks[:, 0] = EXPONENT_BIAS
    else:
        _set_scales(kind, blocks, *scales)
    return np.asarray(dequantize(blocks, kind), np.float32)


@cache
def _minimum(kind: GGMLQuantizationType) -> float:
    """For a scale of 1, that of the minimum with which values are 0 on average."""
    return -float(_sample(kind, 1.0, 0.0).mean() / _sample(kind, 0.0, 1.0).mean())


@cache
def _deviation(kind: GGMLQuantizationType) -> float:
    """Of values with a scale of 1, from 0."""
    scales = (1.0, _minimum(kind)) if len(SCALES.get(kind, ())) == 2 else (1.0,)
    return float(np.sqrt((_sample(kind, *scales) ** 2).mean()))
