"""What distinguishes one decoder from another: fields, so that the decoder's text never forks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvik.cache import KVCacheSpec
from kvik.config import KVDType
from kvik.ops.base import RopeTable


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: pair i turns by position / (theta**(2i / num_dims) * factor)."""

    theta: float
    num_dims: int  # dimensions of a head that turn; the rest pass unchanged
    adjacent_pairs: bool  # dimensions (2i, 2i+1) turn together, else (i, i + num_dims / 2)
    factors: tuple[float, ...] | float = 1.0  # one divisor for all pairs, or one for each

    @property
    def token_bytes(self) -> int:
        """Bytes of one position's cosines and sines, float32."""
        return self.num_dims * 4

    def table(self, num_positions: int) -> RopeTable:
        """Angles in float64, rounded once: a position's row depends on nothing but the position."""
        pairs = np.arange(self.num_dims // 2)
        frequencies = self.theta ** (-2.0 * pairs / self.num_dims) / np.asarray(self.factors, np.float64)
        turns = np.empty((num_positions, len(pairs), 2), np.float32)
        for start in range(0, num_positions, 4096):  # the float64 angles of a long context would outweigh the table
            part = turns[start : start + 4096]
            angles = np.arange(start, start + len(part))[:, None] * frequencies
            part[..., 0] = np.cos(angles)
            part[..., 1] = np.sin(angles)
        return RopeTable(turns, self.adjacent_pairs)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The shape of a decoder and the choices that its family made."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    tied_head: bool  # the embedding table is the output matrix too
    norm: Literal["rms"] = "rms"
    mlp: Literal["gated_silu"] = "gated_silu"

    def kv_spec(self, dtype: KVDType) -> KVCacheSpec:
        """What a KV cache of this decoder holds."""
        return KVCacheSpec(self.num_layers, self.num_kv_heads, self.head_dim, dtype)
