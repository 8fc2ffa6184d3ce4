"""Routes that generate nothing: models, tokens, embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from kvik.engine.llm import LLM
from server_process import Client

TEXTS = ["", "Hello, world", "naïve café 你好 🚀", "<|im_end|>", "a\n\n\tb "]
EMBED = "/v1/embeddings"


def test_models(client: Client) -> None:
    """The list, and one by its id or an alias, also one with a slash."""
    (card,) = client.get("/v1/models").body["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("smollm2", "model", "kvik")
    assert card["aliases"] == ["org/smol"]
    assert card["max_model_len"] == 8192
    for name in ("smollm2", "org/smol", "org%2Fsmol"):
        assert client.get(f"/v1/models/{name}").body == card


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_and_back(client: Client, smol: LLM, text: str) -> None:
    body = client.ok("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert body["tokens"] == smol.model.tokenizer.encode(text, add_special=False)
    assert body["count"] == len(body["tokens"])
    assert client.ok("/tokenize", {"content": text, "add_special": False})["tokens"] == body["tokens"]
    back = client.ok("/detokenize", {"tokens": body["tokens"]})
    assert back["prompt"] == back["content"] == text


def test_pieces(client: Client) -> None:
    """With their text, or their bytes where they are no text."""
    body = client.ok("/tokenize", {"prompt": "Hi 🧬", "with_pieces": True, "return_token_strs": True})
    pieces = [each["piece"] for each in body["tokens"]]
    assert b"".join(bytes(each) if isinstance(each, list) else each.encode() for each in pieces).decode() == "Hi 🧬"
    assert any(isinstance(each, list) for each in pieces)
    assert len(body["token_strs"]) == body["count"] == len(pieces)


def test_a_conversation_s_tokens(client: Client, smol: LLM) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    for prompt in (True, False):
        body = client.ok("/tokenize", {"messages": messages, "add_generation_prompt": prompt})
        assert body["tokens"] == smol.render_chat(messages, add_generation_prompt=prompt, plain_content=True)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": 3}, "invalid_type", "prompt"),
        ("/detokenize", {}, "missing_field", "tokens"),
        ("/detokenize", {"tokens": [49152]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "invalid_type", "tokens[0]"),
    ],
)
def test_tokens_that_are_none(client: Client, path: str, body: Any, code: str, param: str) -> None:
    answer = client.post(path, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, code, param)


def test_tokenizer_info(client: Client, smol: LLM) -> None:
    body = client.get("/tokenizer_info").body
    assert body["eos_token"] == "<|im_end|>"
    assert body["eos_token_ids"] == sorted(smol.model.tokenizer.eos_token_ids)
    assert body["model_max_length"] == 8192
    assert "add_generation_prompt" in body["chat_template"]
    assert client.get("/tokenizer_info?model=none").status == 404


def test_embeddings(client: Client, smol: LLM) -> None:
    """Texts, token ids and base64; what they are is said."""
    texts = ["The sea", "A train"]
    body = client.ok(EMBED, {"input": texts, "user": "me"})
    ids = client.ok(EMBED, {"input": [smol.encode(text) for text in texts]})
    encoded = client.ok(EMBED, {"input": texts, "encoding_format": "base64"})
    assert body["data"] == ids["data"]
    assert [item["index"] for item in body["data"]] == [0, 1]
    for item, other in zip(body["data"], encoded["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), np.float32)
        assert [float(value) for value in vector] == item["embedding"]
    assert body["usage"]["prompt_tokens"] == sum(len(smol.encode(text)) for text in texts)
    assert "trained to chat" in body["note"]
    assert len(client.ok(EMBED, {"input": "One", "dimensions": 576})["data"]) == 1


def test_head(client: Client) -> None:
    """Load generators ask so whether the server is there."""
    answer = client.ask("HEAD", "/v1/models")
    assert (answer.status, answer.data) == (200, b"")
