"""What files of each GGUF architecture have in common and no key tells.

Source: the hparams and graphs of each architecture in llama.cpp, and what its converter writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvik.ops.base import Nonlinearity

Scores: TypeAlias = Literal["softmax", "sigmoid", "logits"]  # as in `Routing`


@dataclass(frozen=True, slots=True)
class Router:
    """How files of one architecture choose experts, where no key tells."""

    scores: Scores = "softmax"
    renormalize: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a file of one architecture does not say, because all of them have it."""

    pairs: Literal["adjacent", "halves"] | None  # dimensions that rotate together; None: a table of positions
    norm: Literal["rms", "layer"] = "rms"
    norm_places: Literal["before", "after", "around"] = "before"
    qk_norm: Literal["none", "head", "row"] = "none"
    qk_norm_after_rope: bool = False
    parallel: Literal["none", "one_norm", "two_norms"] = "none"  # where neither key nor tensor tells otherwise
    activation: Nonlinearity = "silu"
    xielu: bool = False  # in place of the activation
    gated: bool = True
    scales_embedding: bool = False  # by the square root of hidden_size
    attention_soft_cap: float = 0.0  # where no key tells; 0: none
    logit_soft_cap: float = 0.0  # likewise
    layers_of_wide_scale: int = 0  # with so many layers, scores are scaled by hidden_size / num_heads, not by head_dim
    window: int = 0  # tokens, where no key tells; 0: none
    window_pattern: int = 0  # each so-many-th layer sees all; 0: none does
    local_theta: float | None = None  # of layers with a window, where no key tells; None: as that of the others
    local_scaling: bool = True  # whether these layers' rotary embeddings are stretched with the others'
    nope_pattern: int = 0  # each so-many-th layer has no RoPE
    whole_yarn: bool = True  # whether YaRN's bounds are whole pairs
    nope_full: bool = False  # where there is a window, the layers without it have no RoPE
    divides_logits: bool = False  # by the key logit_scale; others multiply
    rope_switch: bool = False  # whether the key rope.scaling.finetuned can switch RoPE off
    router: Router | None = None  # of its experts, where it may have some
    value_norm: bool = False
    attention_scale: float = 0.0  # 0: the usual one


_GPT2 = Architecture(None, norm="layer", activation="gelu_tanh", gated=False)

# Pythia and Falcon were trained with the exact GELU, which llama.cpp replaces by its approximation.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("adjacent", router=Router(renormalize=True)),
    "smollm3": Architecture("adjacent", nope_pattern=4),
    "granite": Architecture("adjacent", rope_switch=True, divides_logits=True),
    "granitemoe": Architecture("adjacent", router=Router("logits"), divides_logits=True),
    "qwen2": Architecture("halves"),
    "qwen2moe": Architecture("halves", router=Router()),
    "qwen3": Architecture("halves", qk_norm="head"),
    "qwen3moe": Architecture("halves", qk_norm="head", router=Router(renormalize=True)),
    "olmoe": Architecture("halves", qk_norm="row", router=Router()),
    "phi3": Architecture("halves"),
    "olmo2": Architecture("halves", norm_places="after", qk_norm="row", window_pattern=4, local_scaling=False),
    "gemma": Architecture("halves", activation="gelu_tanh", scales_embedding=True),
    "gemma2": Architecture(
        "halves",
        norm_places="around",
        activation="gelu_tanh",
        scales_embedding=True,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        layers_of_wide_scale=46,
        window=4096,
        window_pattern=2,
    ),
    "gemma3": Architecture(
        "halves",
        norm_places="around",
        qk_norm="head",
        activation="gelu_tanh",
        scales_embedding=True,
        layers_of_wide_scale=62,
        window_pattern=6,
        local_theta=10_000.0,
        local_scaling=False,
    ),
    "gpt-oss": Architecture(
        "halves", activation="clamped_silu", window_pattern=2, whole_yarn=False, router=Router("logits")
    ),
    "gemma4": Architecture(
        "halves",
        norm_places="around",
        qk_norm="head",
        activation="gelu_tanh",
        scales_embedding=True,
        local_theta=10_000.0,
        local_scaling=False,
        value_norm=True,
        attention_scale=1.0,
        router=Router(renormalize=True),
    ),
    "gpt2": _GPT2,
    "starcoder": _GPT2,
    "starcoder2": Architecture("halves", norm="layer", activation="gelu_tanh", gated=False),
    "gptneox": Architecture("halves", norm="layer", parallel="two_norms", activation="gelu", gated=False),
    "falcon": Architecture("halves", norm="layer", parallel="one_norm", activation="gelu", gated=False),
    "phi2": Architecture("halves", norm="layer", parallel="one_norm", activation="gelu_tanh", gated=False),
    "mistral3": Architecture("adjacent"),
    "exaone4": Architecture("halves", norm_places="after", qk_norm="head", window_pattern=4, nope_full=True),
    "glm4": Architecture("adjacent", norm_places="around"),
    "ernie4_5": Architecture("adjacent"),
    "hunyuan-dense": Architecture("halves", qk_norm="head", qk_norm_after_rope=True),
    "seed_oss": Architecture("halves"),
    "command-r": Architecture("adjacent", norm="layer", parallel="one_norm"),
    "cohere2": Architecture(
        "adjacent", norm="layer", parallel="one_norm", window=4096, window_pattern=4, nope_full=True
    ),
    "apertus": Architecture("halves", qk_norm="head", xielu=True, gated=False),
    "arcee": Architecture("adjacent", activation="relu2", gated=False),
}
