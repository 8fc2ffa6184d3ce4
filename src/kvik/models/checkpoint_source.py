"""A decoder's tensors out of a checkpoint: checked, cut, transposed and packed in pieces, so that none lies twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik.config import WeightFormat
from kvik.files.safetensors import StoredTensor
from kvik.hub.progress import Progress, silent
from kvik.models.checkpoint import FLOATS, Checkpoint, decoder_parts
from kvik.models.hf_parts import is_tied_head
from kvik.models.mxfp4 import MAX_SCALE, gguf_rows
from kvik.models.parts import Part
from kvik.models.quantize import SCALE_GROUP, TYPES, Quantization, Quantizer
from kvik.models.spec import LAYER_EMBEDDINGS, DecoderSpec
from kvik.models.weights import Kinds
from kvik.ops.base import Ops, Vector, Weight, WeightPlace

FloatArray = npt.NDArray[np.float32]
Raw = npt.NDArray[Any]  # float32, float16, or uint16 for bfloat16

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q4_1": 5.0, "MXFP4": 4.25}

# Of a number in its bits: where all of the exponent's are set, it is infinite or NaN.
_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}

ROWS_TOGETHER = 16
FEWEST_VALUES, MAX_VALUES = 1 << 16, 1 << 21  # of a chunk, which grows with the model, as what may lie beside it does

_DAMAGED = "the file is damaged, or training failed; take another checkpoint"

_TABLES = ("token_embd.weight", "output.weight")
"""In 8 bits where others get 4: what is lost here shows in the logits at once."""


class CheckpointSource:
    """A `TensorSource` that keeps weights as they are stored, or quantises matrices as they come."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        ops: Ops,
        *,
        weights: WeightFormat | None = None,
        progress: Progress = silent,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.ops = ops
        self.shapes = spec.tensors()
        self.parts = decoder_parts(checkpoint, spec)
        self.quantizer = None if weights is None else Quantizer(weights)
        num_values = {name: math.prod(shape) for name, shape in self.shapes.items() if name != LAYER_EMBEDDINGS}
        self._most_values = min(max(sum(num_values.values()) // 1024, FEWEST_VALUES), MAX_VALUES)
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(size * self._stored_bits(name) for name, size in num_values.items()) // 8
        self._check_tied_head()

    @property
    def num_bytes(self) -> int:
        """Bytes that the native backend holds when all is loaded, but for what fills up last rows."""
        vectors = (shape[0] for shape in self.shapes.values() if len(shape) == 1)
        matrix_bits = sum(math.prod(self.shapes[name]) * _BITS[self._type_of(name)] for name in self._matrices())
        return int(matrix_bits / 8) + 4 * sum(vectors)

    @property
    def quantization(self) -> Quantization | None:
        """What quantising did to what was loaded so far."""
        return None if self.quantizer is None else self.quantizer.report()

    def kinds(self) -> Kinds:
        """All matrices but a table, in the order of their files."""
        names = self._matrices()
        files = list(dict.fromkeys(str(tensor.file.path) for tensor in self.checkpoint.tensors.values()))
        places = {
            name: (files.index(str(self._tensor(name).file.path)), self._tensor(name).start, self.parts[name].item or 0)
            for name in names
        }
        in_order = sorted(names, key=places.__getitem__)
        return {name: (self._type_of(name), self.shapes[name][0], self.shapes[name][1]) for name in in_order}

    def matrix(self, name: str, place: WeightPlace | None = None) -> Weight:
        """A matrix, packed."""
        rows, columns = self.shapes[name]
        kind = self._type_of(name)
        if self.parts[name].scales is not None:
            return self.ops.load_rows(kind, self._block_rows(name), rows, columns, place)
        if self.quantizer is not None and kind not in FLOATS:
            return self.ops.load_rows(kind, self._quantized_rows(name, kind, self.quantizer), rows, columns, place)
        if self.quantizer is not None and columns % SCALE_GROUP:
            self.quantizer.kept.append(self.parts[name].stored)
        return self.ops.load_rows(kind, self._stored_rows(name), rows, columns, place)

    def table(self, name: str) -> Weight:
        """A matrix whose rows are looked up in its file, as they are stored there."""
        part, tensor = self.parts[name], self._tensor(name)
        assert part.rows is None
        assert not part.transposed
        tensor.file.expect_jumps(tensor.start, tensor.num_bytes)
        return self.ops.map_rows(tensor.dtype, tensor.data, *tensor.shape)

    def _matrices(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if len(shape) == 2 and name != LAYER_EMBEDDINGS]

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        part = self.parts[name]
        pieces = [_to_float32(piece, self._tensor(name).dtype) for piece in self._chunks(name)]
        values: FloatArray = np.concatenate(pieces)
        return values + np.float32(part.offset) if part.offset else values

    # What is read.

    def _stored_rows(self, name: str) -> Iterator[npt.NDArray[np.uint8]]:
        for chunk in self._chunks(name):
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)

    def _quantized_rows(self, name: str, kind: str, quantizer: Quantizer) -> Iterator[npt.NDArray[np.uint8]]:
        tensor = self._tensor(name)
        for chunk in self._chunks(name):
            blocks = quantizer.quantize(tensor.name, _to_float32(chunk, tensor.dtype), kind)
            if not math.isfinite(quantizer.error(tensor.name)):
                raise tensor.error(
                    f"has values too large for {quantizer.weights}, whose scales are in half precision",
                    "load it without quantising, that is without `--weights`",
                )
            yield blocks.reshape(-1)

    def _block_rows(self, name: str) -> Iterator[npt.NDArray[np.uint8]]:
        """Blocks of MXFP4 in the order of GGUF's."""
        part, num_done = self.parts[name], 0
        assert part.scales is not None
        tensor = self.checkpoint.tensors[part.scales]
        stored, rows = _view(tensor, part.item), _rows(part, 0, self.shapes[name][0])
        scales = stored[rows]
        if (largest := int(scales.max(initial=0))) > MAX_SCALE:
            raise tensor.error(f"has the scale {largest}, with which values are not finite", _DAMAGED)
        for chunk in self._chunks(name):
            yield gguf_rows(chunk, scales[num_done : num_done + len(chunk)]).reshape(-1)
            num_done += len(chunk)
        self._drop(tensor, part, stored, rows)

    def _chunks(self, name: str) -> Iterator[Raw]:
        """All rows of a tensor of the decoder, some at a time, as they are stored; each is used before the next."""
        part, shape = self.parts[name], self.shapes[name]
        tensor = self.checkpoint.tensors[part.stored]
        values = _view(tensor, part.item)
        step = self._most_values // math.prod(shape[1:]) // ROWS_TOGETHER * ROWS_TOGETHER or ROWS_TOGETHER
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            rows = _rows(part, start, stop)
            chunk = self._transposed(part, values, rows, stop - start) if part.transposed else values[rows]
            if tensor.dtype in FLOATS:
                self._check_finite(tensor, chunk)
            yield chunk
            if not part.transposed:
                self._drop(tensor, part, values, rows)
            self._done_bytes += chunk.nbytes
            self._progress(f"{self.checkpoint.folder.name}: loading", self._done_bytes, self._total_bytes)

    def _transposed(self, part: Part, values: Raw, columns: slice | npt.NDArray[np.int64], count: int) -> Raw:
        """Some columns as rows. All of the tensor's pages are touched, but never held at once."""
        tensor = self.checkpoint.tensors[part.stored]
        transposed = np.empty((count, len(values)), values.dtype)
        step = max(1, self._most_values // values.shape[1])
        for start in range(0, len(values), step):
            rows = slice(start, min(start + step, len(values)))
            transposed[:, rows] = values[rows, columns].T
            self._drop(tensor, part, values, rows)
        return transposed

    def _drop(self, tensor: StoredTensor, part: Part, values: Raw, rows: slice | npt.NDArray[np.int64]) -> None:
        """Give back the pages of rows that were read."""
        first, last = (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows.min()), int(rows.max()) + 1)
        row_bytes, start = values[:1].nbytes, tensor.start + (part.item or 0) * values.nbytes
        tensor.file.drop_pages(start + first * row_bytes, (last - first) * row_bytes)

    # What is checked.

    def _check_tied_head(self) -> None:
        """A head that is stored although it is tied must be the embedding, bit for bit."""
        embedding = self.checkpoint.tensors[self.parts["token_embd.weight"].stored]
        for tensor in self.checkpoint.tensors.values():
            if not is_tied_head(self.spec, tensor.name):
                continue
            is_same = (tensor.dtype, tensor.shape) == (embedding.dtype, embedding.shape)
            for start in range(0, tensor.num_bytes, self._most_values):
                if not is_same:
                    break
                part = slice(start, start + self._most_values)
                is_same = np.array_equal(tensor.data[part], embedding.data[part])
                for one in (tensor, embedding):
                    one.file.drop_pages(one.start + start, min(self._most_values, one.num_bytes - start))
            if not is_same:
                raise tensor.error(
                    f"differs from {embedding.name!r:.120}, although config.json says that they are tied",
                    "set tie_word_embeddings to false in config.json if the head is one of its own",
                )

    def _check_finite(self, tensor: StoredTensor, chunk: Raw) -> None:
        mask = _EXPONENTS[tensor.dtype]
        bits = chunk.view(np.uint32 if chunk.itemsize == 4 else np.uint16)
        if bits.size and int((bits & np.asarray(mask, bits.dtype)).max()) == mask:
            what = "NaN" if np.isnan(_to_float32(chunk, tensor.dtype)).any() else "infinity"
            raise tensor.error(f"holds {what}", _DAMAGED)

    # Small things.

    def _tensor(self, name: str) -> StoredTensor:
        """The stored tensor that a tensor of the decoder is, or is part of."""
        return self.checkpoint.tensors[self.parts[name].stored]

    def _stored_bits(self, name: str) -> int:
        """Of each value, in the file."""
        return 4 if self.parts[name].scales is not None else 8 * _DTYPES[self._tensor(name).dtype].itemsize

    def _type_of(self, name: str) -> str:
        """The GGUF type that a matrix becomes.

        A table of positions is added, not multiplied, and a router's rounding would choose other experts: both stay,
        and so do the gate of shared experts, one row, and what is in blocks already.
        """
        stored = self.checkpoint.type_of(self.parts[name])
        stays = name == "position_embd.weight" or ".ffn_gate_inp" in name or stored not in FLOATS
        if self.quantizer is None or self.shapes[name][1] % SCALE_GROUP or stays:
            return stored
        return TYPES["q8" if name in _TABLES else self.quantizer.weights]


def _view(tensor: StoredTensor, item: int | None) -> Raw:
    """The values of the tensor, or of one item of its first axis; of bfloat16 the bits."""
    values = tensor.data.view(_DTYPES[tensor.dtype]).reshape(tensor.shape or (1,))  # a number is a vector of one
    return values if item is None else values[item]


def _rows(part: Part, start: int, stop: int) -> slice | npt.NDArray[np.int64]:
    """Rows `start` ... `stop` - 1 of the part, as rows of the stored tensor, or as its columns if it is transposed."""
    if part.rows is None:
        return slice(start, stop)
    if isinstance(part.rows, slice):
        first, step = part.rows.start or 0, part.rows.step or 1
        return slice(first + start * step, first + (stop - 1) * step + 1, step)
    return part.rows[start:stop]


def _to_float32(values: Raw, dtype: str) -> FloatArray:
    if dtype == "BF16":
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return values.astype(np.float32)
