"""From a GGUF file or a checkpoint to a decoder that runs: names, shapes and numbers are checked before any is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvik.config import Weights
from kvik.errors import InvalidInput, ModelError, NotEnoughMemory
from kvik.machine import available_memory_bytes
from kvik.models.chat_template import ChatTemplate
from kvik.models.checkpoint import Checkpoint, read_checkpoint
from kvik.models.checkpoint_source import CheckpointSource
from kvik.models.decoder import Decoder
from kvik.models.gguf import GGUFFile, read_gguf
from kvik.models.gguf_model import GGUFSource, read_spec
from kvik.models.hf_spec import read_hf_spec
from kvik.models.progress import Progress, silent
from kvik.models.quantize import Quantization
from kvik.models.spec import DecoderSpec
from kvik.models.tokenizer import Tokenizer
from kvik.models.weights import read_weights
from kvik.ops.base import Ops


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    path: Path  # a file or a folder
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    context: int  # most tokens of a sequence
    quantization: Quantization | None = None  # what quantising at load did to the weights


Approve = Callable[[DecoderSpec, int], None]
"""Called with the decoder's shape and the context before anything large is allocated; may raise."""


def load_model(
    path: Path,
    ops: Ops,
    *,
    context: int | None = None,
    weights: Weights = "keep",
    approve: Approve = lambda spec, context: None,
    progress: Progress = silent,
) -> LoadedModel:
    """Read, check and pack a GGUF file, or a folder with a checkpoint; `context` None means the model's own.

    `weights` other than "keep" quantises a checkpoint's matrices. Raises `ModelError`, `InvalidInput`, `NotEnoughMemory`.
    """
    if path.is_dir():
        return _load_checkpoint(path, ops, context, weights, approve, progress)
    if weights != "keep":
        raise InvalidInput(
            f"weights is {weights}, {path.name} is a file whose weights have their types already",
            hint="leave it out, or give a checkpoint: a folder with config.json and model.safetensors",
        )
    return _load_gguf(path, ops, context, approve)


def _load_gguf(path: Path, ops: Ops, context: int | None, approve: Approve) -> LoadedModel:
    file = read_gguf(path)
    spec = read_spec(file)
    context = _checked_context(context, spec, path)
    approve(spec, context)
    tokenizer = Tokenizer.from_metadata(file.metadata, path.name)
    if tokenizer.vocab_size != spec.vocab_size:
        raise ModelError(
            f"{path}: the vocabulary has {tokenizer.vocab_size:,} tokens, the embedding {spec.vocab_size:,} rows",
            hint="the file's parts do not belong together; take another GGUF of this model",
        )
    weights = read_weights(spec, GGUFSource(file, spec, ops))
    return LoadedModel(
        path=path,
        decoder=Decoder(spec, weights, ops, context),
        tokenizer=tokenizer,
        chat_template=_chat_template(file, tokenizer),
        context=context,
    )


def _load_checkpoint(
    folder: Path, ops: Ops, context: int | None, weights: Weights, approve: Approve, progress: Progress
) -> LoadedModel:
    checkpoint = read_checkpoint(folder)
    spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
    context = _checked_context(context, spec, folder)
    approve(spec, context)
    source = CheckpointSource(checkpoint, spec, ops, weights, progress)
    available = available_memory_bytes()
    if source.num_bytes > available:
        raise NotEnoughMemory(
            f"{folder}: the weights take {source.num_bytes / 2**30:,.1f} GiB,"
            f" the machine has {available / 2**30:,.1f} GiB available",
            hint="quantise them as they are loaded (`--weights q8` or q4), or take a smaller model",
        )
    tokenizer, chat_template = _read_texts(checkpoint, spec)
    decoder_weights = read_weights(spec, source)
    return LoadedModel(
        path=folder,
        decoder=Decoder(spec, decoder_weights, ops, context),
        tokenizer=tokenizer,
        chat_template=chat_template,
        context=context,
        quantization=source.quantization,
    )


def _checked_context(context: int | None, spec: DecoderSpec, path: Path) -> int:
    if context is not None and context > spec.context_length:
        raise InvalidInput(
            f"context is {context:,}, {path.name} was made for {spec.context_length:,} tokens",
            hint=f"give at most {spec.context_length}",
        )
    return spec.context_length if context is None else context


def _read_texts(checkpoint: Checkpoint, spec: DecoderSpec) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer and the chat template beside a checkpoint's weights."""
    raise NotImplementedError


def _chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = file.get_str("tokenizer.chat_template", "")
    if not source:
        return None

    def text(key: str) -> str:
        token_id = file.get_int(f"tokenizer.ggml.{key}_token_id", -1)
        return tokenizer.token_text(token_id) if 0 <= token_id < tokenizer.vocab_size else ""

    return ChatTemplate(source, bos_token=text("bos"), eos_token=text("eos"), name=file.path.name)
