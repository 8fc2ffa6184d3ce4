"""Tools, template variables and parts on every route to a chat template."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_llama
from kvik.config import SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import InvalidInput
from template_families import CALLS, FAMILIES, RESULTS, TOOLS

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)
USER: dict[str, Any] = {"role": "user", "content": "Hello"}
PARTS: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
ASKED: dict[str, Any] = {"tools": TOOLS, "template_vars": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("chat") / "tools.gguf"
    metadata = {"tokenizer.chat_template": FAMILIES["smollm3"]}
    return LLM(tiny_llama(path, context_length=4096, tied=False, extra_metadata=metadata), kv_memory="4MiB")


def rendered(llm: LLM, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    template = llm.model.chat_template
    assert template is not None
    return llm.model.tokenizer.encode(template.render(messages, **variables), add_special=False)


def test_they_reach_the_template(llm: LLM) -> None:
    expected = rendered(llm, [USER], tools=TOOLS, enable_thinking=False)
    assert llm.render_chat([USER], **ASKED) == llm.render_chat([PARTS], **ASKED) == expected
    assert llm.render_chat([USER]) == rendered(llm, [USER]) != expected


def test_every_route_asks_the_same(llm: LLM) -> None:
    expected = llm.generate(llm.render_chat([USER], **ASKED), PARAMS)[0]
    assert llm.chat([PARTS], PARAMS, **ASKED).token_ids == expected.token_ids
    assert "".join(piece.text for piece in llm.stream_chat([USER], PARAMS, **ASKED)) == expected.text
    with Session(llm, **ASKED) as session:
        session.append("user", PARTS["content"])
        completion = session.generate(PARAMS)
        assert completion.token_ids == expected.token_ids
        assert completion.stats.num_prompt_tokens == expected.stats.num_prompt_tokens

    async def served() -> tuple[list[int], str]:
        async with AsyncLLM(llm) as served_llm:
            (completion,) = await served_llm.chat([USER], PARAMS, **ASKED)
            text = [piece.text async for piece in served_llm.stream_chat([PARTS], PARAMS, **ASKED)]
            return completion.token_ids, "".join(text)

    assert asyncio.run(served()) == (expected.token_ids, expected.text)


def test_a_session_carries_calls_and_their_results(llm: LLM) -> None:
    with Session(llm, system="Be brief.", **ASKED) as session:
        session.append("user", "What time is it?")
        session.append("assistant", None, tool_calls=CALLS)
        for result in RESULTS:
            session.append(**result)
        prompt_ids = llm.render_chat(session.messages, **ASKED)
        assert session.generate(PARAMS).stats.num_prompt_tokens == len(prompt_ids)
        with session.fork() as fork:
            fork.append("user", "And now?")
            prompt_ids = llm.render_chat(fork.messages, **ASKED)
            assert fork.generate(PARAMS).stats.num_prompt_tokens == len(prompt_ids)


def test_what_is_none_is_refused_at_the_edge(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match=r"tools\[0\]\.type"):
        Session(llm, tools=[{"type": "x"}])
    with pytest.raises(InvalidInput, match="template_vars has 'messages'"):
        Session(llm, template_vars={"messages": []})
    with Session(llm) as session:
        session.append("user", "Hello")
        with pytest.raises(InvalidInput, match=r"messages\[1\]\.content\[0\] has unsupported content, 'image_url'"):
            session.append("user", [{"type": "image_url", "image_url": {"url": "x"}}])
        assert len(session.messages) == 1
    for route in (llm.chat, llm.stream_chat):
        with pytest.raises(InvalidInput, match=r"messages\[0\]\.content\[0\] has unsupported content"):
            route([{"role": "user", "content": [{"type": "input_audio"}]}])


def test_a_template_without_tools_says_so(tmp_path: Path) -> None:
    plain = LLM(tiny_llama(tmp_path / "plain.gguf"))
    with pytest.raises(InvalidInput, match=r"plain\.gguf: the chat template takes no tools"):
        plain.chat([USER], tools=TOOLS)
