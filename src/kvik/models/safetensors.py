"""Read safetensors files that nobody vouches for: the header is checked against the file, tensors are mapped.

Source: the format's description (github.com/huggingface/safetensors): 8 bytes of length, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.models.config_fields import read_json_object
from kvik.models.mapped import drop_pages

MOST_HEADER_BYTES = 1 << 27  # the format's own limit is 100 MB
MOST_INDEX_BYTES = 1 << 26
MOST_SHARDS = 1 << 12

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_NUMPY: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

_DAMAGED = "the file is damaged or was badly written; download it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    dtype: str  # as the format writes it: "F32", "BF16", ...
    shape: tuple[int, ...]
    first: int  # byte of its file
    path: Path
    data: npt.NDArray[np.uint8]  # its bytes, mapped

    def array(self) -> npt.NDArray[Any]:
        """The values in their shape; bfloat16 as the 16 bits that it is."""
        return self.data.view(_NUMPY[self.dtype]).reshape(self.shape)


class SafetensorsFile:
    """One file: its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                if size < 10:
                    raise self.error(f"has {size} bytes, fewer than the shortest header")
                # Never closed by hand: arrays refer to it.
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror}", hint="check its name and permissions"
            ) from None
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._read(size))

    def drop_pages(self, tensor: StoredTensor) -> None:
        """Give the memory of a tensor's pages back; they are read again when they are looked at."""
        drop_pages(self._map, tensor.first, len(tensor.data))

    def error(self, what: str) -> ModelError:
        """What to raise."""
        return ModelError(f"{self.path}: {what}", hint=_DAMAGED)

    def _read(self, size: int) -> dict[str, StoredTensor]:
        length = int.from_bytes(self._map[:8], "little")
        if length > min(MOST_HEADER_BYTES, size - 8):
            raise self.error(f"its header is said to have {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(self._map[8 : 8 + length], object_pairs_hook=self._without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is not JSON: {str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise self.error("its header holds no JSON object")
        header.pop("__metadata__", None)
        begin = 8 + length
        tensors = {name: self._tensor(name, entry, begin, size) for name, entry in header.items()}
        end = begin
        for tensor in sorted(tensors.values(), key=lambda one: (one.first, len(one.data))):
            if tensor.first < end:
                raise self.error(f"tensor {tensor.name!r:.80} lies over another")
            end = tensor.first + len(tensor.data)
        return tensors

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise self.error("its header has one name twice")
        return found

    def _tensor(self, name: str, entry: Any, begin: int, size: int) -> StoredTensor:
        what = f"tensor {name!r:.80}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self.error(f"{what} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise self.error(f"{what} has the unknown dtype {dtype!r:.40}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
                raise self.error(f"{what} has {reprlib.repr(numbers)} where a list of sizes belongs")
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - begin:
            raise self.error(f"{what} is said to lie at bytes {offsets} of {size - begin:,}: the file is cut short")
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if offsets[1] - offsets[0] != num_bytes:
            raise self.error(
                f"{what} has {offsets[1] - offsets[0]:,} bytes, its shape {tuple(shape)} needs {num_bytes:,}"
            )
        first = begin + offsets[0]
        data = np.frombuffer(self._map, np.uint8, num_bytes, first) if num_bytes else np.zeros(0, np.uint8)
        return StoredTensor(name, dtype, tuple(shape), first, self.path, data)


def read_checkpoint(folder: Path) -> dict[str, tuple[StoredTensor, SafetensorsFile]]:
    """All tensors of a checkpoint, in one file or in the shards that its index names. Raises `ModelError`."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        file = SafetensorsFile(folder / "model.safetensors")
        return {name: (tensor, file) for name, tensor in file.tensors.items()}
    places = read_json_object(index, MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} has no weight_map", hint=_DAMAGED)
    for name, shard in places.items():
        # A plain name stays in the folder; a link in it may lead out, as those of a download cache do.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index}: tensor {name!r:.80} is said to be in {shard!r:.80}, which is no .safetensors of this folder",
                hint=_DAMAGED,
            )
    shards = sorted(set(places.values()))
    if len(shards) > MOST_SHARDS:
        raise ModelError(f"{index} names {len(shards):,} files", hint=_DAMAGED)
    found: dict[str, tuple[StoredTensor, SafetensorsFile]] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise ModelError(f"{index}: {shard} is missing", hint="download the checkpoint again, all of its files")
        file = SafetensorsFile(folder / shard)
        for name, tensor in file.tensors.items():
            if places.get(name) != shard:
                raise ModelError(
                    f"{file.path}: tensor {name!r:.80} is not one that {index.name} has there", hint=_DAMAGED
                )
            found[name] = (tensor, file)
    for name, shard in places.items():
        if name not in found:
            raise ModelError(f"{folder / shard}: tensor {name!r:.80} of {index.name} is missing", hint=_DAMAGED)
    return found
