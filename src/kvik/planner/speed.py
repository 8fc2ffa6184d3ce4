"""A roofline: the time that reading and arithmetic take at best, and which of the two binds.

Source: Williams, Waterman and Patterson (2009). A step reads each weight once for all of its tokens and each
sequence's keys and values once, and multiplies and adds every weight with every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvik.cache import GroupSpec
from kvik.cache.spec import attention_multiply_adds
from kvik.planner.fit import Load
from kvik.planner.memory import weight_memory
from kvik.planner.shape import ModelShape

READ_EFFICIENCY = 0.7
"""The part of a catalogue device's bandwidth that a good engine reaches in decode. An assumption, and shown as such."""

COMPUTE_EFFICIENCY = 0.5
"""The part of its arithmetic that a good engine reaches in prefill. An assumption, and shown as such."""

Resource = Literal["bandwidth", "arithmetic"]


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a machine does, and how much of that an engine reaches."""

    name: str
    bytes_per_s: float | None
    operations_per_s: float | None  # on weights; a multiply-add is two
    attention_operations_per_s: float | None
    read_efficiency: float  # of decode
    compute_efficiency: float  # of prefill
    is_measured: bool  # on this machine; else a catalogue's figures and assumed efficiencies


@dataclass(frozen=True, slots=True)
class PhaseSpeed:
    """One phase: what it takes, and what binds."""

    phase: Literal["decode", "prefill"]
    num_tokens: int  # of one step of decode, or of the whole prompt
    read_bytes: int
    operations: int
    read_s: float | None  # at the efficiency; None: the figure is not known
    compute_s: float | None

    @property
    def seconds(self) -> float | None:
        """Of the step or the prompt; `None` where a limit that matters is not known."""
        needed = (self.read_s,) if self.phase == "decode" and self.compute_s is None else (self.read_s, self.compute_s)
        known = [one for one in needed if one is not None]
        return max(known) if len(known) == len(needed) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of all sequences together."""
        seconds = self.seconds
        return None if seconds is None else self.num_tokens / seconds

    @property
    def binds(self) -> Resource | None:
        """What it waits for; `None` where not both limits are known."""
        if self.read_s is None or self.compute_s is None:
            return None
        return "bandwidth" if self.read_s >= self.compute_s else "arithmetic"


def speeds(load: Load, roofline: Roofline) -> tuple[PhaseSpeed, PhaseSpeed] | None:
    """Decode behind a full context, one token for each user, and prefill of one prompt of that length.

    `None` where the number of weights that a token is multiplied with is not known.
    """
    shape, params = load.shape, load.shape.active_params
    weights = weight_memory(shape, load.weights)
    if params is None or weights is None or (step_bytes := weights.step_bytes) is None:
        return None

    def read_of_weights(num_tokens: int) -> int:
        """Of a mixture whose experts are not counted, each token may choose others: at most all of them."""
        if shape.is_mixture and weights.experts is None:
            return min(weights.held_bytes, step_bytes * num_tokens)
        return weights.bytes_for(num_tokens) or step_bytes

    def speed(
        phase: Literal["decode", "prefill"], tokens: int, read: int, on_weights: int, attention: int
    ) -> PhaseSpeed:
        efficiency = roofline.read_efficiency if phase == "decode" else roofline.compute_efficiency
        read_s = None if roofline.bytes_per_s is None else read / (roofline.bytes_per_s * efficiency)
        compute_s = None
        if roofline.operations_per_s is not None and roofline.attention_operations_per_s is not None:
            compute_s = on_weights / roofline.operations_per_s + attention / roofline.attention_operations_per_s
            compute_s /= efficiency
        return PhaseSpeed(phase, tokens, read, on_weights + attention, read_s, compute_s)

    decode = speed(
        "decode",
        load.users,
        read_of_weights(load.users) + _kv_read_bytes(load),
        2 * params * load.users,
        load.users * attention_operations(shape, load.context),
    )
    prompt = load.context
    prefill = speed(
        "prefill",
        prompt,
        read_of_weights(prompt),
        2 * params * prompt,
        sum(_prompt_operations(shape, group, prompt) for group in shape.groups),
    )
    return decode, prefill


def attention_operations(shape: ModelShape, context: int) -> int:
    """Operations of one new token's attention: with each key and each value that is remembered."""
    return sum(_key_operations(shape, group) * group.num_tokens(context) for group in shape.groups)


def _key_operations(shape: ModelShape, group: GroupSpec) -> int:
    """Of one query's attention to one token in a group's layers."""
    # In MLA queries are brought into the latent's space (DeepSeek-V2, absorbed matrices).
    value_dim = 0 if group.value is None else group.value.num_items
    num_layers = shape.num_readers(group)
    return 2 * num_layers * attention_multiply_adds(shape.num_heads, group.key.num_items, value_dim)


def _prompt_operations(shape: ModelShape, group: GroupSpec, prompt: int) -> int:
    """Of a whole prompt: the first token sees one, the next two, up to the window."""
    window = group.num_tokens(prompt)
    seen = window * (window + 1) // 2 + (prompt - window) * window
    return _key_operations(shape, group) * seen


def _kv_read_bytes(load: Load) -> int:
    """Keys and values that one step of decode reads: a shared prefix once for all."""
    total = 0
    for group in load.shape.kv_spec(load.kv_dtype).groups:
        tokens = group.num_tokens(load.context)
        shared = min(load.prefix, tokens) if tokens == load.context else 0
        read_bytes = group.token_bytes * load.shape.num_readers(group) // max(1, group.num_layers)
        total += read_bytes * (shared + load.users * (tokens - shared))
    return total
