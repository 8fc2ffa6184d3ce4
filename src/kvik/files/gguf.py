"""Read GGUF model files that nobody vouches for.

A file is walked once: the fixed fields, the metadata, the tensor table. Every count and length in it is checked against
the bytes that are there, in Python integers that cannot overflow, before anything is allocated or looped over. Tensor
data is mapped, not read. Whatever is wrong with a file, the one exception that leaves here is `ModelError`.

Source: GGUF specification, ggml docs/gguf.md, versions 2 and 3, little endian. The dequantisation is that of the `gguf`
library; the walk is our own, since its reader trusts the counts.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.files.gguf_types import BLOCKS, DEFAULT_ALIGNMENT, MAGIC, TensorType, ValueType
from kvik.files.mapped import MappedFile, map_file
from kvik.files.split import Part
from kvik.files.texts import Texts

MetadataValue: TypeAlias = bool | int | float | str | list[bool] | list[int] | list[float] | Texts
_Kind = TypeVar("_Kind")
_Item = TypeVar("_Item", bool, int, float, str)
_Number = TypeVar("_Number", int, float)

VERSIONS = (2, 3)
MAX_GGUF_DIMENSIONS = 4
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 1_024
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20

# What a header may ask of memory: its bytes take 8 times the room or more as Python objects, and a sparse file can have
# any size. Real headers have up to 40 MB, a million array items, a few thousand tensors and a hundred keys.
MAX_GGUF_HEADER_BYTES = 1 << 27
MAX_NUM_ARRAY_ITEMS = 1 << 22
MAX_GGUF_TENSORS = 1 << 18
MAX_NUM_KEYS = 1 << 16

_WINDOW_BYTES = 1 << 20  # of strings, copied at a time

_MIN_KEY_BYTES = 8 + 4 + 1  # length of the name, type, a bool
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, n_dims, one dimension, type, offset

_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")
_SCALAR_NAMES = ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64", "BOOL")
_SCALARS = {ValueType[name]: np.dtype(name.lower()).newbyteorder("<") for name in _SCALAR_NAMES}

_DOWNLOAD = "download the file again and compare its size and checksum with the publisher's"
_DAMAGED = f"the file is damaged or was badly written; {_DOWNLOAD}, or take another GGUF of this model"
_CONVERT = "convert the model again with a current convert_hf_to_gguf.py of llama.cpp, or take another GGUF of it"
_GGUF_ONLY = "kvik reads GGUF files; look for a .gguf of this model"
_NO_PICKLE = (
    "kvik never unpickles, as that runs what the file says; save the model as safetensors"
    " (transformers: `model.save_pretrained(folder, safe_serialization=True)`) and give that folder"
)
_WHOLE_FOLDER = "give the folder that it lies in, with the model's config.json and tokenizer.json"
_UPGRADE = "if the file is new, a newer kvik may know the type; if not, download it again"

# How files that are not GGUF begin, what they are and what to do about it.
_OTHER_FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the model", "run `git lfs pull` where it was cloned"),
    ((b"PK\x03\x04",), "a zip archive, as PyTorch checkpoints are", _NO_PICKLE),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle, as PyTorch checkpoints are", _NO_PICKLE),
    ((b"\x1f\x8b",), "a gzip archive", "unpack it first"),
    ((b"lmgg", b"fmgg", b"tjgg"), "a GGML file, the format before GGUF", _CONVERT),
    ((b"<",), "a web page, perhaps an error or a login", "download the file itself, not the page that shows it"),
    ((b"{",), "a JSON text", _GGUF_ONLY),
)

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """One tensor of a file: what it is, and a view of its bytes."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # NumPy order: (rows, columns), columns vary fastest
    num_bytes: int
    offset: int  # bytes from the start of the file
    data: npt.NDArray[np.uint8]  # (num_bytes,), a read-only view of the mapped file


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """The metadata and tensors of one file, checked for form; what they mean is for the loader to judge.

    Each getter raises ModelError with the file, the key, what was found and what is accepted. Without a default the key
    must be there; a default is returned as it is.
    """

    path: Path
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, GGUFTensor]  # in the order of their data
    mapped: MappedFile | None = None  # the file, where it was mapped
    homes: Mapping[str, MappedFile] = field(default_factory=dict)  # of a split model: the part that a tensor lies in

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, or of all parts of a split model."""
        files = {one.path: len(one.data) for one in (*self.homes.values(), *([self.mapped] if self.mapped else []))}
        return sum(files.values())

    def drop_pages(self, tensor: GGUFTensor) -> None:
        """Give back the memory through which a tensor was read; reading it once more brings it back from the file."""
        if (home := self._home(tensor)) is not None:
            home.drop_pages(tensor.offset, tensor.num_bytes)

    def expect_jumps(self, tensor: GGUFTensor) -> None:
        """Tell the system that a tensor's rows will be read here and there: it need not read ahead."""
        if (home := self._home(tensor)) is not None:
            home.expect_jumps(tensor.offset, tensor.num_bytes)

    def _home(self, tensor: GGUFTensor) -> MappedFile | None:
        return self.homes.get(tensor.name, self.mapped)

    def tensor(self, name: str) -> GGUFTensor:
        """Return the tensor of that name, which must be there."""
        if name not in self.tensors:
            raise ModelError(
                f"{self.path}: tensor {name!r} is missing", hint="the file is not whole; download it again"
            )
        return self.tensors[name]

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        """Return the bool under `key`."""
        return self._get(key, bool, default)

    def get_str(self, key: str, default: str | None = None) -> str:
        """Return the string under `key`."""
        return self._get(key, str, default)

    def get_int(
        self, key: str, default: int | None = None, *, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        """Return the integer under `key`, which lies from `minimum` to `maximum`, both included."""
        return self._in_range(key, self._get(key, int, default), minimum, maximum)

    def get_float(
        self, key: str, default: float | None = None, *, minimum: float | None = None, maximum: float | None = None
    ) -> float:
        """Return the finite float under `key`, which lies from `minimum` to `maximum`, both included."""
        value = self._get(key, float, default)
        if key in self.metadata and not math.isfinite(value):
            raise self._unfit(key, "finite")
        return self._in_range(key, value, minimum, maximum)

    def get_list(
        self, key: str, kind: type[_Item], default: list[_Item] | None = None, *, length: int | None = None
    ) -> list[_Item]:
        """Return the list of `kind` under `key`, of `length` items if that is given; floats are finite."""
        value = self.metadata.get(key)
        items: list[Any] = list(value) if isinstance(value, Texts) else self._get(key, list, default)
        if key not in self.metadata:
            return items
        # A GGUF array has one type, so that its first item speaks for all.
        if items and type(items[0]) is not kind:
            raise self._unfit(key, f"a list of {kind.__name__}")
        if length is not None and len(items) != length:
            raise self._unfit(key, f"a list of {length:,} items (it has {len(items):,})")
        if not all(math.isfinite(item) for item in items if isinstance(item, float)):
            raise self._unfit(key, "finite")
        return items

    def _get(self, key: str, kind: type[_Kind], default: _Kind | None) -> _Kind:
        if key not in self.metadata:
            if default is None:
                raise ModelError(f"{self.path}: the metadata has no key {key!r}", hint=_CONVERT)
            return default
        value: Any = self.metadata[key]
        if kind in (int, float, bool) and type(value) is list and value and value.count(value[0]) == len(value):
            value = value[0]  # one number for each layer, all the same
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # not isinstance: a bool is no int here
            raise self._unfit(key, f"of type {kind.__name__}")
        return value

    def _in_range(self, key: str, value: _Number, minimum: _Number | None, maximum: _Number | None) -> _Number:
        if key not in self.metadata:
            return value
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            lower = "" if minimum is None else f" from {minimum:,}"
            upper = "" if maximum is None else f" up to {maximum:,}"
            raise self._unfit(key, f"{lower}{upper}".lstrip())
        return value

    def _unfit(self, key: str, accepted: str) -> ModelError:
        value = self.metadata[key]
        found = f"the {type(value).__name__} {_SHORT.repr(value)}"
        return ModelError(f"{self.path}: metadata key {key!r} is {found}; it must be {accepted}", hint=_CONVERT)


def read_gguf(path: Path) -> GGUFFile:
    """Map the GGUF file at `path` and read its header; ModelNotFound where no file is, ModelError where it is unfit.

    Any part of a split model stands for all of them, which lie beside it.
    """
    mapped = map_file(path, hint="give the path of a .gguf file")
    part = Part.of(path.name)
    if part is not None and _Header(mapped.data, path).split_count() == part.count:
        return _read_parts(path, part)
    return replace(parse_gguf(mapped.data, path), mapped=mapped)


def _read_parts(path: Path, part: Part) -> GGUFFile:
    """One file of all parts: the metadata of the first, the tensors of each."""
    paths = part.paths(path)
    missing = [number for number, one in enumerate(paths, 1) if not one.is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(
            f"{path}: part {part.number:,} of {part.count:,} of a model that was split;"
            f" parts missing beside it: {shown}",
            hint="put all parts into one folder",
        )
    tensors: dict[str, GGUFTensor] = {}
    homes: dict[str, MappedFile] = {}
    metadata: dict[str, MetadataValue] = {}
    for index, one in enumerate(paths):
        mapped = map_file(one, hint="give the path of a .gguf file")
        header = _Header(mapped.data, one)
        num_tensors, num_keys = header.read_start()
        found = header.read_metadata(num_keys)
        if (found.get("split.no"), found.get("split.count")) != (index, part.count):
            raise header.error(f"is not part {index + 1:,} of {part.count:,}, as its name says")
        metadata = metadata or found
        for name, tensor in header.read_tensors(num_tensors).items():
            if name in tensors:
                raise header.error(f"tensor {_SHORT.repr(name)} is in {homes[name].path.name} too")
            tensors[name], homes[name] = tensor, mapped
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise ModelError(f"{paths[0]}: the parts have {len(tensors):,} tensors, not {promised}", hint=_DOWNLOAD)
    return GGUFFile(paths[0], MappingProxyType(metadata), MappingProxyType(tensors), None, MappingProxyType(homes))


def parse_gguf(data: npt.NDArray[np.uint8], path: Path) -> GGUFFile:
    """Read the GGUF file whose bytes are `data`; `path` only names it. Tensors are views of `data`."""
    header = _Header(data, path)
    num_tensors, num_keys = header.read_start()
    metadata = header.read_metadata(num_keys)
    _check_whole(path, metadata)
    tensors = header.read_tensors(num_tensors)
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(tensors))


def _check_whole(path: Path, metadata: Mapping[str, MetadataValue]) -> None:
    """Raise ModelError for a part of a split model: of its tensors only some are here."""
    named, count, index = Part.of(path.name), metadata.get("split.count"), metadata.get("split.no")
    if isinstance(count, int) and isinstance(index, int):
        if count > 1:
            part = Part(None if named is None else named.base, index + 1, count)
            raise part.error(str(path), hint=f"merge all parts with {part.merge_command}, and give that file")
    elif named is not None:
        raise named.error(
            str(path), hint=f"merge all parts with {named.merge_command}; if this is a whole file, rename it"
        )


def dequantize(tensor: GGUFTensor) -> npt.NDArray[np.float32]:
    """Return the values of `tensor` in its shape, by the `gguf` library; of F32, a view of the file.

    Raises ModelError for a type that holds no floats or that the library cannot dequantise.
    """
    if tensor.type == TensorType.F32:
        return tensor.data.view("<f4").reshape(tensor.shape)
    from gguf import GGMLQuantizationType  # slow to import, and the weights of most files need it not
    from gguf.quants import dequantize as dequantize_rows

    try:
        kind = GGMLQuantizationType(tensor.type)
        values = dequantize_rows(tensor.data.reshape(math.prod(tensor.shape[:-1]), -1), kind)
    except NotImplementedError as error:
        message = f"tensor {_SHORT.repr(tensor.name)} is {tensor.type.name}, which the gguf library cannot dequantise"
        raise ModelError(message, hint="take a GGUF of this model in another format, such as Q8_0 or Q4_K_M") from error
    return cast(npt.NDArray[np.float32], values).reshape(tensor.shape)


class _Header:
    """A cursor over the header of one file. Every step is checked before it is made."""

    def __init__(self, data: npt.NDArray[np.uint8], path: Path) -> None:
        self.data = data
        self.view = data.data
        self.path = path
        self.position = 0
        self.end = min(len(data), MAX_GGUF_HEADER_BYTES)
        self.num_array_items = 0
        self.alignment = DEFAULT_ALIGNMENT

    def error(self, message: str, hint: str = _DAMAGED) -> ModelError:
        return ModelError(f"{self.path}: {message}", hint=hint)

    # The small parts.

    def take(self, num_bytes: int, what: str) -> int:
        """Step over `num_bytes` and return where they begin."""
        start = self.position
        if start + num_bytes > self.end:
            problem = "truncated" if self.end == len(self.data) else "its header is too large"
            raise self.error(f"{problem}: {what} needs {num_bytes:,} bytes at {start:,}, which is past {self.end:,}")
        self.position = start + num_bytes
        return start

    def uint32(self, what: str) -> int:
        return int(_UINT32.unpack_from(self.view, self.take(4, what))[0])

    def uint64(self, what: str) -> int:
        return int(_UINT64.unpack_from(self.view, self.take(8, what))[0])

    def text(self, what: str, max_bytes: int = MAX_GGUF_HEADER_BYTES) -> str:
        num_bytes = self.uint64(f"the length of {what}")
        if num_bytes > max_bytes:
            raise self.error(
                f"{what} at {self.position:,} is {num_bytes:,} bytes long; up to {max_bytes:,} are accepted"
            )
        start = self.take(num_bytes, what)
        try:
            return str(self.view[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason} at {start + error.start:,}") from None

    def texts(self, count: int, what: str) -> Texts:
        start = self.position
        try:
            return Texts(self.pieces(count, what))
        except UnicodeDecodeError:
            self.position = start
            for index in range(count):  # one of them raises, with its own place
                self.text(f"item {index:,} of {what}")
            raise

    def pieces(self, count: int, what: str) -> list[bytes]:
        """Read `count` strings as bytes. A vocabulary has 10^5, so the loop is bare, over a copy that slices fast."""
        pieces: list[bytes] = []
        append, unpack = pieces.append, _UINT64.unpack_from
        while len(pieces) < count:
            window = bytes(self.view[self.position : min(self.end, self.position + _WINDOW_BYTES)])
            at = 0
            with contextlib.suppress(struct.error):
                for _ in range(count - len(pieces)):
                    start = at + 8
                    stop = start + unpack(window, at)[0]
                    if stop > len(window):
                        break
                    append(window[start:stop])
                    at = stop
            self.position += at
            if len(pieces) < count:  # the window cuts it off, or it is damaged
                append(self.text(f"item {len(pieces):,} of {what}").encode())
        return pieces

    def scalars(self, kind: ValueType, count: int, what: str) -> list[bool] | list[int] | list[float]:
        dtype = _SCALARS[kind]
        start = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.view, dtype, count, start)
        if kind == ValueType.BOOL and np.any(values.view(np.uint8) > 1):
            raise self.error(f"{what} has a bool of {values.view(np.uint8).max()} at {start:,}; it must be 0 or 1")
        return cast(list[bool] | list[int] | list[float], values.tolist())

    def value_type(self, what: str) -> ValueType:
        raw = self.uint32(f"the type of {what}")
        try:
            return ValueType(raw)
        except ValueError:
            raise self.error(f"{what} has the unknown value type {raw:,} at {self.position - 4:,}") from None

    def array(self, what: str) -> MetadataValue:
        kind = self.value_type(f"the items of {what}")
        if kind == ValueType.ARRAY:
            raise self.error(f"{what} is an array of arrays, which kvik does not read", _CONVERT)
        count = self.uint64(f"the number of items of {what}")
        item_bytes = 8 if kind == ValueType.STRING else _SCALARS[kind].itemsize
        self.check_count(count, item_bytes, MAX_NUM_ARRAY_ITEMS - self.num_array_items, f"items in {what}")
        self.num_array_items += count
        return self.texts(count, what) if kind == ValueType.STRING else self.scalars(kind, count, what)

    def check_count(self, count: int, item_bytes: int, max_count: int, what: str) -> None:
        """Refuse more items than are believed, or than the rest of the file can hold at `item_bytes` each or more."""
        room = (len(self.data) - self.position) // item_bytes
        if count > room:
            raise self.error(f"truncated or damaged: {count:,} {what}, but the rest of the file has room for {room:,}")
        if count > max_count:
            raise self.error(f"{count:,} {what}; up to {max_count:,} are accepted")

    def split_count(self) -> int:
        """Parts of the model, as the metadata says; 0: it does not."""
        count = self.read_metadata(self.read_start()[1]).get("split.count")
        return count if isinstance(count, int) else 0

    # The three parts of a header.

    def read_start(self) -> tuple[int, int]:
        """Read the fixed fields and return the numbers of tensors and of metadata keys."""
        if len(self.data) == 0:
            raise self.error("the file is empty", _DOWNLOAD)
        if bytes(self.data[:4]) != MAGIC:
            raise self.not_gguf()
        self.take(4, "the magic number")
        version = self.uint32("the version")
        if version & 0xFFFF == 0 and version >> 16:
            raise self.error("a big-endian GGUF file; kvik reads little-endian ones", _CONVERT)
        if version not in VERSIONS:
            raise self.error(f"GGUF version {version:,}; kvik reads versions 2 and 3", _CONVERT)
        num_tensors, num_keys = self.uint64("tensor_count"), self.uint64("metadata_kv_count")
        self.check_count(num_tensors, _MIN_TENSOR_BYTES, MAX_GGUF_TENSORS, "tensors")
        self.check_count(num_keys, _MIN_KEY_BYTES, MAX_NUM_KEYS, "metadata keys")
        return num_tensors, num_keys

    def not_gguf(self) -> ModelError:
        # safetensors: the length of a JSON text in 8 bytes, which may be any letter, then the text
        if bytes(self.data[5:9]) == b"\0\0\0{":
            return self.error("not a GGUF file: it looks like a safetensors file", _WHOLE_FOLDER)
        start = bytes(self.data[:64]).lstrip()
        for prefixes, looks_like, hint in _OTHER_FORMATS:
            if start.startswith(prefixes):
                return self.error(f"not a GGUF file: it looks like {looks_like}", hint)
        return self.error(f"not a GGUF file: it begins with {bytes(self.data[:4])!r}, not b'GGUF'", _GGUF_ONLY)

    def read_metadata(self, num_keys: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for index in range(num_keys):
            key = self.text(f"metadata key {index:,}", MAX_KEY_BYTES)
            what = f"metadata key {_SHORT.repr(key)}"
            if key in metadata:
                raise self.error(f"{what} occurs twice, the second time before {self.position:,}")
            kind = self.value_type(what)
            if kind == ValueType.ARRAY:
                metadata[key] = self.array(what)
            elif kind == ValueType.STRING:
                metadata[key] = self.text(what)
            else:
                metadata[key] = self.scalars(kind, 1, what)[0]
            if key == "general.alignment":
                self.alignment = self.checked_alignment(kind, metadata[key])
        return metadata

    def checked_alignment(self, kind: ValueType, value: MetadataValue) -> int:
        if kind != ValueType.UINT32 or not isinstance(value, int):
            raise self.error(f"general.alignment is of type {kind.name}; it must be UINT32")
        if value.bit_count() != 1 or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT:
            accepted = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
            raise self.error(f"general.alignment is {value:,}; it must be {accepted}")
        return value

    def read_tensors(self, num_tensors: int) -> dict[str, GGUFTensor]:
        """Read the tensor table, place the data after it and prove that it is there, in pieces that do not overlap."""
        table: dict[str, tuple[TensorType, tuple[int, ...], int, int]] = {}
        for index in range(num_tensors):
            name = self.text(f"the name of tensor {index:,}", MAX_TENSOR_NAME_BYTES)
            if name in table:
                raise self.error(f"tensor {_SHORT.repr(name)} occurs twice, the second time before {self.position:,}")
            table[name] = self.read_tensor_entry(f"tensor {_SHORT.repr(name)}")

        data_start = -(-self.position // self.alignment) * self.alignment
        tensors: dict[str, GGUFTensor] = {}
        last_end, last = data_start, ""
        # Python integers: no sum wraps round. In the order of the data, each must begin where the one before has ended.
        for name, (kind, shape, num_bytes, offset) in sorted(table.items(), key=lambda entry: entry[1][-1]):
            start, end = data_start + offset, data_start + offset + num_bytes
            what = f"tensor {_SHORT.repr(name)}"
            if start < last_end:
                raise self.error(f"{what} begins at {start:,} and so overlaps {last}, which ends at {last_end:,}")
            tensors[name] = GGUFTensor(name, kind, shape, num_bytes, start, self.data[start:end])
            last_end, last = end, what
        if tensors and last_end > len(self.data):
            message = f"truncated: needs {last_end:,} bytes (the end of {last}), the file has {len(self.data):,}"
            raise self.error(message, _DOWNLOAD)
        return tensors

    def read_tensor_entry(self, what: str) -> tuple[TensorType, tuple[int, ...], int, int]:
        """Read one entry after its name: type, shape, size in bytes, offset in bytes from the start of the data."""
        num_dimensions = self.uint32(f"n_dims of {what}")
        if not 1 <= num_dimensions <= MAX_GGUF_DIMENSIONS:
            raise self.error(f"{what} has {num_dimensions:,} dimensions; 1 to {MAX_GGUF_DIMENSIONS} are accepted")
        dimensions = [self.uint64(f"a dimension of {what}") for _ in range(num_dimensions)]
        if any(not 0 < dimension < 1 << 63 for dimension in dimensions):
            raise self.error(f"{what} has the dimensions {dimensions}; each must be from 1 to 2^63 - 1")
        raw = self.uint32(f"the type of {what}")
        try:
            kind = TensorType(raw)
            block_size, block_bytes = BLOCKS[kind]
        except (ValueError, KeyError):
            raise self.error(f"{what} has the unknown type {raw:,}", _UPGRADE) from None
        if dimensions[0] % block_size:
            blocks = f"{kind.name} needs a multiple of {block_size}"
            raise self.error(f"{what} has {dimensions[0]:,} columns; {blocks}")
        offset = self.uint64(f"the offset of {what}")
        if offset % self.alignment:
            raise self.error(f"{what} has the offset {offset:,}, which is not a multiple of {self.alignment:,}")
        return kind, tuple(reversed(dimensions)), math.prod(dimensions) // block_size * block_bytes, offset
