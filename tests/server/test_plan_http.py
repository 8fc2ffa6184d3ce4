"""`/v1/plan`: the planner's figures, against the memory that the server has."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlencode

import pytest

from kept_server import KeptServer
from kvik.engine.llm import LLM
from kvik.planner.plan import plan
from server_process import with_engine


@pytest.fixture(scope="module")
def server(tiny_llm: LLM) -> Iterator[KeptServer]:
    with KeptServer(with_engine(tiny_llm)) as server:
        yield server


@pytest.mark.parametrize(
    ("model", "context", "users", "kv"), [("qwen2.5-0.5b", 4096, 3, "int8"), ("gpt2", 512, 1, "f16")]
)
def test_the_figures_are_those_of_the_planner(
    server: KeptServer, model: str, context: int, users: int, kv: str
) -> None:
    query = urlencode({"model": model, "context": context, "users": users, "kv": kv})
    told = server.caller().get(f"/v1/plan?{query}")
    memory = told["bytes"]["memory"]
    wanted = plan(model, context=context, users=users, kv=kv, memory=memory)
    assert told["bytes"]["kv"] == wanted.kv.num_bytes
    assert told["bytes"]["needed"] == wanted.needed_bytes
    assert wanted.fit is not None
    assert (told["fits"], told["most_users"]) == (wanted.fit.fits, wanted.fit.most_users)
    assert told["largest_context"] == wanted.fit.largest_context
    if told["doubled"] is None:
        assert 2 * context > wanted.model.max_context
    else:
        twice = plan(model, context=2 * context, users=users, kv=kv)
        assert told["doubled"] == {"context": 2 * context, "more_bytes": twice.kv.num_bytes - wanted.kv.num_bytes}


def test_the_served_model_fits_as_it_is_served(server: KeptServer) -> None:
    llm, spec = server.llm, server.llm.engine.kv_spec
    told = server.caller().get("/v1/plan")
    assert (told["model"], told["context"], told["bytes"]["token"]) == ("model", llm.model.context, spec.token_bytes)
    assert told["bytes"]["weights"] == llm.model.decoder.weights.num_bytes
    num_rest = told["bytes"]["memory"] - told["bytes"]["weights"] - llm.cache.num_bytes
    assert num_rest >= told["bytes"]["others"]
    num_fitting = llm.cache.num_blocks * spec.block_size // llm.model.context
    assert told["most_users"] >= num_fitting > 0


def test_names_are_never_paths(server: KeptServer) -> None:
    path = server.llm.model.path
    caller = server.caller()
    assert caller.get(f"/v1/plan?{urlencode({'model': str(path)})}", status=404)["error"]["code"] == "model_not_found"
    for query in ("context=0", "context=x", "users=0", "kv=q2", "context=99999999"):
        caller.get(f"/v1/plan?{query}", status=400)
    listed = caller.get("/v1/plan/models")["data"]
    assert listed[0] == {"id": "model", "is_served": True}
    assert {"id": "qwen2.5-0.5b", "is_served": False} in listed
