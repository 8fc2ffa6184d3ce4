"""Where a GGUF file keeps a decoder's tensors: names, shapes and types are checked before any is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile, GGUFTensor, dequantize
from kvik.hub.progress import Progress, silent
from kvik.models.parts import Part, Parts, TensorName
from kvik.models.spec import LAYER_EMBEDDINGS, XIELU_FIELDS, DecoderSpec
from kvik.models.weights import Kinds
from kvik.ops.base import Ops, Vector, Weight, WeightPlace

PLAIN_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Types that the packed weights hold exactly; a tensor of any other type is refused."""

_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
_ROPE_TENSORS = (_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT)

_FUSED_QKV = ("gpt2", "starcoder", "gptneox", "falcon", "phi3")
_FUSED_MLP = ("phi3", "glm4")
_FALCON_NORMS = {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
"""With a norm each for attention and MLP, Falcon's files name the MLP's as others name attention's."""
_NORM_BETWEEN = {"ffn_norm": "post_attention_norm"}
_OTHER_NAMES: Mapping[str, Mapping[str, str]] = {"seed_oss": _NORM_BETWEEN, "gpt-oss": _NORM_BETWEEN}
"""What an architecture's files call otherwise than the others."""


def gguf_parts(file: GGUFFile, spec: DecoderSpec) -> Parts:
    """Where each of the decoder's tensors lies; whether they all are there is not looked at.

    Queries, keys and values may be fused in any architecture, or apart; where neither is there, the usual one is named.
    """
    shapes = spec.tensors()
    parts: dict[str, Part] = {}
    renamed = _OTHER_NAMES.get(spec.architecture, {})
    if spec.architecture == "falcon" and spec.parallel == "two_norms":
        renamed = _FALCON_NORMS
    for canonical, shape in shapes.items():
        parsed = TensorName.parse(canonical)
        name, kind = parsed.name, parsed.kind
        if kind in XIELU_FIELDS:
            continue  # see `listed_numbers`
        starts, num_rows = _qkv_rows(spec, parsed.layer)
        prefix = "" if parsed.layer is None else f"blk.{parsed.layer}."
        fused = f"{prefix}attn_qkv.{kind}"
        is_apart = canonical in file.tensors or spec.architecture not in _FUSED_QKV
        if name in starts and (fused in file.tensors or not is_apart):
            rows = slice(starts[name], starts[name] + shape[0])
            parts[canonical] = Part(fused, (num_rows, *shape[1:]), rows)
        elif parsed.expert is not None:
            parts[canonical] = _part_of_expert(file, spec, prefix, parsed, shape)
        elif name in ("ffn_gate", "ffn_up") and spec.architecture in _FUSED_MLP:
            rows = slice(0, shape[0]) if name == "ffn_gate" else slice(shape[0], None)
            parts[canonical] = Part(f"{prefix}ffn_up.{kind}", (2 * shape[0], *shape[1:]), rows)
        else:
            stored = renamed.get(name, name)
            alone = file.tensors.get(f"{prefix}{stored}.{kind}")
            is_vector = alone is not None and len(alone.shape) == 1  # as a matrix of one row may be stored
            parts[canonical] = Part(f"{prefix}{stored}.{kind}", shape[-1:] if shape[0] == 1 and is_vector else shape)
    return parts


def _qkv_rows(spec: DecoderSpec, layer: int | None) -> tuple[Mapping[str, int], int]:
    """Where queries, keys and values begin in a layer's fused projection, and how many rows that has."""
    if layer is None:
        return {}, 0
    of_layer = spec.layers[layer]
    head_dim = spec.head_dim_of(of_layer)
    queries, keys = spec.num_heads * head_dim, spec.num_kv_heads_of(of_layer) * head_dim
    return {"attn_q": 0, "attn_k": queries, "attn_v": queries + keys}, queries + 2 * keys


def listed_numbers(file: GGUFFile, spec: DecoderSpec) -> Mapping[str, float]:
    """Vectors of one item that files have among their keys, one number a layer or the same for all: those of xIELU."""
    found: dict[str, float] = {}
    for name in XIELU_FIELDS if spec.xielu else ():
        key = f"xielu.{name}"
        is_list = isinstance(file.metadata.get(key), list)
        numbers = (
            file.get_list(key, float, length=spec.num_layers) if is_list else [file.get_float(key)] * spec.num_layers
        )
        found |= {f"blk.{layer}.ffn_act.{name}": number for layer, number in enumerate(numbers)}
    return found


def _part_of_expert(file: GGUFFile, spec: DecoderSpec, prefix: str, name: TensorName, shape: tuple[int, ...]) -> Part:
    """All experts of a layer lie in one tensor, gates and ups in one or in two; in files of early 2024 each alone."""
    assert spec.experts is not None
    expert, count = name.expert, spec.experts.num_experts
    alone = f"{prefix}{name.name.removesuffix('_exps')}.{expert}.{name.kind}"
    both = f"{prefix}ffn_gate_up_exps.{name.kind}"
    if alone in file.tensors:
        return Part(alone, shape)
    if name.name != "ffn_down_exps" and both in file.tensors:
        rows = slice(0, shape[0]) if name.name == "ffn_gate_exps" else slice(shape[0], None)
        return Part(both, (count, 2 * shape[0], *shape[1:]), rows, item=expert)
    return Part(f"{prefix}{name.name}.{name.kind}", (count, *shape), item=expert)


def read_divisors(file: GGUFFile, num_pairs: int, *, beyond_original: bool) -> npt.NDArray[np.float64] | None:
    """What divides each pair's frequency beside a scaling of all of them: Llama 3's, or LongRoPE's for that context."""
    found = [name for name in _ROPE_TENSORS if name in file.tensors]
    if not found:
        return None
    if found not in ([_ROPE_FREQS], [_ROPE_LONG, _ROPE_SHORT]):
        raise ModelError(
            f"{file.path}: has {' and '.join(found)}, which do not belong together",
            hint=f"a whole file has {_ROPE_FREQS}, or both {_ROPE_LONG} and {_ROPE_SHORT}, or none of them",
        )
    tensors = {name: _checked(file, Part(name, (num_pairs,))) for name in found}
    for name, tensor in tensors.items():
        if not (np.isfinite(values := dequantize(tensor)).all() and (values > 0).all()):
            raise ModelError(
                f"{file.path}: tensor {name!r} holds values that are not positive numbers",
                hint="the file is damaged; download it again",
            )
    chosen = tensors[found[0] if beyond_original else found[-1]]
    return dequantize(chosen).astype(np.float64)


MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 18, 1 << 23
"""Of the file, mapped at a time while it is packed: a hundredth of it within these bounds."""

AHEAD_BYTES = 1 << 26
"""Of the file, that the system is asked for before they are packed."""

ROWS_TOGETHER = 16


class GGUFSource:
    """The tensors of a GGUF file, by the names of `DecoderSpec.tensors()`."""

    def __init__(self, file: GGUFFile, spec: DecoderSpec, ops: Ops, progress: Progress = silent) -> None:
        self.file = file
        self.ops = ops
        self.tensors = find_tensors(file, spec)
        self._numbers = listed_numbers(file, spec)
        self._progress = progress
        self._total_bytes = sum(tensor.num_bytes for tensor in self._matrices().values())
        self._piece_bytes = min(max(self._total_bytes // 128, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        self._done_bytes = 0
        self._asked = 0, 0  # from where to where in the file

    @property
    def num_bytes(self) -> int:
        """Bytes that the native backend holds when all is loaded, but for what fills up last rows."""
        vectors = sum(4 * tensor.shape[0] for tensor in self.tensors.values() if len(tensor.shape) == 1)
        return self._total_bytes + vectors

    @property
    def quantization(self) -> None:
        """A file's weights stay as they are."""
        return None

    def kinds(self) -> Kinds:
        """All matrices but a table, in the order of the file."""
        matrices = sorted(self._matrices().items(), key=lambda item: item[1].offset)
        return {name: (tensor.type.name, tensor.shape[0], tensor.shape[1]) for name, tensor in matrices}

    def _matrices(self) -> dict[str, GGUFTensor]:
        return {
            name: tensor for name, tensor in self.tensors.items() if len(tensor.shape) == 2 and name != LAYER_EMBEDDINGS
        }

    def matrix(self, name: str, place: WeightPlace | None = None) -> Weight:
        """A matrix, packed."""
        tensor = self.tensors[name]
        rows, columns = tensor.shape
        return self.ops.load_rows(tensor.type.name, self._pieces(tensor), rows, columns, place)

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        if name in self._numbers:
            return np.array([self._numbers[name]], np.float32)
        values = np.array(dequantize(self.tensors[name]))  # a view would keep the file mapped
        self.file.drop_pages(self.tensors[name])
        return values

    def table(self, name: str) -> Weight:
        """A matrix whose rows are looked up in the file."""
        tensor = self.tensors[name]
        self.file.expect_jumps(tensor)
        return self.ops.map_rows(tensor.type.name, tensor.data, *tensor.shape)

    def _pieces(self, tensor: GGUFTensor) -> Iterator[npt.NDArray[np.uint8]]:
        """All of a matrix's rows, some at a time; the pages of each piece are given back when it was used."""
        num_rows = tensor.shape[0]
        row_bytes = tensor.num_bytes // num_rows
        step = self._piece_bytes // row_bytes // ROWS_TOGETHER * ROWS_TOGETHER or ROWS_TOGETHER
        for start in range(0, num_rows, step):
            piece = rows_of(tensor, start, min(start + step, num_rows))
            self._ask_for(piece.offset, piece.offset + piece.num_bytes + AHEAD_BYTES)
            yield piece.data
            self.file.drop_pages(piece)
            self._done_bytes += piece.num_bytes
            self._progress(f"{self.file.path.name}: loading", self._done_bytes, self._total_bytes)

    def _ask_for(self, start: int, end: int) -> None:
        """Have the system read this part of the file, but for a table that stays in it, while others are packed."""
        from_, asked = self._asked if self._asked[0] <= start <= self._asked[1] else (start, start)
        if self.file.mapped is None or end <= asked + AHEAD_BYTES // 4:
            return
        table = self.tensors.get(LAYER_EMBEDDINGS)
        first, last = (end, end) if table is None else (table.offset, table.offset + table.num_bytes)
        for begin, stop in ((asked, min(end, first)), (max(asked, last), end)):
            self.file.mapped.ask_for(begin, stop - begin)
        self._asked = from_, end


def find_tensors(file: GGUFFile, spec: DecoderSpec) -> Mapping[str, GGUFTensor]:
    """The decoder's tensors by their names in `DecoderSpec.tensors()`, rows of stored ones where those are fused.

    Raises `ModelError` where one is missing, is of another shape or of a type that kvik does not run, or is left over:
    the decoder is not the one that the file was made for.
    """
    parts = gguf_parts(file, spec)
    used = {part.stored for part in parts.values()} | _unused(spec)
    for name in file.tensors:
        if name not in used and name not in _ROPE_TENSORS:
            raise ModelError(
                f"{file.path}: tensor {name!r:.80} has no place in a {spec.architecture} decoder"
                f" of {spec.num_layers} layers",
                hint="the model has a part that kvik does not run yet; take another model",
            )
    shapes = spec.tensors()
    found = {name: _rows(_item(_checked(file, part), part.item), part.rows) for name, part in parts.items()}
    return {name: dataclasses.replace(tensor, shape=shapes[name]) for name, tensor in found.items()}


def _unused(spec: DecoderSpec) -> set[str]:
    """Keys and values of layers that read those of others; files may have them all the same."""
    shared = [index for index, layer in enumerate(spec.layers) if layer.kv_from is not None]
    return {f"blk.{index}.attn_{name}.weight" for index in shared for name in ("k", "v", "k_norm")}


def _checked(file: GGUFFile, part: Part) -> GGUFTensor:
    tensor = file.tensor(part.stored)
    if tensor.shape != part.shape:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} has shape {tensor.shape}, the metadata asks for {part.shape}",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )
    allowed = PLAIN_TYPES + QUANTIZED_TYPES if part.is_matrix else PLAIN_TYPES
    if tensor.type.name not in allowed:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} is of type {tensor.type.name}, which kvik does not run",
            hint=f"take a file of one of these types: {', '.join(allowed)}",
        )
    return tensor


def _item(tensor: GGUFTensor, item: int | None) -> GGUFTensor:
    """One item of the first axis as a tensor of its own."""
    if item is None:
        return tensor
    found = rows_of(tensor, item, item + 1)
    return dataclasses.replace(found, shape=found.shape[1:])


def _rows(tensor: GGUFTensor, rows: slice | npt.NDArray[np.int64] | None) -> GGUFTensor:
    if rows is None:
        return tensor
    assert isinstance(rows, slice)
    start, stop, _ = rows.indices(tensor.shape[0])
    return rows_of(tensor, start, stop)


def rows_of(tensor: GGUFTensor, start: int, stop: int) -> GGUFTensor:
    """Some rows as a tensor of their own: rows are whole blocks, one after the other, in every type."""
    row_bytes = tensor.num_bytes // tensor.shape[0]
    return dataclasses.replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        num_bytes=(stop - start) * row_bytes,
        offset=tensor.offset + start * row_bytes,
        data=tensor.data[start * row_bytes : stop * row_bytes],
    )
