"""The decoder, written once; `ops` decides where it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvik.cache import KVCacheSpec
from kvik.models.spec import DecoderSpec, LayerSpec, RopeSpec
from kvik.ops.base import (
    XIELU,
    Array,
    AttentionRule,
    Batch,
    ExpertsWeights,
    LayerKV,
    Linear,
    Norm,
    Ops,
    QKVWeights,
    RopeTable,
    Step,
    Vector,
    Weight,
    slots_of,
)
from kvik.ops.capture import record
from kvik.ops.table import OPS, Cost, add_up


@dataclass(frozen=True, slots=True)
class LayerEmbedding:
    """What a layer does with its own embedding e of the token: x + norm(out_proj(activation(gate_proj(x)) * e))."""

    gate_proj: Linear  # (layer_embedding_size, hidden_size)
    out_proj: Linear  # (hidden_size, layer_embedding_size)
    norm: Norm


@dataclass(frozen=True, slots=True)
class LayerEmbeddings:
    """Where all layers' embeddings e of a token come from: (norm(proj(x)) + table[token]) / sqrt(2), layer by layer."""

    table: Weight  # (vocab_size, num_layers * layer_embedding_size), in its file
    proj: Linear  # (num_layers * layer_embedding_size, hidden_size)
    norm: Norm  # of each layer's part alone


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer; a part that the family lacks is None."""

    qkv: QKVWeights
    o_proj: Linear  # (hidden_size, num_heads * head_dim)
    # The MLP, or the shared experts beside those that are chosen.
    gate_proj: Linear | None  # (intermediate_size, hidden_size)
    up_proj: Linear | None  # (intermediate_size, hidden_size)
    down_proj: Linear | None  # (hidden_size, intermediate_size)
    router: Linear | None = None  # (num_experts, hidden_size)
    experts: ExpertsWeights | None = None
    shared_gate: Linear | None = None  # (1, hidden_size) of what the shared experts add
    router_norm: Norm | None = None  # in place of the MLP's
    experts_norm: Norm | None = None  # likewise
    post_experts_norm: Norm | None = None
    post_shared_norm: Norm | None = None
    attn_norm: Norm | None = None
    post_attn_norm: Norm | None = None
    mlp_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    sinks: Vector | None = None  # (num_heads,)
    embedding: LayerEmbedding | None = None
    scale: float = 1.0  # of what the layer gives
    xielu: XIELU | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All that a token is multiplied with."""
        others = [self.gate_proj, self.up_proj, self.down_proj, self.router, self.shared_gate]
        if self.embedding is not None:
            others += [self.embedding.gate_proj, self.embedding.out_proj]
        chosen = () if self.experts is None else self.experts.linears
        return (*self.qkv.linears, self.o_proj, *(linear for linear in others if linear is not None), *chosen)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms; one that attention and the MLP share once."""
        own = [self.attn_norm, self.post_attn_norm, self.mlp_norm, self.post_mlp_norm]
        own += [self.router_norm, self.experts_norm, self.post_experts_norm, self.post_shared_norm]
        own += [self.qkv.query_norm, self.qkv.key_norm, None if self.embedding is None else self.embedding.norm]
        found = {id(norm): norm for norm in own if norm is not None}
        return tuple(found.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices, biases and norms, and of what sinks, experts and xIELU have beside them."""
        vectors = 0 if self.experts is None else self.experts.vector_bytes
        vectors += 0 if self.sinks is None else self.sinks.nbytes
        vectors += 0 if self.xielu is None else self.xielu.num_bytes
        return vectors + sum(one.num_bytes for one in self.linears) + sum(norm.num_bytes for norm in self.norms)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; a tied model's `lm_head` multiplies with its `embedding`."""

    embedding: Weight  # (vocab_size, hidden_size)
    layers: Sequence[LayerWeights]
    norm: Norm
    lm_head: Linear  # (vocab_size, hidden_size)
    positions: Weight | None = None  # (num_learned_positions, hidden_size)
    layer_embeddings: LayerEmbeddings | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is in memory; what is tied once."""
        others = [self.embedding] if self.lm_head.matrix is not self.embedding else []
        tables = [*others, *([] if self.positions is None else [self.positions])]
        layers, head = sum(layer.num_bytes for layer in self.layers), self.norm.num_bytes + self.lm_head.num_bytes
        own = self.layer_embeddings
        of_layers = 0 if own is None else own.proj.num_bytes + own.norm.num_bytes
        return layers + head + of_layers + sum(table.num_bytes for table in tables)


@dataclass(frozen=True, slots=True)
class _KVOfLayer:
    """What a layer's cost depends on, where there are no arrays."""

    kv_group: int
    token_bytes: int
    recent_group: int | None


