"""A GGUF file of a config.json's shape, with random weights: the speed of a model that nobody has to download.

python bench/random_model.py bench/shapes/llama-1.1b.json --types Q4_K_M,Q8_0 [--out build/peers/models]

What it writes is noise. The weights are drawn, written as F16 a part of a tensor at a time, and quantised by
llama-quantize, which bench/peers/build_llama_cpp.sh builds. The vocabulary is the default model's, filled up with
unused tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from kvik.errors import KvikError
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.files.texts import Texts
from kvik.hub.store import resolve
from kvik.models.hf_spec import read_hf_spec
from kvik.models.spec import DecoderSpec
from kvik_runs import NotAvailable
from llama_cpp_runs import LlamaCppRuns

FAMILIES = ("llama", "qwen2", "qwen3")  # whose files have no keys but those below
CHUNK_VALUES = 1 << 24
VOCABULARY = ("model", "pre", "add_bos_token", "add_space_prefix", "bos_token_id", "eos_token_id", "unknown_token_id",
              "padding_token_id")  # fmt: skip


def write_random_model(config: Mapping[str, Any], path: Path, vocabulary: GGUFFile, seed: int = 0) -> None:
    """Write the file in F16, norms and biases in F32, whole or not at all; memory does not grow with the model."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{family}: only the shapes of {', '.join(FAMILIES)} are made")
    spec, partial = read_hf_spec(config, path), path.with_suffix(".partial")
    writer = GGUFWriter(partial, arch=str(family))
    _add_shape(writer, config, spec)
    _add_vocabulary(writer, vocabulary, spec.vocab_size)
    shapes = spec.tensors()
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if len(shape) == 2 else np.float32)
        size_bytes = int(np.prod(shape)) * kind.itemsize
        raw = GGMLQuantizationType.F16 if kind == np.float16 else GGMLQuantizationType.F32
        writer.add_tensor_info(name, list(shape), kind, size_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, rng = writer.fout[0], np.random.default_rng(seed)
    for name, shape in shapes.items():
        writer.write_padding(file, file.tell())
        if len(shape) == 1:
            np.full(shape, name.endswith(".weight"), np.float32).tofile(file)
            continue
        scale, left = np.float32(shape[1] ** -0.5), shape[0] * shape[1]  # rows stay as long as they were
        while left:
            drawn = rng.standard_normal(min(left, CHUNK_VALUES), np.float32)
            (drawn * scale).astype(np.float16).tofile(file)
            left -= len(drawn)
    writer.write_padding(file, file.tell())
    writer.close()
    partial.rename(path)


def _add_shape(writer: GGUFWriter, config: Mapping[str, Any], spec: DecoderSpec) -> None:
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)


def _add_vocabulary(writer: GGUFWriter, like: GGUFFile, size: int) -> None:
    """Another file's vocabulary, filled up to so many tokens. Raises `ValueError` where it has more."""
    tokens, merges = (list(_texts(like, key)) for key in ("tokens", "merges"))
    types = like.get_list("tokenizer.ggml.token_type", int)
    if size < len(tokens):
        raise ValueError(f"vocab_size is {size:,}, the vocabulary has {len(tokens):,} tokens")
    unused = size - len(tokens)
    writer.add_token_list([*tokens, *(f"<|unused_{index}|>" for index in range(unused))])
    writer.add_token_types([*types, *[int(TokenType.UNUSED)] * unused])
    writer.add_token_merges(merges)
    for key in VOCABULARY:
        value = like.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)


def _texts(file: GGUFFile, key: str) -> Texts:
    value = file.metadata[f"tokenizer.ggml.{key}"]
    assert isinstance(value, Texts)
    return value


def main() -> int:
    """Make the files that are not there yet and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--types", default="Q4_K_M", help="as llama-quantize names them, by commas; F16 is the source")
    parser.add_argument("--out", type=Path, default=Path("build/peers/models"))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where llama.cpp was built")
    parser.add_argument("--keep-f16", action="store_true", help="leave the F16 file there too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source, kinds = args.out / f"{args.config.stem}.F16.gguf", args.types.split(",")
    paths = [args.out / f"{args.config.stem}.{kind}.gguf" for kind in kinds]
    try:
        if not all(path.exists() for path in paths) and not source.exists():
            write_random_model(json.loads(args.config.read_text()), source, read_gguf(resolve("smollm2")))
        runs = LlamaCppRuns(args.peers.resolve(), threads=2)
        for path, kind in zip(paths, kinds, strict=True):
            if not path.exists():
                runs.quantize(source, path, kind)
            print(path)
    except (KvikError, ValueError, OSError, RuntimeError, NotAvailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if "F16" not in kinds and not args.keep_f16:
        source.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
