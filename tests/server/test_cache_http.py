"""`/v1/cache`: numbers for everybody, text for whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kept_server import KEYS, KeptServer
from kvik.engine.llm import LLM
from server_process import wait_until, with_engine

SECRET = "The password of the safe is swordfish. " * 6


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> LLM:
    return LLM(default_model_path, kv_memory="48MiB", threads=2)


@pytest.fixture
def server(llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(llm), api_keys=KEYS) as server:
        yield server


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_the_numbers_are_those_of_the_engine(server: KeptServer) -> None:
    anna = server.caller("key-of-anna")
    (empty,) = anna.get("/v1/cache")["models"]
    assert empty["blocks"] == {
        **empty["blocks"],
        "held": 0,
        "reusable": 0,
        "pinned": 0,
        "free": empty["blocks"]["total"],
    }
    anna.chat(user(SECRET))
    anna.chat(user(SECRET))
    (told,) = anna.get("/v1/cache")["models"]
    view = server.llm.cache
    assert told["blocks"]["reusable"] == view.num_reusable > 0
    assert told["bytes"]["reserved"] == view.num_bytes
    assert told["prompt_tokens"]["cached"] == view.stats.num_cached_tokens > 0
    assert told["prompt_tokens"]["hit_rate"] == pytest.approx(view.stats.hit_rate, abs=1e-6)
    assert (told["num_queries"], told["num_evicted_blocks"], told["pins"], told["sessions"]) == (2, 0, [], [])


def test_the_text_of_others_is_not_shown(server: KeptServer) -> None:
    anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
    anna.chat(user(SECRET))
    anna.chat(user(SECRET), cache_salt="mine")
    bert.chat(user("Hello. " * 40))
    own = anna.get("/v1/cache/tree")["data"]
    assert sum("swordfish" in row.get("text", "") for row in own if not row["level"]) == 2
    others = bert.get("/v1/cache/tree")["data"]
    assert [row["is_own"] for row in others] == [not row["is_own"] for row in own]
    assert {row["is_own"] for row in own if not row["level"]} == {True, False}
    assert all(("text" in row) == row["is_own"] for row in others)
    assert "swordfish" not in str(others)
    assert sum(row["num_tokens"] for row in others) == sum(row["num_tokens"] for row in own)


def test_what_all_share_is_nobodys_own(llm: LLM) -> None:
    with KeptServer(with_engine(llm), api_keys=KEYS, shared_cache=True) as server:
        server.caller("key-of-anna").chat(user(SECRET))
        rows = server.caller("key-of-bert").get("/v1/cache/tree")["data"]
        assert [row["level"] for row in rows] == [0, 1]
        assert not any(row["is_own"] or "text" in row for row in rows)


def test_what_others_wrote_is_not_told_by_where_a_guess_leaves_it(llm: LLM) -> None:
    """Tenants that share a cache may see how far a prompt is known, not how somebody's goes on."""
    with KeptServer(with_engine(llm), api_keys=KEYS, shared_cache=True) as server:
        server.caller("key-of-anna").chat(user(SECRET))
        guess = {"messages": user(SECRET[:24] + " door")}
        told = server.caller("key-of-bert").post("/v1/cache/match", guess)
        assert told["num_cached_tokens"] > 0
        assert "expected" not in told
        assert told["found"]
    with KeptServer(with_engine(llm)) as server:
        caller = server.caller()
        caller.chat(user(SECRET))
        assert caller.post("/v1/cache/match", guess)["expected"], "the only one there is may see it"


