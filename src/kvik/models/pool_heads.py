"""Fewer KV heads for a GGUF model: neighbouring heads' projections become their mean (Ainslie et al., 2023, GQA)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from kvik.errors import InvalidInput
from kvik.files.gguf import read_gguf
from kvik.files.output import whole_file
from kvik.hub.progress import Progress, silent
from kvik.models.gguf_spec import read_spec
from kvik.models.spec import DecoderSpec

_PROJECTIONS = re.compile(r"blk\.\d+\.attn_[kv]\.(weight|bias)")
_KEY_NORMS = re.compile(r"blk\.\d+\.attn_k_norm\.weight")
_FLOATS = ("F32", "F16", "BF16")
_PACKABLE = (*_FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types that the gguf library can write; the means of others become Q8_0."""


def pool_kv_heads(source: Path, target: Path, num_kv_heads: int, progress: Progress = silent) -> DecoderSpec:
    """Write the model of `source` with so many KV heads, each the mean of neighbours, and give its shape before.

    Without training such a model is worse than the one it came from. Raises `ModelError`, and `InvalidInput` for a
    number that does not divide the model's KV heads, for fused projections and where the file cannot be written.
    """
    file = read_gguf(source)  # which checks what the library's reader trusts
    spec = read_spec(file)
    if any(layer.num_kv_heads or layer.head_dim for layer in spec.layers):
        raise InvalidInput(
            f"{source.name} has layers whose heads differ in number or size, which are not pooled here",
            hint="take a model whose layers are alike, like the Llama family's",
        )
    if num_kv_heads >= spec.num_kv_heads or spec.num_kv_heads % num_kv_heads:
        fits = [str(count) for count in range(1, spec.num_kv_heads) if spec.num_kv_heads % count == 0]
        raise InvalidInput(
            f"--kv-heads is {num_kv_heads}, {source.name} has {spec.num_kv_heads} KV heads",
            hint=f"give {' or '.join(fits)}" if fits else "it has the fewest already",
        )
    if not any(_PROJECTIONS.fullmatch(name) for name in file.tensors):
        raise InvalidInput(
            f"{source.name} keeps queries, keys and values in one matrix, which is not cut apart here",
            hint="take a model with matrices of their own, like the Llama family's",
        )
    with whole_file(target) as partial:
        writer = GGUFWriter(partial, file.get_str("general.architecture"))
        _fill(writer, source, spec, num_kv_heads, progress)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return spec


def _fill(writer: GGUFWriter, source: Path, spec: DecoderSpec, num_kv_heads: int, progress: Progress) -> None:
    reader = GGUFReader(source)
    key = f"{spec.architecture}.attention.head_count_kv"
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", key):
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    writer.add_uint32(key, num_kv_heads)
    done_bytes, all_bytes = 0, source.stat().st_size
    for tensor in reader.tensors:
        data, stored_as = tensor.data, tensor.tensor_type
        # A norm of all keys of a token has weights for each head; one of a head alone is shared by all of them.
        of_heads = _PROJECTIONS.fullmatch(tensor.name) or (spec.qk_norm == "row" and _KEY_NORMS.fullmatch(tensor.name))
        if of_heads:
            data, stored_as = _pooled(data, stored_as, spec, num_kv_heads)
        writer.add_tensor(tensor.name, data, raw_dtype=stored_as)
        done_bytes += tensor.n_bytes
        progress(f"{source.name}: pooling heads", done_bytes, all_bytes)


def _pooled(
    data: npt.NDArray[np.uint8], kind: GGMLQuantizationType, spec: DecoderSpec, num_kv_heads: int
) -> tuple[npt.NDArray[np.generic], GGMLQuantizationType]:
    values = dequantize(data, kind)
    heads = values.reshape(num_kv_heads, spec.num_kv_heads // num_kv_heads, spec.head_dim, *values.shape[1:])
    mean = heads.mean(axis=1, dtype=np.float32).reshape(num_kv_heads * spec.head_dim, *values.shape[1:])
    if kind.name not in _PACKABLE:
        kind = GGMLQuantizationType.Q8_0 if mean.shape[-1] % 32 == 0 else GGMLQuantizationType.F16
    return quantize(mean, kind), kind
