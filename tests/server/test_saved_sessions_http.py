"""Sessions saved over HTTP: they go on after a restart, for the key and the salt that they were saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest

from kept_server import KEYS, KeptServer
from kvik.engine.llm import LLM
from kvik.engine.open_store import salts_secret

SESSIONS, SAVED = "/v1/sessions", "/v1/saved_sessions"
LONG = "Tell me of the sea, the sky, the hills, the woods, the towns and all that lives in them, one by one. " * 2


def opened(path: Path, store: Path | None) -> LLM:
    return LLM(path, kv_memory="32MiB", threads=2, store=store)


class StoringServer(KeptServer):
    """As `kvik serve --store` runs it."""

    def __enter__(self) -> Self:
        super().__enter__()
        if self.llm.config.store is not None:
            self.state.secret = salts_secret(self.llm.config)
        return self


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_saved_session_goes_on_after_a_restart(tmp_path: Path, default_model_path: Path) -> None:
    llm = opened(default_model_path, tmp_path)
    with StoringServer(llm, api_keys=KEYS) as server:
        anna = server.caller("key-of-anna")
        session = anna.post(SESSIONS, {"cache_salt": "sea"})
        anna.chat(user(LONG), session_id=session["id"])
        saved = anna.post(f"{SESSIONS}/{session['id']}/save", {"name": "sea"})
        assert saved["num_messages"] == 2
        assert saved["num_stored_blocks"] == saved["num_blocks"] >= 2
        expected = anna.chat(user("And then?"), session_id=session["id"])
    llm.close()

    llm = opened(default_model_path, tmp_path)
    with StoringServer(llm, api_keys=KEYS) as server:
        anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
        assert anna.get(f"{SAVED}?cache_salt=sea")["data"] == [{"name": "sea", "object": "saved_session"}]
        assert anna.get(SAVED)["data"] == bert.get(f"{SAVED}?cache_salt=sea")["data"] == []
        bert.post(SESSIONS, {"load": "sea", "cache_salt": "sea"}, status=400)
        anna.post(SESSIONS, {"load": "sea"}, status=400)
        anna.post(SESSIONS, {"load": "sea", "cache_salt": "sea", "system": "x"}, status=400)
        sessions = [anna.post(SESSIONS, {"load": "sea", "cache_salt": "sea"}) for _ in range(2)]
        assert [each["num_messages"] for each in sessions] == [2, 2]
        for each in sessions:  # forks of one past
            answer = anna.chat(user("And then?"), session_id=each["id"])
            assert answer["choices"] == expected["choices"]
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= saved["num_tokens"]
        assert llm.engine.tier is not None
        assert llm.engine.tier.stats.num_stored_tokens >= saved["num_tokens"]
        bert.ask("DELETE", f"{SAVED}/sea?cache_salt=sea", status=404)
        anna.ask("DELETE", f"{SAVED}/sea?cache_salt=sea")
        anna.ask("DELETE", f"{SAVED}/sea?cache_salt=sea", status=404)
        with anna.open("GET", "/metrics") as response:
            metrics = response.read().decode()
        assert 'kvik_store_blocks_read_total{model="model"}' in metrics
    llm.close()


@pytest.mark.parametrize("name", ["../x", ".x", "a b", "x" * 65, ""])
def test_names_are_checked(tmp_path: Path, default_model_path: Path, name: str) -> None:
    llm = opened(default_model_path, tmp_path)
    with StoringServer(llm) as server:
        caller = server.caller()
        session = caller.post(SESSIONS, {})
        caller.post(f"{SESSIONS}/{session['id']}/save", {"name": name}, status=400)
        caller.post(SESSIONS, {"load": name}, status=400)
    llm.close()


def test_without_a_store_it_is_said(default_model_path: Path) -> None:
    with StoringServer(opened(default_model_path, None)) as server:
        caller = server.caller()
        session = caller.post(SESSIONS, {})
        caller.post(f"{SESSIONS}/{session['id']}/save", {"name": "x"}, status=409)
        caller.post(SESSIONS, {"load": "x"}, status=409)
        caller.get(SAVED, status=409)
