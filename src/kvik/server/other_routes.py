"""Routes that generate nothing: models, tokens, embeddings, health."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from kvik import __version__
from kvik.config import Pooling
from kvik.engine.output import Embedding
from kvik.server.bodies import json_response, read_body
from kvik.server.errors import api_error, bad_request, client_left
from kvik.server.fields import Body, Text
from kvik.server.generation import check_texts, unless_client_leaves
from kvik.server.openai.chat import prepare_chat, session_of
from kvik.server.openai.chat_input import CHAT_FIELDS, ChatMessage, ChatRequest, texts_of
from kvik.server.openai.completions import prompts_of
from kvik.server.preparing import ignored_header
from kvik.server.reasoning import with_thoughts
from kvik.server.served import ServedModel
from kvik.server.state import ServerState

# What `/v1/embeddings` says of itself in every answer.
POOR_EMBEDDINGS = "hidden states of a model that was trained to chat: far behind those of models trained for embeddings"


async def list_models(request: Request) -> Response:
    """All models."""
    models = ServerState.of(request).models
    return json_response({"object": "list", "data": [served.card() for served in models]})


async def one_model(request: Request) -> Response:
    """One of them."""
    return json_response(ServerState.of(request).models.get(request.path_params["name"]).card())


MAX_TOKENIZED = 1 << 20  # characters
MAX_DETOKENIZED = 1 << 18  # tokens


class TokenizeRequest(Body, frozen=True, kw_only=True):
    """Text, or a conversation, to be tokenized."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZED)] | None = None
    content: Annotated[str, Meta(max_length=MAX_TOKENIZED)] | None = None  # llama.cpp's name of it
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_special: bool | None = None  # llama.cpp's name of it
    add_generation_prompt: bool = True
    with_pieces: bool = False
    return_token_strs: bool = False


async def tokenize(request: Request) -> Response:
    """Token ids of a text or of a conversation."""
    state = ServerState.of(request)
    body = await read_body(request, TokenizeRequest)
    served = state.models.get(body.model)
    given = [value for value in (body.prompt, body.content, body.messages) if value is not None]
    if len(given) != 1:
        raise bad_request("send one of prompt and messages", "prompt")
    add_special = body.add_special_tokens if body.add_special is None else body.add_special

    def encode() -> list[int]:
        if body.messages is not None:
            messages = [message.plain(f"messages[{at}]") for at, message in enumerate(body.messages)]
            check_texts(served, texts_of(messages), "messages")
            return served.llm.render_chat(
                with_thoughts(served, messages), add_generation_prompt=body.add_generation_prompt, plain_content=True
            )
        assert isinstance(given[0], str)
        return served.llm.model.tokenizer.encode(given[0], add_special=add_special)

    def answer() -> dict[str, Any]:
        tokens = encode()
        told: dict[str, Any] = {
            "tokens": [_with_piece(served, token_id) for token_id in tokens] if body.with_pieces else tokens,
            "count": len(tokens),
            "max_model_len": served.llm.model.context,
        }
        if body.return_token_strs:
            told["token_strs"] = [served.llm.model.tokenizer.token_text(token_id) for token_id in tokens]
        return told

    try:
        return json_response(await asyncio.to_thread(answer))
    except Exception as error:
        raise api_error(error, frozenset(TokenizeRequest.__struct_fields__)) from error


def _with_piece(served: ServedModel, token_id: int) -> dict[str, Any]:
    data = served.llm.model.tokenizer.token_bytes(token_id, skip_special=False)
    try:
        return {"id": token_id, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(data)}


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """Token ids to be made text."""

    model: str | None = None
    tokens: Annotated[list[int], Meta(max_length=MAX_DETOKENIZED)]


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    body = await read_body(request, DetokenizeRequest)
    served = ServerState.of(request).models.get(body.model)
    try:
        text = await asyncio.to_thread(served.llm.model.tokenizer.decode, body.tokens, skip_special=False)
    except Exception as error:
        raise api_error(error, frozenset({"tokens"})) from error
    return json_response({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """What a client needs to know of the tokenizer, as lm-eval asks for it."""
    served = ServerState.of(request).models.get(request.query_params.get("model"))
    model = served.llm.model
    tokenizer, template = model.tokenizer, model.chat_template

    def name(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token_text(token_id)

    # First the one that the model's own files call its end.
    ends = sorted(
        tokenizer.eos_token_ids, key=lambda each: (template is None or name(each) != template.eos_token, each)
    )
    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": name(tokenizer.bos_token_id),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token": name(ends[0]) if ends else None,
            "eos_token_id": ends[0] if ends else None,
            "eos_token_ids": sorted(ends),
            "pad_token": None,
            "model_max_length": model.context,
            "chat_template": None if template is None else template.source,
        }
    )


class EmbeddingRequest(Body, frozen=True, kw_only=True):
    """Texts or token ids to be made vectors."""

    accepted = frozenset({"user"})

    model: str | None = None
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    pooling: Pooling = "last"
    normalize: bool = True
    cache_salt: Text | None = None
    user: str | None = None


async def embeddings(request: Request) -> Response:
    """One vector for each input."""
    state = ServerState.of(request)
    body = await read_body(request, EmbeddingRequest)
    served = state.models.get(body.model)
    width = served.llm.model.decoder.spec.hidden_size
    if body.dimensions not in (None, width):
        raise bad_request(f"dimensions is {body.dimensions}, the model's vectors have {width}", "dimensions")
    try:
        prompts = await asyncio.to_thread(prompts_of, served, body.input, name="input")
        if len(prompts) > state.config.max_prompts:
            raise bad_request(f"input has {len(prompts):,} items, give up to {state.config.max_prompts:,}", "input")
        work = served.async_llm.embed(
            prompts,
            body.pooling,
            body.normalize,
            salt=state.salt(request, body.cache_salt),
            request_id=request.scope["state"]["request_id"],
        )
        found = await unless_client_leaves(request, asyncio.ensure_future(work))
    except Exception as error:
        raise api_error(error, frozenset(EmbeddingRequest.__struct_fields__)) from error
    if found is None:
        raise client_left()
    num_tokens = sum(embedding.num_tokens for embedding in found)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(embedding, body.encoding_format)}
        for index, embedding in enumerate(found)
    ]
    usage = {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(embedding.stats.num_cached_tokens for embedding in found)},
    }
    answer = {"object": "list", "data": data, "model": served.id, "usage": usage, "note": POOR_EMBEDDINGS}
    return json_response(answer, headers=ignored_header(body.ignored()))


def _vector(embedding: Embedding, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(embedding.vector.astype(np.dtype("<f4")).tobytes()).decode()
    return [float(value) for value in embedding.vector]


async def count_chat_tokens(request: Request) -> Response:
    """How many tokens a chat request's prompt has."""
    state = ServerState.of(request)
    body = await read_body(request, ChatRequest)
    session = session_of(state, request, body)
    served = state.models.get(body.model) if session is None else session.served
    try:
        generation = await asyncio.to_thread(prepare_chat, state, request, body, served, session)
    except Exception as error:
        raise api_error(error, CHAT_FIELDS) from error
    return json_response({"object": "chat.completion.input_tokens", "input_tokens": len(generation.prompts[0])})


async def version(request: Request) -> Response:
    """The server's version."""
    return json_response({"version": __version__})
