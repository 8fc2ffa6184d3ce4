"""A model's shape from a GGUF file's header."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from kvik.errors import ModelError
from kvik.experts import ExpertsRead
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.models.gguf_layers import active_part, num_experts, num_values, read_gguf_layers
from kvik.models.gguf_source import find_tensors
from kvik.models.gguf_spec import read_spec
from kvik.planner.held import held_shape
from kvik.planner.shape import ModelShape, WeightTensors, shape_of_layers


def read_header(path: Path, name: str) -> ModelShape:
    """The shape that a GGUF file's header describes; weights are not read. Raises `ModelError`."""
    file = read_gguf(path)
    try:
        spec = read_spec(file)
        types = {tensor: found.type.name for tensor, found in find_tensors(file, spec).items()}
    except ModelError:  # kvik would not run it, but its keys and tensors may tell its shape
        return _shape_of_keys(file, name)
    return held_shape(spec, types, name=name, origin="gguf", path=path, file_bytes=file.file_bytes)


def _shape_of_keys(file: GGUFFile, name: str) -> ModelShape:
    kept = read_gguf_layers(file)
    total, active, table = num_values(file)
    by_format: Counter[str] = Counter()
    for tensor in file.tensors.values():
        by_format[tensor.type.name.lower()] += tensor.num_bytes
    held, part = sum(by_format.values()), active_part(file)
    rest = sum(one.num_bytes for one in file.tensors.values() if "_exps." not in one.name)
    looked_up = file.tensors["token_embd.weight"].num_bytes if table else 0
    main = by_format.most_common(1)[0][0]
    number, chosen = num_experts(file)
    experts = ExpertsRead(number, chosen, (held - rest) // number) if part < 1.0 else None
    return replace(
        shape_of_layers(kept, name, "gguf", file.path, total),
        is_mixture=part < 1.0,
        num_active_params=active if part < 1.0 else None,
        num_experts=number,
        num_chosen_experts=chosen,
        num_table_params=table,
        tensors=WeightTensors(
            format=main,
            held_bytes=held,
            step_bytes=int(rest + (held - rest) * part) - looked_up,
            file_bytes=file.file_bytes,
            quantized=main not in ("f32", "f16", "bf16"),
            experts=experts,
        ),
    )
