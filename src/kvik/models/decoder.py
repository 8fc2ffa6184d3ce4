"""The decoder, written once; `ops` decides where it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvik.models.spec import DecoderSpec
from kvik.ops.base import Array, Batch, LayerKV, Norm, Ops, QKVWeights, RopeTable, Weight


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer."""

    attn_norm: Norm
    qkv: QKVWeights
    o_proj: Weight  # (hidden_size, num_heads * head_dim)
    mlp_norm: Norm
    gate_proj: Weight  # (intermediate_size, hidden_size)
    up_proj: Weight  # (intermediate_size, hidden_size)
    down_proj: Weight  # (hidden_size, intermediate_size)

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """All that a token is multiplied with."""
        qkv = (self.qkv.query, self.qkv.key, self.qkv.value)
        return (*qkv, self.o_proj, self.gate_proj, self.up_proj, self.down_proj)

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices and norms."""
        norms = (self.attn_norm, self.mlp_norm)
        return sum(matrix.num_bytes for matrix in self.matrices) + sum(norm.weight.nbytes for norm in norms)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; a tied model's `lm_head` is its `embedding`."""

    embedding: Weight  # (vocab_size, hidden_size)
    layers: Sequence[LayerWeights]
    norm: Norm
    lm_head: Weight  # (vocab_size, hidden_size)

    def step_bytes(self, *, with_logits: bool) -> int:
        """Bytes that one pass over the layers reads, and over the head where logits are wanted."""
        layers = sum(layer.num_bytes for layer in self.layers)
        return layers + (self.norm.weight.nbytes + self.lm_head.num_bytes if with_logits else 0)

    @property
    def layer_multiply_adds(self) -> int:
        """Multiply-adds of one token with the matrices of all layers."""
        return sum(matrix.rows * matrix.columns for layer in self.layers for matrix in layer.matrices)


class Decoder:
    """A decoder-only transformer."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, ops: Ops, rope: RopeTable) -> None:
        assert (spec.norm, spec.mlp) == ("rms", "gated_silu")  # what the fields allow today
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.rope = rope

    def with_ops(self, ops: Ops) -> Decoder:
        """The same weights, run by other ops of the same backend, which pack weights alike."""
        return Decoder(self.spec, self.weights, ops, self.rope)

    def record(self, kv_cache: Sequence[LayerKV]) -> Callable[[Batch], Array]:
        """The forward pass over these KV arrays as one function of the batch, its ops noted where the backend can."""
        return self.ops.record(lambda ops, batch: self.forward(batch, kv_cache, ops))

    def forward(self, batch: Batch, kv_cache: Sequence[LayerKV], ops: Ops | None = None) -> Array:
        """Computes the batch's tokens, remembers their keys and values, and gives logits (R, vocab_size)."""
        ops, weights = ops or self.ops, self.weights
        x = ops.embed(weights.embedding, batch.token_ids)  # (T, hidden_size)
        for layer, kv in zip(weights.layers, kv_cache, strict=True):
            q = ops.norm_qkv(x, layer.attn_norm, layer.qkv, self.rope, kv, batch)  # and remember these tokens
            attended = ops.attend(q, kv, batch)  # look back over all of them
            x = ops.linear(ops.merge_heads(attended), layer.o_proj, residual=x)
            gated = ops.norm_gated(x, layer.mlp_norm, layer.gate_proj, layer.up_proj)
            x = ops.linear(gated, layer.down_proj, residual=x)
        return ops.norm_linear(ops.take_rows(x, batch.logit_rows), weights.norm, weights.lm_head)
