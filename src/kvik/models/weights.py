"""From named tensors to the decoder's weights, wherever the tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kvik.models.decoder import DecoderWeights, LayerWeights
from kvik.models.parts import TensorName
from kvik.models.spec import DecoderSpec, LayerSpec
from kvik.ops.base import Expert, ExpertsWeights, Linear, Norm, Ops, QKVWeights, Vector, Weight, WeightPlace

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
        """All matrices, in the order of their files."""

    def matrix(self, name: str, place: WeightPlace | None = None) -> Weight:
        """A matrix, packed into a place of `ops`."""

    def vector(self, name: str) -> Vector:
        """A vector, float32."""


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

    def __init__(self, matrices: Mapping[str, Weight], vectors: FileSource) -> None:
        self._matrices = dict(matrices)
        self._vectors = vectors

    def matrix(self, name: str) -> Weight:
        """A matrix, packed."""
        return self._matrices.pop(name)

    def vector(self, name: str) -> Vector:
        """A vector, float32."""
        return self._vectors.vector(name)


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
        norm = self.norm("output_norm")
        assert norm is not None
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            norm=norm,
            lm_head=Linear(head, self.optional_vector("output.bias"), spec.logit_scale),
            positions=positions,
        )

    def layer(self, layer: str, of_layer: LayerSpec) -> LayerWeights:
        spec = self.spec
        attn_norm, shared = self.norm(f"{layer}.attn_norm"), "_shexp" * of_layer.sparse
        return LayerWeights(
            qkv=QKVWeights(
                query=self.linear(f"{layer}.attn_q"),
                key=None if of_layer.kv_from is not None else self.linear(f"{layer}.attn_k"),
                value=None if of_layer.kv_from is not None else self.linear(f"{layer}.attn_v"),
                head_dim=spec.head_dim_of(of_layer),
                query_norm=self.norm(f"{layer}.attn_q_norm"),
                key_norm=self.norm(f"{layer}.attn_k_norm"),
            ),
            o_proj=self.linear(f"{layer}.attn_output", spec.residual_scale),
            gate_proj=self.optional_linear(f"{layer}.ffn_gate{shared}"),
            up_proj=self.optional_linear(f"{layer}.ffn_up{shared}"),
            down_proj=self.optional_linear(f"{layer}.ffn_down{shared}", spec.residual_scale),
            router=self.optional_linear(f"{layer}.ffn_gate_inp"),
            experts=self.experts(layer) if of_layer.sparse else None,
            shared_gate=self.optional_linear(f"{layer}.ffn_gate_inp_shexp"),
            attn_norm=attn_norm,
            post_attn_norm=self.norm(f"{layer}.post_attention_norm"),
            mlp_norm=attn_norm if spec.parallel == "one_norm" else self.norm(f"{layer}.ffn_norm"),
            post_mlp_norm=self.norm(f"{layer}.post_ffw_norm"),
            sinks=self.optional_vector(f"{layer}.attn_sinks.weight"),
        )

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

    def norm(self, name: str) -> Norm | None:
        if f"{name}.weight" not in self.names:
            return None
        weight = self.source.vector(f"{name}.weight")
        return Norm(weight, self.spec.norm_eps, self.optional_vector(f"{name}.bias"), self.spec.norm)
