"""A model's shape from a checkpoint's config.json and the headers of its safetensors."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvik.errors import ModelError
from kvik.experts import ExpertsRead
from kvik.hub.folder import CONFIG, model_bytes
from kvik.models.checkpoint import decoder_parts, read_checkpoint, read_tensors
from kvik.models.hf_spec import read_hf_spec
from kvik.planner.config_json import read_config
from kvik.planner.held import held_shape
from kvik.planner.shape import ModelShape, WeightTensors


def read_folder(folder: Path, name: str) -> ModelShape:
    """The shape of a checkpoint; weights are not read, only their headers. Raises `ModelError`."""
    try:
        checkpoint = read_checkpoint(folder)
        spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
        parts = decoder_parts(checkpoint, spec)
    except ModelError:  # kvik would not run it, but its config may tell its shape
        shape = read_config(folder / CONFIG, name)
        with suppress(ModelError):  # a folder without weights
            return _with_stored_weights(shape, folder)
        return shape
    types = {tensor: checkpoint.type_of(part) for tensor, part in parts.items()}
    return held_shape(spec, types, name=name, origin="checkpoint", path=folder, file_bytes=model_bytes(folder))


def _with_stored_weights(shape: ModelShape, folder: Path) -> ModelShape:
    """The shape with the weights that its files hold, whatever they are."""
    tensors = read_tensors(folder).values()
    by_type: Counter[str] = Counter()
    for tensor in tensors:
        by_type[tensor.dtype.lower()] += tensor.num_bytes
    total, main = sum(by_type.values()), by_type.most_common(1)[0][0]
    plain = main in ("f32", "f16", "bf16")
    params = sum(math.prod(one.shape) for one in tensors if len(one.shape) > 1) if plain else shape.num_params
    step: int | None = total
    if shape.is_mixture:
        step = int(total * shape.num_active_params / params) if shape.num_active_params and params else None
    experts = None
    if step is not None and step < total and shape.num_experts > shape.num_chosen_experts:
        left_out = shape.num_experts - shape.num_chosen_experts
        experts = ExpertsRead(shape.num_experts, shape.num_chosen_experts, (total - step) // left_out)
    stored = WeightTensors(main, total, step, model_bytes(folder), not plain, experts)
    return replace(shape, num_params=params, tensors=stored)
