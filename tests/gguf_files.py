"""Small GGUF files for tests: written by the `gguf` library, so that they do not share our reader's mistakes.

`write_gguf` writes any metadata and tensors, `random_blocks` makes quantised weights that no quantiser had to make, and
`tiny_llama` writes a whole model, vocabulary and chat template included, that loads in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue
from gguf.quants import dequantize, quantize

from kvik.files.texts import Texts

# A plain Python value, or a GGUFValue where the type in the file matters.
Metadata = Mapping[str, Any]
Tensors = Mapping[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]

# Where the scales and minimums, the only float16 fields, lie in a block: byte offsets.
FLOAT16_OFFSETS = {
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_0: (0,),
    GGMLQuantizationType.Q5_1: (0, 2),
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.IQ4_NL: (0,),
    GGMLQuantizationType.IQ4_XS: (0,),
    GGMLQuantizationType.MXFP4: (),
}
FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
WEIGHT_TYPES = (*FLOAT_TYPES, *FLOAT16_OFFSETS)  # the types that kvik runs
# The library reads but cannot write these.
READ_ONLY_TYPES = tuple(kind for kind in WEIGHT_TYPES if kind.name.endswith("_K") or kind.name.startswith("IQ"))

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("Ġ t", "h e", "Ġ a", "i n", "Ġt he", "o n", "e r", "in g", "Ġ o", "r e")
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


def write_gguf(path: Path, metadata: Metadata, tensors: Tensors) -> Path:
    """Write a GGUF file of version 3 and return its path.

    An int becomes UINT32 or, where it does not fit, INT32, UINT64 or INT64, but INT32 in a list; a float FLOAT32. A
    tensor is given as raw blocks, a uint8 array (..., bytes of a row), or as floats to be quantised.
    """
    writer = GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # the writer puts an architecture of its own
    for key, value in metadata.items():
        typed = value if isinstance(value, GGUFValue) else _typed(value)
        writer.add_key_value(key, typed.value, typed.type, typed.sub_type)
        if key == "general.alignment":
            writer.data_alignment = typed.value
    for name, (values, kind) in tensors.items():
        raw = values if values.dtype == np.uint8 else quantize(values.astype(np.float32), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(
    kind: GGMLQuantizationType, rows: int, columns: int, rng: np.random.Generator, *, std: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Return raw blocks (rows, bytes of a row) of a weight type: every bit random, but the floats finite and modest.

    The values that they stand for have mean square `std` ** 2. The signs of scales and minimums are random too.
    """
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if columns % block_size:
        raise ValueError(f"{kind.name} needs a multiple of {block_size} columns, not {columns}")
    if kind in FLOAT_TYPES:
        return random_matrix(kind, rows, columns, rng, std=std)
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), dtype=np.uint8)
    if kind is GGMLQuantizationType.MXFP4:  # scales are powers of two: so many blocks have twice the scale of the rest
        blocks[:, 0] = 128
        power, rest = divmod(float(np.log2(std**2 / np.mean(np.square(dequantize(blocks, kind))))) / 2, 1)
        blocks[:, 0] += np.uint8(int(power) % 256)
        blocks[rng.permutation(len(blocks))[: round(len(blocks) * (4**rest - 1) / 3)], 0] += 1
        return blocks.reshape(rows, -1)
    offsets = FLOAT16_OFFSETS[kind]
    scales = rng.uniform(0.5, 1.5, (len(offsets), len(blocks), 1)) * rng.choice([-1, 1], (len(offsets), len(blocks), 1))

    def put(factor: float) -> npt.NDArray[np.float32]:
        for offset, scale in zip(offsets, scales, strict=True):
            blocks[:, offset : offset + 2] = (scale * factor).astype(np.float16).view(np.uint8)
        values: npt.NDArray[np.float32] = dequantize(blocks, kind)
        return values

    # The values are linear in the float16 fields, whatever the type: measure once, then scale.
    put(std / float(np.sqrt(np.mean(np.square(put(1.0))))))
    return blocks.reshape(rows, -1)


def random_matrix(
    kind: GGMLQuantizationType, rows: int, columns: int, rng: np.random.Generator, *, std: float
) -> npt.NDArray[np.uint8]:
    """Return raw blocks (rows, bytes of a row) of normal values, or random blocks where the library cannot quantise."""
    if kind in READ_ONLY_TYPES:
        return random_blocks(kind, rows, columns, rng, std=std)
    values = quantize(rng.normal(0, std, (rows, columns)).astype(np.float32), kind)
    return np.ascontiguousarray(values).view(np.uint8)