class Decoder:
    """A decoder-only transformer, for sequences of up to `num_positions` tokens."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, ops: Ops, num_positions: int) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.num_positions = num_positions
        self._ropes: Mapping[RopeSpec | None, RopeTable | None] = {
            None: None,
            **{rope: rope.table(num_positions) for rope in spec.ropes},
        }
        scale = spec.query_scale
        self._query_scales = None if scale is None else scale.table(num_positions)
        self._costs: dict[KVCacheSpec, tuple[tuple[Cost, bool], ...]] = {}

    def with_ops(self, ops: Ops) -> Decoder:
        """The same weights, run by other ops of the same backend, which pack weights alike."""
        return Decoder(self.spec, self.weights, ops, self.num_positions)

    def costs(self, kv_spec: KVCacheSpec) -> tuple[tuple[Cost, bool], ...]:
        """What the ops of a step cost at least, added up by `add_up`."""
        found = self._costs.get(kv_spec)
        if found is None:
            layer_bytes = [group.num_kv_heads * group.vector_bytes for group in kv_spec.groups]
            recent = kv_spec.recent_of
            layers = [_KVOfLayer(group, layer_bytes[group], recent.get(group)) for group in kv_spec.layer_groups]
            calls, *_ = record(lambda ops, batch: self.forward(batch, layers, ops))
            found = self._costs[kv_spec] = add_up(
                (OPS[call.name].cost(*call.arguments), any(value.of_logits for value in call.results)) for call in calls
            )
        return found

    def step_bytes(self, kv_spec: KVCacheSpec, num_tokens: int, num_logits: int) -> int:
        """Bytes of weights that a step of so many tokens and logit rows reads; of experts as many as are expected."""
        costs = self.costs(kv_spec)
        return sum(cost.weight_bytes_for(num_logits if of_logits else num_tokens) for cost, of_logits in costs)

    def capture(self, kv_cache: Sequence[LayerKV]) -> Step:
        """The forward pass over these KV arrays as one function of the batch, its ops noted where the backend can.

        Its hidden states are those behind the last layer; see `normed`.
        """

        def forward(ops: Ops, batch: Batch) -> tuple[Array, Array]:
            x = self._layers(batch, kv_cache, ops)
            return self.logits(ops.take_rows(x, batch.logit_rows), ops), ops.take_rows(x, batch.hidden_rows)

        return self.ops.capture(forward)

    def forward(self, batch: Batch, kv_cache: Sequence[LayerKV], ops: Ops | None = None) -> Array:
        """Computes the batch's tokens, remembers their keys and values, and gives logits (R, vocab_size)."""
        ops = ops or self.ops
        return self.logits(ops.take_rows(self._layers(batch, kv_cache, ops), batch.logit_rows), ops)

    def _layers(self, batch: Batch, kv_cache: Sequence[LayerKV], ops: Ops) -> Array:
        """The batch's tokens behind the last layer: (T, hidden_size)."""
        spec, weights = self.spec, self.weights
        x = ops.embed(weights.embedding, batch.token_ids, spec.embedding_scale)  # (T, hidden_size)
        if weights.positions is not None:
            x = ops.add(x, ops.embed(weights.positions, batch.positions))
        embeddings = self._layer_embeddings(ops, x, batch)
        for index, (layer, w, kv) in enumerate(zip(spec.layers, weights.layers, kv_cache, strict=True)):
            q, k, v = self._heads(ops, layer, w, x, batch)
            if layer.kv_from is None:
                ops.write_kv(kv, k, v, *slots_of(kv, batch))  # remember these tokens
            if self._query_scales is not None:
                q = ops.scale_by_position(q, batch.positions, self._query_scales)
            attended = ops.merge_heads(ops.attend(q, kv, batch, self.rule(layer, w)))  # look back over all of them
            after = _add(ops, x, attended, w.o_proj, w.post_attn_norm)
            scale = w.scale if w.embedding is None else 1.0
            x = self._feed_forward(ops, w, after, after if spec.parallel == "none" else x, scale)
            if w.embedding is not None:
                own = ops.take_columns(embeddings, index * spec.layer_embedding_size, spec.layer_embedding_size)
                gated = ops.activate(ops.linear(x, w.embedding.gate_proj), spec.activation, own)
                x = _add(ops, x, gated, w.embedding.out_proj, w.embedding.norm, w.scale)
        return x

    def _layer_embeddings(self, ops: Ops, x: Array, batch: Batch) -> Array | None:
        """Each token's embeddings in all layers: (T, num_layers * layer_embedding_size)."""
        own = self.weights.layer_embeddings
        if own is None:
            return None
        rows = ops.embed(own.table, batch.token_ids, math.sqrt(self.spec.layer_embedding_size))
        return ops.add(ops.norm(ops.linear(x, own.proj), own.norm), rows, math.sqrt(0.5))

    def _heads(
        self, ops: Ops, layer: LayerSpec, w: LayerWeights, x: Array, batch: Batch
    ) -> tuple[Array, Array | None, Array | None]:
        """Queries, and keys and values where the layer has its own: (T, heads, head_dim) each."""
        rope, qkv = self._ropes[layer.rope], w.qkv
        q, *k_and_v = ops.project(_normed(ops, x, w.attn_norm), qkv.linears)
        queries = ops.heads(q, qkv.query_norm, qkv, rope, batch)
        if not k_and_v:
            return queries, None, None
        k, v = k_and_v[0], ops.split_heads(_normed(ops, k_and_v[-1], qkv.value_norm), qkv.head_dim)
        return queries, ops.heads(k, qkv.key_norm, qkv, rope, batch), v

    def logits(self, hidden: Array, ops: Ops) -> Array:
        """What rows of hidden states (R, hidden_size) say about the next token: (R, vocab_size)."""
        logits = ops.linear(ops.norm(hidden, self.weights.norm), self.weights.lm_head)
        return logits if self.spec.logit_soft_cap is None else ops.soft_cap(logits, self.spec.logit_soft_cap)

    def normed(self, hidden: Array) -> Array:
        """Rows of hidden states (H, hidden_size) as the head sees them, behind the last norm."""
        return self.ops.norm(hidden, self.weights.norm)

    def rule(self, layer: LayerSpec, w: LayerWeights) -> AttentionRule:
        """How this layer's scores become weights."""
        return AttentionRule(self.spec.attention_scale, layer.window, self.spec.attention_soft_cap, w.sinks)

    def _feed_forward(self, ops: Ops, w: LayerWeights, residual: Array, x: Array, scale: float) -> Array:
        """The residual and what the MLP, or the experts, make of x, times a scale."""
        normed = _normed(ops, x, w.mlp_norm)
        if w.experts is None:
            assert w.down_proj is not None
            return _add(ops, residual, self._mlp_hidden(ops, w, normed), w.down_proj, w.post_mlp_norm, scale)
        assert w.router is not None
        judged = normed if w.router_norm is None else ops.norm(x, w.router_norm)
        seen = normed if w.experts_norm is None else ops.norm(x, w.experts_norm)
        added = ops.experts(seen, ops.linear(judged, w.router), w.experts, self.spec.activation)
        added = _normed(ops, added, w.post_experts_norm)
        if w.down_proj is not None:
            shared = ops.linear(self._mlp_hidden(ops, w, normed), w.down_proj)
            shared = _normed(ops, shared, w.post_shared_norm)
            gates = None if w.shared_gate is None else ops.linear(normed, w.shared_gate)
            added = ops.add(added, shared if gates is None else ops.gate(shared, gates))
        return ops.add(residual, _normed(ops, added, w.post_mlp_norm), scale)

    def _mlp_hidden(self, ops: Ops, w: LayerWeights, normed: Array) -> Array:
        assert w.up_proj is not None
        if w.gate_proj is None:
            up = ops.linear(normed, w.up_proj)
            return ops.activate(up, self.spec.activation) if w.xielu is None else ops.xielu(up, w.xielu)
        gate, up = ops.project(normed, (w.gate_proj, w.up_proj))
        return ops.activate(gate, self.spec.activation, up)


def _normed(ops: Ops, x: Array, norm: Norm | None) -> Array:
    return x if norm is None else ops.norm(x, norm)


def _add(ops: Ops, residual: Array, x: Array, linear: Linear, post_norm: Norm | None, scale: float = 1.0) -> Array:
    """What attention or the MLP adds to the residual, and the sum times a scale."""
    product = ops.linear(x, linear)
    return ops.add(residual, product if post_norm is None else ops.norm(product, post_norm), scale)
