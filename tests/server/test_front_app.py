"""What the front tells the router of a request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from kvik.cluster import Cost, RoutedRequest, Router
from kvik.server.errors import ApiError
from kvik.server.front.app import Front, FrontState
from kvik.server.settings import ServerConfig

pytestmark = pytest.mark.tiny

TEXT = "the same words " * 200


def front_of(**config: Any) -> Front:
    return Front(FrontState(ServerConfig(**config), Router(Cost()), []))


def routed(front: Front, body: dict[str, Any], **headers: str) -> RoutedRequest:
    return front.routed(Headers(headers), json.loads(json.dumps(body)))


def test_requests_of_different_salts_or_keys_share_no_name() -> None:
    front = front_of()
    body = {"prompt": TEXT, "prompt_cache_key": "k"}
    found = [
        routed(front, body),
        routed(front, body | {"cache_salt": "a"}),
        routed(front, body | {"cache_salt": "b"}),
        routed(front, body, authorization="Bearer one"),
        routed(front, body, authorization="Bearer two"),
        routed(front_of(), body),
    ]
    assert all(len(each.names) > 4 for each in found)
    assert len({each.names[0] for each in found}) == len(found)
    assert len({each.key for each in found}) == len(found)
    assert routed(front, body).names == found[0].names


def test_a_shared_cache_is_one_whatever_the_key() -> None:
    front = front_of(shared_cache=True)
    one, two = (routed(front, {"prompt": TEXT}, authorization=f"Bearer {name}") for name in ("one", "two"))
    assert one.names == two.names


def test_what_begins_alike_has_the_same_first_names() -> None:
    front = front_of()
    one, two = (
        routed(front, {"messages": [{"role": "user", "content": TEXT + end}]}) for end in ("a" * 600, "b" * 600)
    )
    assert one.names[:5] == two.names[:5]
    assert one.names != two.names


def test_a_session_is_of_one_replica() -> None:
    with pytest.raises(ApiError, match="sessions are of one replica"):
        routed(front_of(), {"session_id": "sess_1"})
