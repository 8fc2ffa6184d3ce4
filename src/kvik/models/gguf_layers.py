"""What each layer of any GGUF file remembers, by its keys and its tensors' shapes: also of what kvik does not run.

Source: the hparams of each architecture in llama.cpp, and the tensors that its converter writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile
from kvik.models.hf_layer_kinds import MAX_PLANNED_LAYERS, Kind
from kvik.models.hf_layers import MAX_PLANNED_HEAD_DIM, KeptLayer, KeptLayers

_PATTERNS: Mapping[str, int] = {
    **dict.fromkeys(("gemma2", "gpt-oss"), 2),
    **dict.fromkeys(("cohere2", "cohere2moe", "exaone4", "olmo2", "llama4"), 4),
    "gemma3n": 5,
    **dict.fromkeys(("gemma3", "gemma4", "gemma-embedding"), 6),
    **dict.fromkeys(("phi3", "mistral", "starcoder2"), 0),  # all of them
}
"""Each so-many-th layer sees all where the file has a window and no pattern."""

_CHUNK = 8192  # of Llama 4, which no key tells


def read_gguf_layers(file: GGUFFile) -> KeptLayers:
    """The layers of a file, by its keys and tensors. Raises `ModelError`, which names the key."""
    return _Reader(file, file.get_str("general.architecture")).read()


def num_experts(file: GGUFFile) -> tuple[int, int]:
    """Experts of a layer that has some, and those that one token goes through; 0 of 0: there are none."""
    architecture = file.get_str("general.architecture")
    count = file.get_int(f"{architecture}.expert_count", 0, minimum=0, maximum=1 << 20)
    used = file.get_int(f"{architecture}.expert_used_count", 0, minimum=0, maximum=1 << 20)
    return (count, min(used, count)) if count and used else (0, 0)


def active_part(file: GGUFFile) -> float:
    """The part of an expert tensor's weights that one token goes through; 1.0: there are none."""
    count, used = num_experts(file)
    return used / count if count else 1.0


