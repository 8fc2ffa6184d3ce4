"""Weights in bytes: as a file has them and as kvik holds them, packed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvik.errors import InvalidInput
from kvik.planner.near import near, plain

ROWS_TOGETHER = 16
"""Rows that kvik packs together; the last ones of a matrix are filled up."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One type of weights."""

    name: str
    file_bits: Fraction  # a weight
    packed_bits: Fraction  # the same as kvik holds it: docs/kernels.md, Weights

    @property
    def quantized(self) -> bool:
        """Whether kvik multiplies it in integers."""
        return self.name not in ("f32", "f16", "bf16")


def _format(name: str, file_bytes: int, block: int, packed_bytes: int | None = None) -> WeightFormat:
    """Bytes of a block of one row, in the file and packed: the same unless told."""
    return WeightFormat(name, Fraction(8 * file_bytes, block), Fraction(8 * (packed_bytes or file_bytes), block))


# Best first: what is lost grows from one to the next.
FORMATS: dict[str, WeightFormat] = {
    one.name: one
    for one in (
        _format("f32", 4, 1),
        _format("bf16", 2, 1),
        _format("f16", 2, 1),
        _format("q8_0", 34, 32),
        _format("q6_k", 210, 256),
        _format("q5_k", 176, 256, 180),
        _format("q5_1", 24, 32),
        _format("q5_0", 22, 32),
        _format("q4_k", 144, 256, 148),
        _format("q4_1", 20, 32),
        _format("iq4_nl", 18, 32),
        _format("iq4_xs", 136, 256, 138),
        _format("q4_0", 18, 32),
        _format("mxfp4", 17, 32),
        _format("q3_k", 110, 256),
        _format("q2_k", 84, 256),
    )
}

SHOWN = ("bf16", "q8_0", "q6_k", "q4_k", "q4_1", "q4_0")
"""One of each size, for tables."""


def find_format(name: str) -> WeightFormat:
    """The format of that name. Raises `InvalidInput`."""
    wanted = name.strip().lower().removesuffix("_m").removesuffix("_s")
    if wanted not in FORMATS:
        close = near(wanted, {plain(one): one for one in FORMATS})
        suggestion = f"did you mean {close[0]}? " if close else ""
        raise InvalidInput(f"weights is {name!r:.60}", hint=f"{suggestion}give one of {', '.join(FORMATS)}")
    return FORMATS[wanted]


def held_bytes(num_params: int, form: WeightFormat) -> int:
    """Bytes that kvik takes to hold so many weights of one format."""
    return int(num_params * form.packed_bits / 8)


def file_bytes(num_params: int, form: WeightFormat) -> int:
    """Bytes of a file of them."""
    return int(num_params * form.file_bits / 8)


def packed_matrix_bytes(rows: int, columns: int, form: WeightFormat) -> int:
    """Bytes of one packed matrix, to the byte what `native/packing.cpp` allocates."""
    whole_rows = -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER
    return int(whole_rows * columns * form.packed_bits / 8)
