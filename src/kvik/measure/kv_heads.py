"""`kvik bench --kv-heads`: the model's shape with other numbers of KV heads, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvik.models.random_weights import random_decoder
from kvik.planner.weights import FORMATS, packed_matrix_bytes

if TYPE_CHECKING:
    from kvik.engine.llm import LLM
    from kvik.ops.base import Weight

_DRAWN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "f32")  # types that random weights come in


def variants(llm: LLM, counts: Sequence[int]) -> dict[int | None, LLM]:
    """By its number of KV heads: the model's shape, with random weights that take as many bits as its own.

    Raises `InvalidInput` for a number that does not divide the query heads.
    """
    weights = llm.model.decoder.weights
    layer = weights.layers[0]
    types = {"token_embd.weight": _type_of(weights.embedding), "output.weight": _type_of(weights.lm_head.matrix)}
    default = _type_of(layer.linears[-1].matrix)
    decoder = llm.model.decoder
    return {count: llm.with_decoder(random_decoder(decoder, count, types, default)) for count in counts}


def _type_of(matrix: Weight) -> str:
    """A type whose packed weights take as many bytes as the matrix does, or the nearest."""
    sizes = {name: packed_matrix_bytes(matrix.rows, matrix.columns, FORMATS[name]) for name in _DRAWN}
    return min(sizes, key=lambda name: abs(sizes[name] - matrix.num_bytes)).upper()
