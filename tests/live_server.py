"""The server on a free port, in a thread of the tests' process, and requests to it or to its application alone."""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from starlette.types import ASGIApp, Message

from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.runner import ModelRunner, StepOutput
from kvik.server.listening import bind
from kvik.server.run import Server as RunningServer
from kvik.server.run import new_server, run, stop
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    data: bytes

    @property
    def body(self) -> Any:
        """Its JSON."""
        return json.loads(self.data)


class LiveServer:
    """What a test sees of a running server."""

    def __init__(self, state: ServerState, port: int, server: RunningServer | None = None) -> None:
        self.state = state
        self.port = port
        self._server = server

    @property
    def served(self) -> ServedModel:
        """Its first model."""
        return next(iter(self.state.models))

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request; a body that is neither bytes nor an iterator of them is sent as JSON."""
        with self.asking(method, path, body, headers) as response:
            return Answer(response.status, _names(response.getheaders()), response.read())

    @contextmanager
    def asking(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The same, not yet read; leaving closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes | Iterator):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
        try:
            connection.request(method, path, body, sent)
            yield connection.getresponse()
        finally:
            connection.close()

    def stand_still(self, seconds: float) -> None:
        """Hold up its event loop for so long."""
        is_over = threading.Event()

        def hold_up() -> None:
            time.sleep(seconds)
            is_over.set()

        assert self._server is not None
        assert self._server.loop is not None
        self._server.loop.call_soon_threadsafe(hold_up)
        assert is_over.wait(PATIENCE_S)

    def samples(self) -> dict[str, float]:
        """What `/metrics` says, by name and labels as they stand there."""
        answer = self.ask("GET", "/metrics")
        assert answer.status == 200, answer.data
        lines = [line for line in answer.data.decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextmanager
def live(models: Mapping[str, Any], **config: Any) -> Iterator[LiveServer]:
    """A server of these models, by the names they are served by."""
    state = new_state(models, **config)
    listening = bind(state.config.host, state.config.port)
    server, is_ready = new_server(state), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run(server, state, listening, is_ready.set)))
    thread.start()
    try:
        assert is_ready.wait(PATIENCE_S)
        yield LiveServer(state, listening.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        stop(state)


def new_state(models: Mapping[str, Any], **config: Any) -> ServerState:
    """That of a server which does not listen yet."""
    served = [ServedModel(name, llm) for name, llm in models.items()]
    return ServerState(ServerConfig(port=0, **config), Models(served))


class GatedRunner(ModelRunner):
    """The model, behind a gate that a test closes: a step waits there until it is opened again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._gate = threading.Event()
        self._gate.set()
        self._lock = threading.Lock()
        self._num_left: int | None = None

    @property
    def is_closed(self) -> bool:
        return not self._gate.is_set()

    def close_after(self, num_steps: int) -> None:
        """Let so many steps pass, and stop the next one; `open()` before that step calls the closing off."""
        with self._lock:
            self._num_left = num_steps

    def close(self) -> None:
        self._gate.clear()

    def open(self) -> None:
        """Let all steps pass, also those that a closing was waiting for."""
        with self._lock:
            self._num_left = None
            self._gate.set()

    def run(self, batch: ScheduledBatch) -> StepOutput:
        with self._lock:
            if self._num_left == 0:
                self._num_left = None
                self._gate.clear()
            elif self._num_left is not None:
                self._num_left -= 1
        assert self._gate.wait(PATIENCE_S)
        return super().run(batch)


def gated(llm: LLM, **changes: Any) -> tuple[LLM, GatedRunner]:
    """The same weights behind an engine whose steps can be stopped."""
    other = copy.copy(llm)
    other.engine = Engine(llm.model, replace(llm.config, **changes), make_runner=GatedRunner)
    return other, cast(GatedRunner, other.engine.runner)


def call(
    app: ASGIApp,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: Iterable[bytes] = (b"",),
    *,
    received: list[int] | None = None,
) -> Answer:
    """What the application answers, without a socket; `received` gets the sizes of the parts that it took."""
    chunks = list(body)
    sent: list[Message] = []
    raw = [(name.lower().encode(), value.encode()) for name, value in {"Host": "localhost", **(headers or {})}.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
        "state": {},
    }

    async def receive() -> Message:
        if not chunks:
            await asyncio.sleep(PATIENCE_S)
            return {"type": "http.disconnect"}
        chunk = chunks.pop(0)
        if received is not None:
            received.append(len(chunk))
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Message) -> None:
        sent.append(message)

    async def ask() -> None:
        await app(scope, receive, send)

    asyncio.run(ask())
    start, *parts = sent
    found = [(name.decode(), value.decode()) for name, value in start["headers"]]
    return Answer(start["status"], _names(found), b"".join(part.get("body", b"") for part in parts))


def _names(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}
