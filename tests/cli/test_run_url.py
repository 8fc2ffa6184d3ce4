"""`kvik run --url`: a server's answer as if the model were here, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from command_line import CTRL_C, CTRL_D, Kvik, Terminal
from fake_server import DONE, Exchange, FakeServer, chunk, usage
from kvik.cli.terminal import INTERRUPTED


def refusal(kvik: Kvik, *arguments: str) -> tuple[str, str]:
    """The error line and the hint, after exit code 2."""
    result = kvik("run", *arguments)
    assert result.exit_code == 2, result.output
    first, second = result.stderr.splitlines()
    return first, second


def test_text_goes_to_stdout_and_the_stats_to_stderr(kvik: Kvik) -> None:
    with FakeServer() as server:
        result = kvik("run", "--url", server.url, "--max-tokens", "3", "--stats", "--system", "be brief", "a b c d")
    assert (result.exit_code, result.stdout) == (0, "w0 w1 w2 \n")
    assert result.stderr.startswith("prompt 6 · cached 3 (50 %) · TTFT ")
    assert result.stderr.endswith(" tok/s · cut at 3 tokens\n")
    [body] = server.bodies()
    assert body["model"] == "first"  # not KVIK_MODEL, which names one of this machine
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b c d"}]
    assert (body["temperature"], body["max_tokens"]) == (0, 3)


def test_only_what_is_given_is_sent(kvik: Kvik) -> None:
    given = [
        "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1", "--repetition-penalty", "1.5",
        "--presence-penalty", "1", "--frequency-penalty", "2", "--min-tokens", "2", "--stop", r"\n", "--stop", "x",
        "--stop-token-id", "7", "--seed", "3", "--ignore-eos", "--no-cache", "--logprobs", "2",
    ]  # fmt: skip
    with FakeServer() as server:
        assert kvik("run", "--url", server.url, "-m", "named", "--json", "hello").exit_code == 0
        assert kvik("run", "--url", f"{server.url}/v1", "-m", "named", "--json", "hello", *given).exit_code == 0
    few, many = server.bodies()
    assert set(few) == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert {name: value for name, value in many.items() if name not in few or value != few[name]} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1.0,
        "frequency_penalty": 2.0, "min_tokens": 2, "stop": ["\n", "x"], "stop_token_ids": [7], "seed": 3,
        "ignore_eos": True, "cache_prompt": False, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip


def test_json_has_what_the_server_said(kvik: Kvik) -> None:
    with FakeServer() as server:
        result = kvik("run", "--url", server.url, "--json", "--raw", "--max-tokens", "2", "a b c")
    report: dict[str, Any] = json.loads(result.stdout)
    assert server.exchanges[0].path == "/v1/completions"
    assert server.bodies()[0]["prompt"] == "a b c"
    assert report["text"] == "w0 w1 "
    assert report["server"] == {"url": server.url, "model": "first"}
    assert report["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert report["stats"]["num_completion_tokens"] == 2
    assert report["finish_reason"] == "length"


def test_what_the_server_does_not_say_is_left_out(kvik: Kvik) -> None:
    def tell_nothing(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("a\n"), chunk(finish="stop"), DONE)
        exchange.end()

    with FakeServer(tell_nothing) as server:
        result = kvik("run", "--url", server.url, "--stats", "hello")
    assert result.stdout == "a\n"
    assert result.stderr.startswith("TTFT ")
    assert "·" not in result.stderr


def test_the_key_comes_from_the_environment_and_is_never_shown(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("KVIK_API_KEY", "sk-secret")

    def refuse(exchange: Exchange) -> None:
        exchange.fail(401, {"error": {"message": "wrong key"}})

    with FakeServer(refuse) as server:
        result = kvik("run", "--url", server.url, "hello")
    assert server.exchanges[0].headers["authorization"] == "Bearer sk-secret"
    assert result.exit_code == 2
    assert "answers 401: wrong key" in result.stderr
    assert "sk-" not in result.output + kvik("run", "--help").output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kv-memory", "1GiB", "--threads", "2"], "--kv-memory, --threads have no meaning with --url"),
        (["--tools", "x.json"], "--tools has no meaning with --url"),
        (["--activations", "int16"], "--activations has"),
        (["--timeout", "0"], "--timeout is 0"),
    ],
)
def test_options_of_the_server_are_refused_by_name(kvik: Kvik, options: list[str], named: str) -> None:
    first, _ = refusal(kvik, "--url", "http://127.0.0.1:1", *options, "hello")
    assert named in first


@pytest.mark.parametrize("options", [["--api-key", "k"], ["--timeout", "3"]])
def test_options_of_a_server_need_one(kvik: Kvik, options: list[str]) -> None:
    assert refusal(kvik, *options, "hello")[0] == f"InvalidInput: {options[0]} without --url"


def test_a_missing_extra_is_named(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    first, hint = refusal(kvik, "--url", "http://127.0.0.1:1", "hello")
    assert "h11 and msgspec" in first
    assert hint == "hint: pip install 'kvik[server]'"


def test_an_error_after_the_first_words_ends_their_line(kvik: Kvik) -> None:
    def break_off(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("half a"))
        exchange.break_off()

    with FakeServer(break_off) as server:
        result = kvik("run", "--url", server.url, "hello")
    assert (result.exit_code, result.stdout) == (2, "half a\n")
    assert result.stderr.startswith("RemoteError: ")


def test_ctrl_c_ends_the_stream_and_disconnects(kvik: Kvik) -> None:
    def write_on(exchange: Exchange) -> None:
        exchange.start()
        exchange.send(chunk("half"))
        os.kill(os.getpid(), signal.SIGINT)
        while not exchange.is_gone:
            exchange.send(chunk(""))

    with FakeServer(write_on) as server:
        result = kvik("run", "--url", server.url, "--json", "hello")
        server.wait_until(lambda: server.exchanges[0].is_gone)
    assert result.exit_code == INTERRUPTED
    assert json.loads(result.stdout)["finish_reason"] == "abort"


def test_a_chat_sends_all_messages_and_forgets_one_that_was_refused(tmp_path: Path) -> None:
    def behave(exchange: Exchange) -> None:
        if exchange.number == 1:
            exchange.fail(429, {"error": {"message": "busy"}})
            return
        exchange.start()
        exchange.send(chunk(f"answer {exchange.number}"), chunk(finish="stop"), usage(8, 2, 4), DONE)
        exchange.end()

    with (
        FakeServer(behave) as server,
        Terminal("run", "--url", server.url, "--system", "s", KVIK_CACHE=str(tmp_path)) as terminal,
    ):
        assert f"first at {server.url} · /help" in terminal.read_until("> ")
        terminal.type("one\n")
        assert "prompt 8 · cached 4 (50 %)" in terminal.read_until("> ")
        terminal.type("two\n")
        assert "429: busy" in terminal.read_until("> ")
        terminal.type("three\n")
        terminal.read_until("> ")
        terminal.type(CTRL_C)
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert terminal.finish()[1] == 0
    assert [message["content"] for message in server.bodies()[-1]["messages"]] == ["s", "one", "answer 0", "three"]
