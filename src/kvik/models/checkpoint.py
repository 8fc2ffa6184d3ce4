"""The tensors of a checkpoint folder as the decoder wants them: checked, cut, turned, quantised if asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kvik.config import WeightFormat
from kvik.errors import ModelError
from kvik.models.hf_parts import hf_parts, is_unused
from kvik.models.parts import Part
from kvik.models.progress import Progress, silent
from kvik.models.safetensors import StoredTensor, read_checkpoint
from kvik.models.spec import DecoderSpec
from kvik.ops.base import Ops, Vector, Weight

FLOATS = ("F32", "F16", "BF16")
GROUP = 32
CHUNK_ITEMS = 1 << 20  # values that are turned, checked and quantised at a time

_QUANTIZED: dict[WeightFormat, GGMLQuantizationType] = {
    "q8": GGMLQuantizationType.Q8_0,
    "q4": GGMLQuantizationType.Q4_1,  # a minimum for each group: less error than Q4_0 by a tenth
}
_TABLES = ("token_embd.weight", "output.weight")
"""Kept in 8 bits where others get 4: a wrong logit is a wrong token."""

_NOT_WHOLE = "the checkpoint is not whole, or was made by another version of the model; download it again"


@dataclass(slots=True)
class QuantizationError:
    """How far quantised weights are from those of the file."""

    weights: WeightFormat
    squares: float = 0.0  # of the weights
    squared_errors: float = 0.0
    worst: float = 0.0  # relative error of one tensor
    worst_name: str = ""
    num_kept: int = 0  # matrices whose columns are no multiple of the group

    @property
    def relative(self) -> float:
        """Root mean square error by root mean square weight."""
        return float((self.squared_errors / self.squares) ** 0.5) if self.squares else 0.0

    def add(self, name: str, squares: float, squared_errors: float) -> None:
        """One more tensor."""
        self.squares += squares
        self.squared_errors += squared_errors
        error = (squared_errors / squares) ** 0.5 if squares else 0.0
        if error >= self.worst:
            self.worst, self.worst_name = error, name

    def __str__(self) -> str:
        kept = f"; {self.num_kept} matrices of odd widths stay as they are" if self.num_kept else ""
        return (
            f"weights as {self.weights}: relative error {self.relative:.2%}, at most {self.worst:.2%}"
            f" ({self.worst_name}){kept}"
        )


class CheckpointSource:
    """The tensors of a folder, by the names of `DecoderSpec.tensors()`."""

    def __init__(
        self,
        folder: Path,
        spec: DecoderSpec,
        ops: Ops,
        *,
        weights: WeightFormat | None = None,
        progress: Progress = silent,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.ops = ops
        self.shapes = spec.tensors()
        self.stored = read_checkpoint(folder)
        self.parts = hf_parts(spec, self.stored)
        self.error = QuantizationError(weights) if weights else None
        self._progress = progress
        self._done_bytes = 0
        self._check()
        names = {part.stored for part in self.parts.values()}
        self._all_bytes = sum(len(self.stored[name][0].data) for name in names)

    def matrix(self, name: str) -> Weight:
        """A matrix, packed; the file's own pages are dropped."""
        part = self.parts[name]
        tensor, file = self.stored[part.stored]
        rows, columns = self.shapes[name]
        kind = self._quantized_type(name, columns)
        if kind is None:
            if part.rows is None and not part.transposed:
                self._check_numbers(tensor)
                data = tensor.data
            else:
                data = np.concatenate([chunk.reshape(-1).view(np.uint8) for chunk in self._chunks(part, tensor, rows)])
            weight = self.ops.load_weight(tensor.dtype, _aligned(data, tensor.dtype), rows, columns)
        else:
            data = np.concatenate([block.reshape(-1) for block in self._blocks(name, part, tensor, rows, kind)])
            weight = self.ops.load_weight(kind.name, data, rows, columns)
        file.drop_pages(tensor)  # packed, it lies in memory twice
        self._done_bytes += len(tensor.data) * rows * columns // max(1, int(np.prod(part.shape)))
        self._progress(f"{self.folder.name}: loading", self._done_bytes, self._all_bytes)
        return weight

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        part = self.parts[name]
        tensor, _ = self.stored[part.stored]
        self._check_numbers(tensor)
        values = _to_float32(tensor.array(), tensor.dtype)
        return np.ascontiguousarray(values if part.rows is None else values[part.rows]) + np.float32(part.offset)

    def _check(self) -> None:
        used = set()
        for name, part in self.parts.items():
            used.add(part.stored)
            if part.stored not in self.stored:
                raise ModelError(
                    f"{self.folder}: tensor {part.stored!r} ({name} of a {self.spec.architecture} decoder) is missing",
                    hint=_NOT_WHOLE,
                )
            tensor, file = self.stored[part.stored]
            if tensor.shape != part.shape:
                raise ModelError(
                    f"{file.path}: tensor {part.stored!r} has shape {tensor.shape}, config.json asks for {part.shape}",
                    hint="config.json and tensors do not belong together; download the checkpoint again",
                )
            if tensor.dtype not in FLOATS:
                raise ModelError(
                    f"{file.path}: tensor {part.stored!r} has dtype {tensor.dtype}, which kvik does not run",
                    hint=f"kvik runs {', '.join(FLOATS)}; take the unquantised checkpoint",
                )
        for stored, (_, file) in self.stored.items():
            if stored not in used and not is_unused(self.spec, stored):
                raise ModelError(
                    f"{file.path}: tensor {stored!r:.80} has no place in a {self.spec.architecture} decoder"
                    f" of {self.spec.num_layers} layers",
                    hint="the model has a part that kvik does not run yet; take another model",
                )

    def _quantized_type(self, name: str, columns: int) -> GGMLQuantizationType | None:
        if self.error is None or name == "position_embd.weight":
            return None
        if columns % GROUP:
            self.error.num_kept += 1
            return None
        return _QUANTIZED["q8" if name in _TABLES else self.error.weights]

    def _blocks(
        self, name: str, part: Part, tensor: StoredTensor, rows: int, kind: GGMLQuantizationType
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """The matrix quantised, some rows at a time."""
        assert self.error is not None
        squares = squared_errors = 0.0
        for chunk in self._chunks(part, tensor, rows):
            values = _to_float32(chunk, tensor.dtype)
            block = quantize(values, kind)
            squares += float(np.square(values, dtype=np.float64).sum())
            squared_errors += float(np.square(dequantize(block, kind) - values, dtype=np.float64).sum())
            yield block
        self.error.add(name, squares, squared_errors)

    def _chunks(self, part: Part, tensor: StoredTensor, rows: int) -> Iterator[npt.NDArray[Any]]:
        """The wanted rows in their order, some at a time, in the file's own type."""
        values = tensor.array()
        if part.transposed:
            values = values.T
        step = max(1, CHUNK_ITEMS // values.shape[1])
        for start in range(0, rows, step):
            chunk = _some_rows(values, part.rows, start, min(start + step, rows))
            self._require_finite(chunk, tensor)
            yield np.ascontiguousarray(chunk)

    def _check_numbers(self, tensor: StoredTensor) -> None:
        flat = tensor.data.view(tensor.array().dtype)
        for start in range(0, len(flat), CHUNK_ITEMS):
            self._require_finite(flat[start : start + CHUNK_ITEMS], tensor)

    def _require_finite(self, values: npt.NDArray[Any], tensor: StoredTensor) -> None:
        exponent = 0x7F80
        is_wrong = (values & exponent) == exponent if tensor.dtype == "BF16" else ~np.isfinite(values)
        if count := int(np.count_nonzero(is_wrong)):
            raise ModelError(
                f"{tensor.path}: tensor {tensor.name!r} holds NaN or infinity ({count:,} of {values.size:,} values"
                " looked at)",
                hint="the weights are damaged; download the checkpoint again",
            )


def _some_rows(
    values: npt.NDArray[Any], rows: slice | npt.NDArray[np.int64] | None, first: int, last: int
) -> npt.NDArray[Any]:
    """Rows [first, last) of those that are wanted."""
    if rows is None:
        return values[first:last]
    if isinstance(rows, slice):
        start = rows.start or 0
        return values[start + first : start + last]
    return values[rows[first:last]]


def _to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _aligned(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes where numbers of the type may lie: a header of odd length moves all tensors of its file."""
    item = 4 if dtype == "F32" else 2
    return data if data.ctypes.data % item == 0 else data.copy()
