"""A model's shape from a checkpoint's config.json and the headers of its safetensors."""

from __future__ import annotations

from pathlib import Path

from kvik.hub.folder import model_bytes
from kvik.models.checkpoint import decoder_parts, read_checkpoint
from kvik.models.hf_spec import read_hf_spec
from kvik.planner.held import held_shape
from kvik.planner.shape import ModelShape


def read_folder(folder: Path, name: str) -> ModelShape:
    """The shape of a checkpoint that kvik runs; weights are not read. Raises `ModelError`."""
    checkpoint = read_checkpoint(folder)
    spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
    parts = decoder_parts(checkpoint, spec)
    types = {tensor: checkpoint.tensors[part.stored].dtype for tensor, part in parts.items()}
    return held_shape(spec, types, name=name, origin="checkpoint", path=folder, file_bytes=model_bytes(folder))
