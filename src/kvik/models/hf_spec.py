"""A decoder's shape from a checkpoint's config.json; what differs between families is in hf_families.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kvik.files.config_fields import MAX_WIDTH, ConfigFields
from kvik.models.config_classes import text_part, with_defaults
from kvik.models.hf_experts import read_experts, refuse_experts
from kvik.models.hf_families import FAMILIES, Family
from kvik.models.hf_layers import KeptLayers, read_layers
from kvik.models.hf_rope import read_ropes
from kvik.models.spec import MAX_HEAD_DIM, MAX_LAYERS, OTHER_MODEL, DecoderSpec, LayerSpec

_MULTIMODAL = ("gemma3", "gemma3n", "gemma4", "gemma4_unified", "mistral3")
"""Model types that have a text decoder beside other parts."""

_LACKING = {"gemma3n_text": "AltUp (several hidden states for each token) and LAuReL (low-rank residuals)"}
"""Families that need what kvik does not have."""


def text_config(config: Mapping[str, Any], path: Path) -> ConfigFields:
    """The fields of the part that reads and writes text, with what the family takes where the file says nothing.

    Raises `ModelError` for a family that kvik does not run.
    """
    fields = ConfigFields(config, path)
    name = fields.text("model_type")
    if name in _MULTIMODAL:
        fields = text_part(config, path)
        name = fields.text("model_type")
    if name in _LACKING:
        raise fields.error(f"model_type {name!r} needs {_LACKING[name]}, which kvik does not run", OTHER_MODEL)
    refuse_experts(fields, name)
    if name not in FAMILIES:
        raise fields.error(
            f"model_type {name!r:.60} is not one that kvik runs", f"kvik runs {', '.join(sorted(FAMILIES))}"
        )
    silent = {key: value for key, value in FAMILIES[name].defaults.items() if fields.find(key) is None}
    return with_defaults(ConfigFields({**fields.fields, **silent}, path))


def read_hf_spec(config: Mapping[str, Any], path: Path, context: int | None = None) -> DecoderSpec:
    """The decoder that a config.json describes. Raises `ModelError`, which names the field.

    `context` is that of the sequences to come, where it is shorter than the model's: LongRoPE has other divisors then.
    """
    fields = text_config(config, path)
    model_type = fields.text("model_type")
    family = FAMILIES[model_type]
    for one in fields.list("layer_types", fields.count("num_hidden_layers", maximum=MAX_LAYERS), (str,)) or ():
        if one not in ("full_attention", "sliding_attention"):
            raise fields.error(f"layer_types has {one!r:.60} in it, which kvik does not run", OTHER_MODEL)
    kept = read_layers(fields, MAX_LAYERS, MAX_HEAD_DIM)
    if kept.num_heads * kept.head_dim > MAX_WIDTH:
        heads = f"{kept.num_heads:,} heads of {kept.head_dim:,} dimensions"
        raise fields.error(f"{heads} are more than {MAX_WIDTH:,} together")
    for layer in kept.layers:
        if layer.kind not in ("full", "window"):
            raise fields.error(f"has layers of kind {layer.kind}, which kvik does not run", OTHER_MODEL)
    width = fields.count("intermediate_size", family.inner and family.inner * kept.hidden_size)
    experts, sparse = read_experts(fields, model_type, len(kept.layers), width)
    spec = DecoderSpec(
        architecture=model_type,
        hidden_size=kept.hidden_size,
        intermediate_size=width,
        num_heads=kept.num_heads,
        num_kv_heads=kept.num_kv_heads,
        head_dim=kept.head_dim,
        vocab_size=kept.vocab_size,
        context_length=kept.max_context,
        layers=_layers(fields, family, kept, sparse, context or kept.max_context),
        experts=experts,
        tied_head=fields.flag("tie_word_embeddings", family.tied),
        **family.fields(fields),
    )
    if problem := spec.problem():
        raise fields.error(problem, OTHER_MODEL)
    return spec


def _layers(
    config: ConfigFields, family: Family, kept: KeptLayers, sparse: Collection[int], used: int
) -> tuple[LayerSpec, ...]:
    has_rope = [family.rotary is not None] * len(kept.layers)
    if family.has_rope is not None:
        has_rope = family.has_rope(config, len(kept.layers))
    everywhere = in_windows = None
    if family.rotary is not None:
        head_dims = [{layer.key_dim for layer in kept.layers if layer.slides is slides} for slides in (False, True)]
        if max(map(len, head_dims)) > 1:
            raise config.error(
                "has heads of several sizes among layers of one kind, which kvik does not run", OTHER_MODEL
            )
        of_all, of_windows = (found.pop() if found else kept.head_dim for found in head_dims)
        everywhere, in_windows = read_ropes(config, family.rotary, (of_all, of_windows), kept.max_context, used)
    return tuple(
        LayerSpec(
            rope=None if not rope else in_windows if layer.slides else everywhere,
            window=layer.window,
            num_kv_heads=None if layer.num_kv_heads == kept.num_kv_heads else layer.num_kv_heads,
            head_dim=None if layer.key_dim == kept.head_dim else layer.key_dim,
            kv_from=layer.kv_from,
            sparse=index in sparse,
            **family.of_layer(config, layer),
        )
        for index, (rope, layer) in enumerate(zip(has_rope, kept.layers, strict=True))
    )
