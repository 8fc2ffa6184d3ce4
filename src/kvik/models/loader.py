"""From a GGUF file to a decoder that runs: names, shapes and numbers are checked before any is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import InvalidInput, ModelError
from kvik.models.chat_template import ChatTemplate
from kvik.models.decoder import Decoder
from kvik.models.gguf import GGUFFile, read_gguf
from kvik.models.gguf_source import GGUFSource
from kvik.models.gguf_spec import read_spec
from kvik.models.spec import DecoderSpec
from kvik.models.tokenizer import Tokenizer
from kvik.models.weights import read_weights
from kvik.ops.base import Ops


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    context: int  # most tokens of a sequence


Approve = Callable[[DecoderSpec, int], None]
"""Called with the decoder's shape and the context before anything large is allocated; may raise."""


def load_model(
    path: Path,
    ops: Ops,
    *,
    context: int | None = None,
    approve: Approve = lambda spec, context: None,
) -> LoadedModel:
    """Read, check and pack a GGUF model; `context` None means the model's own. Raises `ModelError`, `InvalidInput`."""
    file = read_gguf(path)
    spec = read_spec(file, context)
    if context is None:
        context = spec.context_length
    if context > spec.context_length:
        raise InvalidInput(
            f"context is {context:,}, {path.name} was made for {spec.context_length:,} tokens",
            hint=f"give at most {spec.context_length}",
        )
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


def _chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = file.get_str("tokenizer.chat_template", "")
    if not source:
        return None

    def text(key: str) -> str:
        token_id = file.get_int(f"tokenizer.ggml.{key}_token_id", -1)
        return tokenizer.token_text(token_id) if 0 <= token_id < tokenizer.vocab_size else ""

    return ChatTemplate(source, bos_token=text("bos"), eos_token=text("eos"), name=file.path.name)
