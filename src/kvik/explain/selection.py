"""Which layers and heads are drawn, so that a page stays small enough to be sent and opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvik.cache import KVCacheSpec
from kvik.errors import InvalidInput
from kvik.models.spec import DecoderSpec

MAX_DRAWN_LAYERS = 5
AIMED_BYTES = 1_100_000
"""What queries, keys and values take at most in a page of which nobody says how much is drawn."""

MAX_DRAWN_BYTES = 16_000_000
"""What they may take where somebody does."""

_TEXT_BYTES = 4 / 3
"""Of a byte in base64 (RFC 4648)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Layers, and KV heads in each of them with all query heads that share them."""

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]

    def query_heads(self, spec: DecoderSpec) -> list[int]:
        """Those that share the KV heads."""
        queries_per_kv = spec.num_heads // spec.num_kv_heads
        return [kv_head * queries_per_kv + each for kv_head in self.kv_heads for each in range(queries_per_kv)]

    def num_bytes(self, spec: DecoderSpec, kv_spec: KVCacheSpec, num_tokens: int) -> int:
        """What their queries, keys and values take in a page."""
        queries = 4 * spec.num_heads // spec.num_kv_heads
        keys_and_values = 2 * (2 if kv_spec.dtype == "f16" else 4)
        head_bytes = num_tokens * spec.head_dim * (queries + keys_and_values)
        return int(_TEXT_BYTES * len(self.layers) * len(self.kv_heads) * head_bytes)


def select(
    spec: DecoderSpec,
    kv_spec: KVCacheSpec,
    num_tokens: int,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
) -> Selection:
    """The layers and KV heads that were asked for; where nothing was, some from the first to the last that fit.

    Layers whose heads are of another shape than the first one's are not drawn. Raises `InvalidInput` for numbers that
    the model lacks, and for more than a page can hold.
    """
    _check("layer", layers, spec.num_layers)
    shapes = [(spec.num_kv_heads_of(layer), spec.head_dim_of(layer)) for layer in spec.layers]
    drawable = [index for index, shape in enumerate(shapes) if shape == (spec.num_kv_heads, spec.head_dim)]
    other = next((index for index in layers or () if index not in drawable), None)
    if other is not None:
        shape, drawn = (f"{heads} KV heads of {dim} dimensions" for heads, dim in (shapes[other], shapes[drawable[0]]))
        raise InvalidInput(
            f"layer {other} has {shape}; a page shows layers that have {drawn}",
            hint=f"name some of {', '.join(map(str, drawable[:8]))}{' ...' if len(drawable) > 8 else ''}",
        )
    _check("KV head", kv_heads, spec.num_kv_heads)
    heads = tuple(kv_heads if kv_heads is not None else range(spec.num_kv_heads))
    if layers is not None:
        chosen = Selection(tuple(layers), heads)
        needed = chosen.num_bytes(spec, kv_spec, num_tokens)
        if needed > MAX_DRAWN_BYTES:
            raise InvalidInput(
                f"{len(layers):,} layers x {len(heads):,} KV heads x {num_tokens:,} tokens take {needed / 1e6:,.0f} MB"
                f" of a page, which holds {MAX_DRAWN_BYTES / 1e6:,.0f} MB of them",
                hint="name fewer with --layers and --kv-heads, or write fewer tokens",
            )
        return chosen
    for count in range(min(MAX_DRAWN_LAYERS, len(drawable)), 0, -1):
        chosen = Selection(tuple(drawable[place] for place in _spread(count, len(drawable))), heads)
        if chosen.num_bytes(spec, kv_spec, num_tokens) <= AIMED_BYTES:
            return chosen
    while kv_heads is None and len(heads) > 1 and chosen.num_bytes(spec, kv_spec, num_tokens) > AIMED_BYTES:
        heads = heads[: len(heads) // 2]
        chosen = Selection(chosen.layers, heads)
    return chosen


def _spread(count: int, total: int) -> tuple[int, ...]:
    """So many of the numbers below `total`, evenly from the first to the last."""
    return (total // 2,) if count == 1 else tuple(index * (total - 1) // (count - 1) for index in range(count))


def _check(what: str, numbers: Sequence[int] | None, total: int) -> None:
    for number in numbers or ():
        if number >= total:
            raise InvalidInput(
                f"there is no {what} {number:,}: the model has {total:,}",
                hint=f"give numbers from 0 to {total - 1:,}",
            )
