"""From named tensors to the decoder's weights, wherever the tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from kvik.models.decoder import DecoderWeights, LayerEmbedding, LayerEmbeddings, LayerWeights
from kvik.models.parts import TensorName
from kvik.models.spec import LAYER_EMBEDDINGS, XIELU_FIELDS, DecoderSpec, LayerSpec
from kvik.ops.base import XIELU, Expert, ExpertsWeights, Linear, Norm, Ops, QKVWeights, Vector, Weight, WeightPlace

if TYPE_CHECKING:
    from kvik.models.quantize import Quantization

Kinds: TypeAlias = Mapping[str, tuple[str, int, int]]
"""Of matrices by name: GGUF type, rows and columns."""


class TensorSource(Protocol):
    """The tensors of one model file or folder, by the names of `DecoderSpec.tensors()`.

    Whether each is there, in the right shape and a readable type, and none is left over, it has checked before it gives
    the first.
    """

    def matrix(self, name: str) -> Weight:
        """A matrix, packed."""

    def vector(self, name: str) -> Vector:
        """A vector, float32."""

    def table(self, name: str) -> Weight:
        """A matrix of which rows are looked up; it stays where it is."""


class FileSource(Protocol):
    """A `TensorSource` of which it is known where its tensors lie."""

    @property
    def ops(self) -> Ops:
        """What packs the matrices."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the native backend holds when all is loaded, but for what fills up last rows."""

    @property
    def quantization(self) -> Quantization | None:
        """What quantising did to what was loaded so far."""

    def kinds(self) -> Kinds:
        """All matrices but such tables, in the order of their files."""

    def matrix(self, name: str, place: WeightPlace | None = None) -> Weight:
        """A matrix, packed into a place of `ops`."""

    def vector(self, name: str) -> Vector:
        """A vector, float32."""

    def table(self, name: str) -> Weight:
        """A matrix of which rows are looked up; it stays where it is."""


class OneByOne(Mapping[str, Weight]):
    """The matrices of a source, each packed whenever it is asked for: memory need not hold two of them."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._kinds = source.kinds()

    def __getitem__(self, name: str) -> Weight:
        return self._source.matrix(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def wanted_together(kinds: Kinds) -> list[list[str]]:
    """The names of matrices, those of one expert together, behind all others; in the order that memory has them."""
    groups: dict[tuple[int, int], list[str]] = {}
    alone: list[list[str]] = []
    for name in kinds:
        parsed = TensorName.parse(name)
        if parsed.expert is None or parsed.layer is None:
            alone.append([name])
        else:
            groups.setdefault((parsed.layer, parsed.expert), []).append(name)
    return [*alone, *(sorted(groups[key], key=_as_they_are_read) for key in sorted(groups))]


def _as_they_are_read(name: str) -> int:
    return ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps").index(TensorName.parse(name).name)


class LoadedMatrices:
    """A source whose matrices are loaded; each is given once."""

    def __init__(self, matrices: Mapping[str, Weight], rest: FileSource) -> None:
        self._matrices = dict(matrices)
        self._rest = rest

    def matrix(self, name: str) -> Weight:
        """A matrix, packed."""
        return self._matrices.pop(name)

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        return self._rest.vector(name)

    def table(self, name: str) -> Weight:
        """A matrix that stays where it is."""
        return self._rest.table(name)


def read_matrices(source: FileSource) -> dict[str, Weight]:
    """All matrices, read as they lie: a disk is fastest that way, and may be asked for what comes next."""
    kinds, places = source.kinds(), dict[str, WeightPlace | None]()
    for names in wanted_together(kinds):
        if len(names) > 1:
            places |= zip(names, source.ops.places_together([kinds[name] for name in names]), strict=True)
    return {name: source.matrix(name, places.get(name)) for name in kinds}


def read_weights(
    spec: DecoderSpec, source: TensorSource, on_layer: Callable[[int], None] = lambda index: None
) -> DecoderWeights:
    """All weights of the decoder; `on_layer` is called with each layer's index when it is loaded."""
    return _Reader(spec, source).read(on_layer)


