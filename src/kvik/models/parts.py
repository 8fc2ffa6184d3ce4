"""Where a decoder's tensors lie in a model file: families name, fuse and transpose them in their own ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the decoder, as some rows of a stored one, or of one item of it where it has the whole layer's."""

    stored: str  # the stored tensor's name
    shape: tuple[int, ...]  # of the whole stored tensor
    rows: slice | npt.NDArray[np.int64] | None = None  # those that are wanted; None: all
    transposed: bool = False  # stored as (columns, rows), so that `rows` counts its columns
    offset: float = 0.0  # added to every value: Gemma's norms are stored less 1
    item: int | None = None  # of the stored tensor's first axis, as an expert's id; None: it has no such axis
    scales: str | None = (
        None  # the tensor beside it that has a scale for each block of MXFP4, which the stored one holds
    )

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor of the decoder is one, and not a vector."""
        return len(self.shape) - (self.item is not None) == 2


Parts: TypeAlias = Mapping[str, Part]
"""By the names of `DecoderSpec.tensors()`, all of them."""

_NAME = re.compile(
    r"(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+)(?:\.(?P<expert>\d+))?\."
    r"(?P<kind>weight|bias|scale|alpha_p|alpha_n|beta|eps)"
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """The parts of a name of `DecoderSpec.tensors()`."""

    layer: int | None
    name: str
    expert: int | None  # its id
    kind: str

    @classmethod
    def parse(cls, canonical: str) -> TensorName:
        """Take a name apart."""
        match = _NAME.fullmatch(canonical)
        assert match is not None, canonical
        layer, expert = (None if match[part] is None else int(match[part]) for part in ("layer", "expert"))
        return cls(layer, match["name"], expert, match["kind"])
