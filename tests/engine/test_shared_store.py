"""Engines that share a store on a server: the same bits, whatever the server does."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.engine.output import Completion
from store.redis_servers import free_port, hostile_server, needs_redis, redis_server

PROMPT = [index * 7 % 300 for index in range(150)]


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef")
    return str(tmp_path / "secret")


@needs_redis
def test_two_engines_share_what_they_compute(tiny_path: Path, tmp_path: Path, secret: str) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3)

    def ask(**options: Any) -> Completion:
        llm = LLM(tiny_path, threads=1, **options)
        (completion,) = llm.generate(PROMPT, params)
        llm.close()
        return completion

    cold = ask()
    with redis_server(tmp_path) as port:
        first, second = (ask(store=f"redis://127.0.0.1:{port}", store_key=secret) for _ in range(2))
    assert (first.stats.num_stored_tokens, second.stats.num_stored_tokens) == (0, 128)
    dead = ask(store=f"redis://127.0.0.1:{free_port()}", store_key=secret)
    assert dead.stats.num_stored_tokens == 0
    for other in (first, second, dead):
        assert (other.token_ids, other.logprobs) == (cold.token_ids, cold.logprobs)


def test_an_engine_whose_store_lies_and_hangs_writes_the_same(tiny_path: Path, secret: str) -> None:
    chance = random.Random(1)

    def answer(client: socket.socket, words: list[bytes]) -> None:
        match words[0], chance.randrange(4):
            case ((b"SET" | b"PING"), _):
                client.sendall(b"+OK\r\n")
            case ((b"EXISTS" | b"TOUCH" | b"DEL"), _):
                client.sendall(b":1\r\n")
            case _, 0:
                client.sendall(b"$20\r\n" + chance.randbytes(20) + b"\r\n")
            case _, 1:
                client.sendall(b"$-1\r\n")
            case _, 2:
                raise OSError
            case _:
                pass  # no answer at all

    params = SamplingParams(max_tokens=5, ignore_eos=True)
    llm = LLM(tiny_path, threads=1)
    expected = [llm.generate(PROMPT[at:], params)[0].token_ids for at in range(6)]
    llm.close()
    with hostile_server(answer) as port:
        llm = LLM(tiny_path, threads=1, store=f"redis://127.0.0.1:{port}", store_key=secret)
        assert [llm.generate(PROMPT[at:], params)[0].token_ids for at in range(6)] == expected
        assert llm.engine.tier is not None
        assert llm.engine.tier.stats.num_loads > 0
        llm.close()
