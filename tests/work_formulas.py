"""What a tiny model's work must be by closed formulas, from its shape alone: for the tests of what commands count."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.config import KVDType


@dataclass(frozen=True, slots=True)
class TinyShape:
    """The defaults of `tiny_llama`, all matrices Q8_0."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 320

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def multiply_adds(self, num_tokens: int, num_logits: int) -> int:
        """With weights."""
        return num_tokens * self.layer_weights + num_logits * self.vocab * self.hidden

    def attention(self, first: int, last: int) -> int:
        """Multiply-adds of tokens at positions `first` ... `last` - 1: p + 1 keys and as many values each."""
        keys = (last * (last + 1) - first * (first + 1)) // 2
        return 2 * self.layers * self.heads * self.head_dim * keys

    def step_bytes(self) -> int:
        """Of weights, with the head: Q8_0 takes 34 bytes for 32 weights packed as in the file, norms are float32."""
        matrices = (self.layer_weights + self.vocab * self.hidden) * 34 // 32
        return matrices + (2 * self.layers + 1) * self.hidden * 4

    def kv_token_bytes(self, dtype: KVDType) -> int:
        head = {"f32": 4 * self.head_dim, "f16": 2 * self.head_dim, "int8": self.head_dim + 4}[dtype]
        return 2 * self.layers * self.kv_heads * head
