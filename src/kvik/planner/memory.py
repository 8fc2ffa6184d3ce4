"""Keys and values, weights and a step's intermediate results in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.cache.spec import BLOCK_SIZE, MIN_SEQUENCES, GroupKind, whole_superblocks
from kvik.config import TOKEN_BUDGET, EngineConfig
from kvik.experts import ExpertsRead
from kvik.planner.shape import ModelShape
from kvik.planner.weights import WeightFormat, file_bytes, held_bytes

MAX_RUNNING = EngineConfig().max_running
"""Most sequences that run at once: the engine's default."""

GATED_TOKENS = 60
"""Tokens for which both halves of the MLP are there at once (native/project.cpp)."""

MLP_WIDTH = 4
"""The MLP's width in hidden sizes, where the facts do not tell it."""

VOCABULARY_ENTRY_BYTES = 192
"""What a vocabulary of 49,152 tokens and as many merges was measured to take in the tokenizer, for each token.

The pages of the file that it was read from are given back. One of SentencePiece takes more, some 280 bytes a token.
"""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one kind of layers remembers."""

    kind: GroupKind
    name: str
    num_layers: int
    token_bytes: int  # of one token, in all of these layers
    window: int | None
    sequence_tokens: int  # remembered of one sequence
    num_blocks: int  # of all sequences, in whole superblocks as the engine allocates them
    num_bytes: int  # of those


@dataclass(frozen=True, slots=True)
class KVMemory:
    """What the cache takes, in one type of keys and values."""

    dtype: str
    token_bytes: int  # one more token, while no window is full
    token_bytes_at_context: int  # one more token, behind `context` of them
    sequence_bytes: int  # one sequence alone, in whole blocks
    num_bytes: int  # all sequences, as the engine allocates it
    layers: tuple[LayerMemory, ...]


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """What the weights take."""

    format: str
    held_bytes: int  # as kvik holds them
    file_bytes: int
    step_bytes: int | None  # of these, what a decode step of one sequence reads; None: not known
    experts: ExpertsRead | None = None  # of all layers, where it is known how many are chosen of how many

    def bytes_for(self, num_tokens: int) -> int | None:
        """What a step of so many tokens reads; `None`: not known."""
        if self.step_bytes is None or self.experts is None:
            return self.step_bytes
        return self.step_bytes + round(self.experts.bytes_for(num_tokens) - self.experts.bytes_for(1))


def kv_memory(shape: ModelShape, dtype: str, context: int, *, users: int = 1, prefix: int = 0) -> KVMemory:
    """The cache of `users` sequences of `context` tokens, the first `prefix` of which are the same for all.

    Only whole blocks are shared, and none in layers with a window. Those have room
    for `MIN_SEQUENCES` sequences at least, and for what a step computes beside what they keep.
    """
    spec = shape.kv_spec(dtype)
    whole = _pool_blocks(context, users, prefix)
    size = spec.pool_size(
        whole,
        context=context,
        step_tokens=TOKEN_BUDGET,
        max_running=max(users, MAX_RUNNING),
        min_sequences=max(users, MIN_SEQUENCES),
    )
    layers = tuple(
        LayerMemory(
            kind=group.kind,
            name=group.name,
            num_layers=group.num_layers,
            token_bytes=group.token_bytes,
            window=group.window,
            sequence_tokens=group.num_tokens(context),
            num_blocks=num_blocks if block_bytes else 0,
            num_bytes=num_blocks * block_bytes,
        )
        for group, num_blocks, block_bytes in zip(spec.groups, size.group_blocks, spec.group_block_bytes, strict=True)
    )
    return KVMemory(
        dtype=spec.dtype,
        token_bytes=spec.token_bytes,
        token_bytes_at_context=shape.token_bytes_at(context, dtype),
        sequence_bytes=spec.held_bytes(context),
        num_bytes=spec.pool_bytes(size),
        layers=layers,
    )


def _pool_blocks(tokens: int, users: int, prefix: int) -> int:
    """Whole superblocks for so many tokens of each user, whose first ones are shared."""
    shared = min(prefix, tokens) // BLOCK_SIZE
    return whole_superblocks(shared + users * (-(-tokens // BLOCK_SIZE) - shared))


def weight_memory(shape: ModelShape, form: WeightFormat | None) -> WeightMemory | None:
    """The weights in a format, or (None) as the model's file has them; `None` where their number is not known."""
    tensors = shape.tensors
    if form is None and tensors is not None:
        return WeightMemory(tensors.format, tensors.held_bytes, tensors.file_bytes, tensors.step_bytes, tensors.experts)
    if form is None or shape.num_params is None:
        return None
    active = shape.active_params
    return WeightMemory(
        format=form.name,
        held_bytes=held_bytes(shape.num_params, form),
        file_bytes=file_bytes(shape.num_params, form),
        step_bytes=None if active is None else held_bytes(active, form),
        experts=_experts(shape, form),
    )


def _experts(shape: ModelShape, form: WeightFormat) -> ExpertsRead | None:
    """Of all layers together, from what one token leaves out."""
    number, chosen, active = shape.num_experts, shape.num_chosen_experts, shape.num_active_params
    if active is None or shape.num_params is None or chosen >= number:
        return None
    return ExpertsRead(number, chosen, held_bytes((shape.num_params - active) // (number - chosen), form))


def activation_bytes(shape: ModelShape, context: int, users: int) -> int:
    """Intermediate results of the largest step, and the logits that each sequence ends with.

    Per token in float32: hidden states, queries, what was attended and its sums (native/program.cpp shares places of
    equal width), one half of the MLP, new keys and values; and the widest row once more in 8 bits with the scales and
    sums of its groups of 32. The other half of the MLP is there for some tokens at a time, that of experts for all, and
    each token's row once more for each expert that it chose (native/experts.cpp). Embeddings that layers have for
    themselves: rows of their table, what is added to them, and the sum.
    An estimate, which tests/planner/test_growth.py checks against the engine's growth.
    """
    queries = shape.num_heads * shape.head_dim
    width = shape.intermediate_size or MLP_WIDTH * shape.hidden_size
    rows = 4 * queries if queries == shape.hidden_size else 2 * shape.hidden_size + 3 * queries
    floats = rows + width + 2 * shape.num_kv_heads * shape.head_dim + 3 * shape.layer_embeddings_width
    widest = max(shape.hidden_size, queries, width)
    num_tokens = max(min(TOKEN_BUDGET, context), users)
    half = 4 * width * min(num_tokens, num_tokens if shape.is_mixture else GATED_TOKENS)
    grouped = shape.num_chosen_experts * (shape.hidden_size + 28 * shape.hidden_size // 32) + 8 * shape.num_experts
    results = num_tokens * (4 * floats + widest + 28 * widest // 32 + grouped)
    return results + half + 4 * users * shape.vocab_size


def table_bytes(shape: ModelShape, context: int) -> int:
    """What kvik holds beside the weights of a model that it runs: each position's rotation, and the vocabulary."""
    if not shape.runs:
        return 0
    return context * shape.rope_token_bytes + VOCABULARY_ENTRY_BYTES * shape.vocab_size
