"""Chat templates that mean harm, and the process that holds them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvik.errors import TemplateError
from kvik.text import chat_template
from subprocesses import python
from templates import USER, ask, template


@pytest.fixture
def quick_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)


# templates that mean harm


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
@pytest.mark.usefixtures("quick_limit")
def test_time_is_limited(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"longer than 0\.3 s"):
        ask(source)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "source", ["{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "{{ '\u00e9' * 2 ** 23 }}x"]
)
def test_length_is_limited(source: str) -> None:
    with pytest.raises(TemplateError, match="more than 16 MiB"):
        ask(source)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no limit on addresses")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'x' | center(10 ** 12) }}",
        "{{ '%1000000000000d' % 4 }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(9) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    ],
)
def test_memory_is_limited(source: str) -> None:
    with pytest.raises(TemplateError, match=r"more than 512 MiB|longer than 2 s"):
        ask(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'_x': 1}) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ dict.__base__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(TemplateError, match=r"Security|Undefined|unsafe"):
        ask(source)


def test_the_worker_has_no_secrets_and_can_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_SECRET", "secret")
    chat = template("{{ 'x'.encode('punycode') }}")
    # Python would load this codec from a file.
    with pytest.raises(TemplateError, match=r"LookupError|Too many open files"):
        chat.render([USER])
    assert chat._worker is not None
    if sys.platform == "linux":
        assert b"KVIK_SECRET" not in Path(f"/proc/{chat._worker.pid}/environ").read_bytes()


def test_a_source_that_is_too_long_is_refused_at_once() -> None:
    with pytest.raises(TemplateError, match="1,048,577 bytes"):
        template("x" * ((1 << 20) + 1))


# the worker


@pytest.mark.usefixtures("quick_limit")
def test_rendering_goes_on_after_a_worker_was_ended() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat = template("{% if messages | length > 1 %}" + endless + "{% endif %}ok")
    for _ in range(2):
        with pytest.raises(TemplateError, match="longer"):
            chat.render([USER, USER])
        assert chat.render([USER]) == "ok"


def test_a_worker_that_was_killed_from_outside_is_replaced() -> None:
    chat = template("{{ messages[0].content }}")
    chat.render([USER])
    assert chat._worker is not None
    chat._worker.kill()
    chat._worker.wait()
    assert chat.render([USER]) == USER["content"]


def test_no_process_to_render_in_is_a_template_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="no process"):
        ask("x")


def test_an_interrupted_rendering_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = template("{{ messages[0].content }}")

    def interrupt(worker: object, line: bytes) -> None:
        send(worker, line)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    chat.render([USER])
    send = chat_template._send
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "_send", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.render([{"role": "user", "content": "first"}])
    assert chat.render([{"role": "user", "content": "second"}]) == "second"


def test_the_worker_ends_with_its_template() -> None:
    chat = template("x")
    chat.render([USER])
    worker = chat._worker
    assert worker is not None
    del chat
    gc.collect()
    assert worker.returncode is not None


def test_threads_may_share_a_template() -> None:
    chat = template("{{ messages[0].content }}")
    answers: dict[int, list[str]] = {}

    def work(number: int) -> None:
        answers[number] = [chat.render([{"role": "user", "content": f"{number} {i}"}]) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [f"{number} {i}" for i in range(20)] for number in range(4)}


def test_the_worker_ends_when_its_input_does() -> None:
    program = "from kvik.text.chat_template import serve; serve()"
    lines = [{"source": "{{ messages }}\u00e9", "seconds": 5}, {"messages": "a"}, {"messages": "b"}]
    worker = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(json.dumps(line) + "\n" for line in lines).encode(),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert worker.stdout.decode() == "text 3\na\u00e9text 3\nb\u00e9"


def test_a_forked_child_renders_and_ends() -> None:
    """Neither may wait for the worker, which is the parent's."""
    program = """
import os, sys
from kvik.text.chat_template import ChatTemplate
chat = ChatTemplate("{{ messages[0].content }}", bos_token="", eos_token="", name="t")
def ask(text):
    assert chat.render([{"role": "user", "content": text}]) == text
ask("first")
if os.fork() == 0:
    ask("child")
    sys.exit(7)
_, status = os.wait()
ask("parent")
sys.exit(os.waitstatus_to_exitcode(status))
"""
    assert python("-c", program).returncode == 7


def test_what_a_template_says_is_one_plain_line() -> None:
    with pytest.raises(TemplateError) as caught:
        ask("{{ raise_exception('a\\nb\\x1b[31m') }}")
    assert "a b [31m" in caught.value.message
