"""What one client sends must cost the others little: it is bounded before work is done with it."""

from __future__ import annotations

import pytest

from kvik.engine.llm import LLM
from server_process import Client, Server, with_engine

LONG = "a" * 700_000  # more than 8,192 of the vocabulary's longest tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["a", LONG]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG[:350_000]}] * 2}]},
            "messages",
        ),
        ("/v1/embeddings", {"input": LONG}, "input"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
)
def test_texts_that_cannot_fit_are_not_tokenized(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object], param: str
) -> None:
    def encode(text: str, **_: object) -> list[int]:
        assert len(text) < 1000, "it was tokenized"
        return [5]

    monkeypatch.setattr(server.served.llm.model.tokenizer, "encode", encode)
    error = client.post(path, body).error
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * ((1 << 20) + 1)}, "prompt"),
        ("/detokenize", {"tokens": [5] * ((1 << 18) + 1)}, "tokens"),
        ("/v1/completions", {"prompt": ["a"] * 1100, "max_tokens": 1}, "prompt"),
    ],
)
def test_lists_and_texts_have_bounds(client: Client, path: str, body: dict[str, object], param: str) -> None:
    answer = client.post(path, body)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_switches_of_templates_have_a_bound(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": "b" * 20_000}}
    error = client.post("/v1/chat/completions", body).error
    assert (error["code"], error["param"]) == ("invalid_value", "chat_template_kwargs")


def test_pins_leave_room_for_requests_that_name_no_number(smol: LLM) -> None:
    """A pin of one client's makes the answers of the others shorter, and refuses none of them."""
    with Server({"smollm2": with_engine(smol, kv_memory="190MiB")}) as server:
        text = " ".join(f"word{number}" for number in range(300))
        part = {"type": "text", "text": text, "prompt_cache_breakpoint": {"mode": "explicit"}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        assert server.client.ok("/v1/chat/completions", body)["prompt_cache_breakpoints"][0]["status"] == "written"
        assert server.engine.cache.num_pinned > 20
        short = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "stop": ["."]}
        assert server.client.post("/v1/chat/completions", short).status == 200
