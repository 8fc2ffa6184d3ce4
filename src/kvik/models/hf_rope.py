"""Rotary embeddings as a checkpoint's config.json describes them.

Source: modeling_rope_utils of transformers 5, and the fields that versions before it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from kvik.files.config_fields import MAX_CONTEXT, ConfigFields
from kvik.models.rope_scaling import llama3_factors, longrope_magnitude, yarn_factors, yarn_magnitude
from kvik.models.spec import RopeSpec

_Scaling: TypeAlias = tuple[tuple[float, ...] | float, float]
"""Divisors of the frequencies, and the magnitude of cosine and sine."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Defaults of a family's rotary embedding."""

    theta: float = 10_000.0
    partial: float = 1.0  # of a head's dimensions
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    rotates_part: bool = False  # whether the class looks at the part where the embedding is not stretched
    windows_plain: bool = False  # layers with a window are not stretched
    windows_theta: float | None = None  # of layers with a window; None: the same
    adjacent_pairs: bool = False  # dimensions (2i, 2i+1) rotate together, else halves of a head


PLAIN_ROTARY = Rotary()


def read_ropes(
    config: ConfigFields, rotary: Rotary, head_dims: tuple[int, int], context: int, used: int
) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see all, and of those with a window, whose heads are of these sizes.

    `used` is how much of the model's context will be.
    """
    theta = config.number(rotary.theta_key, rotary.theta, above=1.0)
    partial = config.number(rotary.partial_key, rotary.partial, maximum=1.0)
    given = rope_fields(config)
    inner = [given.object(kind) for kind in ("full_attention", "sliding_attention")]
    everywhere = _rope(config, rotary, inner[0] or given, theta, partial, head_dims[0], context, used)
    if inner[1] is None and not rotary.windows_plain:
        return everywhere, everywhere
    windows_theta = config.number("rope_local_base_freq", rotary.windows_theta or theta, above=1.0)
    in_windows = inner[1] or ConfigFields({}, config.path)
    return everywhere, _rope(config, rotary, in_windows, windows_theta, partial, head_dims[1], context, used)


def rope_fields(config: ConfigFields) -> ConfigFields:
    """What the config says of stretched embeddings, under the old name or the new one."""
    old, new = config.object("rope_scaling"), config.object("rope_parameters")
    return old if old and old.fields else new or ConfigFields({}, config.path)


def _rope(
    config: ConfigFields,
    rotary: Rotary,
    given: ConfigFields,
    theta: float,
    partial: float,
    head_dim: int,
    context: int,
    used: int,
) -> RopeSpec:
    """One rotary embedding; `theta` and `partial` hold where its own fields do not say."""
    kind = given.text("rope_type", given.text("type", "default"))
    if kind in ("su", "yarn") and config.text("model_type") == "phi3":
        kind = "longrope"  # as the first Phi-3 configs called it
    is_stretched = kind == "dynamic" and config.text("model_type") == "hunyuan_v1_dense" and bool(given.find("alpha"))
    if is_stretched:
        kind = "default"  # but for theta: Hunyuan's is the same at every length
    if kind not in (*_SCALINGS, "proportional"):
        known = f"kvik runs {', '.join(_SCALINGS)} and proportional"
        raise config.error(f"rope_type {kind!r:.60} is not one that kvik runs", known)
    theta = given.number("rope_theta", theta, above=1.0)
    partial = given.number("partial_rotary_factor", partial, maximum=1.0)
    if kind == "proportional":  # a part of the pairs rotate, as fast as they would among all
        num_rotating = int(partial * head_dim // 2)
        return RopeSpec(theta, head_dim, False, given.number("factor", 1.0), num_rotating=num_rotating)
    num_dims = int(head_dim * partial) if rotary.rotates_part or kind != "default" else head_dim
    original = config.optional("original_max_position_embeddings") or given.count(
        "original_max_position_embeddings", context, maximum=MAX_CONTEXT
    )
    if is_stretched and num_dims > 2:
        theta *= _mild(given, "alpha") ** (num_dims / (num_dims - 2))
    factors, magnitude = _SCALINGS[kind](given, _Span(theta, num_dims, context, original, used))
    return RopeSpec(theta, num_dims, adjacent_pairs=rotary.adjacent_pairs, factors=factors, magnitude=magnitude)


@dataclass(frozen=True, slots=True)
class _Span:
    """What is stretched: pairs that rotate by powers of theta, from the original context to the whole one."""

    theta: float
    num_dims: int
    context: int
    original: int
    used: int  # of the context


def _mild(given: ConfigFields, key: str, default: float | None = None) -> float:
    """A number with which frequencies stay numbers."""
    return given.number(key, default, above=1e-6, maximum=1e6)


def _default(given: ConfigFields, span: _Span) -> _Scaling:
    return 1.0, 1.0


def _linear(given: ConfigFields, span: _Span) -> _Scaling:
    return _mild(given, "factor"), 1.0


def _llama3(given: ConfigFields, span: _Span) -> _Scaling:
    low, high = _mild(given, "low_freq_factor"), _mild(given, "high_freq_factor")
    if low >= high:
        raise given.error(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    factor = _mild(given, "factor")
    factors = llama3_factors(
        span.theta, span.num_dims, factor=factor, low=low, high=high, original_context=span.original
    )
    return factors, 1.0


def _yarn(given: ConfigFields, span: _Span) -> _Scaling:
    factor = _mild(given, "factor", span.context / span.original)
    magnitude = yarn_magnitude(factor)
    if given.find("mscale") and given.find("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, _mild(given, "mscale"))
        magnitude /= yarn_magnitude(factor, _mild(given, "mscale_all_dim"))
    factors = yarn_factors(
        span.theta,
        span.num_dims,
        factor=factor,
        original_context=span.original,
        beta_fast=_mild(given, "beta_fast", 32.0),
        beta_slow=_mild(given, "beta_slow", 1.0),
        whole=given.flag("truncate", True),
    )
    return factors, _mild(given, "attention_factor", magnitude)


def _longrope(given: ConfigFields, span: _Span) -> _Scaling:
    """One set of factors for all tokens, by the context that will be used: a key that is kept must not change."""
    key = "short_factor" if span.used <= span.original else "long_factor"
    num_pairs = span.num_dims // 2
    divisors = given.list(key, num_pairs, (int, float))
    if divisors is None or not all(1e-6 < divisor <= 1e6 for divisor in divisors):
        raise given.error(f"{key} must be a list of {num_pairs} numbers above 1e-06, up to 1e+06")
    factor = _mild(given, "factor", span.context / span.original)
    if span.original < 2:
        raise given.error(f"original_max_position_embeddings is {span.original}; it must be 2 or more")
    magnitude = _mild(given, "attention_factor", longrope_magnitude(factor, span.original))
    return tuple(map(float, divisors)), magnitude


_SCALINGS: Mapping[str, Callable[[ConfigFields, _Span], _Scaling]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
