"""An OpenAI-compatible server in a thread, which counts words as tokens and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Events = Iterator[bytes]
Behave = Callable[["Exchange"], None]


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(text: str | None = None, *, finish: str | None = None, role: str | None = None) -> bytes:
    """A chunk of a chat."""
    delta = {"role": role} if role else {"content": text} if text is not None else {}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    """The chunk before the end."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, **details}
    return event({"choices": [], "usage": counts})


DONE = event(b"[DONE]")


@dataclass
class Exchange:
    """One request of a client, and how it is answered."""

    handler: BaseHTTPRequestHandler
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int  # of this kind of request, from 0
    is_gone: bool = field(default=False, init=False)  # the client has left

    def start(self, status: int = 200, content_type: str = "text/event-stream", **headers: str) -> None:
        """The head of a chunked answer."""
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", content_type)
        self.handler.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()

    def send(self, *parts: bytes) -> None:
        """Each as a chunk of HTTP."""
        for part in parts:
            try:
                self.handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.handler.wfile.flush()
            except OSError:
                self.is_gone = True

    def end(self) -> None:
        """The answer is whole."""
        try:
            self.handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.is_gone = True

    def break_off(self) -> None:
        """Close the connection where it is."""
        self.handler.close_connection = True

    def fail(self, status: int, error: Any, **headers: str) -> None:
        """An error in JSON, or as it is."""
        data = error if isinstance(error, bytes) else json.dumps(error).encode()
        self.start(status, "application/json", **headers)
        self.send(data)
        self.end()

    def prompt_words(self) -> list[str]:
        """What stands for prompt tokens."""
        texts = [message["content"] for message in self.body.get("messages", [])] or [self.body.get("prompt", "")]
        return " ".join(texts).split()


def answer(exchange: Exchange) -> None:
    """As many words as asked for, and true usage, of which half the prompt was cached."""
    count, num_prompt = exchange.body["max_tokens"], len(exchange.prompt_words())
    exchange.start(server_timing="queue;dur=2, prefill;dur=4.5")
    if exchange.path.endswith("/chat/completions"):
        exchange.send(chunk(role="assistant"), *(chunk(f"w{index} ") for index in range(count)), chunk(finish="length"))
    else:
        exchange.send(*(event({"choices": [{"text": f"w{index} ", "finish_reason": None}]}) for index in range(count)))
        exchange.send(event({"choices": [{"text": "", "finish_reason": "length"}]}))
    exchange.send(usage(num_prompt, count, num_prompt // 2), DONE)
    exchange.end()


class FakeServer:
    """Listens while it is open; `behave` answers completions."""

    def __init__(self, behave: Behave = answer, models: bytes = b'{"data":[{"id":"first"},{"id":"second"}]}') -> None:
        self.behave = behave
        self.models = models
        self.exchanges: list[Exchange] = []
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nobody reads it."""

            def do_GET(self) -> None:
                fake._models(self)

            def do_POST(self) -> None:
                fake._complete(self)

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that leaves is no error."""

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def bodies(self) -> list[dict[str, Any]]:
        """Of all completions that were asked for."""
        return [exchange.body for exchange in self.exchanges]

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """For what a thread of the server sees a moment later."""
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, "it never became so"
            time.sleep(0.005)

    def _models(self, handler: BaseHTTPRequestHandler) -> None:
        found = handler.path == "/v1/models"
        handler.send_response(200 if found else 404)
        handler.send_header("Content-Length", str(len(self.models)))
        handler.end_headers()
        handler.wfile.write(self.models)

    def _complete(self, handler: BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            exchange = Exchange(handler, handler.path, headers, json.loads(data), len(self.exchanges))
            self.exchanges.append(exchange)
        self.behave(exchange)
