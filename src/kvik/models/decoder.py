"""The decoder, written once; `ops` decides where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.models.spec import DecoderSpec
from kvik.ops.base import Array, Batch, LayerKV, Ops, RopeTable, Weight

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer."""

    attn_norm: Vector  # (hidden_size,)
    q_proj: Weight  # (num_heads * head_dim, hidden_size)
    k_proj: Weight  # (num_kv_heads * head_dim, hidden_size)
    v_proj: Weight  # (num_kv_heads * head_dim, hidden_size)
    o_proj: Weight  # (hidden_size, num_heads * head_dim)
    mlp_norm: Vector  # (hidden_size,)
    gate_proj: Weight  # (intermediate_size, hidden_size)
    up_proj: Weight  # (intermediate_size, hidden_size)
    down_proj: Weight  # (hidden_size, intermediate_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices and norms."""
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj, self.up_proj, self.down_proj)
        return sum(matrix.num_bytes for matrix in matrices) + self.attn_norm.nbytes + self.mlp_norm.nbytes


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; a tied model's `lm_head` is its `embedding`."""

    embedding: Weight  # (vocab_size, hidden_size)
    layers: Sequence[LayerWeights]
    norm: Vector  # (hidden_size,)
    lm_head: Weight  # (vocab_size, hidden_size)

    def step_bytes(self, *, with_logits: bool) -> int:
        """Bytes that one pass over the layers reads, and over the head where logits are wanted."""
        layers = sum(layer.num_bytes for layer in self.layers)
        return layers + (self.norm.nbytes + self.lm_head.num_bytes if with_logits else 0)


class Decoder:
    """A decoder-only transformer."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, ops: Ops, rope: RopeTable) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.rope = rope
        # What families choose among; a choice that is missing here is one that kvik does not run.
        self._norm = {"rms": ops.rms_norm}[spec.norm]
        self._mlp = {"gated_silu": ops.gated_mlp}[spec.mlp]

    def forward(self, batch: Batch, kv_cache: Sequence[LayerKV]) -> Array:
        """Computes the batch's tokens, remembers their keys and values, and gives logits (R, vocab_size)."""
        ops, spec, weights = self.ops, self.spec, self.weights
        x = ops.embed(weights.embedding, batch.token_ids)  # (T, hidden_size)
        for layer, kv in zip(weights.layers, kv_cache, strict=True):
            normed = self._norm(x, layer.attn_norm, spec.norm_eps)
            q, k, v = (
                ops.split_heads(projected, spec.head_dim)
                for projected in ops.project(normed, (layer.q_proj, layer.k_proj, layer.v_proj))
            )  # (T, heads, head_dim)
            q = ops.rope(q, batch.positions, self.rope)
            k = ops.rope(k, batch.positions, self.rope)
            ops.write_kv(kv, k, v, batch.slot_mapping)  # remember these tokens
            attended = ops.attend(q, kv, batch)  # look back over all of them
            x = ops.add(x, ops.linear(ops.merge_heads(attended), layer.o_proj))
            normed = self._norm(x, layer.mlp_norm, spec.norm_eps)
            x = ops.add(x, self._mlp(normed, layer.gate_proj, layer.up_proj, layer.down_proj))
        x = self._norm(ops.take_rows(x, batch.logit_rows), weights.norm, spec.norm_eps)
        return ops.linear(x, weights.lm_head)
