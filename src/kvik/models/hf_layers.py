"""What each layer of a decoder remembers, by its config.json: one reading, from which engine and planner both start.

Source: configuration and attention classes of transformers 5.23 (field names, defaults, which layer has which cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvik.cache import GroupSpec, KVCacheSpec, VectorFormat
from kvik.files.config_fields import MAX_CONTEXT, MAX_WIDTH, ConfigFields
from kvik.models.config_classes import is_encoder_decoder, is_known
from kvik.models.hf_layer_kinds import HEADLESS, MAX_PLANNED_LAYERS, Kind, kinds_of, listed_types

MAX_PLANNED_HEAD_DIM = 1 << 12


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """What one layer keeps of a token."""

    kind: Kind
    window: int | None = None  # or the chunk
    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    num_rotary: int = 0  # of a latent key
    index_dim: int = 0  # of one more key, by which tokens are chosen (sparse attention)
    kv_from: int | None = None  # the layer whose keys and values it reads
    slides: bool = False  # it is of the layers with a window, although that may be as long as the context

    def group(self, index: int) -> GroupSpec:
        """The layer as a group of its own, in f16."""
        key, layers = VectorFormat(self.key_dim, "f16", self.num_rotary), (index,)
        if self.kind == "state":
            return GroupSpec("state", layers, 0, VectorFormat(0, "f32"))
        value, chosen = VectorFormat(self.value_dim, "f16"), self.index_dim
        chooser = VectorFormat(chosen, "f16") if chosen else None
        return GroupSpec(self.kind, layers, self.num_kv_heads, key, value, self.window, chooser)


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The figures of a config that decide memory, checked."""

    model_type: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys, in most layers
    vocab_size: int
    max_context: int
    layers: tuple[KeptLayer, ...]
    note: str = ""  # what is not known

    @property
    def cache(self) -> KVCacheSpec:
        """What a cache of it holds, in f16."""
        own = [layer.group(index) for index, layer in enumerate(self.layers) if layer.kv_from is None]
        shared = [(index, layer.kv_from) for index, layer in enumerate(self.layers) if layer.kv_from is not None]
        return KVCacheSpec.of_layers(own, shared=shared)


def read_layers(
    config: ConfigFields, max_layers: int = MAX_PLANNED_LAYERS, max_head_dim: int = MAX_PLANNED_HEAD_DIM
) -> KeptLayers:
    """The layers of a text config that has its class's defaults. Raises `ModelError`, which names the field."""
    model_type = config.text("model_type", "")
    if why := _REFUSED.get(model_type):
        raise config.error(f"model_type {model_type!r:.60} {why}, which kvik cannot plan")
    if is_encoder_decoder(model_type) or config.find("is_encoder_decoder") is True:
        raise config.error(f"model_type {model_type!r:.60} has an encoder whose keys its decoder keeps too", _DECODERS)
    num_layers = _num_layers(config, model_type, max_layers)
    hidden_size = config.count("hidden_size")
    kinds = kinds_of(config, model_type, num_layers)
    has_heads = model_type not in HEADLESS
    num_heads = _num_heads(config, model_type) if has_heads else 1
    num_kv_heads = kv_heads_of(config, model_type, num_heads) if has_heads else 1
    if num_heads % num_kv_heads:
        raise config.error(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    head_dim = head_dim_of(config, model_type, hidden_size, num_heads, max_head_dim) if has_heads else 1
    max_context = config.count("max_position_embeddings", _CONTEXTS.get(model_type), maximum=MAX_CONTEXT)
    layers = []
    for fields, kind in zip(_fields_of_layers(config, num_layers), kinds, strict=True):
        own = num_kv_heads, head_dim
        if fields is not config:
            own_heads = kv_heads_of(fields, model_type, num_heads)
            own = own_heads, head_dim_of(fields, model_type, hidden_size, num_heads, max_head_dim)
        layers.append(_layer(fields, model_type, kind, *own, max_context))
    if config.optional("kv_lora_rank"):
        layers, head_dim = _latent(config, model_type, layers)
    return KeptLayers(
        model_type,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        config.count("vocab_size"),
        max_context,
        tuple(_shared(config, layers)),
        _note(config, model_type),
    )


_DECODERS = "kvik plans decoders: models that have no encoder"
_CONTEXTS = {  # of classes that have no bound of their own: what their makers trained on, or a round figure
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "xlstm", "recurrent_gemma", "dbrx", "mpt"), 8192),
    **dict.fromkeys(("bloom", "cpmant", "xlnet", "rwkv"), 2048),
}
_REFUSED: Mapping[str, str] = {
    "deepseek_v4": "keeps compressed tokens",
    "qwen4_exp_text": "keeps compressed keys of an index",
    "dots3_note_text": "has latents in windows",
    "blt": "is of several decoders",
    "reformer": "keeps hashed hidden states",
    "xlnet": "keeps hidden states",
    "xlm": "keeps no cache of one kind",
    "mllama": "keeps keys of pictures",
    "mllama_text_model": "keeps keys of pictures",
    "gemma4_assistant": "reads another model's keys and values",
    "gemma4_unified_assistant": "reads another model's keys and values",
    "moshi": "has a second decoder",
    "musicgen": "has an encoder",
    "musicgen_melody": "has an encoder",
}
"""Classes whose caches are of a kind that nothing here can describe. docs/planning.md lists them."""


