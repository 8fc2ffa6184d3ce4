"""A model as the planner sees it: what of it decides memory and speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kvik.cache import GroupSpec, KVCacheSpec, VectorFormat
from kvik.errors import InvalidInput
from kvik.experts import ExpertsRead
from kvik.models.hf_layers import KeptLayers

KV_DTYPES = ("f32", "f16", "int8", "k4v4")
"""What is shown, as `parse_kv_dtype` takes it."""


def kv_group(
    first_layer: int, num_layers: int, num_kv_heads: int, head_dim: int, window: int | None = None
) -> GroupSpec:
    """So many layers with keys and values in f16, the first of them numbered so."""
    layers, vector = tuple(range(first_layer, first_layer + num_layers)), VectorFormat(head_dim, "f16")
    return GroupSpec("full" if window is None else "window", layers, num_kv_heads, vector, vector, window)


def latent_group(num_layers: int, rank: int, num_rotary: int) -> GroupSpec:
    """Layers with MLA: a latent of `rank` items, and behind it a key of `num_rotary` that rotates."""
    key, value = VectorFormat(rank + num_rotary, "f16", num_rotary), VectorFormat(rank, "f16")
    return GroupSpec("latent", tuple(range(num_layers)), 1, key, value)


def group_without_kv(first_layer: int, num_layers: int) -> GroupSpec:
    """Layers that keep nothing of a token; what their states take is not known here."""
    layers = tuple(range(first_layer, first_layer + num_layers))
    return GroupSpec("state", layers, 0, VectorFormat(0, "f32"))


@dataclass(frozen=True, slots=True)
class WeightTensors:
    """Bytes of a file's own tensors, where it is known which they are."""

    format: str  # of most of the matrices' bytes
    held_bytes: int  # as kvik packs them, norms included
    # Of these, what a step of one token reads: all, but only rows of an embedding table that is not the head too, and
    # of a mixture the experts that it goes through; None: not known.
    step_bytes: int | None
    file_bytes: int
    quantized: bool  # whether the matrices are multiplied in integers
    experts: ExpertsRead | None = None  # those of all layers, as `step_bytes` has them of one token


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model: from the catalogue, a config.json, or the headers of a GGUF file or of a checkpoint."""

    name: str
    origin: Literal["catalogue", "config.json", "gguf", "checkpoint"]
    source: str  # where the figures come from: a citation, a path or a Hub id
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[GroupSpec, ...]  # with keys and values in f16
    max_context: int
    vocab_size: int
    num_params: int | None  # None: not known
    is_mixture: bool = False  # of experts
    num_active_params: int | None = None  # that one token uses; None: not known
    num_experts: int = 0  # of a layer that has some; 0: a dense model, or not known
    num_chosen_experts: int = 0  # that one token goes through
    num_table_params: int = 0  # of an embedding table that is only looked up, where that is known
    intermediate_size: int | None = None  # of what one token goes through in a layer
    layer_embeddings_width: int = 0  # of all layers' embeddings of a token (Gemma 4), where kvik runs it
    uncertain: tuple[str, ...] = ()  # names of doubtful figures
    note: str = ""
    often_quoted_as_mha: bool = False
    tensors: WeightTensors | None = None
    rope_token_bytes: int = 0  # of one position's cosines and sines, where kvik will hold them
    runs: bool = False  # whether kvik runs this file
    shared_layers: tuple[tuple[int, int], ...] = ()  # as in `KVCacheSpec.shared`

    @property
    def attention(self) -> str:
        """MHA, GQA-8 (8 KV heads), MQA or MLA."""
        if any(group.kind == "latent" for group in self.groups):
            return "MLA"
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else f"GQA-{self.num_kv_heads}"

    @property
    def active_params(self) -> int | None:
        """Parameters that one token is multiplied with, where that is known."""
        params = self.num_active_params if self.is_mixture else self.num_params
        return None if params is None else params - self.num_table_params

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """Types that its keys and values can be kept in."""

        def is_kept(dtype: str) -> bool:
            try:
                self.kv_spec(dtype)
            except InvalidInput:
                return False
            return True

        return tuple(filter(is_kept, KV_DTYPES))

    def num_readers(self, group: GroupSpec) -> int:
        """Layers that attend to what a group keeps: its own, and those that share with them."""
        return group.num_layers + sum(owner in group.layers for _, owner in self.shared_layers)

    def kv_spec(self, dtype: str) -> KVCacheSpec:
        """Its cache, the types of keys and values as `parse_kv_dtype` takes them."""
        return KVCacheSpec(self.groups, shared=self.shared_layers).with_dtype(dtype)

    def token_bytes(self, dtype: str) -> int:
        """Bytes of KV cache that one more token takes while no window is full."""
        return self.kv_spec(dtype).token_bytes

    def token_bytes_at(self, context: int, dtype: str) -> int:
        """Bytes that one more token takes behind `context` of them: layers with a full window take none."""
        groups = self.kv_spec(dtype).groups
        return sum(one.token_bytes for one in groups if one.num_tokens(context + 1) > one.num_tokens(context))

    def with_kv_heads(self, num_kv_heads: int) -> ModelShape:
        """The same model with so many KV heads in every layer that has any; a latent becomes keys and values."""

        def changed(group: GroupSpec) -> GroupSpec:
            if group.kind == "latent":
                return kv_group(group.layers[0], group.num_layers, num_kv_heads, self.head_dim)
            return group if group.kind == "state" else replace(group, num_kv_heads=num_kv_heads)

        groups = tuple(map(changed, self.groups))
        return replace(self, num_kv_heads=num_kv_heads, groups=groups, tensors=None, runs=False)


def shape_of_layers(
    kept: KeptLayers, name: str, origin: Literal["config.json", "gguf"], source: Path, num_params: int | None
) -> ModelShape:
    """A model of these layers, of whose weights only the number of parameters is told."""
    cache = kept.cache
    return ModelShape(
        name=name,
        origin=origin,
        source=str(source),
        num_layers=len(kept.layers),
        hidden_size=kept.hidden_size,
        num_heads=kept.num_heads,
        num_kv_heads=kept.num_kv_heads,
        head_dim=kept.head_dim,
        groups=cache.groups,
        max_context=kept.max_context,
        vocab_size=kept.vocab_size,
        num_params=num_params,
        shared_layers=cache.shared,
        note=kept.note,
    )
