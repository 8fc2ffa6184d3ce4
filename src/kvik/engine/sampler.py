"""From logits to a token, random only through (seed, position): the reference in NumPy, and the native sampler."""

from __future__ import annotations

from kvik.engine.sampler_native import NativeSampler
from kvik.engine.sampler_reference import NumpySampler
from kvik.engine.sampling import Sampled, Sampler, SampleRow
from kvik.ops.base import Ops

__all__ = ["NativeSampler", "NumpySampler", "SampleRow", "Sampled", "Sampler", "make_sampler"]


def make_sampler(ops: Ops) -> Sampler:
    """The native one where the ops have a core for it."""
    core = ops.row_sampler()
    return NumpySampler() if core is None else NativeSampler(core)
