"""A server in a thread of the tests' process, so that they can look at its engine, and a plain HTTP client of it."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPResponse
from types import TracebackType
from typing import Any, Self

from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.token_stream import TokenStream
from kvik.server.listening import bind
from kvik.server.run import new_server, run, stop
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState
from models import assert_idle

PATIENCE_S = 60.0
JSON = {"Content-Type": "application/json"}


def with_engine(llm: LLM, **changes: Any) -> LLM:
    """The same weights behind an engine of its own."""
    other = copy.copy(llm)
    other.engine = llm.new_engine(**changes)
    return other


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    data: bytes

    @cached_property
    def body(self) -> Any:
        """Its JSON."""
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        """The error that it must be, in OpenAI's shape: four fields, always."""
        error: dict[str, Any] = self.body["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        assert error["message"]
        assert error["type"]
        return error


class Client:
    """Requests to a server; each has a connection of its own."""

    def __init__(self, port: int, **headers: str) -> None:
        self.port = port
        self._headers = headers

    def ask(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, headers: Mapping[str, str] = JSON
    ) -> Answer:
        """Any request."""
        with self.connected(method, path, body, headers) as response:
            return _answer(response)

    def get(self, path: str, **headers: str) -> Answer:
        """A GET."""
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """A POST of JSON."""
        return self.ask("POST", path, json.dumps(body).encode(), JSON | headers)

    def ok(self, path: str, body: Any, **headers: str) -> Any:
        """The JSON of a POST that must succeed."""
        answer = self.post(path, body, **headers)
        assert answer.status == 200, answer.data
        return answer.body

    def stream(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The JSON of every event of a stream, which must succeed and end as it should."""
        with self.streaming(path, body) as events:
            *found, last = events
        assert last == "[DONE]"
        return [json.loads(each) for each in found]

    @contextmanager
    def streaming(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """The data of the events as they come; leaving closes the connection."""
        with self.connected("POST", path, json.dumps({**body, "stream": True}).encode()) as response:
            assert response.status == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            yield (line[6:].decode().rstrip("\n") for line in response if line.startswith(b"data: "))

    @contextmanager
    def connected(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str] = JSON
    ) -> Iterator[HTTPResponse]:
        """An answer that is not yet read; leaving closes the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, {**self._headers, **headers})
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()


class Server:
    """The real application on a free port, around models by their names; a context manager."""

    def __init__(
        self,
        models: Mapping[str, LLM],
        *,
        aliases: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        **config: Any,
    ) -> None:
        self.config = ServerConfig(port=0, drain_s=1.0, **config)
        self._clock = clock
        self._models = models
        self._aliases = aliases
        self._ready = threading.Event()
        self._streams: list[TokenStream] = []
        self._thread = threading.Thread(target=self._main, name="server")

    def __enter__(self) -> Self:
        self._listening = bind(self.config.host, self.config.port)
        self.port: int = self._listening.getsockname()[1]
        served = [ServedModel(name, llm, self._aliases) for name, llm in self._models.items()]
        self.state = ServerState(self.config, Models(served), clock=self._clock)
        for model in served:
            self._record_streams(model)
        self._server = new_server(self.state)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert stop(self.state), "an engine's thread lives on"

    @property
    def url(self) -> str:
        """Where OpenAI's clients find it."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def client(self) -> Client:
        """A client that sends the first of the keys, where there are any."""
        return Client(self.port, **({"X-Api-Key": key} if (key := next(iter(self.config.api_keys), None)) else {}))

    @property
    def served(self) -> ServedModel:
        """The first model."""
        return next(iter(self.state.models))

    @property
    def engine(self) -> Engine:
        """The first model's."""
        return self.served.llm.engine

    @property
    def streams(self) -> list[TokenStream]:
        """What was queued since the last call."""
        found, self._streams = self._streams, []
        return found

    def wait_for_stream(self) -> TokenStream:
        """The next that is queued."""
        wait_until(lambda: bool(self._streams))
        return self._streams.pop(0)

    def assert_idle(self) -> None:
        """Soon nothing runs, nothing waits, and nobody holds a block."""
        wait_until(lambda: not self.engine.scheduler.has_work)
        assert_idle(self.engine)

    def _record_streams(self, model: ServedModel) -> None:
        opened = model.async_llm.open

        def record(*arguments: Any, **options: Any) -> TokenStream:
            stream = opened(*arguments, **options)
            self._streams.append(stream)
            return stream

        model.async_llm.open = record  # type: ignore[method-assign]

    def _main(self) -> None:
        asyncio.run(run(self._server, self.state, self._listening, self._ready.set))


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until it is so, which must come some time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def _answer(response: HTTPResponse) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())
