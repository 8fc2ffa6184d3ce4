"""The same model with other numbers of KV heads."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.planner.memory import kv_memory
from kvik.planner.shape import ModelShape

GROUPED_HEADS = 8
"""KV heads of the grouped what-if: those of Llama 2 70B, Llama 3 and Mistral."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The model with one kind of attention."""

    attention: str  # MHA, GQA-8, MQA
    num_kv_heads: int
    token_bytes: int
    num_bytes: int  # of all sequences
    of_mha: float  # the part of MHA's bytes a token
    as_it_is: bool


def what_ifs(shape: ModelShape, dtype: str, context: int, users: int, prefix: int) -> tuple[WhatIf, ...]:
    """The model as it is, as MHA, GQA-8 (where its heads divide among 8) and MQA, most KV heads first.

    A latent (MLA) is compared with heads of `head_dim` for keys and values.
    """
    counts = {shape.num_heads, 1}
    if shape.num_heads % GROUPED_HEADS == 0:
        counts.add(GROUPED_HEADS)
    variants = {f"{count}": shape.with_kv_heads(count) for count in counts if count != shape.num_kv_heads}
    variants |= {"as it is": shape}
    if shape.attention == "MLA":
        variants |= {f"{count}": shape.with_kv_heads(count) for count in counts}
    mha_bytes = shape.with_kv_heads(shape.num_heads).token_bytes(dtype)
    rows = [
        WhatIf(
            attention=variant.attention,
            num_kv_heads=variant.num_kv_heads,
            token_bytes=variant.token_bytes(dtype),
            num_bytes=kv_memory(variant, dtype, context, users=users, prefix=prefix).num_bytes,
            of_mha=variant.token_bytes(dtype) / mha_bytes,
            as_it_is=variant is shape,
        )
        for variant in variants.values()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.num_kv_heads, row.as_it_is)))
