"""`kvik serve` before it serves: whom it refuses to serve, keys, names of models, shares of memory, and its log."""

from __future__ import annotations

import json
import logging
import socket
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from command_line import Kvik
from kvik.cli import serve
from kvik.cli.serve_logs import JsonFormatter, TextFormatter
from kvik.errors import InvalidInput
from kvik.server.errors import ApiError
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig

ENGINE = {"kv_memory": "auto", "threads": 1, "context": 64}


def test_it_does_not_open_itself_to_others_by_accident(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIK_API_KEYS", raising=False)
    refused = kvik("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.exit_code == 2
    assert "add --api-key, or --no-auth" in refused.stderr
    both = kvik("serve", "--host", "0.0.0.0", "--no-auth", "--api-key", "long-enough-key")
    assert both.exit_code == 2
    assert "contradict" in both.stderr


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(kvik: Kvik) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = kvik("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "cannot listen on 127.0.0.1" in result.stderr
    assert "no-such-model" not in result.stderr


# Of `ServerConfig`, what no flag sets.
INTERNAL = {
    "is_replica": "the front that begins a replica tells it so, for it believes what the front says of an answer",
    "unread_s": "guards the server's own memory, and no client that reads meets it",
    "max_remembered_tokens": "4 MiB for each key; --max-remembered bounds the same in what people count",
}

# Each with the field that it sets.
FLAGS: dict[str, tuple[str, tuple[str, ...], object]] = {
    "host": ("--host", ("0.0.0.0",), "0.0.0.0"),
    "port": ("--port", ("8123",), 8123),
    "api_keys": ("--api-key", ("bob=key-of-bob",), {"key-of-bob": "bob"}),
    "no_auth": ("--no-auth", (), True),
    "shared_cache": ("--shared-cache", (), True),
    "cors_origins": ("--cors-origin", ("localhost",), ("localhost",)),
    "allowed_hosts": ("--allowed-host", ("kvik.example",), ("kvik.example",)),
    "max_body_bytes": ("--max-body", ("2MiB",), 2 << 20),
    "max_prompts": ("--max-prompts", ("7",), 7),
    "work_limit": ("--work-limit", ("5000",), 5000),
    "ping_s": ("--ping", ("2.5",), 2.5),
    "drain_s": ("--drain", ("4",), 4.0),
    "hang_s": ("--hang", ("60",), 60.0),
    "pin_share": ("--pin-share", ("0.5",), 0.5),
    "max_sessions": ("--max-sessions", ("9",), 9),
    "session_ttl_s": ("--session-ttl", ("90",), 90.0),
    "max_remembered": ("--max-remembered", ("11",), 11),
    "log_format": ("--log-format", ("json",), "json"),
    "access_log": ("--no-access-log", (), False),
    "read_only": ("--read-only", (), True),
    "redact": ("--redact", (), True),
    "kv_events": ("--kv-events", ("tcp://127.0.0.1:*",), "tcp://127.0.0.1:*"),
    "kv_events_replay": (
        "--kv-events-replay",
        ("tcp://127.0.0.1:*", "--kv-events", "tcp://127.0.0.1:*"),
        "tcp://127.0.0.1:*",
    ),
    "kv_events_topic": ("--kv-events-topic", ("pod", "--kv-events", "tcp://127.0.0.1:*"), "pod"),
    "drop_billing_line": ("--drop-billing-line", (), True),
}


def test_each_field_of_the_config_has_a_flag_or_a_reason_to_have_none() -> None:
    names = {each.name for each in fields(ServerConfig)}
    assert names == FLAGS.keys() | INTERNAL.keys()
    assert not FLAGS.keys() & INTERNAL.keys()
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for name, (flag, _, expected) in FLAGS.items():
        assert f"`{flag}" in page, f"docs/serving.md says nothing of {flag}"
        assert expected != getattr(ServerConfig(), name), f"the test of {flag} would not see it"


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_reaches_its_field(kvik: Kvik, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made: list[ServerConfig] = []
    monkeypatch.delenv("KVIK_API_KEYS", raising=False)
    monkeypatch.setattr("kvik.cli.serve_logs.set_up_logs", lambda form: None)
    monkeypatch.setattr("kvik.server.run.serve", lambda state, listening, **others: made.append(state.config))
    flag, values, expected = FLAGS[name]
    others = ("--no-auth",) if name == "host" else ()
    with socket.socket() as listening:
        monkeypatch.setattr("kvik.server.listening.bind", lambda host, port: listening)
        assert kvik("serve", flag, *values, *others).exit_code == 0
        assert getattr(made[0], name) == expected
        assert kvik("serve").exit_code == 0
        assert made[1] == ServerConfig()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--port", "70000", "port is 70000"),
        ("--max-body", "1100GiB", "max_body_bytes is 1181116006400"),
        ("--max-prompts", "0", "max_prompts is 0"),
        ("--work-limit", "-1", "work_limit is -1"),
        ("--ping", "0", "ping_s is 0"),
        ("--drain", "nan", "drain_s is nan"),
        ("--hang", "inf", "hang_s is inf"),
        ("--pin-share", "1.5", "pin_share is 1.5"),
        ("--max-sessions", "-1", "max_sessions is -1"),
        ("--session-ttl", "0.5", "session_ttl_s is 0.5"),
        ("--max-remembered", "-1", "max_remembered is -1"),
    ],
)
def test_a_limit_out_of_bounds_is_refused_by_its_name(kvik: Kvik, flag: str, value: str, said: str) -> None:
    refused = kvik("serve", flag, value)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert "give a number from" in refused.stderr


def test_keys_come_from_words_files_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalice=key-of-alice\n\nkey-of-nobody\n")
    assert serve.read_keys(["bob=key-of-bob", f"@{path}"], "ignored-key") == {
        "key-of-bob": "bob",
        "key-of-alice": "alice",
        "key-of-nobody": "key 3",
    }
    assert serve.read_keys(None, "key-of-alice\nbob=key-of-bob") == {"key-of-alice": "key 1", "key-of-bob": "bob"}
    assert serve.read_keys(None, "") == {}
    with pytest.raises(InvalidInput, match="given twice, to 'a' and 'b'"):
        serve.read_keys(["a=the-same-key", "b=the-same-key"], "")
    with pytest.raises(InvalidInput, match="no-such-file"):
        serve.read_keys([f"@{tmp_path}/no-such-file"], "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c2VjcmV0LWtleQ==", {"c2VjcmV0LWtleQ==": "key 1"}),
        ("c2VjcmV0LWtleTE=", {"c2VjcmV0LWtleTE=": "key 1"}),
        ("c2V/cmV0+LWtleQ=rest-of-it", {"c2V/cmV0+LWtleQ=rest-of-it": "key 1"}),
        ("our bob=c2VjcmV0LWtleQ==", {"c2VjcmV0LWtleQ==": "our bob"}),
        ("bob@home.net=key=of=bob", {"key=of=bob": "bob@home.net"}),
        ("bob=short", {"short": "bob"}),  # which the server refuses
    ],
)
def test_an_equals_sign_may_be_the_keys_own(line: str, expected: dict[str, str]) -> None:
    assert serve.read_keys([line], "") == expected


