"""A decoder's shape from a GGUF file's metadata; what no key tells is in gguf_architectures.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile
from kvik.models.gguf_architectures import ARCHITECTURES, Scores
from kvik.models.gguf_source import read_divisors
from kvik.models.rope_scaling import yarn_factors, yarn_magnitude
from kvik.models.spec import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_LAYERS,
    OTHER_MODEL,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    QueryScale,
    RopeSpec,
)
from kvik.ops.base import Routing

MAX_COUNT = 1 << 24  # of any one dimension or count: far above every published model
STILL = 1e30  # a divisor that stands for no rotation at all (Gemma 4)


_GATING_FUNCTIONS: Mapping[int, Scores] = {1: "softmax", 2: "sigmoid", 3: "logits"}
"""By the numbers that files have for them; the last is the softmax over the chosen experts' logits."""

_REFUSED = {
    "attention.max_alibi_bias": "ALiBi",
    "attention.clamp_kqv": "clamped queries, keys and values",
    "nextn_predict_layers": "layers that predict several tokens",
}
"""Keys that ask for something kvik does not run, where they are not 0."""

_OWN_KEYS = {
    "attention.scale": ("granite", "granitemoe"),
    "embedding_scale": ("granite", "granitemoe"),
    "residual_scale": ("granite", "granitemoe"),
    "logit_scale": ("granite", "granitemoe", "cohere2", "command-r"),
    "attention.temperature_scale": ("mistral3",),
    "attention.temperature_length": (),
    "rope.scaling.yarn_log_multiplier": ("mistral3",),
    "rope.dimension_sections": (),  # with them halves of a head rotate where pairs did
    "attn_logit_softcapping": ("gemma2",),
    "final_logit_softcapping": ("gemma2", "gemma3", "gemma4"),
    "attention.shared_kv_layers": ("gemma4",),
    "embedding_length_per_layer_input": ("gemma4",),
}
"""Keys that change what is computed, and the architectures that have them."""


_LACKING = {"gemma3n": "AltUp (several hidden states for each token) and LAuReL (low-rank residuals)"}
"""Architectures that need what kvik does not have."""


def read_spec(file: GGUFFile, context: int | None = None) -> DecoderSpec:
    """The decoder's shape from the metadata. Raises `ModelError` for what kvik does not run.

    `context` is that of the sequences to come, where it is shorter than the model's: LongRoPE has other divisors then.
    """
    architecture = file.get_str("general.architecture")
    if architecture in _LACKING:
        what = f"architecture {architecture!r} needs {_LACKING[architecture]}, which kvik does not run"
        raise ModelError(f"{file.path}: {what}", hint=OTHER_MODEL)
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: architecture {architecture!r:.60} is not one that kvik runs",
            hint=f"kvik runs {', '.join(ARCHITECTURES)}: docs/models.md",
        )
    return _Reader(file, architecture).read(context)


