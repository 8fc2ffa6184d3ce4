"""Sessions saved by name: they go on in another process where they ended, for nobody but who saved them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import InvalidInput
from kvik.store.files import FileStore

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)


def opened(path: Path, store: Path, **options: Any) -> LLM:
    return LLM(path, threads=1, store=store, **options)


def files(llm: LLM) -> FileStore:
    assert llm.engine.tier is not None
    assert isinstance(llm.engine.tier.store, FileStore)
    return llm.engine.tier.store


def test_a_session_goes_on_in_another_process(tmp_path: Path, tiny_path: Path) -> None:
    llm = opened(tiny_path, tmp_path)
    session = Session(llm, system="Be brief.")
    session.append("user", "Why is the sky blue?")
    session.generate(PARAMS)
    saved = session.save("sky")
    assert saved.num_tokens > 60
    assert saved.num_stored_blocks == len(saved.digests) == saved.num_tokens // 32
    session.append("user", "And why is it black at night?")
    expected = session.generate(PARAMS)
    llm.close()

    llm = opened(tiny_path, tmp_path)
    loaded = Session.load(llm, "sky")
    assert len(loaded.messages) == 3
    loaded.append("user", "And why is it black at night?")
    fork = loaded.fork()
    answer = loaded.generate(PARAMS)
    assert answer.token_ids == expected.token_ids
    assert answer.stats.num_stored_tokens >= saved.num_tokens
    assert fork.generate(PARAMS).token_ids == expected.token_ids
    loaded.save("sky")
    assert len(Session.load(llm, "sky").messages) == 5, "the newer in place of the older"
    llm.close()


def test_its_options_are_saved_and_can_be_replaced(tmp_path: Path, tiny_path: Path) -> None:
    llm = opened(tiny_path, tmp_path)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    Session(llm, template_vars={"style": "short"}, plain_content=True, salt="ada", tools=tools).save("a.b-c_1")
    loaded = Session.load(llm, "a.b-c_1", salt="ada", plain_content=False)
    assert loaded._for_template == {"template_vars": {"style": "short"}, "plain_content": False, "tools": tools}
    for salt in (None, "bob"):
        with pytest.raises(InvalidInput, match="no saved session"):
            Session.load(llm, "a.b-c_1", salt=salt)
    llm.close()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0", "a b", "ä", "x" * 65, 3, None]
)
def test_names_lead_nowhere_else(tmp_path: Path, tiny_path: Path, name: Any) -> None:
    llm = opened(tiny_path, tmp_path)
    for what in (Session(llm).save, lambda each: Session.load(llm, each)):
        with pytest.raises(InvalidInput, match="a session's name"):
            what(name)
    llm.close()


def test_a_damaged_session_is_refused(tmp_path: Path, tiny_path: Path) -> None:
    llm = opened(tiny_path, tmp_path)
    session = Session(llm)
    session.append("user", "Hello")
    session.save("hello")
    path = files(llm).folder / "sessions" / llm.engine.cache.root().hex() / "hello"
    assert path.stat().st_mode & 0o777 == 0o600
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InvalidInput, match="damaged"):
            Session.load(llm, "hello")
        path.write_bytes(data[:at])
        with pytest.raises(InvalidInput, match="damaged"):
            Session.load(llm, "hello")
    path.write_bytes(data)
    assert len(Session.load(llm, "hello").messages) == 1
    path.rename(path.with_name("renamed"))
    with pytest.raises(InvalidInput, match="damaged"):
        Session.load(llm, "renamed")
    llm.close()


def test_without_a_store_nothing_is_saved(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="there is none"):
        Session(llm).save("x")
    with pytest.raises(InvalidInput, match="there is none"):
        Session.load(llm, "x")


def test_what_could_not_be_stored_is_said(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(tiny_path, tmp_path)
    monkeypatch.setattr(files(llm), "put", lambda block: False)
    session = Session(llm)
    session.append("user", "Hello")
    session.generate(PARAMS)
    saved = session.save("hello")
    assert (saved.num_stored_blocks, len(saved.digests) > 1) == (0, True)
    llm.close()


def test_the_same_for_tasks(tmp_path: Path, tiny_path: Path) -> None:
    async def main() -> None:
        llm = opened(tiny_path, tmp_path)
        async with AsyncLLM(llm) as async_llm:
            session = async_llm.session()
            session.append("user", "Hello")
            await session.generate(PARAMS)
            await session.save("hello")
            loaded = await async_llm.load_session("hello")
            assert loaded.messages == session.messages
            loaded.append("user", "Go on")
            await loaded.generate(PARAMS)
        llm.close()

    asyncio.run(main())
