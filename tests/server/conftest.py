"""Servers that several tests share, and the library beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.engine.llm import LLM
from models import tiny_model
from server_process import Client, Server, with_engine
from tool_model import write_tool_model

KV_MEMORY = "96MiB"


@pytest.fixture(scope="session")
def smol(default_model_path: Path) -> LLM:
    """The default model as the library has it, with an engine of its own."""
    return LLM(default_model_path, kv_memory=KV_MEMORY, threads=2)


@pytest.fixture(scope="session")
def smol_server(smol: LLM) -> Iterator[Server]:
    """The default model's server."""
    with Server({"smollm2": with_engine(smol)}, aliases=["org/smol"]) as server:
        yield server


@pytest.fixture
def server(smol_server: Server) -> Iterator[Server]:
    """The same for one test, which must leave it idle."""
    smol_server.streams  # noqa: B018  # forget those of others
    yield smol_server
    smol_server.assert_idle()


@pytest.fixture
def client(server: Server) -> Client:
    """A client of the default model's server."""
    return server.client


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model of 320 tokens with a long context: fast, and it never has a reason to stop."""
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=8192).path
    return LLM(path, kv_memory="16MiB", threads=1)


@pytest.fixture(scope="session")
def tool_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model with a chat template that writes calls as Hermes does."""
    return LLM(write_tool_model(tmp_path_factory.mktemp("tools")), kv_memory="16MiB", threads=1)


@pytest.fixture(scope="session")
def tool_server(tool_llm: LLM) -> Iterator[Server]:
    """Its server."""
    with Server({"tools": with_engine(tool_llm)}) as server:
        yield server
