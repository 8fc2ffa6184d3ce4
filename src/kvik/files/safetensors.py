"""Read safetensors files that nobody vouches for.

A file is 8 bytes, the length of a JSON text in little endian; the text, which gives each tensor's dtype, shape and
place; and the tensors' bytes, one after the other. All numbers are checked as Python integers before anything is made
of them. Tensors are mapped, not read. Whatever is wrong with a file, the one exception that leaves here is
`ModelError`.

Source: the format's description in the safetensors repository. The walk is our own, as the library gives NumPy no
bfloat16.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.files.mapped import MappedFile, map_file

# Headers take many times their bytes as Python objects. Real ones have some hundred kB, and 10^4 tensors at most.
MAX_SAFETENSORS_HEADER_BYTES = 1 << 24
MAX_SAFETENSORS_TENSORS = 1 << 17
MAX_SAFETENSORS_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 1_024

DTYPE_BITS: Mapping[str, int] = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}

_DAMAGED = "the file is damaged or is not whole; download it again and compare its size and checksum"
_LFS = b"version https://git-lfs"

_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of a file: what it is, and where."""

    name: str
    dtype: str  # as the format calls it: F32, F16, BF16, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int
    file: MappedFile

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """A read-only view of its bytes."""
        return self.file.data[self.start : self.start + self.num_bytes]

    def error(self, what: str, hint: str) -> ModelError:
        """What to raise about this tensor."""
        return ModelError(f"{self.file.path}: tensor {_SHORT.repr(self.name)} {what}", hint=hint)


def read_safetensors(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of the file at `path`, by name, in the order of their data. Raises `ModelError`."""
    return parse_safetensors(map_file(path, hint="give the folder of a model"))


def parse_safetensors(file: MappedFile) -> Mapping[str, StoredTensor]:
    """The tensors of a mapped file."""
    return MappingProxyType(_Header(file).tensors())


class _Header:
    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.num_bytes = len(file.data)

    def error(self, message: str, hint: str = _DAMAGED) -> ModelError:
        return ModelError(f"{self.file.path}: {message}", hint=hint)

    def tensors(self) -> dict[str, StoredTensor]:
        header_bytes = self.header_bytes()
        data_start = 8 + header_bytes
        entries = self.entries(bytes(self.file.data[8:data_start]))
        tensors: dict[str, StoredTensor] = {}
        last_end, last = data_start, "the header"
        # In the order of the data, each begins where the one before has ended: no overlap, no byte that nobody owns.
        for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
            what = f"tensor {_SHORT.repr(name)}"
            if data_start + end > self.num_bytes:
                raise self.error(
                    f"truncated: {what} ends at byte {data_start + end:,}, the file has {self.num_bytes:,}"
                )
            if data_start + begin != last_end:
                raise self.error(f"{what} begins at byte {data_start + begin:,}, {last} ends at {last_end:,}")
            tensors[name] = StoredTensor(name, dtype, shape, data_start + begin, end - begin, self.file)
            last_end, last = data_start + end, what
        if last_end != self.num_bytes:
            raise self.error(f"the file has {self.num_bytes:,} bytes, {last} ends at {last_end:,}")
        return tensors

    def header_bytes(self) -> int:
        """The length of the JSON text, which lies in the file and is of a size that is believed."""
        start = bytes(self.file.data[:64])
        if start.startswith(_LFS):
            raise self.error("a Git LFS pointer, not the model", "run `git lfs pull` where it was cloned")
        if len(start) < 8:
            raise self.error(f"not a safetensors file: it has {self.num_bytes:,} bytes")
        header_bytes = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise self.error(f"not a safetensors file: byte 8 is {start[8:9]!r}, not b'{{'")
        if header_bytes > self.num_bytes - 8:
            raise self.error(f"truncated: the header needs {header_bytes:,} bytes, the file has {self.num_bytes:,}")
        if header_bytes > MAX_SAFETENSORS_HEADER_BYTES:
            raise self.error(
                f"the header has {header_bytes:,} bytes; up to {MAX_SAFETENSORS_HEADER_BYTES:,} are accepted"
            )
        return header_bytes

    def entries(self, text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Of each tensor dtype, shape, and begin and end from where the data starts."""
        num_objects = 0

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            nonlocal num_objects
            num_objects += 1
            fields = dict(pairs)
            if num_objects > MAX_SAFETENSORS_TENSORS or len(fields) > MAX_SAFETENSORS_TENSORS:
                raise self.error(f"the header has more than {MAX_SAFETENSORS_TENSORS:,} tensors")
            if len(fields) < len(pairs):
                twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
                raise self.error(f"the name {_SHORT.repr(twice)} occurs twice in the header")
            return fields

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"the header is not JSON: {str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise self.error("the header is no JSON object")
        header.pop("__metadata__", None)
        return {name: self.entry(name, fields) for name, fields in header.items()}

    def entry(self, name: str, fields: Any) -> tuple[str, tuple[int, ...], int, int]:
        what = f"tensor {_SHORT.repr(name)}"
        if not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
            raise self.error(f"{what} has a name that is empty, too long or not printable")
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"{what} is {reprlib.repr(fields)}; it must have dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise self.error(f"{what} has the unknown dtype {reprlib.repr(dtype)}", "a newer kvik may know it")
        if not _are_sizes(shape) or len(shape) > MAX_SAFETENSORS_DIMENSIONS:
            raise self.error(f"{what} has the shape {reprlib.repr(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self.error(f"{what} has the data_offsets {reprlib.repr(offsets)}")
        begin, end = offsets
        needed_bits = math.prod(shape) * DTYPE_BITS[dtype]
        if needed_bits != 8 * (end - begin):
            raise self.error(
                f"{what} of dtype {dtype} and shape {_shown(shape)} needs {needed_bits // 8:,} bytes,"
                f" its data_offsets give {end - begin:,}"
            )
        return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers that 64 bits hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _shown(shape: list[int]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "()"
