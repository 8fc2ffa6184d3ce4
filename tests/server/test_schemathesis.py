"""Requests made up from our own `/openapi.json`: never a 5xx, only what it documents, and a server that lives on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from answer_schemas import strict
from kvik.engine.llm import LLM
from kvik.server.app import ROUTES
from kvik.server.endpoint import Endpoint
from kvik.server.openapi import describe
from live_server import LiveServer, gated, live
from models import tiny_model
from tiers import examples

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A context so short that whatever is asked for is written soon."""
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=64).path
    llm, _ = gated(LLM(path, kv_memory="8MiB", threads=1))
    with live({"tiny": llm}, work_limit=2048, access_log=False) as server:
        yield server


OPERATIONS = {
    each.ok().label: each.ok()  # type: ignore[union-attr]
    for each in schemathesis.openapi.from_dict(strict(describe(ROUTES, ["tiny"]))).get_all_operations()
}


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label, operation in OPERATIONS.items()
        if label != "GET /v1/events"  # which has no end
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.body  # else nothing can be wrong with it
    ],
)
def test_any_request_gets_an_answer_that_is_documented(server: LiveServer, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    takes_something = bool(operation.body or operation.path_parameters)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples(100) if takes_something else 2, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=f"http://127.0.0.1:{server.port}", checks=CHECKS)

    ask()


def test_the_server_lives_on(server: LiveServer) -> None:
    assert server.ask("GET", "/health").status == 200
    assert server.ask("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 2}).status == 200
    assert server.served.llm.engine.cache.pool.num_held == 0


def test_each_route_stands_in_the_description(server: LiveServer) -> None:
    document = server.ask("GET", "/openapi.json").body
    assert document["openapi"] == "3.1.0"
    assert len(document["paths"]) == len({route.path for route in ROUTES})
    for route in ROUTES:
        assert isinstance(route, Endpoint), f"{route.path}: register it as an Endpoint, so that it is described"
        assert route.summary
        takes_body = "POST" in (route.methods or ()) and not route.path.endswith(("/unpin", "/link"))
        assert takes_body == (route.body is not None), route.path
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    models = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["anyOf"]
    assert {"type": "string", "enum": server.state.models.names} in models
    ids = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(set(ids)) == len(ids)
