"""What keys and values depend on beside the weights' files: stored ones are used where all of this is the same."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.config import EngineConfig
from kvik.files.split import Part

if TYPE_CHECKING:
    from kvik.models.loader import LoadedModel

NUMERICS_VERSION = 1
"""Raised with every change of kernels or of the decoder that changes a bit of a key or value, or where it lies.

tests/engine/test_store.py fails where that was forgotten.
"""


def numerics_of(model: LoadedModel, config: EngineConfig) -> str:
    """The arithmetic that a model is run with, as one line."""
    decoder = model.decoder
    # Its shape as read, since what is read from a file may change with kvik, and some RoPE with the context.
    shape = sha256(repr(decoder.spec).encode()).hexdigest()[:16]
    weights = config.weights or "as stored"
    return f"{decoder.ops.name} {NUMERICS_VERSION}, activations {config.activations}, weights {weights}, shape {shape}"


def weight_files(path: Path) -> list[Path]:
    """The files that decide a model's weights and shape, in an order of their own."""
    if not path.is_dir():
        part = Part.of(path.name)
        parts = [path] if part is None else part.paths(path)
        return parts if all(one.is_file() for one in parts) else [path]
    return [*sorted(path.glob("*.safetensors")), path / "config.json"]
