"""Where a decoder's tensors lie in a model file: families name, fuse and transpose them in their own ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the decoder, as some rows of a stored one."""

    stored: str  # the stored tensor's name
    shape: tuple[int, ...]  # of the whole stored tensor
    rows: slice | npt.NDArray[np.int64] | None = None  # those that are wanted; None: all
    transposed: bool = False  # stored as (columns, rows), so that `rows` counts its columns
    offset: float = 0.0  # added to every value: Gemma's norms are stored less 1


Parts: TypeAlias = Mapping[str, Part]
"""By the names of `DecoderSpec.tensors()`, all of them."""
