"""A model's shape from a GGUF file's header."""

from __future__ import annotations

from pathlib import Path

from kvik.files.gguf import read_gguf
from kvik.models.gguf_source import find_tensors
from kvik.models.gguf_spec import read_spec
from kvik.planner.held import held_shape
from kvik.planner.shape import ModelShape


def read_header(path: Path, name: str) -> ModelShape:
    """The shape that a GGUF file's header describes; weights are not read. Raises `ModelError`."""
    file = read_gguf(path)
    spec = read_spec(file)
    types = {tensor: found.type.name for tensor, found in find_tensors(file, spec).items()}
    return held_shape(spec, types, name=name, origin="gguf", path=path, file_bytes=path.stat().st_size)
