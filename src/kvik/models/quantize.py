"""Quantise matrices as they are loaded, and say what that changed.

q8 is GGUF's Q8_0: 32 weights share a scale, and each is a whole number from -127 to 127. q4 is its Q4_1: 32 weights
share a scale and a minimum, and each is a whole number from 0 to 15. Its Q4_0, which has no minimum, saves half a bit a
weight and has a tenth more error on normal weights, a quarter more on heavy-tailed ones. Both round to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik.config import WeightFormat

SCALE_GROUP = 32
"""Columns whose weights share a scale."""

TYPES: Mapping[WeightFormat, str] = {"q8": "Q8_0", "q4": "Q4_1"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What quantising a model's matrices did to them. Errors are relative: RMS of what changed, by RMS of what was."""

    weights: WeightFormat
    error: float
    worst_tensor: str  # as the checkpoint calls it
    worst_error: float
    num_tensors: int
    kept: tuple[str, ...]  # matrices that are as they were, because their columns do not divide by 32

    def __str__(self) -> str:
        line = f"weights as {self.weights}: relative error {_percent(self.error)}"
        if self.num_tensors > 1:
            line += f", worst {_percent(self.worst_error)} ({self.worst_tensor})"
        if self.kept:
            some = ", ".join(self.kept[:2]) + (f" and {len(self.kept) - 2} more" if len(self.kept) > 2 else "")
            line += f"; not quantised, as their columns do not divide by {SCALE_GROUP}: {some}"
        return line


def noted_quantization(notes: Mapping[str, Any] | None) -> Quantization | None:
    """What was written down of a `Quantization`; None where it is none, or not as it was written."""
    if notes is None or notes.keys() != {field.name for field in fields(Quantization)}:
        return None
    values = Quantization(**notes)
    kept = values.kept
    is_text = isinstance(values.worst_tensor, str) and isinstance(kept, list) and all(isinstance(n, str) for n in kept)
    are_errors = all(type(error) is float and math.isfinite(error) for error in (values.error, values.worst_error))
    if not (is_text and are_errors and values.weights in TYPES and type(values.num_tensors) is int):
        return None
    return replace(values, kept=tuple(kept))


@dataclass(slots=True)
class Quantizer:
    """Quantises chunk by chunk and keeps the sums of which the errors are made."""

    weights: WeightFormat
    kept: list[str] = field(default_factory=list)
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # squares of what changed, and of what was

    def quantize(self, name: str, values: npt.NDArray[np.float32], type_name: str) -> npt.NDArray[np.uint8]:
        """Rows (n, columns) of the tensor of that name, as the bytes of GGUF blocks of this type."""
        from gguf import GGMLQuantizationType  # slow to import, and most models need it not
        from gguf.quants import dequantize, quantize

        kind = GGMLQuantizationType[type_name]
        with np.errstate(all="ignore"):  # of scales that half precision does not hold; the error tells
            blocks = quantize(values, kind)
            change = dequantize(blocks, kind)
            change -= values
            changed, all_squares = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = changed + _sum_of_squares(change), all_squares + _sum_of_squares(values)
        return np.ascontiguousarray(blocks).view(np.uint8)

    def error(self, name: str) -> float:
        """The relative error of one tensor; not finite where its scales overflowed."""
        return _relative(*self._sums[name])

    def report(self) -> Quantization:
        """What became of all tensors."""
        worst = max(self._sums, key=self.error, default="")
        changed, all_squares = (
            (sum(column) for column in zip(*self._sums.values(), strict=True)) if worst else (0.0, 0.0)
        )
        return Quantization(
            weights=self.weights,
            error=_relative(changed, all_squares),
            worst_tensor=worst,
            worst_error=self.error(worst) if worst else 0.0,
            num_tensors=len(self._sums),
            kept=tuple(dict.fromkeys(self.kept)),
        )


def _sum_of_squares(values: npt.NDArray[np.float32]) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def _relative(changed: float, all_squares: float) -> float:
    return math.sqrt(changed / all_squares) if all_squares else changed


def _percent(error: float) -> str:
    return f"{error:.2%}" if error < 0.0995 else f"{error:.1%}"