class _Reader:
    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def read(self) -> KeptLayers:
        num_layers = self.count("block_count", maximum=MAX_PLANNED_LAYERS)
        hidden_size = self.count("embedding_length")
        heads = self.per_layer("attention.head_count", num_layers, [1] * num_layers)
        num_heads = max(heads) or 1
        context = self.count("context_length")
        windows = self.windows(num_layers)
        layers = [self.layer(index, heads[index] or num_heads, windows[index], context) for index in range(num_layers)]
        for index, layer in enumerate(layers):  # one that has queries alone reads another one's keys
            if layer.kind != "state" and not layer.key_dim:
                layers[index] = self.shared(layers, index, windows)
        own = [layer for layer in layers if layer.key_dim]
        main = max(own, key=lambda layer: layer.num_kv_heads * layer.key_dim) if own else KeptLayer("state")
        vocabulary = self.file.tensors.get("token_embd.weight")
        if vocabulary is None:
            raise self.file_error("has no tensor 'token_embd.weight'", "the file is of no language model")
        return KeptLayers(
            model_type=self.architecture,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_heads if main.kind == "latent" else main.num_kv_heads or 1,
            head_dim=main.key_dim or 1,
            vocab_size=vocabulary.shape[0],
            max_context=context,
            layers=tuple(layers),
            note=self.note(windows),
        )

    def layer(self, index: int, num_heads: int, window: int | None, context: int) -> KeptLayer:
        """What one layer keeps; a key of 0 dimensions where it has queries alone."""
        prefix, tensors = f"blk.{index}.", self.file.tensors
        window = None if window is None or window >= context else window
        kind: Kind = "full" if window is None else "chunk" if self.architecture == "llama4" else "window"
        latent = tensors.get(f"{prefix}attn_kv_a_mqa.weight")
        if latent is not None:
            rank = self.count("attention.kv_lora_rank")
            rotary = latent.shape[0] - rank
            if not 0 < rotary <= MAX_PLANNED_HEAD_DIM:
                raise self.file_error(f"{prefix}attn_kv_a_mqa has {latent.shape[0]:,} rows for a latent of {rank:,}")
            chooser = tensors.get(f"{prefix}indexer.attn_k.weight") or tensors.get(f"{prefix}indexer.k_proj.weight")
            return KeptLayer("latent", None, 1, rank + rotary, rank, rotary, chooser.shape[0] if chooser else 0)
        key, value = (tensors.get(f"{prefix}attn_{name}.weight") for name in ("k", "v"))
        head_dim = self.head_dim("key", window is not None, num_heads)
        if key is not None:
            value_dim = self.head_dim("value", window is not None, num_heads)
            num_kv_heads = max(1, key.shape[0] // head_dim)
            if value is not None:
                value_dim = max(1, value.shape[0] // num_kv_heads)
            return KeptLayer(kind, window, num_kv_heads, key.shape[0] // num_kv_heads, value_dim)
        if f"{prefix}attn_qkv.weight" in tensors and not any(
            f"{prefix}ssm_{one}" in tensors for one in ("a", "dt.bias")
        ):
            number = self.file.get_int(f"{self.architecture}.block_count")
            num_kv_heads = self.per_layer("attention.head_count_kv", number, [num_heads] * number)[index] or num_heads
            return KeptLayer(kind, window, num_kv_heads, head_dim, head_dim)
        return KeptLayer(kind, window) if f"{prefix}attn_q.weight" in tensors else KeptLayer("state")

    def shared(self, layers: list[KeptLayer], index: int, windows: list[int | None]) -> KeptLayer:
        """As the last layer before it that has keys and the same window."""
        for before in range(index - 1, -1, -1):
            one = layers[before]
            if one.key_dim and one.kv_from is None and windows[before] == windows[index]:
                return replace(one, kv_from=before)
        raise self.file_error(f"layer {index} has no keys, and none of its kind comes before it")

    def windows(self, num_layers: int) -> list[int | None]:
        """Of each layer, as the file or its architecture says."""
        base = f"{self.architecture}.attention.sliding_window"
        window = self.file.get_int(base, 0, minimum=0, maximum=1 << 31)
        if self.architecture == "llama4":
            window = self.file.get_int(f"{self.architecture}.attention.chunk_size", _CHUNK, minimum=1, maximum=1 << 31)
        pattern = self.file.metadata.get(f"{base}_pattern")
        if not window or (pattern is None and self.architecture not in _PATTERNS):
            return [None] * num_layers
        if isinstance(pattern, list):
            slides = self.file.get_list(f"{base}_pattern", type(pattern[0]) if pattern else bool, length=num_layers)
            return [window if slide else None for slide in slides]
        default = _PATTERNS.get(self.architecture, 0)
        every = self.file.get_int(f"{base}_pattern", default, minimum=0, maximum=MAX_PLANNED_LAYERS)
        return [window if every == 0 or index % every < every - 1 else None for index in range(num_layers)]

    def note(self, windows: list[int | None]) -> str:
        """What is not known of it."""
        window = self.file.metadata.get(f"{self.architecture}.attention.sliding_window")
        if window and not any(windows):
            return "which layers have its window is not known: the figure for keys and values is an upper bound"
        return ""

    # The keys.

    def count(self, key: str, *, maximum: int = 1 << 31) -> int:
        return self.file.get_int(f"{self.architecture}.{key}", minimum=1, maximum=maximum)

    def head_dim(self, of: str, in_window: bool, num_heads: int) -> int:
        names = [f"{self.architecture}.attention.{of}_length"]
        if in_window:
            names.insert(0, f"{names[0]}_swa")
        found = next((name for name in names if name in self.file.metadata), None)
        if found is not None:
            return self.file.get_int(found, minimum=1, maximum=MAX_PLANNED_HEAD_DIM)
        if of == "value":
            return self.head_dim("key", in_window, num_heads)
        return max(1, self.count("embedding_length") // num_heads)

    def per_layer(self, key: str, num_layers: int, default: list[int]) -> list[int]:
        """One number for all layers, or one for each."""
        name = f"{self.architecture}.{key}"
        if isinstance(self.file.metadata.get(name), list):
            found = self.file.get_list(name, int, length=num_layers)
        elif name in self.file.metadata:
            found = [self.file.get_int(name, minimum=0, maximum=1 << 24)] * num_layers
        else:
            found = default
        if any(not 0 <= one < 1 << 24 for one in found):
            raise self.file_error(f"{name} has numbers in it that no layer can have")
        return found

    def file_error(self, what: str, hint: str = "take another GGUF of this model") -> ModelError:
        return ModelError(f"{self.file.path}: {what}", hint=hint)


def num_values(file: GGUFFile) -> tuple[int, int, int]:
    """All weights of the file's matrices, those that one token goes through, and those of a table only looked up."""
    part, total, active = active_part(file), 0, 0.0
    for name, tensor in file.tensors.items():
        if len(tensor.shape) > 1:
            size = math.prod(tensor.shape)
            total += size
            active += size * (part if "_exps." in name else 1.0)
    table = math.prod(file.tensors["token_embd.weight"].shape) if "output.weight" in file.tensors else 0
    return total, int(active), table
