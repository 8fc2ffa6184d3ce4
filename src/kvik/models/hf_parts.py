"""Where each family's checkpoints keep the decoder's tensors: names, fused projections, transposed ones.

Source: the modules of transformers 5, whose state dicts checkpoints are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvik.models.mxfp4 import MXFP4_BYTES, MXFP4_VALUES
from kvik.models.parts import Part, Parts, TensorName
from kvik.models.spec import DecoderSpec

Names = dict[str, str]
"""By the decoder's names, a layer's without its number and an expert's without its id: those of the checkpoint.

To a name comes `.weight` or `.bias`, unless the decoder's name has it too: a parameter of its own, in no module, has
none. With `{}` in it, it is that of one expert; without, an expert is one item of a tensor that has the layer's.
"""

Rows: TypeAlias = slice | npt.NDArray[np.int64]

_LLAMA: Names = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_AROUND: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4: Names = _LLAMA | {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_gate": "mlp.gate_up_proj",
    "ffn_up": "mlp.gate_up_proj",
}
_GPT2: Names = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "attn_norm": "ln_1",
    "attn_q": "attn.c_attn",
    "attn_k": "attn.c_attn",
    "attn_v": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_NEOX: Names = {
    "token_embd": "embed_in",
    "output_norm": "final_layer_norm",
    "attn_norm": "input_layernorm",
    "attn_q": "attention.query_key_value",
    "attn_k": "attention.query_key_value",
    "attn_v": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON: Names = _NEOX | {
    "token_embd": "word_embeddings",
    "output_norm": "ln_f",
    "attn_q": "self_attention.query_key_value",
    "attn_k": "self_attention.query_key_value",
    "attn_v": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
}
_OPT: Names = _LLAMA | {
    "position_embd": "embed_positions",
    "output_norm": "final_layer_norm",
    "attn_norm": "self_attn_layer_norm",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}


_EXPERTS: Names = _LLAMA | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_MIXTRAL: Names = _LLAMA | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_GRANITE_MOE: Names = _LLAMA | {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.input_linear",
    "ffn_up_exps": "block_sparse_moe.input_linear",
    "ffn_down_exps": "block_sparse_moe.output_linear",
    "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}


_GPT_OSS: Names = _LLAMA | {
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    **{
        f"{name}.{kind}": f"mlp.experts.{stored}{suffix}"
        for name, stored in (
            ("ffn_gate_exps", "gate_up_proj"),
            ("ffn_up_exps", "gate_up_proj"),
            ("ffn_down_exps", "down_proj"),
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    },
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of one family, and what it does to its tensors."""

    names: Names = field(default_factory=lambda: _LLAMA)
    prefixes: tuple[str, ...] = ("model.", "")  # of all names but the head's; the first that is found holds
    layers: str = "layers"
    head: str = "lm_head"
    # Rows of a fused projection: all queries, keys, values; or for each KV head its queries, its key, its value.
    # The other kind, of gates and ups: in turn.
    fused: Literal["stacked", "grouped", "in_turn"] = "stacked"
    transposed: Literal["none", "all", "experts"] = "none"  # which projections are stored as (columns, rows)
    norm_offset: float = 0.0  # what norms are stored less than
    first_position: int = 0  # row of the table of positions that position 0 has
    others: tuple[str, ...] = ()  # beginnings of names, behind `model.`, of parts that are no decoder's


_GEMMA = Layout(norm_offset=1.0)
_SEEING = ("model.", "", "language_model.model.", "model.language_model.")  # beside a part that sees
_OTHER_SENSES = ("vision_tower.", "multi_modal_projector.")
_GEMMA4 = Layout(
    _LLAMA
    | _NORMS_AROUND
    | {
        "layer_output_scale.weight": "layer_scalar",
        "per_layer_token_embd": "embed_tokens_per_layer",
        "per_layer_model_proj": "per_layer_model_projection",
        "per_layer_proj_norm": "per_layer_projection_norm",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_gate_exps.weight": "experts.gate_up_proj",
        "ffn_up_exps.weight": "experts.gate_up_proj",
        "ffn_down_exps.weight": "experts.down_proj",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
    },
    _SEEING,
    others=("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder."),
)

