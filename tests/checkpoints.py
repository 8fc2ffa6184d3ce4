"""Write checkpoint folders as transformers does: config.json, safetensors in one file or several, tokenizer.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gguf_files import byte_characters

FloatArray = npt.NDArray[np.float32]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I8": "i1", "F8_E4M3": "u1"}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a llama of 2 layers; a change to None leaves a field out."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, FloatArray]:
    """Random tensors of that llama, by the names of transformers."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {name: random_tensor(rng, shape) for name, shape in shapes.items()}


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """A vector around 1, or a matrix that keeps rows about as long as they were."""
    mean, std = (1.0, 0.1) if len(shape) == 1 else (0.0, 1 / sqrt(shape[1]))
    return rng.normal(mean, std, shape).astype(np.float32)


def stored_bytes(values: npt.NDArray[Any], dtype: str) -> bytes:
    """The values in a dtype of the format; of bfloat16 the upper half of float32, which is rounded towards zero."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(_NUMPY[dtype]).tobytes()


def safetensors_bytes(tensors: Mapping[str, npt.NDArray[Any]], dtype: str = "F32") -> bytes:
    """A file with these tensors, all in one dtype."""
    header, end = {}, 0
    data = {name: stored_bytes(values, dtype) for name, values in tensors.items()}
    for name, values in tensors.items():
        begin, end = end, end + len(data[name])
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    return b"".join((struct.pack("<Q", len(text)), text, *data.values()))


def as_bf16(values: FloatArray) -> FloatArray:
    """What of the values is left when they are stored as bfloat16."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str = "F32") -> Path:
    """The same as a file."""
    path.write_bytes(safetensors_bytes(tensors, dtype))
    return path


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    dtype: str = "F32",
    num_shards: int = 1,
) -> Path:
    """A whole folder; of several shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        name = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[index::num_shards])
        write_safetensors(folder / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """The index of shards."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, and some control tokens before them."""
    characters = sorted(byte_characters())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL_TOKENS))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL_TOKENS[0]}))


def tiny_checkpoint(folder: Path, *, dtype: str = "BF16", num_shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A whole random llama; `changes` are of its config."""
    config = tiny_config(**changes)
    return write_checkpoint(folder, config, tiny_tensors(config, seed), dtype=dtype, num_shards=num_shards)
