"""A model's shape from a GGUF file's header: what kvik will hold of it, to the byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kvik.errors import ModelError
from kvik.models.gguf import GGUFFile, GGUFTensor, read_gguf
from kvik.models.gguf_model import read_spec
from kvik.models.spec import DecoderSpec
from kvik.planner.shape import LayerGroup, ModelShape, WeightTensors
from kvik.planner.weights import FORMATS, packed_matrix_bytes


def read_header(path: Path, name: str) -> ModelShape:
    """The shape that a GGUF file's header describes; tensor data is not read. Raises `ModelError`."""
    file = read_gguf(path)
    spec = read_spec(file)
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) == 2]
    by_format: Counter[str] = Counter()
    for tensor in matrices:
        by_format[tensor.type.name.lower()] += tensor.num_bytes
    if not matrices:
        raise ModelError(f"{path}: has no matrices", hint="take another GGUF of this model")
    held = sum(_held_bytes(file, tensor) for tensor in file.tensors.values())
    table = None if spec.tied_head else file.tensors["token_embd.weight"]
    main = by_format.most_common(1)[0][0]
    return ModelShape(
        name=name,
        origin="gguf",
        source=str(path),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        groups=layer_groups(spec),
        max_context=spec.context_length,
        vocab_size=spec.vocab_size,
        num_params=sum(_num_items(tensor) for tensor in matrices),
        num_table_params=_num_items(table) if table else 0,
        intermediate_size=spec.intermediate_size,
        tensors=WeightTensors(
            format=main,
            held_bytes=held,
            step_bytes=held - (_held_bytes(file, table) if table else 0),
            file_bytes=path.stat().st_size,
            quantized=FORMATS[main].quantized,
        ),
        rope_token_bytes=spec.position_bytes,
        runs=True,
    )


def layer_groups(spec: DecoderSpec) -> tuple[LayerGroup, ...]:
    """The decoder's layers by what they remember, those that see all tokens first."""
    counts = Counter(layer.window for layer in spec.layers)
    return tuple(
        LayerGroup("sliding" if window else "full", count, spec.num_kv_heads, spec.head_dim, window)
        for window, count in sorted(counts.items(), key=lambda item: item[0] or 0)
    )


def _held_bytes(file: GGUFFile, tensor: GGUFTensor) -> int:
    """A matrix packed, a norm in float32; the rotary divisors become part of the table."""
    if tensor.name == "rope_freqs.weight":
        return 0
    if len(tensor.shape) != 2:
        return 4 * _num_items(tensor)
    form = FORMATS.get(tensor.type.name.lower())
    if form is None:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r:.80} is of type {tensor.type.name}, which kvik does not run",
            hint=f"take a file of one of these types: {', '.join(FORMATS)}",
        )
    return packed_matrix_bytes(*tensor.shape, form)


def _num_items(tensor: GGUFTensor) -> int:
    number = 1
    for dimension in tensor.shape:
        number *= dimension
    return number
