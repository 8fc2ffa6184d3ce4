"""Chat templates of strangers: what they refuse, and what they do instead of rendering."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvik.engine.llm import LLM
from models import altered
from server_process import Server, with_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def server_with(template: str, tiny_llm: LLM, folder: Path) -> Server:
    path = altered(tiny_llm.model.path, folder / "model.gguf", metadata={"tokenizer.chat_template": template})
    return Server({"tiny": LLM(path, kv_memory="1MiB", threads=1)})


def test_one_that_refuses(tiny_llm: LLM, tmp_path: Path) -> None:
    """Row 16: its own message, and the client's fault."""
    with server_with("{{ raise_exception('Roles must alternate') }}", tiny_llm, tmp_path) as server:
        for others in ({}, {"stream": True}):
            answer = server.client.post(CHAT, ASK | others)
            assert (answer.status, answer.error["code"]) == (400, "template_refused")
            assert "Roles must alternate" in answer.error["message"]
            assert answer.error["param"] == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{%- for a in range(99999) %}{%- for b in range(99999) %}{%- endfor %}{%- endfor %}",
        "{%- set ns = namespace(text='x' * 1000) %}{%- for a in range(40) %}{%- set ns.text = ns.text + ns.text %}"
        "{%- endfor %}{{ ns.text }}",
    ],
    ids=["loops", "grows"],
)
def test_one_that_never_ends(tiny_llm: LLM, tmp_path: Path, template: str) -> None:
    """Row 15: an error of the server's, which is not to be repeated; others are served meanwhile."""
    with server_with(template, tiny_llm, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.client.post, CHAT, ASK)
        assert server.client.ok(TEXT, {"prompt": "Hi", "max_tokens": 1})["choices"]
        answer = asked.result()
        assert (answer.status, answer.error["code"], answer.error["type"]) == (500, "template_error", "server_error")
        assert answer.headers["x-should-retry"] == "false"
        server.assert_idle()


def test_a_model_without_one(tiny_llm: LLM, tmp_path: Path) -> None:
    path = altered(tiny_llm.model.path, tmp_path / "model.gguf", without=["tokenizer.chat_template"])
    with Server({"tiny": LLM(path, kv_memory="1MiB", threads=1)}) as server:
        answer = server.client.post(CHAT, ASK)
        assert (answer.status, answer.error["code"]) == (400, "unsupported_by_model")
        assert str(tmp_path) not in answer.error["message"]
        assert not server.client.get("/v1/models").body["data"][0]["chat"]


def test_a_hundred_equal_prompts_at_once(tiny_llm: LLM) -> None:
    """Row 34: the prompt is computed about once, and the others find it."""
    prompt = [5 + at % 290 for at in range(2000)]
    with Server({"tiny": with_engine(tiny_llm, kv_memory="64MiB")}) as server:
        body = {"prompt": [prompt] * 100, "max_tokens": 2, "temperature": 0, "return_token_ids": True}
        answer = server.client.ok(TEXT, body)
        assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 1
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 99 * 1984 - 2000
        server.assert_idle()