_LAYOUTS: Mapping[str, Layout] = {
    "phi3": Layout(
        _LLAMA
        | dict.fromkeys(("attn_q", "attn_k", "attn_v"), "self_attn.qkv_proj")
        | dict.fromkeys(("ffn_gate", "ffn_up"), "mlp.gate_up_proj")
    ),
    "phi": Layout(
        _LLAMA
        | {
            "output_norm": "final_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        }
    ),
    "qwen2_moe": Layout(_EXPERTS),
    "qwen3_moe": Layout(_EXPERTS),
    "olmoe": Layout(_EXPERTS),
    "mixtral": Layout(_MIXTRAL),
    "granitemoe": Layout(_GRANITE_MOE),
    "granitemoeshared": Layout(_GRANITE_MOE),
    "gpt_oss": Layout(_GPT_OSS, fused="in_turn", transposed="experts"),
    "olmo2": Layout(_LLAMA | _NORMS_AROUND),
    "olmo3": Layout(_LLAMA | _NORMS_AROUND),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, names=_LLAMA | _NORMS_AROUND),
    "gemma3_text": replace(_GEMMA, names=_LLAMA | _NORMS_AROUND, prefixes=_SEEING, others=_OTHER_SENSES),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "mistral": Layout(prefixes=_SEEING, others=_OTHER_SENSES),
    "ministral3": Layout(prefixes=_SEEING, others=_OTHER_SENSES),
    "exaone4": Layout(_LLAMA | _NORMS_AROUND),
    "glm4": Layout(_GLM4),
    "hunyuan_v1_dense": Layout(
        _LLAMA | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
    ),
    "apertus": Layout(
        _LLAMA | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm", "ffn_act": "mlp.act_fn"}
    ),
    "starcoder2": Layout(_LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gpt2": Layout(_GPT2, ("transformer.", ""), "h", transposed="all"),
    "nanogpt": Layout(_GPT2, ("transformer.", "", "_orig_mod.transformer."), "h"),
    "gpt_bigcode": Layout(_GPT2, ("transformer.", ""), "h", fused="grouped"),
    "gpt_neox": Layout(_NEOX, ("gpt_neox.", ""), head="embed_out", fused="grouped"),
    "falcon": Layout(_FALCON, ("transformer.", ""), "h", fused="grouped"),
    "opt": Layout(_OPT, ("model.decoder.", "decoder.", ""), first_position=2),
}
_PLAIN = Layout()
_AROUND = ("_orig_mod.", "language_model.")
"""What stands before all names, the head's too, of a compiled model and of old ones that see."""

_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
_OF_KEYS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.\w+$")


def hf_parts(spec: DecoderSpec, stored: Collection[str]) -> Parts:
    """The parts of a checkpoint that has tensors of these names; whether they all are there is not looked at."""
    layout = _layout_of(spec)
    first = layout.names["token_embd"]
    prefix = next((one for one in layout.prefixes if f"{one}{first}.weight" in stored), layout.prefixes[0])
    wide = next((one for one in _AROUND if prefix.startswith(one)), "")
    parts: dict[str, Part] = {}
    named = [(canonical, TensorName.parse(canonical), shape) for canonical, shape in spec.tensors().items()]
    cuts = _cuts(spec, layout, named)
    for canonical, parsed, shape in named:
        if parsed.name == "output":
            parts[canonical] = Part(f"{wide}{layout.head}.{parsed.kind}", shape)
            continue
        layer = "" if parsed.layer is None else f"{layout.layers}.{parsed.layer}."
        of_layer = _stored(layout, parsed.name, parsed.kind)
        where = f"{prefix}{layer}{of_layer}".replace("{}", str(parsed.expert))
        if parsed.kind in ("beta", "eps"):
            shape = ()  # transformers keeps what is not trained as a number
        part = _part(layout, parsed.name, where, shape, cuts.get(parsed.name))
        if spec.experts is not None and parsed.expert is not None and "{}" not in of_layer:
            part = replace(part, shape=(spec.experts.num_experts, *part.shape), item=parsed.expert)
            if part.transposed and f"{where}_blocks" in stored:
                part = _in_blocks(part)
        parts[canonical] = part
    return parts


def is_tied_head(spec: DecoderSpec, name: str) -> bool:
    """Whether a stored tensor is the head of a decoder that takes its embedding for it."""
    head = f"{_layout_of(spec).head}.weight"
    return spec.tied_head and name in (head, *(f"{around}{head}" for around in _AROUND))


def is_unused(spec: DecoderSpec, name: str) -> bool:
    """Whether a stored tensor is of no use to a decoder.

    A tied head, a recomputable buffer, a vision tower, or keys and values of a layer that reads those of another.
    """
    if name.removeprefix("model.").startswith(_layout_of(spec).others):
        return True
    of_keys = _OF_KEYS.search(name)
    if of_keys is not None and (index := int(of_keys[1])) < spec.num_layers and spec.layers[index].kv_from is not None:
        return True
    return is_tied_head(spec, name) or bool(_BUFFERS.search(name))


def _layout_of(spec: DecoderSpec) -> Layout:
    layout = _LAYOUTS.get(spec.architecture, _PLAIN)
    if spec.architecture == "falcon" and spec.parallel == "two_norms":
        return replace(layout, names=layout.names | {"attn_norm": "ln_attn", "ffn_norm": "ln_mlp"})
    return layout


@dataclass(frozen=True, slots=True)
class _Cut:
    """The place of one projection in a stored tensor that has several."""

    rows: Rows
    num_rows: int  # of all of them


_SIBLINGS = (
    ("attn_q", "attn_k", "attn_v"),
    *((f"ffn_gate{of}", f"ffn_up{of}") for of in ("", "_exps", "_shexp")),
)
"""Projections of the same rows, which may be stored as one."""


def _cuts(
    spec: DecoderSpec, layout: Layout, named: Sequence[tuple[str, TensorName, tuple[int, ...]]]
) -> dict[str, _Cut]:
    """Made once for all layers."""
    num_rows: dict[str, int] = {}
    for _, parsed, shape in named:
        num_rows.setdefault(parsed.name, shape[0])
    cuts: dict[str, _Cut] = {}
    for siblings in _SIBLINGS:
        if siblings[0] not in num_rows or len({_stored(layout, name, "weight") for name in siblings}) > 1:
            continue
        sizes = [num_rows[name] for name in siblings]
        ends = list(itertools.accumulate(sizes))
        rows: Sequence[Rows] = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        if layout.fused == "grouped":
            rows = _grouped_rows(spec)
        elif layout.fused == "in_turn":
            rows = [slice(at, ends[-1], len(sizes)) for at in range(len(sizes))]
        cuts |= {name: _Cut(cut_rows, ends[-1]) for name, cut_rows in zip(siblings, rows, strict=True)}
    return cuts


def _stored(layout: Layout, name: str, kind: str) -> str:
    """The stored name of a tensor of the decoder, without prefix and layer."""
    return layout.names.get(f"{name}.{kind}") or f"{layout.names[name]}.{kind}"


def _part(layout: Layout, name: str, where: str, shape: tuple[int, ...], cut: _Cut | None) -> Part:
    if name == "position_embd" and layout.first_position:
        return Part(where, (shape[0] + layout.first_position, shape[1]), slice(layout.first_position, None))
    if name.endswith("_norm"):
        return Part(where, shape, offset=layout.norm_offset)
    if cut is not None:
        shape = (cut.num_rows, *shape[1:])
    turns = name.endswith("_exps") or (layout.transposed == "all" and name not in ("token_embd", "position_embd"))
    transposed = layout.transposed != "none" and turns and len(shape) == 2
    return Part(where, shape[::-1] if transposed else shape, None if cut is None else cut.rows, transposed)


def _in_blocks(part: Part) -> Part:
    """The same as blocks of MXFP4, whose rows lie as they are multiplied: (items, rows, blocks of a row, bytes)."""
    num_items, columns, rows = part.shape
    shape = (num_items, rows, -(-columns // MXFP4_VALUES), MXFP4_BYTES)
    return replace(part, stored=f"{part.stored}_blocks", scales=f"{part.stored}_scales", shape=shape, transposed=False)


def _grouped_rows(spec: DecoderSpec) -> tuple[Rows, Rows, Rows]:
    """Rows of queries, keys and values where each KV head has its own beside those of the queries that share it."""
    queries_per_kv = spec.num_heads // spec.num_kv_heads
    rows = np.arange((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    by_head = rows.reshape(spec.num_kv_heads, queries_per_kv + 2, spec.head_dim)
    query, key, value = by_head[:, :queries_per_kv], by_head[:, queries_per_kv], by_head[:, queries_per_kv + 1]
    return query.reshape(-1), key.reshape(-1), value.reshape(-1)
