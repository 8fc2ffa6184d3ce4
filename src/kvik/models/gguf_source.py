"""Where a GGUF file keeps a decoder's tensors: names, shapes and types are checked before any is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile, GGUFTensor, dequantize
from kvik.models.parts import Part, Parts
from kvik.models.spec import DecoderSpec
from kvik.ops.base import Ops, Vector, Weight

PLAIN_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Types that the packed weights hold exactly; a tensor of any other type is refused."""

_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
_ROPE_TENSORS = (_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT)

_FUSED_QKV = ("gpt2", "starcoder", "gptneox", "falcon", "phi3")
_FUSED_MLP = ("phi3",)
_FALCON_NORMS = {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}
"""With a norm each for attention and MLP, Falcon's files name the MLP's as others name attention's."""


def gguf_parts(file: GGUFFile, spec: DecoderSpec) -> Parts:
    """Where each of the decoder's tensors lies; whether they all are there is not looked at.

    Queries, keys and values may be fused in any architecture, or apart; where neither is there, the usual one is named.
    """
    shapes = spec.tensors()
    parts: dict[str, Part] = {}
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    starts = {"attn_q": 0, "attn_k": queries, "attn_v": queries + keys}
    two_norms = spec.architecture == "falcon" and spec.parallel == "two_norms"
    for canonical, shape in shapes.items():
        *layer, name, kind = canonical.split(".")
        prefix = "".join(f"{part}." for part in layer)
        fused = f"{prefix}attn_qkv.{kind}"
        alone = canonical in file.tensors or spec.architecture not in _FUSED_QKV
        if name in starts and (fused in file.tensors or not alone):
            rows = slice(starts[name], starts[name] + shape[0])
            parts[canonical] = Part(fused, (queries + 2 * keys, *shape[1:]), rows)
        elif name in ("ffn_gate", "ffn_up") and spec.architecture in _FUSED_MLP:
            rows = slice(0, shape[0]) if name == "ffn_gate" else slice(shape[0], None)
            parts[canonical] = Part(f"{prefix}ffn_up.{kind}", (2 * shape[0], *shape[1:]), rows)
        else:
            stored = _FALCON_NORMS.get(name, name) if two_norms else name
            parts[canonical] = Part(f"{prefix}{stored}.{kind}", shape)
    return parts


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


class GGUFSource:
    """The tensors of a GGUF file, by the names of `DecoderSpec.tensors()`."""

    def __init__(self, file: GGUFFile, spec: DecoderSpec, ops: Ops) -> None:
        self.file = file
        self.ops = ops
        self.tensors = find_tensors(file, spec)

    def matrix(self, name: str) -> Weight:
        """A matrix, packed; the file's own pages are dropped."""
        tensor = self.tensors[name]
        rows, columns = tensor.shape
        weight = self.ops.load_weight(tensor.type.name, tensor.data, rows, columns)
        self.file.drop_pages(tensor)  # packed, it lies in memory twice
        return weight

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        return np.array(dequantize(self.tensors[name]))  # a view would keep the file mapped, pages for each vector


def find_tensors(file: GGUFFile, spec: DecoderSpec) -> Mapping[str, GGUFTensor]:
    """The decoder's tensors by their names in `DecoderSpec.tensors()`, rows of stored ones where those are fused.

    Raises `ModelError` where one is missing, is of another shape or of a type that kvik does not run, or is left over:
    the decoder is not the one that the file was made for.
    """
    parts = gguf_parts(file, spec)
    used = {part.stored for part in parts.values()}
    for name in file.tensors:
        if name not in used and name not in _ROPE_TENSORS:
            raise ModelError(
                f"{file.path}: tensor {name!r:.80} has no place in a {spec.architecture} decoder"
                f" of {spec.num_layers} layers",
                hint="the model has a part that kvik does not run yet; take another model",
            )
    return {canonical: _rows(_checked(file, part), part.rows) for canonical, part in parts.items()}


def _checked(file: GGUFFile, part: Part) -> GGUFTensor:
    tensor = file.tensor(part.stored)
    if tensor.shape != part.shape:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} has shape {tensor.shape}, the metadata asks for {part.shape}",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )
    allowed = PLAIN_TYPES + QUANTIZED_TYPES if len(part.shape) == 2 else PLAIN_TYPES
    if tensor.type.name not in allowed:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} is of type {tensor.type.name}, which kvik does not run",
            hint=f"take a file of one of these types: {', '.join(allowed)}",
        )
    return tensor


def _rows(tensor: GGUFTensor, rows: slice | npt.NDArray[np.int64] | None) -> GGUFTensor:
    """Some rows as a tensor of their own: rows are whole blocks, one after the other, in every type."""
    if rows is None:
        return tensor
    assert isinstance(rows, slice)
    start, stop, _ = rows.indices(tensor.shape[0])
    row_bytes = tensor.num_bytes // tensor.shape[0]
    return dataclasses.replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        num_bytes=(stop - start) * row_bytes,
        offset=tensor.offset + start * row_bytes,
        data=tensor.data[start * row_bytes : stop * row_bytes],
    )
