"""A model as the planner sees it: what of it decides memory and speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvik.cache.spec import MAX_INT8_HEAD_DIM, KVCacheSpec, vector_bytes
from kvik.config import KVDType

LayerKind = Literal["full", "sliding", "chunked", "latent", "none"]

KV_DTYPES: tuple[KVDType, ...] = ("f32", "f16", "int8")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that remember alike.

    full: keys and values of every token; sliding and chunked: of the newest `window` at most; latent: one compressed
    vector and one rotary key a token for all heads (MLA, DeepSeek-V2); none: nothing per token (linear attention,
    Mamba, or no attention).
    """

    kind: LayerKind
    num_layers: int
    num_kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None  # tokens
    latent_dims: tuple[int, int] = (0, 0)  # kv_lora_rank, qk_rope_head_dim

    def takes(self, dtype: KVDType) -> bool:
        """Whether keys and values can be kept in this type."""
        return dtype != "int8" or max(self.head_dim, *self.latent_dims) <= MAX_INT8_HEAD_DIM

    def token_bytes(self, dtype: KVDType) -> int:
        """Bytes that one remembered token occupies in these layers."""
        if self.kind == "none":
            return 0
        if self.kind == "latent":
            return self.num_layers * sum(vector_bytes(dim, dtype) for dim in self.latent_dims)
        return KVCacheSpec(self.num_layers, self.num_kv_heads, self.head_dim, dtype).token_bytes

    def num_tokens(self, context: int) -> int:
        """Tokens of `context` that are remembered."""
        if self.kind == "none":
            return 0
        return context if self.window is None else min(context, self.window)

    @property
    def name(self) -> str:
        """The kind, with the window where there is one."""
        if self.kind == "none":
            return "no KV"
        return f"{self.kind} {self.window:,}" if self.window else self.kind


@dataclass(frozen=True, slots=True)
class WeightTensors:
    """Bytes of a file's own tensors, where it is known which they are."""

    format: str  # of most of the matrices' bytes
    held_bytes: int  # as kvik packs them, norms included
    step_bytes: int  # of these, what one step reads: all, but only rows of an embedding table that is not the head too
    file_bytes: int
    quantized: bool  # whether the matrices are multiplied in integers


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
    groups: tuple[LayerGroup, ...]
    max_context: int
    vocab_size: int
    num_params: int | None  # None: not known
    is_mixture: bool = False  # of experts
    num_active_params: int | None = None  # that one token uses; None: not known
    num_table_params: int = 0  # of an embedding table that is only looked up, where that is known
    intermediate_size: int | None = None
    uncertain: tuple[str, ...] = ()  # names of doubtful figures
    note: str = ""
    often_quoted_as_mha: bool = False
    tensors: WeightTensors | None = None
    rope_token_bytes: int = 0  # of one position's cosines and sines, where kvik will hold them
    runs: bool = False  # whether kvik runs this file

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
    def kv_dtypes(self) -> tuple[KVDType, ...]:
        """Types that its keys and values can be kept in."""
        return tuple(dtype for dtype in KV_DTYPES if all(group.takes(dtype) for group in self.groups))

    def token_bytes(self, dtype: KVDType) -> int:
        """Bytes of KV cache that one more token takes while no window is full."""
        return sum(group.token_bytes(dtype) for group in self.groups)

    def token_bytes_at(self, context: int, dtype: KVDType) -> int:
        """Bytes that one more token takes behind `context` of them: layers with a full window take none."""
        grows = (group for group in self.groups if group.num_tokens(context + 1) > group.num_tokens(context))
        return sum(group.token_bytes(dtype) for group in grows)

    def with_kv_heads(self, num_kv_heads: int) -> ModelShape:
        """The same model with so many KV heads in every layer that has any; a latent becomes keys and values."""
        groups = tuple(
            group
            if group.kind == "none"
            else replace(
                group,
                kind="full" if group.kind == "latent" else group.kind,
                num_kv_heads=num_kv_heads,
                head_dim=group.head_dim or self.head_dim,
                latent_dims=(0, 0),
            )
            for group in self.groups
        )
        return replace(self, num_kv_heads=num_kv_heads, groups=groups, tensors=None, runs=False)
