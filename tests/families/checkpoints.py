"""Checkpoint folders whose weights follow from their names, so that none need be stored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gguf_files import byte_characters

FloatArray = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]


def _bits(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """24 of each item."""
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape))) >> np.uint64(40)


def weight(name: str, shape: tuple[int, ...]) -> FloatArray:
    """The tensor of that name: matrices such that numbers neither grow nor fade, norms about 1, others about 0.

    Made of a bit generator's raw output, which no version of NumPy changes.
    """
    bits = _bits(name, shape)
    values = (bits.astype(np.float32) / np.float32(1 << 23) - np.float32(1)).reshape(shape)  # -1 ... 1, exactly
    if len(shape) < 2:
        return np.asarray(values * np.float32(0.5) + np.float32(name.endswith(("weight", "scalar"))))
    return values * np.float32(2 / np.sqrt(max(shape)))


def tensor(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The same, or bytes: blocks of MXFP4, and scales such that their values are about as large."""
    if name.endswith("_blocks"):
        return _bits(name, shape).astype(np.uint8).reshape(shape)
    if name.endswith("_scales"):
        return (_bits(name, shape) % np.uint64(3) + np.uint64(121)).astype(np.uint8).reshape(shape)
    return weight(name, shape)


def write_weights(folder: Path, shapes: Shapes) -> None:
    """The folder's one file of tensors."""
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer.json of bytes, and names for the ids that are left."""
    tokens = [*byte_characters(), *(f"<{token_id}>" for token_id in range(256, vocab_size))]
    tokenizer = Tokenizer(models.BPE(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Path:
    """A whole checkpoint, and its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # those of the family are larger than this
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    write_weights(folder, shapes)
    write_tokenizer(folder, config.get("text_config", config)["vocab_size"])
    return folder
