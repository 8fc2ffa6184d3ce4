"""A server in a thread of the tests' process, with a clock that the tests set, and clients with keys."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import uvicorn

from checkpoints import tiny_config, tiny_tensors, write_checkpoint
from kvik.engine.llm import LLM
from kvik.server.app import make_app
from kvik.server.run import bind
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState
from models import assert_idle
from tool_templates import SUPPORTED, make

PATIENCE_S = 60.0
KEYS = {"key-of-anna": "anna", "key-of-bert": "bert"}
CHAT = "/v1/chat/completions"


class Caller:
    """Requests with one key."""

    def __init__(self, port: int, key: str | None) -> None:
        self._port = port
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    @contextmanager
    def open(self, method: str, path: str, body: Any = None) -> Iterator[HTTPResponse]:
        """An answer that is not yet read; leaving closes the connection."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {**self._headers, "Content-Type": "application/json"})
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON of an answer with this status."""
        with self.open(method, path, body) as response:
            data = response.read()
            assert response.status == status, data
            return json.loads(data)

    def get(self, path: str, *, status: int = 200) -> Any:
        """That of a GET."""
        return self.ask("GET", path, status=status)

    def post(self, path: str, body: Any, *, status: int = 200) -> Any:
        """That of a POST."""
        return self.ask("POST", path, body, status=status)

    def chat(self, messages: Any, **others: Any) -> Any:
        """A short greedy answer."""
        return self.post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 6, **others})

    def stream(self, messages: Any, **others: Any) -> list[Any]:
        """The same in chunks."""
        body = {"messages": messages, "temperature": 0, "max_tokens": 6, "stream": True, **others}
        with self.open("POST", CHAT, body) as response:
            lines = [line[6:] for line in response.read().splitlines() if line.startswith(b"data: ")]
        assert lines.pop() == b"[DONE]"
        return [json.loads(line) for line in lines]


class KeptServer:
    """The real application around `model`, `model-2` and so on; a context manager, which leaves the engine idle."""

    def __init__(self, llm: LLM, *others: LLM, **config: Any) -> None:
        self.llm = llm
        self._others = others
        self.now_s = 1000.0
        self._config = ServerConfig(port=0, drain_s=0, **config)

    def __enter__(self) -> KeptServer:
        listening = bind("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        served = [ServedModel("model", self.llm)]
        served += [ServedModel(f"model-{at}", llm) for at, llm in enumerate(self._others, start=2)]
        self.state = ServerState(self._config, Models(served), clock=lambda: self.now_s)
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(self.state), http="h11", lifespan="off", log_config=None, access_log=False)
        )

        async def main() -> None:
            await self._server.serve(sockets=[listening])
            self.state.kept.close()
            for model in served:
                await model.async_llm.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(main()))
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert_idle(self.llm.engine)

    def caller(self, key: str | None = None) -> Caller:
        """Whoever has this key."""
        return Caller(self.port, key)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.llm.engine.cache.pool.num_held


def tool_llm(folder: Path) -> LLM:
    """A random model with a chat template that writes calls as Qwen's do."""
    template, tokenizer = make(folder / "tokenizer", SUPPORTED["qwen2.5"])
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    write_checkpoint(folder, config, tiny_tensors(config, seed=3))
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    (folder / "chat_template.jinja").write_text(template.source)
    return LLM(folder, kv_memory="16MiB", threads=1)


def with_engine(llm: LLM, **changes: Any) -> LLM:
    """The same weights behind an engine of its own."""
    other = copy.copy(llm)
    other.engine = llm.new_engine(**changes)
    return other


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until it is; give up after a minute."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.002)
