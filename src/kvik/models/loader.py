"""From a model file or a checkpoint folder to a decoder that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.config import WeightFormat
from kvik.errors import InvalidInput, ModelError, NotEnoughMemory
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.hub.folder import CONFIG
from kvik.hub.progress import Progress, silent
from kvik.machine import available_memory_bytes
from kvik.models.decoder import Decoder
from kvik.models.gguf_source import GGUFSource
from kvik.models.gguf_spec import read_spec
from kvik.models.spec import DecoderSpec
from kvik.models.weights import FileSource, LoadedMatrices, OneByOne, read_matrices, read_weights
from kvik.ops.base import Ops, Weight
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer
from kvik.text.tokenizer_gguf import GGUFTokenizer
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.models.packed_cache import PackedCache
    from kvik.models.quantize import Quantization


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    context: int  # most tokens of a sequence
    quantization: Quantization | None = None  # what quantising at load did to the weights


Approve = Callable[[DecoderSpec, int], None]
"""Called with the decoder's shape and the context before anything large is allocated; may raise."""


def check_config_of(folder: Path) -> None:
    """Raise `ModelError` for a checkpoint folder whose config.json is of no model that kvik runs."""
    from kvik.models.checkpoint import read_model_config
    from kvik.models.hf_spec import read_hf_spec

    read_hf_spec(read_model_config(folder), folder / CONFIG)


def load_model(
    path: Path,
    ops: Ops,
    *,
    context: int | None = None,
    weights: WeightFormat | None = None,
    approve: Approve = lambda spec, context: None,
    progress: Progress = silent,
    packed_cache: Path | None = None,
) -> LoadedModel:
    """Read, check and pack a GGUF file or a checkpoint folder; `context` None means the model's own.

    `weights` quantises those of a folder; in `packed_cache`, a folder, what was packed is kept for the next time.
    Raises `ModelError`, `InvalidInput`, `NotEnoughMemory`.
    """
    cache = None if packed_cache is None else _open_cache(packed_cache, path, ops, weights, progress)
    if path.is_dir():
        return _load_folder(path, ops, context, weights, approve, progress, cache)
    if weights is not None:
        raise InvalidInput(
            f"weights is {weights!r}, but {path.name} is a GGUF file, whose weights stay as they are",
            hint="leave it out, take a GGUF of that type, or load the checkpoint folder that it was made from",
        )
    file = read_gguf(path)
    spec = read_spec(file, context)
    context = _chosen_context(path, spec, context)
    approve(spec, context)
    tokenizer = GGUFTokenizer(file.metadata, path.name)
    if tokenizer.vocab_size != spec.vocab_size:
        raise ModelError(
            f"{path}: the vocabulary has {tokenizer.vocab_size:,} tokens, the embedding {spec.vocab_size:,} rows",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )
    source = GGUFSource(file, spec, ops, progress)
    matrices = _load_matrices(path, source, cache)
    decoder = Decoder(spec, read_weights(spec, LoadedMatrices(matrices, source)), ops, context)
    return LoadedModel(path, decoder, tokenizer, _gguf_template(file, tokenizer), context)


def _load_folder(
    folder: Path,
    ops: Ops,
    context: int | None,
    weights: WeightFormat | None,
    approve: Approve,
    progress: Progress,
    cache: PackedCache | None,
) -> LoadedModel:
    # What a GGUF file, as most models are, does not need to wait for.
    from kvik.models.checkpoint import read_checkpoint
    from kvik.models.checkpoint_source import CheckpointSource
    from kvik.models.hf_spec import read_hf_spec
    from kvik.text.tokenizer_config import chat_template_of
    from kvik.text.tokenizer_json import FolderTokenizer

    checkpoint = read_checkpoint(folder)
    spec = read_hf_spec(checkpoint.config, checkpoint.config_path, context)
    context = _chosen_context(folder, spec, context)
    approve(spec, context)
    tokenizer = FolderTokenizer(folder, spec.vocab_size)
    source = CheckpointSource(checkpoint, spec, ops, weights=weights, progress=progress)
    matrices = _load_matrices(folder, source, cache)
    quantization = source.quantization if cache is None or cache.quantization is None else cache.quantization
    decoder = Decoder(spec, read_weights(spec, LoadedMatrices(matrices, source)), ops, context)
    return LoadedModel(
        path=folder,
        decoder=decoder,
        tokenizer=tokenizer,
        chat_template=chat_template_of(folder),
        context=context,
        quantization=quantization,
    )


def _open_cache(folder: Path, model: Path, ops: Ops, weights: WeightFormat | None, progress: Progress) -> PackedCache:
    from kvik.models.packed_cache import PackedCache

    return PackedCache(folder.expanduser(), model, ops, weights, progress)


def _load_matrices(path: Path, source: FileSource, cache: PackedCache | None) -> dict[str, Weight]:
    """All matrices: packed, or mapped from the cache, where those stay that memory does not hold."""
    kinds, available = source.kinds(), available_memory_bytes()
    too_large = f"{path}: the weights take {amount(source.num_bytes)}, the machine has {amount(available)} available"
    if source.num_bytes <= available:
        matrices = None if cache is None else cache.read(kinds)
        if matrices is None:
            matrices = read_matrices(source)
            if cache is not None:
                cache.write(matrices, source)
        return matrices
    if cache is None:
        raise NotEnoughMemory(
            too_large,
            hint="keep them packed in a file, where they are read as they are needed, which is slower"
            " (`--packed-cache`); or take fewer bits (a folder's `--weights q4`, a GGUF of such a type)",
        )
    log.warning("%s: they stay in %s and are read as they are needed, which is slower", too_large, cache.folder)
    matrices = cache.read(kinds, on_demand=True)
    if matrices is None:
        cache.write(OneByOne(source), source)
        matrices = cache.read(kinds, on_demand=True)
    if matrices is None:
        raise NotEnoughMemory(too_large, hint="see what the log says of the packed cache, or take a smaller model")
    return matrices


def _chosen_context(path: Path, spec: DecoderSpec, context: int | None) -> int:
    if context is None:
        return spec.context_length
    if context > spec.context_length:
        raise InvalidInput(
            f"context is {context:,}, {path.name} was made for {spec.context_length:,} tokens",
            hint=f"give at most {spec.context_length}",
        )
    return context


def _gguf_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = file.get_str("tokenizer.chat_template", "")
    if not source:
        return None

    def text(key: str) -> str:
        token_id = file.get_int(f"tokenizer.ggml.{key}_token_id", -1)
        return tokenizer.token_text(token_id) if 0 <= token_id < tokenizer.vocab_size else ""

    return ChatTemplate(source, bos_token=text("bos"), eos_token=text("eos"), name=file.path.name)
