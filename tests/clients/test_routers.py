"""Routers before two servers, as docs/scaling.md has them: prompts that begin alike meet, a dead server is left."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from server_process import PATIENCE_S, Answer, Client, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
CHAT = "/v1/chat/completions"
SYSTEM = [f"You are number {number}. " + "Speak of the sea and of nothing else. " * 40 for number in range(4)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def is_ready(log: Path) -> bool:
    return "Try: curl" in log.read_text()


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            finally:
                process.kill()


@pytest.fixture
def servers(tmp_path: Path, default_model_path: Path) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Two servers by their ports."""
    options = ["--threads", "1", "--kv-memory", "128MiB", "--drain", "1"]
    with ExitStack() as stack:
        found = {}
        for name in ("one", "two"):
            log = tmp_path / name
            command = [sys.executable, "-m", "kvik", "serve", f"smollm2={default_model_path}", "--port", "0", *options]
            process = stack.enter_context(running(command, log))
            wait_until(partial(is_ready, log))
            port = re.search(r"kvik serves at http://127.0.0.1:(\d+)", log.read_text())
            assert port is not None
            found[int(port[1])] = process
        yield found


def haproxy(ports: list[int], front: int, tmp_path: Path) -> list[str]:
    found = re.search(r"```haproxy\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    text = found[1]
    for shown, real in ((8000, front), (8001, ports[0]), (8002, ports[1])):
        assert text.count(f":{shown}\n") == 1
        text = text.replace(f":{shown}\n", f":{real}\n")
    path = tmp_path / "haproxy.cfg"
    path.write_text(text)
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("haproxy is not installed")
    return [program, "-f", str(path)]


def smg(ports: list[int], front: int, tmp_path: Path) -> list[str]:
    found = re.search(r"```text\nsmg (.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    words = found[1].replace("\\\n", " ").split()
    real = {"8000": str(front)} | {
        f"http://127.0.0.1:{8001 + at}": f"http://127.0.0.1:{port}" for at, port in enumerate(ports)
    }
    assert real.keys() <= set(words)
    # A port of its own for metrics, as the usual one may be taken.
    more = ["--prometheus-port", str(free_port())]
    return [str(Path(sysconfig.get_path("scripts")) / "smg"), *(real.get(word, word) for word in words), *more]


def body(system: str, question: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"model": "smollm2", "messages": messages, "max_tokens": 6, "temperature": 0}


@pytest.mark.parametrize("router", [haproxy, smg])
def test_a_router_before_two_servers(
    router: Any, servers: dict[int, subprocess.Popen[bytes]], tmp_path: Path, default_model_path: Path
) -> None:
    front, log = free_port(), tmp_path / "router"
    with running(router(list(servers), front, tmp_path), log) as process:

        def answer(system: str, question: str) -> Answer | None:
            assert process.poll() is None, log.read_text()
            try:
                found = Client(front).post(CHAT, body(system, question))
            except OSError:
                return None
            return found if found.status == 200 else None

        wait_until(lambda: answer("Wait.", "Ready?") is not None)
        llm = LLM(default_model_path, threads=1, kv_memory="128MiB")
        for turn, question in enumerate(("What is it?", "Why?", "And then?")):
            for system in SYSTEM:
                found = answer(system, question)
                assert found is not None
                expected = llm.chat(body(system, question)["messages"], SamplingParams(max_tokens=6))
                assert found.body["choices"][0]["message"]["content"] == expected.text
                num_cached = found.body["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert turn == 0 or num_cached > 200, "a beginning is where it was before"
        next(iter(servers.values())).kill()
        wait_until(lambda: all(answer(system, "And now?") is not None for system in SYSTEM))
