"""`kvik serve` in a process of its own: what it prints, what its curl line does, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gguf_files import tiny_llama
from live_server import LiveServer
from server_process import wait_until

LONG = {"prompt": [1, 2, 3], "max_tokens": 20_000, "ignore_eos": True, "stream": True}


class Process(LiveServer):
    """A running `kvik serve`."""

    def __init__(self, process: subprocess.Popen[str], port: int, printed: list[str], log: list[str]) -> None:
        self.process = process
        self.port = port
        self.printed = printed
        self.log = log

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for thread in threads for pid in (thread / path.name).read_text().split()]


@contextmanager
def serving(*arguments: str, columns: int = 80) -> Iterator[Process]:
    """Start it, and wait until it says how it is called."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvik", "serve", *arguments, "--port", "0", "--kv-memory", "32MiB", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"},
    )
    assert process.stderr is not None
    printed: list[str] = []
    try:
        for line in process.stderr:
            printed.append(line.rstrip("\n"))
            if "curl" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", "\n".join(printed))
        assert found is not None, printed
        log: list[str] = []
        reading = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        reading.start()
        yield Process(process, int(found[1]), printed, log)
    finally:
        process.kill()
        process.wait()
        reading.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("serve") / "tiny.gguf", context_length=1 << 15, tied=False))


@contextmanager
def streaming(server: Process, **fields: object) -> Iterator[http.client.HTTPResponse]:
    with server.asking("POST", "/v1/completions", LONG | fields) as response:
        assert response.readline().startswith(b"data: ")
        yield response


def events_of(response: http.client.HTTPResponse) -> list[bytes]:
    return [line[6:].strip() for line in response if line.startswith(b"data: ")]


def test_running_streams_end_well_and_new_requests_are_refused(tiny: str) -> None:
    with serving(f"tiny={tiny}") as server, streaming(server, max_tokens=2500) as response:
        server.end()
        wait_until(lambda: server.ask("GET", "/health").status == 503)
        refused = server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1})
        assert (refused.status, refused.body["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        *_, last, done = events_of(response)
        assert done == b"[DONE]"
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


def test_what_runs_too_long_ends_with_an_error(tiny: str) -> None:
    with serving(f"tiny={tiny}", "--drain", "0.5") as server, streaming(server) as response:
        server.end()
        *_, error, done = events_of(response)
        assert done == b"[DONE]"
        assert json.loads(error)["error"]["code"] == "shutting_down"
        assert server.process.wait(30) == 0


def test_no_drain_ends_at_once_and_so_do_the_children(tiny: str) -> None:
    with serving(f"tiny={tiny}", "--drain", "0") as server:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert server.ask("POST", "/v1/chat/completions", chat).status == 200
        children = server.children()
        assert children
        with streaming(server):
            started_s = time.monotonic()
            server.end(signal.SIGINT)
            assert server.process.wait(30) == 0
            assert time.monotonic() - started_s < 4  # items of --drain 0: the promise is a time
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def test_a_second_signal_ends_it_at_once(tiny: str) -> None:
    with serving(f"tiny={tiny}", "--drain", "600") as server, streaming(server):
        server.end()
        wait_until(lambda: server.ask("GET", "/health").status == 503)
        server.end()
        assert server.process.wait(10) == 128 + signal.SIGTERM
    assert any("stopping at once" in line for line in server.log)


def test_an_idle_server_ends_without_a_word_too_many(tiny: str) -> None:
    with serving(f"tiny={tiny}") as server:
        server.end()
        assert server.process.wait(10) == 0
    assert not [line for line in server.log if "rror" in line or "Traceback" in line]


@pytest.mark.parametrize("keys", [(), ("--api-key", "alice=secret-of-alice")])
def test_one_screen_says_it_all_and_its_curl_line_works(tiny: str, keys: tuple[str, ...]) -> None:
    with serving(f"tiny={tiny}", *keys) as server:
        assert len(server.printed) <= 20
        text = "\n".join(server.printed)
        assert "secret-of-alice" not in text
        for told in (f"http://127.0.0.1:{server.port}/v1", "tiny", "32,768", " MB", "/docs", "/metrics"):
            assert told in text
        line = server.printed[-1]
        command = line[line.index("curl") :]
        done = subprocess.run(
            ["sh", "-c", command.replace("$KVIK_API_KEY", "secret-of-alice")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
        assert shlex.split(command)[0] == "curl"
        for printed in server.printed[:-1]:
            assert len(printed) <= 80, printed


@pytest.mark.parametrize("form", ["text", "json"])
def test_both_logs_name_the_request_and_neither_the_prompt_nor_the_key(tiny: str, form: str) -> None:
    with serving(f"tiny={tiny}", "--log-format", form, "--api-key", "secret-of-alice") as server:
        headers = {"Authorization": "Bearer secret-of-alice", "X-Request-Id": "mine-1"}
        body = {"prompt": "the prompt itself", "max_tokens": 3, "ignore_eos": True}
        assert server.ask("POST", "/v1/completions", body, headers).status == 200
        wait_until(lambda: sum("mine-1" in line for line in server.log) >= 2)
        wrong = {"Authorization": "Bearer not-the-key-at-all"}
        assert server.ask("GET", "/v1/models?key=in-the-query", None, wrong).status == 401
        server.end()
        assert server.process.wait(30) == 0
    text = "".join(server.log)
    for secret in ("prompt itself", "secret-of-alice", "not-the-key", "in-the-query"):
        assert secret not in text
    assert "POST /v1/completions 200" in text
    assert "GET /v1/models 401" in text
    if form == "json":
        lines = [json.loads(line) for line in server.log]
        mine = [line for line in lines if line.get("request_id") == "mine-1"]
        assert {line["logger"] for line in mine} == {"kvik.access", "kvik.engine"}
        assert {"time", "level", "message", "client", "seconds"} <= mine[-1].keys()
