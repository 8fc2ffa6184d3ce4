"""A GGUF file of a config.json's shape, with random weights: the speed of a model that nobody has to download.

python bench/random_model.py bench/shapes/llama-1.1b.json --types Q4_K_M,Q8_0 [--out build/peers/models]

What it writes is noise. Which tensor has which weight format is llama-quantize's choice (bench/peers/build_llama_cpp.sh
builds it), as for a model that it quantises; the weights are drawn in these formats, a part of a tensor at a time. The
vocabulary is the default model's, filled up with unused tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from gguf_shapes import add_shape, family_of, tensors
from kvik.errors import KvikError
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.files.texts import Texts
from kvik.hub.store import resolve
from kvik_runs import NotAvailable
from llama_cpp_runs import LlamaCppRuns
from random_blocks import draw

CHUNK_VALUES = 1 << 24
VOCABULARY = ("model", "pre", "add_bos_token", "add_space_prefix", "bos_token_id", "eos_token_id", "unknown_token_id",
              "padding_token_id")  # fmt: skip


def write_random_model(
    config: Mapping[str, Any],
    path: Path,
    vocabulary: GGUFFile,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    *,
    file_type: str = "F16",
    empty: bool = False,
    seed: int = 0,
) -> None:
    """Write the file, whole or not at all; memory does not grow with the model.

    `kinds` are the weight formats by tensor; without them matrices are F16, norms, biases and routers F32. `empty`: the
    weights are a hole in the file, which takes no room on the disk. Raises `ValueError` for a family or a format of
    which no file is made, and for a vocabulary with more tokens than the model has.
    """
    architecture, shapes, partial = family_of(config).architecture, tensors(config), path.with_suffix(".partial")
    kinds = kinds or {name: _plain(name, shape) for name, shape in shapes.items()}
    writer = GGUFWriter(partial, arch=architecture)
    writer.add_file_type(_file_type(file_type))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_shape(writer, config)
    _add_vocabulary(writer, vocabulary, config["vocab_size"])
    for name, shape in shapes.items():
        values, size = GGML_QUANT_SIZES[kinds[name]]
        # float16 says nothing here: the format is the one that is given.
        writer.add_tensor_info(name, shape, np.dtype(np.float16), math.prod(shape) // values * size, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file, rng = writer.fout[0], np.random.default_rng(seed)
        for name, shape in shapes.items():
            writer.write_padding(file, file.tell())
            if empty:
                values, size = GGML_QUANT_SIZES[kinds[name]]
                file.truncate(file.seek(math.prod(shape) // values * size, 1))
            elif len(shape) == 1 or name.endswith(".bias"):
                np.full(shape, name.endswith(".weight"), np.float32).tofile(file)
            else:
                left, deviation = math.prod(shape), _size(name, shape, config["num_hidden_layers"])
                while left:
                    count = min(left, CHUNK_VALUES)
                    draw(kinds[name], count, deviation, rng).tofile(file)
                    left -= count
        writer.write_padding(file, file.tell())
        writer.close()
        partial.rename(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def quantized_kinds(
    config: Mapping[str, Any], vocabulary: GGUFFile, folder: Path, file_type: str, runs: LlamaCppRuns
) -> dict[str, GGMLQuantizationType]:
    """The weight formats that llama-quantize gives to the tensors. Raises `RuntimeError` where it does not tell."""
    path = folder / "shape.gguf"
    try:
        write_random_model(config, path, vocabulary, empty=True)
        names = runs.tensor_types(path, file_type)
    finally:
        path.unlink(missing_ok=True)
    if names.keys() != tensors(config).keys():
        raise RuntimeError(f"llama-quantize told the formats of {len(names)} tensors, not of {len(tensors(config))}")
    return {tensor: GGMLQuantizationType[name.upper()] for tensor, name in names.items()}


def _plain(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    is_matrix = len(shape) > 1 and name.endswith(".weight") and ".ffn_gate_inp." not in name
    return GGMLQuantizationType.F16 if is_matrix else GGMLQuantizationType.F32


def _size(name: str, shape: tuple[int, ...], num_layers: int) -> float:
    """The standard deviation of a matrix's values: what it projects stays as large as it was.

    A layer adds little to its residual, so that tokens stay apart from one another: routers choose other experts for
    other tokens. With small embeddings all tokens of a text come to be what attention adds to each of them.
    """
    if name == "token_embd.weight":
        return 1.0
    is_added = ".attn_output." in name or ".ffn_down" in name
    return float((shape[-1] * (2 * num_layers if is_added else 1)) ** -0.5)


def _file_type(name: str) -> LlamaFileType:
    return LlamaFileType[f"ALL_{name}" if name == "F32" else f"MOSTLY_{name}"]


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
    parser.add_argument("--types", default="Q4_K_M", help="as llama-quantize names them, by commas")
    parser.add_argument("--out", type=Path, default=Path("build/peers/models"))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where llama.cpp was built")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        config, runs = json.loads(args.config.read_text()), LlamaCppRuns(args.peers.resolve(), threads=2)
        vocabulary = read_gguf(resolve("smollm2"))
        for kind in args.types.split(","):
            path = args.out / f"{args.config.stem}.{kind}.gguf"
            if not path.exists():
                kinds = quantized_kinds(config, vocabulary, args.out, kind, runs)
                write_random_model(config, path, vocabulary, kinds, file_type=kind)
            print(path)
    except (KvikError, ValueError, OSError, RuntimeError, NotAvailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