def byte_characters() -> list[str]:
    """Return the character that stands for each of the 256 bytes in a byte-level vocabulary (GPT-2, encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tiny_vocabulary(vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer's metadata: special tokens, then the bytes, then what merges make of them."""
    characters = sorted(byte_characters())
    pairs = (f"{first} {second}" for first, second in product(f"Ġ{LETTERS}", LETTERS))
    merges = list(dict.fromkeys((*MERGES, *pairs)))[: max(0, vocab_size - len(SPECIAL_TOKENS) - len(characters))]
    tokens = [*SPECIAL_TOKENS, *characters, *(merge.replace(" ", "") for merge in merges)]
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL_TOKENS))
    if not merges:
        raise ValueError(f"the vocabulary has {len(tokens)} tokens and a merge at least; {vocab_size} are too few")
    num_unused = vocab_size - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + [f"<|unused_{index}|>" for index in range(num_unused)],
        "tokenizer.ggml.token_type": [int(kind) for kind in types] + [int(TokenType.UNUSED)] * num_unused,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int | None = None,
    intermediate_size: int = 96,
    vocab_size: int = 320,
    context_length: int = 512,
    rope_freq_base: float = 10_000.0,
    rms_norm_eps: float = 1e-5,
    tied: bool = True,
    weight_type: GGMLQuantizationType | Mapping[str, GGMLQuantizationType] = GGMLQuantizationType.Q8_0,
    extra_metadata: Metadata | None = None,
) -> Path:
    """Write a whole random model of architecture `llama` and return its path; the same arguments, the same file.

    `weight_type` goes for all matrices, or maps names to types: of one tensor ("blk.0.attn_q.weight") or of one kind
    ("attn_q", "token_embd", "output"); those not in it are Q8_0. Norms are F32. `hidden_size` is num_heads * head_dim
    unless given. The logits have a standard deviation of about 2. `extra_metadata` is added, or takes the place of what
    is there.
    """
    rng = np.random.default_rng(seed)
    hidden_size = num_heads * head_dim if hidden_size is None else hidden_size
    tensors: dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]] = {}

    def matrix(name: str, rows: int, columns: int, std: float | None = None) -> None:
        kind = weight_type
        if isinstance(kind, Mapping):
            kind = kind.get(name, kind.get(name.split(".")[-2], GGMLQuantizationType.Q8_0))
        tensors[name] = random_matrix(kind, rows, columns, rng, std=1 / sqrt(columns) if std is None else std), kind

    def norm(name: str) -> None:
        tensors[name] = rng.normal(1, 0.1, hidden_size).astype(np.float32), GGMLQuantizationType.F32

    # The last hidden state has a mean square of 1, so this head makes logits of the standard deviation 2.
    head_std = 2 / sqrt(hidden_size)
    matrix("token_embd.weight", vocab_size, hidden_size, head_std if tied else 1.0)
    for layer in range(num_layers):
        norm(f"blk.{layer}.attn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", num_heads * head_dim, hidden_size)
        matrix(f"blk.{layer}.attn_k.weight", num_kv_heads * head_dim, hidden_size)
        matrix(f"blk.{layer}.attn_v.weight", num_kv_heads * head_dim, hidden_size)
        matrix(f"blk.{layer}.attn_output.weight", hidden_size, num_heads * head_dim)
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", intermediate_size, hidden_size)
        matrix(f"blk.{layer}.ffn_up.weight", intermediate_size, hidden_size)
        matrix(f"blk.{layer}.ffn_down.weight", hidden_size, intermediate_size)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", vocab_size, hidden_size, head_std)

    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": f"tiny random llama {seed}",
        "general.quantization_version": 2,
        "llama.block_count": num_layers,
        "llama.context_length": context_length,
        "llama.embedding_length": hidden_size,
        "llama.feed_forward_length": intermediate_size,
        "llama.attention.head_count": num_heads,
        "llama.attention.head_count_kv": num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": rms_norm_eps,
        "llama.rope.freq_base": rope_freq_base,
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": vocab_size,
    }
    if hidden_size != num_heads * head_dim:
        metadata |= {"llama.attention.key_length": head_dim, "llama.attention.value_length": head_dim}
    return write_gguf(path, metadata | tiny_vocabulary(vocab_size) | dict(extra_metadata or {}), tensors)


def _typed(value: bool | int | float | str | list[Any]) -> GGUFValue:
    if isinstance(value, bool):
        return GGUFValue(value, GGUFValueType.BOOL)
    if isinstance(value, int):
        ranges = {
            GGUFValueType.UINT32: (0, 1 << 32),
            GGUFValueType.INT32: (-(1 << 31), 0),
            GGUFValueType.UINT64: (0, 1 << 64),
            GGUFValueType.INT64: (-(1 << 63), 0),
        }
        return GGUFValue(value, next(kind for kind, (low, high) in ranges.items() if low <= value < high))
    value = list(value) if isinstance(value, Texts) else value
    return GGUFValue(value, GGUFValueType.get_type(value))