def _note(config: ConfigFields, model_type: str) -> str:
    """What is said of a class that is not known. Raises where not even an upper bound follows from the fields."""
    if is_known(model_type) or model_type in ("nanogpt", "phi3small"):
        return ""
    strange = [
        key
        for key, value in config.fields.items()
        if key not in _HEAD_FIELDS and value and any(part in key for part in ("head_dim", "kv_head", "key_value_head"))
    ]
    if strange:
        raise config.error(
            f"model_type {model_type!r:.60} is not known, and {strange[0]:.60} may make its keys and values larger"
        )
    return (
        f"model_type {model_type!r:.40} is not known: unknown layers, the figure for keys and values is an upper bound"
    )


_HEAD_FIELDS = (
    *("head_dim", "num_key_value_heads", "num_kv_heads", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"),
)


# Numbers of layers and heads.


def _num_layers(config: ConfigFields, model_type: str, maximum: int) -> int:
    if model_type == "longcat_flash":  # two attentions a layer
        return 2 * config.count("num_layers", config.find("num_hidden_layers"), maximum=maximum // 2)
    if model_type == "nemotron_h":
        if (types := listed_types(config)) is not None:
            return len(types)
        pattern = config.text("hybrid_override_pattern", "ME*-")
        if not 0 < len(pattern) <= maximum:
            raise config.error(f"hybrid_override_pattern has {len(pattern):,} letters; it must have 1 to {maximum:,}")
        return len(pattern)
    number = config.count("num_hidden_layers", maximum=maximum)
    if model_type == "hrm_text" and config.find("num_layers_per_stack") is None:
        return number * config.count("H_cycles", maximum=64) * (config.count("L_cycles", maximum=64) + 1)
    return number


def _num_heads(config: ConfigFields, model_type: str) -> int:
    if model_type == "jetmoe":  # each chosen expert has queries of its own
        return config.count("num_key_value_heads") * config.count("num_experts_per_tok", maximum=64)
    return config.count("num_attention_heads", maximum=MAX_WIDTH)


def kv_heads_of(config: ConfigFields, model_type: str, num_heads: int) -> int:
    """Heads of keys and values; some families say it in their own ways."""
    if model_type == "falcon":
        if config.flag("new_decoder_architecture", False):
            other = config.count("n_head_kv", num_heads, maximum=num_heads)
            return config.count("num_kv_heads", other, maximum=num_heads)
        return 1 if config.flag("multi_query", True) else num_heads
    if model_type == "gpt_bigcode":
        return 1 if config.flag("multi_query", True) else num_heads
    if model_type in ("dbrx", "mpt"):
        inner = config.object("attn_config") or ConfigFields({}, config.path)
        return inner.count("kv_n_heads", 1 if model_type == "dbrx" else num_heads, maximum=num_heads)
    if model_type in _ALL_HEADS:
        return num_heads
    if config.find("num_key_value_heads") is None and not is_known(model_type):
        if config.find("multi_query") is True:
            return 1
        return config.count("num_kv_heads", num_heads, maximum=num_heads)
    return config.count("num_key_value_heads", num_heads, maximum=num_heads)


_ALL_HEADS = ("gpt2", "nanogpt", "gpt_neox", "opt", "gptj", "gpt_neo", "codegen", "bloom")


def head_dim_of(config: ConfigFields, model_type: str, hidden_size: int, num_heads: int, maximum: int) -> int:
    """Dimensions of a head of queries and keys."""
    if config.find("head_dim") is None and config.find("kv_lora_rank") is not None:
        return 1  # it follows from the parts of a latent's key
    if model_type in ("zamba", "zamba2"):
        return config.count("attention_head_dim", 2 * hidden_size // num_heads, maximum=maximum)
    if config.find("head_dim") is None and hidden_size % num_heads:
        raise config.error(f"hidden_size {hidden_size:,} does not divide among {num_heads:,} heads")
    return config.count("head_dim", max(1, hidden_size // num_heads), maximum=maximum)


# One layer.


def _fields_of_layers(config: ConfigFields, num_layers: int) -> list[ConfigFields]:
    """The config of each layer: transformers 5.18 and later write what is particular about some of them apart."""
    fields = [config] * num_layers
    given = config.object("per_layer_config")
    for key in given.fields if given is not None else ():
        assert given is not None
        own = given.object(key)
        if not (key.isascii() and key.isdecimal()) or int(key) >= num_layers or own is None:
            raise config.error(f"per_layer_config has {key!r:.60} in it, which is none of its {num_layers:,} layers")
        if strange := own.fields.keys() - {"head_dim", "num_key_value_heads"}:
            raise config.error(
                f"per_layer_config gives layer {int(key)} {min(strange)!r:.60}, which kvik does not know"
            )
        fields[int(key)] = ConfigFields({**config.fields, **own.fields}, config.path)
    return fields


def _layer(
    config: ConfigFields, model_type: str, kind: Kind, num_kv_heads: int, head_dim: int, context: int
) -> KeptLayer:
    value_dim = head_dim
    if kind == "state":
        return KeptLayer("state")
    if model_type.startswith("gemma4") and kind == "full" and config.find("per_layer_config") is None:
        head_dim = value_dim = config.count("global_head_dim", 512, maximum=MAX_PLANNED_HEAD_DIM)
        if config.flag("attention_k_eq_v", False):
            num_kv_heads = config.count("num_global_key_value_heads", num_kv_heads, maximum=MAX_WIDTH)
    if model_type.startswith("inkling") and kind == "window":
        num_kv_heads = config.count("swa_num_key_value_heads", maximum=MAX_WIDTH)
        head_dim = value_dim = config.count("swa_head_dim", maximum=MAX_PLANNED_HEAD_DIM)
    if model_type == "mimo_v2_flash":
        value_dim = config.count("v_head_dim", 128, maximum=MAX_PLANNED_HEAD_DIM)
        num_kv_heads *= 2 if kind == "window" else 1
    window, slides = window_of(config, model_type, kind), kind == "window"
    if window is not None and window >= context:
        kind, window = "full", None
    return KeptLayer(kind, window, num_kv_heads, head_dim, value_dim, slides=slides)


def window_of(config: ConfigFields, model_type: str, kind: Kind) -> int | None:
    """The tokens that a layer of that kind sees, its own among them; `None`: all."""
    if kind == "chunk":
        return config.count("attention_chunk_size", maximum=MAX_CONTEXT)
    if kind != "window":
        return None
    if model_type == "modernbert-decoder":
        return config.count("local_attention") // 2
    if model_type == "mimo_v2_flash" and config.find("sliding_window_size") is not None:
        return config.count("sliding_window_size", maximum=MAX_CONTEXT) + 1
    return config.count("sliding_window", maximum=MAX_CONTEXT)


def _latent(config: ConfigFields, model_type: str, layers: list[KeptLayer]) -> tuple[list[KeptLayer], int]:
    """Layers of multi-head latent attention (DeepSeek-V2), and the width of a head's keys once they are unfolded."""
    rank = config.count("kv_lora_rank")
    rotary, plain = (
        config.count(key, maximum=MAX_PLANNED_HEAD_DIM) for key in ("qk_rope_head_dim", "qk_nope_head_dim")
    )
    chosen = [0] * len(layers)
    if config.optional("index_head_dim"):
        index_dim = config.count("index_head_dim", maximum=MAX_PLANNED_HEAD_DIM)
        chosen = [index_dim if own else 0 for own in _own_index(config, model_type, len(layers))]
    made = []
    for layer, index_dim in zip(layers, chosen, strict=True):
        if layer.kind in ("window", "chunk"):
            raise config.error("has latents (kv_lora_rank) in layers with a window, which kvik cannot plan")
        latent = KeptLayer("latent", None, 1, rank + rotary, rank, rotary, index_dim)
        made.append(latent if layer.kind == "full" else layer)
    return made, rotary + plain


def _own_index(config: ConfigFields, model_type: str, num_layers: int) -> list[bool]:
    """Which layers have an index of their own; the others reuse what the one before has chosen."""
    types = config.list("indexer_types", num_layers, (str,))
    if types is not None:
        return [one == "full" for one in types]
    if model_type == "hy_v4":
        return [index == 0 or (index - 1) % 4 == 0 for index in range(num_layers)]
    if model_type == "glm_moe_dsa" and (every := config.optional("index_topk_freq")) is not None:
        offset = config.optional("index_skip_topk_offset") or 2
        return [max(index - offset + 1, 0) % every == 0 for index in range(num_layers)]
    return [True] * num_layers


def _shared(config: ConfigFields, layers: list[KeptLayer]) -> list[KeptLayer]:
    """The last layers read the keys and values of the last own layer of their kind (Gemma 3n and 4)."""
    count = config.optional("num_kv_shared_layers") or 0
    first = len(layers) - count
    if count and first < 1:
        raise config.error(f"num_kv_shared_layers is {count} of {len(layers)} layers")
    for index in range(first, len(layers)):
        alike = [at for at in range(first) if layers[at] == layers[index]]
        if not alike:
            raise config.error(
                f"layer {index} shares the keys of a layer of its kind, but there is none before {first}"
            )
        layers[index] = replace(layers[index], kv_from=alike[-1])
    return layers