def test_a_tree_is_shown_as_far_as_is_asked_for(llm: LLM) -> None:
    with KeptServer(with_engine(llm)) as server:
        caller = server.caller()
        for at in range(4):
            caller.chat(user("The same beginning for all of them. " * 6 + f"{at} " * 40), max_tokens=1)
        whole = caller.get("/v1/cache/tree")
        assert [row["level"] for row in whole["data"]] == [0, *[1, 2] * 4]
        assert {row["num_tokens"] < 32 for row in whole["data"] if row["level"] == 2} == {True}, "where each has ended"
        assert not whole["has_more"]
        assert whole["data"][0]["is_own"]
        assert len(caller.get("/v1/cache/tree?max_level=0")["data"]) == 1
        cut = caller.get("/v1/cache/tree?max_rows=2")
        assert (cut["data"], cut["has_more"]) == (whole["data"][:2], True)
        assert not whole["has_deeper"]
        assert whole["above"] is None
        assert caller.get("/v1/cache/tree?max_level=1")["has_deeper"]
        trunk, branch = whole["data"][:2]
        assert (trunk["num_children"], branch["num_children"]) == (4, 1)
        part = caller.get(f"/v1/cache/tree?below={branch['last_block']}")
        assert part["above"] == trunk["last_block"]
        assert [row | {"level": row["level"] + 1} for row in part["data"]] == whole["data"][1:3]
        assert caller.get(f"/v1/cache/tree?below={trunk['last_block']}")["data"] == whole["data"]
        missing = caller.get("/v1/cache/tree?below=100000", status=404)
        assert missing["error"]["code"] == "not_found"
        for query in ("max_rows=2001", "max_rows=-1", "max_level=x", "max_level=65", "below=x"):
            error = caller.get(f"/v1/cache/tree?{query}", status=400)["error"]
            assert error["param"] == query.split("=")[0]
        assert caller.get("/v1/cache/tree?model=none", status=404)["error"]["code"] == "model_not_found"


def test_only_who_is_alone_may_clear_it(server: KeptServer, llm: LLM) -> None:
    anna = server.caller("key-of-anna")
    anna.chat(user(SECRET))
    assert anna.ask("DELETE", "/v1/cache", status=403)["error"]["code"] == "not_the_operator"
    assert server.llm.cache.num_reusable > 0
    with KeptServer(with_engine(llm), api_keys={"the-only-key": "me"}) as alone:
        caller = alone.caller("the-only-key")
        session = caller.post("/v1/sessions", {})
        caller.chat(user(SECRET), session_id=session["id"])
        caller.chat(user("Other. " * 80))
        before = caller.get("/v1/cache")["models"][0]["blocks"]
        cleared = caller.ask("DELETE", "/v1/cache")["cleared_blocks"]
        after = caller.get("/v1/cache")["models"][0]["blocks"]
        assert cleared == {"model": before["reusable"]}
        assert (after["reusable"], after["held"]) == (0, before["held"])
        assert before["held"] > 0


def test_a_client_that_leaves_leaves_nothing_held(server: KeptServer) -> None:
    anna = server.caller("key-of-anna")
    part = {"type": "text", "text": SECRET, "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 900, "ignore_eos": True}
    with anna.open("POST", "/v1/chat/completions", {**body, "stream": True}) as response:
        response.readline()
        assert server.num_held > 0
    wait_until(lambda: server.num_held == 0)
    assert anna.get("/v1/cache")["models"][0]["blocks"]["pinned"] == 0


def test_a_prompt_is_looked_for_and_nothing_is_computed(server: KeptServer) -> None:
    anna, bert = server.caller("key-of-anna"), server.caller("key-of-bert")
    anna.chat(user(SECRET * 2))
    steps = server.served.meter.num_steps
    asked = {"messages": user(SECRET + "Is it safe?")}
    told = anna.post("/v1/cache/match", asked)
    whole, rest = divmod(told["num_cached_tokens"], 32)
    assert rest, "it ends within a block"
    assert (told["miss_reason"], told["num_blocks"], len(told["block_ids"])) == ("differs", whole + 1, whole + 1)
    assert told["before"][-1] != told["found"][0]
    assert told["expected"][0] != told["found"][0]
    assert server.served.meter.num_steps == steps
    answer = anna.chat(**asked)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == told["num_cached_tokens"]
    others = bert.post("/v1/cache/match", asked)
    assert (others["num_cached_tokens"], others["miss_reason"], others["expected"]) == (0, "unseen", [])
    anna.post("/v1/cache/match", {"prompt": "a", "messages": []}, status=400)
    anna.post("/v1/cache/match", {}, status=400)
