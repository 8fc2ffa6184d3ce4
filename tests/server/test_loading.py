"""While its models load, a server says so on every route; what ends it then ends it cleanly."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvik.engine.llm import LLM
from kvik.errors import ModelNotFound
from kvik.server.app import ROUTES
from kvik.server.endpoint import plain_path
from kvik.server.errors import is_anthropic_path
from kvik.server.gate import PATHS_WITHOUT_MODELS
from kvik.server.listening import bind
from kvik.server.run import new_server, run, stop
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState
from live_server import PATIENCE_S, LiveServer
from server_process import wait_until

KEY = {"Authorization": "Bearer secret-of-alice"}

# A `kvik serve` whose models never come.
ENDLESS = """
import threading
from kvik.cli import app, serve
serve.load = lambda names, **engine: threading.Event().wait()
app.main()
"""


class Loading(LiveServer):
    """A server in a thread, and the models that it waits for."""

    def __init__(self, state: ServerState, port: int) -> None:
        super().__init__(state, port)
        self.models: Future[Models] = Future()
        self.is_ready = threading.Event()
        self.raised: list[BaseException] = []


@contextmanager
def loading(**config: object) -> Iterator[Loading]:
    state = ServerState(ServerConfig(port=0, **config))  # type: ignore[arg-type]
    listening = bind("127.0.0.1", 0)
    waiting = Loading(state, listening.getsockname()[1])
    server = new_server(state)

    def main() -> None:
        try:
            asyncio.run(run(server, state, listening, waiting.is_ready.set, waiting.models))
        except ModelNotFound as error:
            waiting.raised.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    try:
        yield waiting
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert stop(state)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


def test_every_route_says_that_the_models_load_and_then_works(tiny_llm: LLM) -> None:
    with loading() as server:
        for path in ("/health", "/health/decode", "/ready"):
            answer = server.ask("GET", path)
            assert (answer.status, answer.body) == (503, {"status": "loading", "models": {}})
            assert int(answer.headers["retry-after"]) > 0
        for path in ("/version", "/", "/page/main.js"):
            assert server.ask("GET", path).status == 200
        num_asked = 0
        for route in ROUTES:
            path = plain_path(route.path).replace("{id}", "sess_1").replace("{name}", "tiny")
            if path in PATHS_WITHOUT_MODELS:
                continue
            for method in route.methods or ():
                answer = server.ask(method, path, {} if method == "POST" else None)
                assert answer.status == 503, path
                assert int(answer.headers["retry-after"]) > 0
                if method == "HEAD":
                    continue
                error = answer.body["error"]
                if is_anthropic_path(path):
                    assert (answer.body["type"], error["type"]) == ("error", "overloaded_error")
                else:
                    assert (error["type"], error["code"], error["param"]) == ("server_error", "model_loading", None)
                assert "models are being loaded" in error["message"]
                num_asked += 1
        assert num_asked > 20
        assert not server.is_ready.is_set()
        server.models.set_result(Models([ServedModel("tiny", tiny_llm)]))
        assert server.is_ready.wait(PATIENCE_S)
        assert server.ask("GET", "/health").body == {"status": "ok", "models": {"tiny": "ok"}}
        assert server.ask("GET", "/ready").status == 200
        assert server.ask("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 2}).status == 200


def test_who_has_no_key_learns_no_more_than_ever() -> None:
    with loading(api_keys={"secret-of-alice": "alice"}) as server:
        assert server.ask("GET", "/health").status == 503
        assert server.ask("GET", "/version").status == server.ask("GET", "/v1/models").status == 401
        assert server.ask("GET", "/v1/models", headers={"Host": "other.example"} | KEY).status == 403
        assert server.ask("GET", "/version", headers=KEY).status == 200
        assert server.ask("GET", "/v1/models", headers=KEY).status == 503


def test_models_that_cannot_be_loaded_end_it_with_their_error() -> None:
    error = ModelNotFound("there is no x", hint="take another")
    with loading() as server:
        server.models.set_exception(error)
        wait_until(lambda: server.raised == [error])
        assert not server.is_ready.is_set()


def test_a_command_whose_model_is_not_there_ends_with_its_message(tmp_path: Path) -> None:
    with process("-m", "kvik", "serve", f"{tmp_path}/none.gguf", "--port", "0") as started:
        _, text = started.communicate(timeout=60)
        assert started.returncode == 2
    assert "none.gguf" in text
    assert "hint:" in text
    assert "Traceback" not in text
    assert "kvik serves at" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_the_models_load(number: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with process("-c", ENDLESS, "serve", "--port", str(port)) as started:
        server = LiveServer(ServerState(ServerConfig()), port)

        def is_asked() -> bool:
            assert started.poll() is None
            try:
                return bool(server.ask("GET", "/health").body["status"] == "loading")
            except ConnectionRefusedError:  # it has not come so far
                return False

        wait_until(is_asked)
        started.send_signal(number)
        _, text = started.communicate(timeout=60)
        assert started.returncode == 0
    assert re.fullmatch(r"[\s\S]*ending in the middle of loading\n", text)
    assert "Traceback" not in text
    assert "kvik serves at" not in text
