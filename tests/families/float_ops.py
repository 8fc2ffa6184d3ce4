"""Ops that multiply blocks as the numbers they stand for, as transformers does: activations are not rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvik import _native
from kvik.models.checkpoint import FLOATS
from kvik.ops.base import WeightPlace
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, ReferenceWeight

Parts = Iterable[npt.NDArray[np.uint8]]


def as_floats(type_name: str, parts: Parts, columns: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of the float32 numbers of some rows' blocks."""
    kind = GGMLQuantizationType[type_name]
    values_of_block, bytes_of_block = GGML_QUANT_SIZES[kind]
    row_bytes = columns // values_of_block * bytes_of_block
    return (dequantize(part.reshape(-1, row_bytes), kind).reshape(-1).view(np.uint8) for part in parts)


class FloatOps(NativeOps):
    """The native ones."""

    def load_rows(
        self, type_name: str, parts: Parts, rows: int, columns: int, place: WeightPlace | None = None
    ) -> _native.PackedWeight:
        if type_name in FLOATS:
            return super().load_rows(type_name, parts, rows, columns, place)
        return super().load_rows("F32", as_floats(type_name, parts, columns), rows, columns)


class FloatReference(ReferenceOps):
    """The reference."""

    def load_rows(
        self, type_name: str, parts: Parts, rows: int, columns: int, place: WeightPlace | None = None
    ) -> ReferenceWeight:
        if type_name in FLOATS:
            return super().load_rows(type_name, parts, rows, columns)
        return super().load_rows("F32", as_floats(type_name, parts, columns), rows, columns)