class _Reader:
    """The keys of one file, each taken by name and checked."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture
        self.facts = ARCHITECTURES[architecture]

    def read(self, context: int | None) -> DecoderSpec:
        file, facts = self.file, self.facts
        self.check_refused()
        hidden_size = self.count("embedding_length")
        num_heads = self.count("attention.head_count", maximum=hidden_size)
        head_dim = self.count("attention.key_length", max(1, hidden_size // num_heads), maximum=MAX_HEAD_DIM)
        context_length = self.count("context_length")
        num_layers = self.count("block_count", maximum=MAX_LAYERS)
        widths = self.per_layer("feed_forward_length", num_layers)
        kv_heads = self.per_layer("attention.head_count_kv", num_layers, num_heads)
        layers = self.layers(num_layers, head_dim, context_length, context or context_length)
        dims = [layer.head_dim or head_dim for layer in layers]
        logit_scale = self.factor("logit_scale", 1.0)
        wide_scale = (hidden_size // num_heads) ** -0.5 if num_layers == facts.layers_of_wide_scale else None
        experts, sparse = self.experts(num_layers)
        spec = DecoderSpec(
            architecture=self.architecture,
            hidden_size=hidden_size,
            intermediate_size=widths[0],
            num_heads=num_heads,
            num_kv_heads=kv_heads[0],
            head_dim=dims[0],
            vocab_size=file.tensor("token_embd.weight").shape[0],
            context_length=context_length,
            layers=tuple(
                replace(
                    layer,
                    num_kv_heads=None if heads == kv_heads[0] else heads,
                    head_dim=None if dim == dims[0] else dim,
                    intermediate_size=None if width == widths[0] else width,
                    sparse=index in sparse,
                )
                for index, (layer, heads, dim, width) in enumerate(zip(layers, kv_heads, dims, widths, strict=True))
            ),
            tied_head="output.weight" not in file.tensors,
            norm=facts.norm,
            norm_eps=self.number(f"attention.layer_norm{'_rms' * (facts.norm == 'rms')}_epsilon", maximum=1.0),
            norm_bias=facts.norm == "layer" and "output_norm.bias" in file.tensors,
            norm_places=facts.norm_places,
            qk_norm=facts.qk_norm,
            value_norm=facts.value_norm,
            qk_norm_after_rope=facts.qk_norm_after_rope,
            qkv_bias=self.has_bias("attn_q") or self.has_bias("attn_qkv"),
            output_bias=self.has_bias("attn_output"),
            mlp_bias=self.has_bias("ffn_up"),
            head_bias="output.bias" in file.tensors,
            attention_scale=self.number("attention.scale", facts.attention_scale) or wide_scale,
            attention_soft_cap=self.number("attn_logit_softcapping", facts.attention_soft_cap) or None,
            sinks="blk.0.attn_sinks.weight" in file.tensors,
            query_scale=self.query_scale(context_length),
            activation=facts.activation,
            xielu=facts.xielu,
            gated=facts.gated,
            experts=experts,
            parallel=self.parallel(),
            num_learned_positions=context_length if facts.pairs is None else 0,
            embedding_scale=self.factor("embedding_scale", math.sqrt(hidden_size) if facts.scales_embedding else 1.0),
            residual_scale=self.factor("residual_scale", 1.0),
            layer_scales="blk.0.layer_output_scale.weight" in file.tensors,
            layer_embedding_size=file.get_int(
                f"{self.architecture}.embedding_length_per_layer_input", 0, minimum=0, maximum=MAX_COUNT
            ),
            logit_scale=1.0 / logit_scale if facts.divides_logits else logit_scale,
            logit_soft_cap=self.number("final_logit_softcapping", facts.logit_soft_cap) or None,
        )
        if problem := spec.problem():
            raise self.refuse(problem)
        value_dim = self.count("attention.value_length", head_dim)
        if value_dim != head_dim:
            raise self.refuse(f"keys have {head_dim} dimensions, values {value_dim}: they must have as many")
        return spec

    def check_refused(self) -> None:
        for key, what in _REFUSED.items():
            if self.file.metadata.get(f"{self.architecture}.{key}", 0) not in (0, False):
                raise self.refuse(f"{what} ({self.architecture}.{key}), which kvik does not run yet")
        if not self.file.get_bool(f"{self.architecture}.attention.causal", True):
            raise self.refuse("attention to later tokens, which kvik does not run")
        for key, owners in _OWN_KEYS.items():
            if f"{self.architecture}.{key}" in self.file.metadata and self.architecture not in owners:
                raise self.refuse(f"{self.architecture}.{key}, which kvik does not know of this architecture")

    def parallel(self) -> Literal["none", "one_norm", "two_norms"]:
        if self.facts.parallel == "none" or not self.file.get_bool(f"{self.architecture}.use_parallel_residual", True):
            return "none"
        return "two_norms" if "blk.0.attn_norm_2.weight" in self.file.tensors else self.facts.parallel

    def experts(self, num_layers: int) -> tuple[ExpertsSpec | None, Collection[int]]:
        """The experts, and the layers that have some: those that have a router."""
        router, tensors = self.facts.router, self.file.tensors
        number = self.file.get_int(f"{self.architecture}.expert_count", 0, minimum=0, maximum=MAX_EXPERTS)
        if not number:
            return None, ()
        if router is None:
            raise self.refuse(f"a mixture of experts ({self.architecture}.expert_count), which kvik does not run yet")
        sparse = [index for index in range(num_layers) if f"blk.{index}.ffn_gate_inp.weight" in tensors]
        if not sparse:
            raise self.refuse(f"{number:,} experts, and no layer with a tensor 'ffn_gate_inp.weight'")
        first = f"blk.{sparse[0]}"
        own_norms = f"{first}.pre_ffw_norm_2.weight" in tensors
        of_shared = f"{first}.ffn_down{'' if own_norms else '_shexp'}.weight"
        names = (f"{first}.ffn_down_exps.weight", f"{first}.ffn_down.0.weight", of_shared)
        alone, one_each, shared = (tensors[name].shape[-1] if name in tensors else None for name in names)
        scores, gating = router.scores, self.file.get_int(f"{self.architecture}.expert_gating_func", 0)
        if gating:
            if gating not in _GATING_FUNCTIONS:
                raise self.refuse(f"{self.architecture}.expert_gating_func {gating}, which kvik does not run")
            scores = _GATING_FUNCTIONS[gating]
        routing = Routing(
            self.count("expert_used_count"),
            scores,
            renormalize=self.file.get_bool(f"{self.architecture}.expert_weights_norm", router.renormalize),
            scale=self.number("expert_weights_scale", 0.0) or 1.0,
            num_groups=self.count("expert_group_count", 1),
            num_chosen_groups=self.count("expert_group_used_count", 1),
        )
        experts = ExpertsSpec(
            num_experts=number,
            intermediate_size=self.count("expert_feed_forward_length", alone or one_each),
            routing=routing,
            router_bias=f"{first}.ffn_gate_inp.bias" in tensors,
            choice_bias=f"{first}.exp_probs_b.bias" in tensors,
            scales=f"{first}.ffn_down_exps.scale" in tensors,
            bias=f"{first}.ffn_down_exps.bias" in tensors,
            own_norms=own_norms,
            shared_size=self.file.get_int(
                f"{self.architecture}.expert_shared_feed_forward_length", shared or 0, minimum=0, maximum=MAX_COUNT
            ),
            shared_gate=f"{first}.ffn_gate_inp_shexp.weight" in tensors,
        )
        return experts, sparse

    def query_scale(self, context_length: int) -> QueryScale | None:
        beta = self.number("attention.temperature_scale", 0.0, maximum=1e3)
        original = self.count("rope.scaling.original_context_length", context_length)
        return QueryScale(beta, original) if beta else None

    def layers(self, num_layers: int, head_dim: int, context_length: int, context: int) -> tuple[LayerSpec, ...]:
        facts = self.facts
        slides, window = self.windows(num_layers, context_length)
        dim_of_windows = self.dim_of_windows(head_dim)
        has_rope = not facts.rope_switch or self.file.get_bool(f"{self.architecture}.rope.scaling.finetuned", True)
        if facts.pairs is None or not has_rope:
            return tuple(LayerSpec(None, window if slide else None) for slide in slides)
        theta = self.theta("rope.freq_base", 10_000.0)
        everywhere = self.rope(theta, head_dim, context_length, context, scaled=True)
        in_windows = everywhere
        if any(slides):
            local_theta = self.theta("rope.freq_base_swa", facts.local_theta or theta)
            in_windows = self.rope(local_theta, dim_of_windows, context_length, context, scaled=facts.local_scaling)
        every = facts.nope_pattern or num_layers + 1
        nope_full = facts.nope_full and self.window() > 0
        return tuple(
            LayerSpec(
                rope=None
                if index % every == every - 1 or (nope_full and not slide)
                else in_windows
                if slide
                else everywhere,
                window=window if slide else None,
                head_dim=dim_of_windows if slide and dim_of_windows != head_dim else None,
                kv_from=owner,
                keys_as_values=owner is None and self.keys_are_values(index),
            )
            for index, (slide, owner) in enumerate(zip(slides, self.owners(slides), strict=True))
        )

    def dim_of_windows(self, head_dim: int) -> int:
        """Dimensions of a head in layers with a window, of keys and of values."""
        dims = [self.count(f"attention.{of}_length_swa", head_dim, maximum=MAX_HEAD_DIM) for of in ("key", "value")]
        if dims[0] != dims[1]:
            raise self.refuse(f"keys have {dims[0]} dimensions in windows, values {dims[1]}: they must have as many")
        return dims[0]

    def owners(self, slides: list[bool]) -> list[int | None]:
        """Of each layer the one whose keys and values it reads: of the last ones, the last before them of its kind."""
        count = self.file.get_int(
            f"{self.architecture}.attention.shared_kv_layers", 0, minimum=0, maximum=len(slides) - 1
        )
        first = len(slides) - count
        last = {slide: index for index, slide in enumerate(slides[:first])}
        if not set(slides) <= last.keys():
            raise self.refuse(
                f"its last {count} layers read the keys of layers of their kind, and there are none before"
            )
        return [None] * first + [last[slide] for slide in slides[first:]]

    def keys_are_values(self, index: int) -> bool:
        """Whether a layer has no projection for values, which are what that for keys gives then."""
        has_keys, has_values = (f"blk.{index}.attn_{of}.weight" in self.file.tensors for of in ("k", "v"))
        return self.facts.value_norm and has_keys and not has_values

    def windows(self, num_layers: int, context_length: int) -> tuple[list[bool], int | None]:
        """Which layers have a window, and how long it is; one as long as the context is none."""
        window = self.window()
        if not window:
            return [False] * num_layers, None
        key = f"{self.architecture}.attention.sliding_window_pattern"
        if isinstance(self.file.metadata.get(key), list):
            slides = self.file.get_list(key, bool, length=num_layers)
        else:
            every = self.file.get_int(key, self.facts.window_pattern, minimum=0, maximum=MAX_LAYERS)
            slides = [every == 0 or index % every < every - 1 for index in range(num_layers)]
        return slides, window if window < context_length else None

    def window(self) -> int:
        """As the file or the architecture says; 0: none."""
        key = f"{self.architecture}.attention.sliding_window"
        return self.file.get_int(key, self.facts.window, minimum=0, maximum=MAX_COUNT << 8)

    def rope(self, theta: float, head_dim: int, context_length: int, context: int, *, scaled: bool) -> RopeSpec:
        """Of layers that see all, or, where it is not scaled, of those with a window."""
        adjacent_pairs = self.facts.pairs == "adjacent"  # the converter reorders rows of queries and keys for it
        if not scaled:
            in_windows = f"{self.architecture}.rope.dimension_count_swa" in self.file.metadata
            num_dims = self.count(f"rope.dimension_count{'_swa' * in_windows}", head_dim, maximum=head_dim)
            return RopeSpec(theta, num_dims, adjacent_pairs)
        num_dims = self.count("rope.dimension_count", head_dim, maximum=head_dim)
        kind, factor = self.rope_scaling()
        magnitude = self.factor("rope.scaling.attn_factor", 1.0)
        original = self.count("rope.scaling.original_context_length", context_length)
        factors: tuple[float, ...] | float = factor
        if kind == "yarn":
            weight = self.number("rope.scaling.yarn_log_multiplier", 0.0, maximum=1e3)
            magnitude *= self.factor(
                "rope.scaling.yarn_attn_factor",
                yarn_magnitude(factor) / (yarn_magnitude(factor, weight) if weight else 1),
            )
            factors = yarn_factors(
                theta,
                num_dims,
                factor=factor,
                original_context=original,
                beta_fast=self.factor("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=self.factor("rope.scaling.yarn_beta_slow", 1.0),
                whole=self.facts.whole_yarn,
            )
        divisors = read_divisors(self.file, num_dims // 2, beyond_original=context > original)
        num_rotating = None
        if divisors is not None:
            if divisors[-1] >= STILL:
                num_rotating = int(np.argmax(divisors >= STILL))
                divisors = divisors[:num_rotating]
            factors = tuple(float(product) for product in np.multiply(factors, divisors))
            factors = factors[0] if len(set(factors)) == 1 else factors
        return RopeSpec(theta, num_dims, adjacent_pairs, factors, magnitude, num_rotating)

    def rope_scaling(self) -> tuple[str, float]:
        """Its kind, and by what it divides all frequencies, or those that YaRN wants."""
        factor_key = "rope.scaling.factor"
        if f"{self.architecture}.{factor_key}" not in self.file.metadata:
            factor_key = "rope.scale_linear"  # of files from before 2024
        kind = self.file.get_str(f"{self.architecture}.rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise ModelError(
                f"{self.file.path}: rope scaling {kind!r:.60} is not one that kvik runs",
                hint="kvik runs none, linear, yarn, longrope and llama3",
            )
        if kind == "yarn" and self.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise self.refuse(f"{self.architecture}.rope.scaling.yarn_ext_factor other than 1, which kvik does not run")
        return kind, 1.0 if kind == "none" else self.factor(factor_key, 1.0)

    # The keys.

    def per_layer(self, key: str, num_layers: int, default: int | None = None) -> list[int]:
        """One count for all layers, or one for each."""
        name = f"{self.architecture}.{key}"
        if not isinstance(self.file.metadata.get(name), list):
            return [self.count(key, default)] * num_layers
        found = self.file.get_list(name, int, length=num_layers)
        if not all(1 <= one <= MAX_COUNT for one in found):
            raise self.refuse(f"{name} has numbers in it that no layer can have")
        return found

    def count(self, key: str, default: int | None = None, *, maximum: int = MAX_COUNT) -> int:
        return self.file.get_int(f"{self.architecture}.{key}", default, minimum=1, maximum=maximum)

    def theta(self, key: str, default: float) -> float:
        return self.number(key, default, minimum=1.01)

    def number(self, key: str, default: float | None = None, *, minimum: float = 0.0, maximum: float = 1e12) -> float:
        """A number; float32 in the file, it stands for the shortest decimal that rounds to it, as 1e-5."""
        value = self.file.get_float(f"{self.architecture}.{key}", default, minimum=minimum, maximum=maximum)
        return float(str(np.float32(value))) if f"{self.architecture}.{key}" in self.file.metadata else value

    def factor(self, key: str, default: float) -> float:
        """What something is multiplied with or divided by."""
        return self.number(key, default, minimum=1e-6, maximum=1e6)

    def has_bias(self, name: str) -> bool:
        """Of the first layer; whether the others have one is found with their tensors."""
        return f"blk.0.{name}.bias" in self.file.tensors

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"{self.file.path}: {what}", hint=OTHER_MODEL)
