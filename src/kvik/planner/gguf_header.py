"""A model's shape from a GGUF file's header: what kvik will hold of it, to the byte."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kvik.models.gguf import GGUFTensor, read_gguf
from kvik.models.gguf_source import find_tensors
from kvik.models.gguf_spec import read_spec
from kvik.models.spec import DecoderSpec
from kvik.planner.shape import LayerGroup, ModelShape, WeightTensors
from kvik.planner.weights import FORMATS, packed_matrix_bytes


def read_header(path: Path, name: str) -> ModelShape:
    """The shape that a GGUF file's header describes; weights are not read. Raises `ModelError`."""
    file = read_gguf(path)
    spec = read_spec(file)
    tensors = find_tensors(file, spec)
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    by_format: Counter[str] = Counter()
    for tensor in matrices:
        by_format[tensor.type.name.lower()] += tensor.num_bytes
    looked_up = [] if spec.tied_head else [tensors["token_embd.weight"]]
    if spec.num_learned_positions:
        looked_up.append(tensors["position_embd.weight"])
    held = _held_bytes(tensors.values())
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
        groups=_groups(spec),
        max_context=spec.context_length,
        vocab_size=spec.vocab_size,
        num_params=sum(math.prod(tensor.shape) for tensor in matrices),
        num_table_params=sum(math.prod(tensor.shape) for tensor in looked_up),
        intermediate_size=spec.intermediate_size,
        tensors=WeightTensors(
            format=main,
            held_bytes=held,
            step_bytes=held - _held_bytes(looked_up),
            file_bytes=path.stat().st_size,
            quantized=FORMATS[main].quantized,
        ),
        rope_token_bytes=spec.position_bytes,
        runs=True,
    )


def _groups(spec: DecoderSpec) -> tuple[LayerGroup, ...]:
    """The decoder's layers by what they remember, those that see all tokens first."""
    windows = Counter(layer.window for layer in spec.layers)
    return tuple(
        LayerGroup("full" if window is None else "sliding", number, spec.num_kv_heads, spec.head_dim, window)
        for window, number in sorted(windows.items(), key=lambda item: item[0] or 0)
    )


def _held_bytes(tensors: Iterable[GGUFTensor]) -> int:
    """Matrices packed, vectors in float32."""
    return sum(
        packed_matrix_bytes(*tensor.shape, FORMATS[tensor.type.name.lower()])
        if len(tensor.shape) == 2
        else 4 * math.prod(tensor.shape)
        for tensor in tensors
    )
