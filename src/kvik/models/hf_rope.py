"""Rotary embeddings as a checkpoint's config.json describes them.

Source: modeling_rope_utils of transformers 5, and the fields that versions before it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.models.config_fields import MOST_CONTEXT, ConfigFields
from kvik.models.rope_scaling import llama3_factors, longrope_magnitude, yarn_factors, yarn_magnitude
from kvik.models.spec import RopeSpec

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rotary:
    """Defaults of a family's rotary embedding."""

    theta: float = 10_000.0
    partial: float = 1.0  # of a head's dimensions
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"


def read_ropes(config: ConfigFields, rotary: Rotary, head_dim: int, context: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see all, and of those with a window."""
    theta, partial = config.number(rotary.theta_key, rotary.theta), config.number(rotary.partial_key, rotary.partial)
    given = config.object("rope_parameters") or config.object("rope_scaling") or ConfigFields({}, config.path)
    local = config.optional_number("rope_local_base_freq")
    inner = [given.object(kind) for kind in ("full_attention", "sliding_attention")]
    if config.text("model_type") == "gemma3_text":
        local = local or 10_000.0
        everywhere, in_windows = inner[0] or given, inner[1] or ConfigFields({}, config.path)
        return (
            _rope(config, everywhere, theta, partial, head_dim, context),
            _rope(config, in_windows, local, partial, head_dim, context),
        )
    both = _rope(config, inner[0] or given, theta, partial, head_dim, context)
    return both, both if inner[1] is None else _rope(config, inner[1], theta, partial, head_dim, context)


def _rope(
    config: ConfigFields, given: ConfigFields, theta: float, partial: float, head_dim: int, context: int
) -> RopeSpec:
    """One rotary embedding; `theta` and `partial` hold where its own fields do not say."""
    kind = given.text("rope_type", given.text("type", "default"))
    if kind in ("su", "yarn") and config.text("model_type") == "phi3":
        kind = "longrope"  # as the first Phi-3 configs called it
    theta = given.number("rope_theta", theta, above=1.0)
    num_dims = int(head_dim * given.number("partial_rotary_factor", partial, most=1.0))
    original = config.optional("original_max_position_embeddings") or given.count(
        "original_max_position_embeddings", context, most=MOST_CONTEXT
    )
    stretch = context / original
    match kind:
        case "default":
            return RopeSpec(theta, num_dims, adjacent_pairs=False)
        case "linear":
            return RopeSpec(theta, num_dims, adjacent_pairs=False, factors=given.number("factor"))
        case "llama3":
            low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
            if low >= high:
                raise config.error(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
            factors = llama3_factors(
                theta, num_dims, factor=given.number("factor"), low=low, high=high, original_context=original
            )
            return RopeSpec(theta, num_dims, adjacent_pairs=False, factors=factors)
        case "yarn":
            factor = given.number("factor", stretch)
            weights = [given.optional_number(key) for key in ("mscale", "mscale_all_dim")]
            magnitude = yarn_magnitude(factor)
            if all(weights):
                magnitude = yarn_magnitude(factor, weights[0] or 1.0) / yarn_magnitude(factor, weights[1] or 1.0)
            factors = yarn_factors(
                theta,
                num_dims,
                factor=factor,
                original_context=original,
                beta_fast=given.number("beta_fast", 32.0),
                beta_slow=given.number("beta_slow", 1.0),
                whole=given.flag("truncate", True),
            )
            magnitude = given.number("attention_factor", magnitude)
            return RopeSpec(theta, num_dims, adjacent_pairs=False, factors=factors, magnitude=magnitude)
        case "longrope":
            key = "short_factor" if context <= original else "long_factor"
            divisors = given.list(key, num_dims // 2, (int, float))
            if divisors is None or min(divisors, default=1) <= 0:
                raise config.error(f"{key} must be a list of {num_dims // 2} positive numbers")
            magnitude = longrope_magnitude(given.number("factor", stretch), original)
            magnitude = given.number("attention_factor", magnitude)
            return RopeSpec(
                theta, num_dims, adjacent_pairs=False, factors=tuple(map(float, divisors)), magnitude=magnitude
            )
    raise config.error(f"rope_type {kind!r:.60} is not one that kvik runs", f"kvik runs {', '.join(_KINDS)}")