def test_the_screen_says_where_its_curl_line_has_the_key_from(
    tiny: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve.load([f"a={tiny}", f"b={base}"], **ENGINE | {"kv_memory": 1 << 20}, max_running=4)
    keys = serve.read_keys(["bob=key-of-bob"], "")
    said = []
    for config, models in (
        (ServerConfig(), served),
        (ServerConfig(api_keys=keys), served),
        (ServerConfig(), served[1:]),
    ):
        serve.welcome(config, 8000, models)
        said.append(capsys.readouterr().err)
    assert "KVIK_API_KEY" not in said[0] + said[2]
    assert "with a key" in said[1]
    assert "export KVIK_API_KEY=KEY" in said[1]
    assert '-H "Authorization: Bearer $KVIK_API_KEY"' in said[1]
    assert "key-of-bob" not in said[1]
    for text, path in zip(said, ("chat/completions", "chat/completions", "completions"), strict=True):
        *screen, curl = text.splitlines()
        assert curl.startswith(f"Try: curl http://127.0.0.1:8000/v1/{path} -H 'Content-Type: application/json'")
        assert max(map(len, screen)) <= 80
    for model in served:
        assert model.async_llm.stop(30)


def test_models_are_called_by_alias_or_name_and_never_by_a_path(tmp_path: Path, tiny: Path) -> None:
    assert serve.alias_of("smollm2") == ("smollm2", "smollm2")
    assert serve.alias_of("small=org/name") == ("small", "org/name")
    assert serve.alias_of(f"small={tiny}") == ("small", None)
    assert serve.alias_of(str(tiny)) == ("tiny", None)
    assert serve.alias_of(str(tmp_path)) == (tmp_path.name, None)


def test_several_models_share_the_memory_and_each_is_chosen_by_its_names(
    tiny: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = 64 << 20
    monkeypatch.setattr("kvik.machine.available_memory_bytes", lambda: available)
    served = serve.load([f"a={tiny}", f"b={base}"], **ENGINE, max_running=4, token_budget=64)
    try:
        assert [model.id for model in served] == ["a", "b"]
        assert sum(model.llm.cache.num_bytes for model in served) <= available // 2
        models = Models(served)
        assert models.names == ["a", "b", "tiny", "base"]
        assert models.get("base") is models.get("b") is served[1]
        assert models.get(None) is served[0]
        with pytest.raises(ApiError, match="take one of: a, b, tiny, base"):
            models.get("c")
        with pytest.raises(InvalidInput, match="two models have one name"):
            Models([served[0], served[0]])
        assert str(tiny.parent) not in json.dumps([model.card() for model in served])
    finally:
        assert all([model.async_llm.stop(30) for model in served])  # noqa: C419  # all of them


def test_replicas_share_threads_and_memory(kvik: Kvik) -> None:
    assert serve.replica_shares(3, 8, "3GiB") == [(3, 1 << 30), (3, 1 << 30), (2, 1 << 30)]
    with pytest.raises(InvalidInput, match="there are 2 threads"):
        serve.replica_shares(3, 2, "auto")
    assert "--replicas" in kvik("serve", "--replicas", "65", "--port", "0").stderr
    own = ["--host", "127.0.0.1", "--port", "0", "--replicas", "1", "--no-access-log"]
    own += ["--threads", "2", "--kv-memory", "7"]
    head = [sys.executable, "-m", "kvik"]
    assert serve.replica_command(["serve", "a", "--port", "1"], 2, 7) == [*head, "serve", "a", "--port", "1", *own]
    assert serve.replica_command(["serve", "--", "a"], 2, 7) == [*head, "serve", *own, "--", "a"]


def test_a_models_own_name_goes_before_anothers_alias(tiny: Path, base: Path) -> None:
    first, second = serve.load([f"a={tiny}", f"tiny={base}"], **ENGINE | {"kv_memory": 1 << 20}, max_running=4)
    assert isinstance(first, ServedModel)
    assert Models([first, second]).get("tiny") is second
    for model in (first, second):
        assert model.async_llm.stop(30)


def record(message: str, **extras: object) -> logging.LogRecord:
    made = logging.LogRecord("kvik.access", logging.WARNING, "file", 1, message, (), None)
    made.__dict__ |= extras
    return made


def test_a_line_of_the_log_for_people_and_for_programs() -> None:
    told = record("GET /x 200", request_id="req-1", client="127.0.0.1", seconds=0.0123)
    assert TextFormatter().format(told).endswith("warning GET /x 200 12 ms req-1")
    found = json.loads(JsonFormatter().format(told))
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "logger": "kvik.access",
        "message": "GET /x 200",
        "request_id": "req-1",
        "client": "127.0.0.1",
        "seconds": 0.0123,
    }


def test_an_exception_stays_in_its_line_of_json() -> None:
    try:
        raise ValueError("planted")
    except ValueError:
        failed = record("it failed")
        failed.exc_info = sys.exc_info()
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: planted")
    assert TextFormatter().format(failed).endswith("ValueError: planted")