class _Reader:
    def __init__(self, spec: DecoderSpec, source: TensorSource) -> None:
        self.spec = spec
        self.source = source
        self.names = spec.tensors().keys()

    def read(self, on_layer: Callable[[int], None]) -> DecoderWeights:
        spec = self.spec
        embedding = self.source.matrix("token_embd.weight")
        head = embedding if spec.tied_head else self.source.matrix("output.weight")
        positions = self.source.matrix("position_embd.weight") if spec.num_learned_positions else None
        layers = []
        for index, of_layer in enumerate(spec.layers):
            layers.append(self.layer(f"blk.{index}", of_layer))
            on_layer(index)
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            norm=self.needed_norm("output_norm"),
            lm_head=Linear(head, self.optional_vector("output.bias"), spec.logit_scale),
            positions=positions,
            layer_embeddings=self.layer_embeddings() if spec.layer_embedding_size else None,
        )

    def layer_embeddings(self) -> LayerEmbeddings:
        return LayerEmbeddings(
            table=self.source.table(LAYER_EMBEDDINGS),
            proj=self.linear("per_layer_model_proj", self.spec.hidden_size**-0.5),
            norm=self.needed_norm("per_layer_proj_norm"),
        )

    def layer(self, layer: str, of_layer: LayerSpec) -> LayerWeights:
        spec = self.spec
        attn_norm, own_norms = self.norm(f"{layer}.attn_norm"), spec.experts is not None and spec.experts.own_norms
        shared = "_shexp" * (of_layer.sparse and not own_norms)
        return LayerWeights(
            qkv=self.qkv(layer, of_layer),
            o_proj=self.linear(f"{layer}.attn_output", spec.residual_scale),
            gate_proj=self.optional_linear(f"{layer}.ffn_gate{shared}"),
            up_proj=self.optional_linear(f"{layer}.ffn_up{shared}"),
            down_proj=self.optional_linear(f"{layer}.ffn_down{shared}", spec.residual_scale),
            router=self.optional_linear(f"{layer}.ffn_gate_inp", spec.hidden_size**-0.5 if own_norms else 1.0),
            experts=self.experts(layer) if of_layer.sparse else None,
            shared_gate=self.optional_linear(f"{layer}.ffn_gate_inp_shexp"),
            router_norm=self.norm(f"{layer}.ffn_gate_inp", "scale"),
            experts_norm=self.norm(f"{layer}.pre_ffw_norm_2"),
            post_experts_norm=self.norm(f"{layer}.post_ffw_norm_2"),
            post_shared_norm=self.norm(f"{layer}.post_ffw_norm_1"),
            attn_norm=attn_norm,
            post_attn_norm=self.norm(f"{layer}.post_attention_norm"),
            mlp_norm=attn_norm if spec.parallel == "one_norm" else self.norm(f"{layer}.ffn_norm"),
            post_mlp_norm=self.norm(f"{layer}.post_ffw_norm"),
            sinks=self.optional_vector(f"{layer}.attn_sinks.weight"),
            embedding=self.layer_embedding(layer) if spec.layer_embedding_size else None,
            scale=float(self.source.vector(f"{layer}.layer_output_scale.weight")[0]) if spec.layer_scales else 1.0,
            xielu=self.xielu(layer) if spec.xielu else None,
        )

    def qkv(self, layer: str, of_layer: LayerSpec) -> QKVWeights:
        head_dim, own = self.spec.head_dim_of(of_layer), of_layer.kv_from is None
        value_norm = Norm(np.ones(head_dim, np.float32), self.spec.norm_eps) if own and self.spec.value_norm else None
        return QKVWeights(
            query=self.linear(f"{layer}.attn_q"),
            key=self.linear(f"{layer}.attn_k") if own else None,
            value=self.linear(f"{layer}.attn_v") if own and not of_layer.keys_as_values else None,
            head_dim=head_dim,
            query_norm=self.norm(f"{layer}.attn_q_norm"),
            key_norm=self.norm(f"{layer}.attn_k_norm"),
            value_norm=value_norm,
            norm_after_rope=self.spec.qk_norm_after_rope,
        )

    def layer_embedding(self, layer: str) -> LayerEmbedding:
        gate, out = self.linear(f"{layer}.inp_gate"), self.linear(f"{layer}.proj")
        return LayerEmbedding(gate, out, self.needed_norm(f"{layer}.post_norm"))

    def experts(self, layer: str) -> ExpertsWeights:
        assert self.spec.experts is not None

        def expert(number: int) -> Expert:
            return Expert(
                gate=self.optional_linear(f"{layer}.ffn_gate_exps.{number}"),
                up=self.linear(f"{layer}.ffn_up_exps.{number}"),
                down=self.linear(f"{layer}.ffn_down_exps.{number}", self.spec.residual_scale),
            )

        return ExpertsWeights(
            routing=self.spec.experts.routing,
            experts=tuple(map(expert, range(self.spec.experts.num_experts))),
            choice_bias=self.optional_vector(f"{layer}.exp_probs_b.bias"),
            scales=self.optional_vector(f"{layer}.ffn_down_exps.scale"),
        )

    def optional_linear(self, name: str, scale: float = 1.0) -> Linear | None:
        return self.linear(name, scale) if f"{name}.weight" in self.names else None

    def optional_vector(self, name: str) -> Vector | None:
        return self.source.vector(name) if name in self.names else None

    def linear(self, name: str, scale: float = 1.0) -> Linear:
        return Linear(self.source.matrix(f"{name}.weight"), self.optional_vector(f"{name}.bias"), scale)

    def needed_norm(self, name: str) -> Norm:
        norm = self.norm(name)
        assert norm is not None, name
        return norm

    def norm(self, name: str, kind: str = "weight") -> Norm | None:
        weight = self.optional_vector(f"{name}.{kind}")
        if weight is None:
            return None
        return Norm(weight, self.spec.norm_eps, self.optional_vector(f"{name}.bias"), self.spec.norm)

    def xielu(self, layer: str) -> XIELU:
        """Files hold what softplus makes the two curves of, so that training cannot bend them the other way."""
        raised, sunk, beta, eps = (float(self.source.vector(f"{layer}.ffn_act.{name}")[0]) for name in XIELU_FIELDS)
        return XIELU(float(np.logaddexp(0.0, raised)), beta + float(np.logaddexp(0.0, sunk)), beta, eps)
