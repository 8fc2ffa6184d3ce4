"""A server in a thread of the tests' process, with a clock that the tests set, and clients with keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

from kvik.engine.llm import LLM
from models import assert_idle
from server_process import Client, Server

KEYS = {"key-of-anna": "anna", "key-of-bert": "bert"}
CHAT = "/v1/chat/completions"


class Caller:
    """Requests with one key."""

    def __init__(self, port: int, key: str | None) -> None:
        self._client = Client(port, **({} if key is None else {"Authorization": f"Bearer {key}"}))

    @contextmanager
    def open(self, method: str, path: str, body: Any = None) -> Iterator[HTTPResponse]:
        """An answer that is not yet read; leaving closes the connection."""
        data = None if body is None else json.dumps(body).encode()
        with self._client.connected(method, path, data) as response:
            yield response

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


class KeptServer(Server):
    """The real application around `model`, `model-2` and so on; it leaves the engine idle."""

    def __init__(self, llm: LLM, *others: LLM, **config: Any) -> None:
        self.llm = llm
        self.now_s = 1000.0
        models = {"model": llm} | {f"model-{at}": other for at, other in enumerate(others, start=2)}
        super().__init__(models, clock=lambda: self.now_s, **config)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        assert_idle(self.llm.engine)

    def caller(self, key: str | None = None) -> Caller:
        """Whoever has this key."""
        return Caller(self.port, key)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.llm.engine.cache.pool.num_held
