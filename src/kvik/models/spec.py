"""What distinguishes one decoder from another: fields, so that the decoder's text never forks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvik.cache import GroupSpec, KVCacheSpec, VectorFormat
from kvik.ops.base import Nonlinearity, PositionScales, RopeTable, Routing

MAX_LAYERS = 1 << 12
MAX_HEAD_DIM = 1024
MAX_EXPERTS = 1 << 10  # of a layer
MAX_EXPERTS_OF_ALL = 1 << 16  # of all layers
"""Far above every published model."""

LAYER_EMBEDDINGS = "per_layer_token_embd.weight"
"""The table of all layers' embeddings of a token, as large as the rest: it stays in its file, and rows are read."""
XIELU_FIELDS = ("alpha_p", "alpha_n", "beta", "eps")
"""What xIELU has of its own in each layer."""

OTHER_MODEL = "take a model that kvik runs: docs/models.md lists them"
"""The hint where a file asks for what no decoder here can be."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: pair i rotates by position / (theta**(2i / num_dims) * factor)."""

    theta: float
    num_dims: int  # of a head, that pairs are made of; the rest pass unchanged
    adjacent_pairs: bool  # dimensions (2i, 2i+1) rotate together, else (i, i + num_dims / 2)
    factors: tuple[float, ...] | float = 1.0  # one divisor for all pairs that rotate, or one for each
    magnitude: float = 1.0  # what cosine and sine are multiplied with (YaRN; Peng et al., 2023)
    num_rotating: int | None = None  # the first so many pairs, the rest pass unchanged too (Gemma 4); None: all

    @property
    def num_pairs(self) -> int:
        """Pairs that rotate."""
        return self.num_dims // 2 if self.num_rotating is None else self.num_rotating

    @property
    def token_bytes(self) -> int:
        """Bytes of one position's cosines and sines, float32."""
        return self.num_pairs * 8

    def table(self, num_positions: int) -> RopeTable:
        """Angles in float64, rounded once: a position's row depends on nothing but the position."""
        pairs = np.arange(self.num_pairs)
        frequencies = self.theta ** (-2.0 * pairs / self.num_dims) / np.asarray(self.factors, np.float64)
        cos_sin = np.empty((num_positions, len(pairs), 2), np.float32)
        for start in range(0, num_positions, 4096):  # the float64 angles of a long context would outweigh the table
            part = cos_sin[start : start + 4096]
            angles = np.arange(start, start + len(part))[:, None] * frequencies
            part[..., 0] = np.cos(angles) * self.magnitude
            part[..., 1] = np.sin(angles) * self.magnitude
        return RopeTable(cos_sin, 0 if self.adjacent_pairs else self.num_dims // 2)


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Queries grow with their position: times 1 + beta * ln(1 + floor(position / original_context)), after RoPE."""

    beta: float
    original_context: int

    def table(self, num_positions: int) -> PositionScales:
        """Computed in float64 and rounded once."""
        turns = np.arange(num_positions) // self.original_context
        return PositionScales((1.0 + self.beta * np.log1p(turns)).astype(np.float32))


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec | None  # None: no RoPE (NoPE layer)
    window: int | None = None  # tokens that a token sees, its own the last; None: all before it
    num_kv_heads: int | None = None  # None: the decoder's; more or fewer in some layers (Gemma 4)
    head_dim: int | None = None  # None: the decoder's
    kv_from: int | None = None  # the layer whose keys and values it reads, having none of its own (Gemma 3n and 4)
    keys_as_values: bool = False  # values are the projected keys, before their norm and RoPE (Gemma 4)
    intermediate_size: int | None = None  # None: the decoder's
    sparse: bool = False  # it has the decoder's experts in place of an MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """The experts of a decoder's sparse layers."""

    num_experts: int
    intermediate_size: int  # of each
    routing: Routing
    router_bias: bool = False
    choice_bias: bool = False  # added to the scores to choose by, and not to the weights
    scales: bool = False  # each expert's weight is multiplied with a learned one
    bias: bool = False  # of the experts' projections
    shared_size: int = 0  # intermediate_size of the shared experts that every token goes through; 0: there are none
    shared_gate: bool = False  # what they add is multiplied with the sigmoid of a projection to one value
    # Router, experts and the shared ones each norm what they read; what the latter two give is normed too (Gemma 4).
    own_norms: bool = False

    def problem(self) -> str | None:
        """Why there can be no such experts; `None`: there can."""
        routing = self.routing
        if self.num_experts > MAX_EXPERTS:
            return f"{self.num_experts:,} experts are more than {MAX_EXPERTS:,}"
        if not 0 < routing.num_chosen <= self.num_experts:
            return f"{routing.num_chosen} of {self.num_experts} experts cannot be chosen"
        if self.num_experts % routing.num_groups:
            return f"{self.num_experts} experts do not divide into {routing.num_groups} groups"
        if routing.num_groups > 1 and self.num_experts // routing.num_groups < 2:
            return f"groups of {self.num_experts // routing.num_groups} expert have no second one"
        reachable = self.num_experts // routing.num_groups * routing.num_chosen_groups
        if not 0 < routing.num_chosen_groups <= routing.num_groups or reachable < routing.num_chosen:
            return f"{routing.num_chosen_groups} of {routing.num_groups} groups have no {routing.num_chosen} experts"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The shape of a decoder and the choices that its family made."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    tied_head: bool  # the embedding table is the output matrix too
    # Norms.
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float
    norm_bias: bool = False
    norm_places: Literal["before", "after", "around"] = "before"  # of attention and of the MLP
    qk_norm: Literal["none", "head", "row"] = "none"  # of queries and keys: each head alone, or all heads of a token
    value_norm: bool = False  # of values, each head alone and without a weight (Gemma 4)
    qk_norm_after_rope: bool = False
    # Attention and MLP.
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's last projection
    mlp_bias: bool = False
    head_bias: bool = False
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_soft_cap: float | None = None
    sinks: bool = False  # a learned score of each query head joins its softmax and brings no value
    query_scale: QueryScale | None = None
    activation: Nonlinearity = "silu"
    xielu: bool = False  # in its place, with numbers of its own in each layer
    gated: bool = True  # activation(gate(x)) * up(x), else activation(up(x)); of experts too
    experts: ExpertsSpec | None = None  # of the sparse layers
    parallel: Literal["none", "one_norm", "two_norms"] = "none"  # attention and MLP read the same x, and both add to it
    # Beginning and end.
    num_learned_positions: int = 0  # rows of a table that is added to the embedding; 0: no such table
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    layer_scales: bool = False  # what each layer gives is multiplied with a number of its own (Gemma 4)
    layer_embedding_size: int = 0  # of an embedding of the token that each layer has for itself (Gemma 3n and 4)
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return len(self.layers)

    def num_kv_heads_of(self, layer: LayerSpec) -> int:
        """KV heads of a layer."""
        return layer.num_kv_heads or self.num_kv_heads

    def head_dim_of(self, layer: LayerSpec) -> int:
        """Dimensions of each of a layer's heads."""
        return layer.head_dim or self.head_dim

    def intermediate_size_of(self, layer: LayerSpec) -> int:
        """The width of a layer's MLP."""
        return layer.intermediate_size or self.intermediate_size

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotary embeddings, in the order of the layers that need them first."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in all tables: cosines and sines, and what queries are multiplied with."""
        return sum(rope.token_bytes for rope in self.ropes) + (0 if self.query_scale is None else 4)

    @property
    def token_intermediate_size(self) -> int:
        """Items between up and down that a token has, in the layer where it has most."""
        sizes = {self.intermediate_size_of(layer) for layer in self.layers if not layer.sparse}
        if self.experts is not None:
            sizes.add(self.experts.routing.num_chosen * self.experts.intermediate_size + self.experts.shared_size)
        return max(sizes)

    def problem(self) -> str | None:
        """Why no decoder can have this shape; `None`: one can."""
        if self.experts is not None:
            if problem := self.experts.problem():
                return problem
            number = self.experts.num_experts * sum(layer.sparse for layer in self.layers)
            if number > MAX_EXPERTS_OF_ALL:
                return f"{number:,} experts in all layers are more than {MAX_EXPERTS_OF_ALL:,}"
        for index, layer in enumerate(self.layers):
            num_kv_heads, head_dim, rope = self.num_kv_heads_of(layer), self.head_dim_of(layer), layer.rope
            if self.num_heads % num_kv_heads:
                return f"{self.num_heads} query heads do not divide among {num_kv_heads} KV heads"
            if head_dim % 8:
                return f"head_dim {head_dim} is no multiple of 8"
            if rope is not None and (rope.num_dims % 2 or not 0 < rope.num_dims <= head_dim):
                return f"{rope.num_dims} dimensions of a head of {head_dim} cannot rotate in pairs"
            if rope is not None and not 0 < rope.num_pairs <= rope.num_dims // 2:
                return f"{rope.num_pairs} of {rope.num_dims // 2} pairs of dimensions cannot rotate"
            if layer.kv_from is not None and self._kv_of(layer) != self._kv_of(self.layers[layer.kv_from]):
                return f"layer {index} reads keys and values of layer {layer.kv_from}, which has others"
            if layer.kv_from is not None and not layer.kv_from < index:
                return f"layer {index} reads keys and values of layer {layer.kv_from}, which comes later"
        if 0 < self.num_learned_positions < self.context_length:
            return f"{self.num_learned_positions:,} learned positions for a context of {self.context_length:,}"
        return None

    def _kv_of(self, layer: LayerSpec) -> tuple[int, int, int | None]:
        return self.num_kv_heads_of(layer), self.head_dim_of(layer), layer.window

    def kv_spec(self, dtype: str) -> KVCacheSpec:
        """What a KV cache of this decoder holds; the types of keys and values as `parse_kv_dtype` takes them."""

        def group(index: int, layer: LayerSpec) -> GroupSpec:
            num_kv_heads, head_dim, window = self._kv_of(layer)
            vector = VectorFormat(head_dim, "f16")
            return GroupSpec("full" if window is None else "window", (index,), num_kv_heads, vector, vector, window)

        own = [group(index, layer) for index, layer in enumerate(self.layers) if layer.kv_from is None]
        shared = [(index, layer.kv_from) for index, layer in enumerate(self.layers) if layer.kv_from is not None]
        return KVCacheSpec.of_layers(own, shared=shared).with_dtype(dtype)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights; the names are those of GGUF files, where each projection has its own.

        Those of an expert have its id before the last part: `blk.0.ffn_up_exps.5.weight`.
        """
        hidden, of_layer = self.hidden_size, self.layer_embedding_size
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, *, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        def mlp(layer: str, size: int, suffix: str, *, bias: bool) -> None:
            if self.gated:
                linear(f"{layer}.ffn_gate{suffix}", size, hidden, bias=bias)
            linear(f"{layer}.ffn_up{suffix}", size, hidden, bias=bias)
            linear(f"{layer}.ffn_down{suffix}", hidden, size, bias=bias)

        def norm(name: str, size: int = hidden, *, bias: bool = self.norm_bias) -> None:
            shapes[f"{name}.weight"] = (size,)
            if bias:
                shapes[f"{name}.bias"] = (size,)

        shapes["token_embd.weight"] = (self.vocab_size, hidden)
        if self.num_learned_positions:
            shapes["position_embd.weight"] = (self.num_learned_positions, hidden)
        if of_layer:
            shapes[LAYER_EMBEDDINGS] = (self.vocab_size, self.num_layers * of_layer)
            linear("per_layer_model_proj", self.num_layers * of_layer, hidden, bias=False)
            norm("per_layer_proj_norm", of_layer)
        for index, spec in enumerate(self.layers):
            layer, head_dim = f"blk.{index}", self.head_dim_of(spec)
            queries, keys = self.num_heads * head_dim, self.num_kv_heads_of(spec) * head_dim
            of_kv = [("attn_k", keys), ("attn_v", keys)][: 0 if spec.kv_from is not None else 2 - spec.keys_as_values]
            inner = self.intermediate_size_of(spec)
            if self.norm_places != "after":
                norm(f"{layer}.attn_norm")
            for name, rows in (("attn_q", queries), *of_kv):
                linear(f"{layer}.{name}", rows, hidden, bias=self.qkv_bias)
            if self.qk_norm != "none":
                norm(f"{layer}.attn_q_norm", head_dim if self.qk_norm == "head" else queries, bias=False)
                if spec.kv_from is None:
                    norm(f"{layer}.attn_k_norm", head_dim if self.qk_norm == "head" else keys, bias=False)
            if self.sinks:
                shapes[f"{layer}.attn_sinks.weight"] = (self.num_heads,)
            linear(f"{layer}.attn_output", hidden, queries, bias=self.output_bias)
            if self.norm_places != "before":
                norm(f"{layer}.post_attention_norm")
            if self.norm_places != "after" and self.parallel != "one_norm":
                norm(f"{layer}.ffn_norm")
            if not spec.sparse:
                mlp(layer, inner, "", bias=self.mlp_bias)
                if self.xielu:
                    shapes |= {f"{layer}.ffn_act.{name}": (1,) for name in XIELU_FIELDS}
            else:
                experts = self.experts
                assert experts is not None
                linear(f"{layer}.ffn_gate_inp", experts.num_experts, hidden, bias=experts.router_bias)
                if experts.choice_bias:
                    shapes[f"{layer}.exp_probs_b.bias"] = (experts.num_experts,)
                if experts.scales:
                    shapes[f"{layer}.ffn_down_exps.scale"] = (experts.num_experts,)
                for expert_id in range(experts.num_experts):
                    mlp(layer, experts.intermediate_size, f"_exps.{expert_id}", bias=experts.bias)
                if experts.shared_size:
                    mlp(layer, experts.shared_size, "" if experts.own_norms else "_shexp", bias=False)
                if experts.own_norms:
                    shapes[f"{layer}.ffn_gate_inp.scale"] = (hidden,)
                    for name in ("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"):
                        norm(f"{layer}.{name}")
                if experts.shared_gate:
                    linear(f"{layer}.ffn_gate_inp_shexp", 1, hidden, bias=False)
            if self.norm_places != "before":
                norm(f"{layer}.post_ffw_norm")
            if of_layer:
                linear(f"{layer}.inp_gate", of_layer, hidden, bias=False)
                linear(f"{layer}.proj", hidden, of_layer, bias=False)
                norm(f"{layer}.post_norm")
            if self.layer_scales:
                shapes[f"{layer}.layer_output_scale.weight"] = (1,)
        norm("output_norm")
        if not self.tied_head:
            linear("output", self.vocab_size, hidden, bias=False)
        if self.head_bias:
            shapes["output.bias"] = (self.vocab_size,)
        return shapes
