"""A model's shape from its decoder and the types of its tensors: what kvik will hold of it, to the byte."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kvik.experts import ExpertsRead
from kvik.models.parts import TensorName
from kvik.models.spec import LAYER_EMBEDDINGS, DecoderSpec
from kvik.planner.shape import ModelShape, WeightTensors
from kvik.planner.weights import FORMATS, packed_matrix_bytes


def held_shape(
    spec: DecoderSpec,
    types: Mapping[str, str],
    *,
    name: str,
    origin: Literal["gguf", "checkpoint"],
    path: Path,
    file_bytes: int,
) -> ModelShape:
    """The shape of a model whose tensors have these types, by the names of `DecoderSpec.tensors()`."""
    shapes = spec.tensors()
    num_values = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
    in_file = [LAYER_EMBEDDINGS] if spec.layer_embedding_size else []
    matrices = [tensor for tensor, shape in shapes.items() if len(shape) == 2 and tensor not in in_file]
    by_format: Counter[str] = Counter()
    for tensor in matrices:
        by_format[types[tensor].lower()] += int(num_values[tensor] * FORMATS[types[tensor].lower()].file_bits / 8)
    looked_up = [] if spec.tied_head else ["token_embd.weight"]
    if spec.num_learned_positions:
        looked_up.append("position_embd.weight")

    def held_bytes(tensor: str) -> int:
        """A matrix packed, a vector in float32."""
        if tensor not in matrices:
            return 4 * num_values[tensor]
        rows, columns = shapes[tensor]
        return packed_matrix_bytes(rows, columns, FORMATS[types[tensor].lower()])

    all_bytes = sum(map(held_bytes, shapes.keys() - in_file))
    read_bytes = all_bytes - sum(map(held_bytes, looked_up))
    num_params = num_active_params = sum(num_values[tensor] for tensor in (*matrices, *in_file))
    read = None
    if experts := spec.experts:
        number, chosen = experts.num_experts, experts.routing.num_chosen
        of_one = [tensor for tensor in shapes if TensorName.parse(tensor).expert == 0]
        read = ExpertsRead(number, chosen, sum(map(held_bytes, of_one)))
        read_bytes -= (number - chosen) * read.expert_bytes
        num_active_params -= (number - chosen) * sum(num_values[tensor] for tensor in matrices if tensor in of_one)
    cache = spec.kv_spec("f16")
    main = by_format.most_common(1)[0][0]
    return ModelShape(
        name=name,
        origin=origin,
        source=str(path),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=max(map(spec.head_dim_of, spec.layers)),
        groups=cache.groups,
        max_context=spec.context_length,
        vocab_size=spec.vocab_size,
        num_params=num_params,
        is_mixture=experts is not None,
        num_active_params=None if experts is None else num_active_params,
        num_experts=read.num_experts if read else 0,
        num_chosen_experts=read.num_chosen if read else 0,
        num_table_params=sum(num_values[tensor] for tensor in (*looked_up, *in_file)),
        intermediate_size=spec.token_intermediate_size,
        layer_embeddings_width=spec.num_layers * spec.layer_embedding_size,
        tensors=WeightTensors(
            format=main,
            held_bytes=all_bytes,
            step_bytes=read_bytes,
            experts=read,
            file_bytes=file_bytes,
            quantized=FORMATS[main].quantized,
        ),
        rope_token_bytes=spec.position_bytes,
        runs=True,
        shared_layers=cache.shared,
    )
