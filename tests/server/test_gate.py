"""What every request passes before its route: key, host, origin, size, type and id, on every route there is."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
from starlette.types import ASGIApp

from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.server.app import ROUTES, make_app
from kvik.server.endpoint import plain_path
from kvik.server.gate import LINKED_PATHS
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState
from live_server import PATIENCE_S, Answer, LiveServer, call, gated, live, new_state
from models import tiny_model
from server_process import wait_until

KEY, OTHER_KEY = "key-of-alice-1", "key-of-bob-2"
BEARER = {"Authorization": f"Bearer {KEY}"}
TYPE = ("Content-Type: application/json",)
JSON = {"Content-Type": "application/json"}
OPEN = {"/", "/page/main.js", "/health", "/ready", "/health/decode", "/docs"}
CALLS = sorted(
    {
        (method, plain_path(route.path).replace("{", "").replace("}", ""))
        for route in ROUTES
        for method in route.methods or ()
    }
)
CLOSED = [each for each in CALLS if each[1] not in OPEN and not each[1].startswith(LINKED_PATHS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=512).path
    return LLM(path, kv_memory="8MiB", threads=1)


def state_of(tiny: LLM, **config: object) -> Iterator[ServerState]:
    llm, _ = gated(tiny)
    state = new_state({"tiny": llm}, **config)
    yield state
    for served in state.models:
        assert served.async_llm.stop(PATIENCE_S)


@pytest.fixture(scope="module")
def app(tiny: LLM) -> Iterator[ASGIApp]:
    """One with keys."""
    for state in state_of(tiny, api_keys={KEY: "alice", OTHER_KEY: "bob"}, max_body_bytes=2000):
        yield make_app(state)


@pytest.fixture(scope="module")
def no_keys(tiny: LLM) -> Iterator[ASGIApp]:
    for state in state_of(tiny, cors_origins=("localhost", "https://page.example")):
        yield make_app(state)


def code(answer: Answer) -> str:
    error = answer.body["error"]
    if answer.body.get("type") == "error":  # Anthropic's shape, which has no codes
        return {400: "invalid_json", 401: "invalid_api_key", 415: "unsupported_media_type"}[answer.status]
    assert {"message", "type", "param", "code"} <= error.keys()
    found: str = error["code"]
    return found


# Keys.


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_route_wants_a_key(app: ASGIApp, method: str, path: str) -> None:
    answer = call(app, method, path, JSON, [b"{}"])
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.data == b"" if method == "HEAD" else code(answer) == "invalid_api_key"
    with_key = call(app, method, path, JSON | BEARER, [b"{}"])
    # Of several keys none may clear the cache of all.
    assert with_key.status not in ((401,) if (method, path) == ("DELETE", "/v1/cache") else (401, 403)), with_key.data


@pytest.mark.parametrize("path", sorted(OPEN))
def test_the_allowlist_is_exact(app: ASGIApp, path: str) -> None:
    assert call(app, "GET", path).status == 200
    for other in (
        f"{path}/",
        f"/{path}",
        f"{path}/x",
        f"{path}%2f",
        path.upper(),
        f"/v1/..{path}",
        f"/x{path}",
        f"{path};x",
    ):
        assert other == path or call(app, "GET", other).status == 401, other


def test_no_spelling_of_a_path_goes_round_the_key(app: ASGIApp) -> None:
    for path in (
        "/v1/models/",
        "//v1/models",
        "/v1//models",
        "/health/../v1/models",
        "/health//v1/models",
        "/docs/../metrics",
    ):
        assert call(app, "GET", path).status == 401, path


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer   {OTHER_KEY} "},
        {"X-Api-Key": KEY},
    ],
)
def test_keys_are_taken_in_both_headers(app: ASGIApp, header: dict[str, str]) -> None:
    assert call(app, "GET", "/v1/models", header).status == 200


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY} {OTHER_KEY}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer", "X-Api-Key": KEY},
        {"X-Api-Key": "é"},
        {"Cookie": f"key={KEY}"},
    ],
)
def test_what_is_no_key(app: ASGIApp, header: dict[str, str]) -> None:
    assert call(app, "GET", "/v1/models", header).status == 401


def test_where_it_listens_decides_whether_keys_are_needed() -> None:
    with pytest.raises(InvalidInput, match="without asking for a key"):
        ServerConfig(host="0.0.0.0")
    with pytest.raises(InvalidInput, match="contradict"):
        ServerConfig(host="0.0.0.0", no_auth=True, api_keys={KEY: "alice"})
    with pytest.raises(InvalidInput, match="5 characters"):
        ServerConfig(api_keys={"short": "alice"})
    for config in ({"no_auth": True}, {"api_keys": {KEY: "alice"}}):
        assert not ServerConfig(host="::", **config).is_local
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServerConfig(host=host).is_local


# OPTIONS and CORS.


def test_a_bare_options_is_no_preflight(app: ASGIApp) -> None:
    assert call(app, "OPTIONS", "/v1/models").status == 401
    assert call(app, "OPTIONS", "/v1/models", {"Origin": "http://localhost"}).status == 401
    answer = call(app, "OPTIONS", "/v1/models", BEARER)
    assert (answer.status, answer.data) == (204, b"")


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "https://[::1]:9", "http://127.0.0.1", "https://page.example"]
)
def test_a_page_that_may_ask_is_answered_for(no_keys: ASGIApp, origin: str) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-mine"}
    preflight = call(no_keys, "OPTIONS", "/v1/chat/completions", asked)
    assert (preflight.status, preflight.data) == (204, b"")
    answer = call(no_keys, "GET", "/v1/models", {"Origin": origin})
    assert answer.status == 200
    for each in (preflight, answer):
        assert each.headers["access-control-allow-origin"] == origin
        assert each.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in each.headers
    assert preflight.headers["access-control-allow-headers"] == "x-mine"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost.evil.com", "http://notlocalhost", "http://evil.com", "null", "", "localhost", "http://["),
        *("http://127.0.0.1.evil.com", "file://", "http://page.example", "https://page.example:444", "http://[::2]"),
        *("https://page.example.evil.com", "http://localhost@evil.com", "ftp://localhost"),
    ],
)
def test_other_pages_may_not(no_keys: ASGIApp, origin: str) -> None:
    for method, more in (("GET", {}), ("POST", {}), ("OPTIONS", {"Access-Control-Request-Method": "POST"})):
        answer = call(no_keys, method, "/v1/models", {"Origin": origin, **more})
        assert answer.status == 403, answer.data
        assert code(answer) == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers


def test_no_page_but_its_own_where_none_was_named(app: ASGIApp) -> None:
    assert call(app, "GET", "/v1/models", BEARER | {"Origin": "http://localhost:5173"}).status == 403
    own = call(app, "GET", "/v1/models", BEARER | {"Host": "localhost:8000", "Origin": "http://localhost:8000"})
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers


# Hosts.


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "192.168.1.5:8000"]
)
def test_addresses_are_hosts(no_keys: ASGIApp, host: str) -> None:
    assert call(no_keys, "GET", "/v1/models", {"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "localhost.evil.com",
        "evil.com:80",
        "",
        "127.0.0.1.evil.com",
        "[::1",
        "127.0.0.1:80:80",
        "@localhost",
    ],
)
def test_a_name_of_others_is_refused(no_keys: ASGIApp, host: str) -> None:
    for path in ("/v1/models", "/health"):
        answer = call(no_keys, "GET", path, {"Host": host})
        if host == "[::1":  # an address all the same
            continue
        assert answer.status == 403, host
        assert code(answer) == "host_not_allowed"


def test_a_proxys_name_can_be_allowed(tiny: LLM) -> None:
    for state in state_of(tiny, allowed_hosts=("api.example",)):
        assert call(make_app(state), "GET", "/version", {"Host": "API.example:443"}).status == 200


# Bodies.


def test_a_declared_body_is_refused_before_it_is_read(app: ASGIApp) -> None:
    received: list[int] = []
    headers = BEARER | JSON | {"Content-Length": "2001"}
    answer = call(app, "POST", "/tokenize", headers, [b"x" * 2001], received=received)
    assert (answer.status, code(answer), received) == (413, "request_too_large", [])
    assert answer.headers["connection"] == "close"
    assert call(app, "POST", "/tokenize", BEARER | JSON | {"Content-Length": "9" * 300}, [b"x"]).status == 413


def test_a_body_of_no_declared_length_is_refused_as_soon_as_it_is_too_long(app: ASGIApp) -> None:
    received: list[int] = []
    answer = call(app, "POST", "/tokenize", BEARER | JSON, [b"x" * 900] * 50, received=received)
    assert (answer.status, code(answer)) == (413, "request_too_large")
    assert len(received) == 3


def test_a_body_of_just_the_limit_is_read(app: ASGIApp) -> None:
    text = b'{"prompt": "%b"}' % (b"a" * 1986)
    assert len(text) == 2000
    assert call(app, "POST", "/tokenize", BEARER | JSON, [text[:1000], text[1000:]]).status == 200
    assert code(call(app, "POST", "/tokenize", BEARER | JSON, [text + b" "])) == "request_too_large"


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if getattr(route, "body", None) is not None], ids=lambda route: route.path
)
def test_bodies_are_json_by_their_type_and_by_their_bytes(app: ASGIApp, route: object) -> None:
    path = route.path  # type: ignore[attr-defined]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data", "application/jsonx"):
        answer = call(app, "POST", path, BEARER | {"Content-Type": kind}, [b"{}"])
        assert (answer.status, code(answer)) == (415, "unsupported_media_type"), kind
    broken = (b"", b"{", b'{"model": "\xff"}', b"\xef\xbb\xbf{}", b'{"model": "\\ud800"}', gzip.compress(b"{}"))
    for data in broken[1:] if path.startswith("/v1/sessions") else broken:  # whose bodies may be left out
        answer = call(app, "POST", path, BEARER | JSON, [data])
        # A field that a route does not have is found before a broken byte behind it.
        codes = ("invalid_json", "unknown_field") if path.startswith("/v1/sessions/") else ("invalid_json",)
        assert answer.status == 400, data[:20]
        assert code(answer) in codes, data[:20]
    for data in (b"[]", b"1", b"null", b'"text"', b"true", b"[" * 1500, b'{"model": NaN}', b'{"x":' * 300):
        assert call(app, "POST", path, BEARER | JSON, [data]).status == 400, data
    kind = "application/json; charset=utf-8"
    assert call(app, "POST", path, BEARER | {"Content-Type": kind}, [b'{"nonsense": 1}']).status == 400


# Paths, methods, ids.


def test_unknown_paths_and_methods_have_the_shape_of_all_errors(app: ASGIApp) -> None:
    unknown = call(app, "GET", "/v1/nothing", BEARER)
    assert (unknown.status, code(unknown)) == (404, "not_found")
    method = call(app, "DELETE", "/v1/models", BEARER)
    assert (method.status, code(method)) == (405, "method_not_allowed")
    assert "GET" in method.headers["allow"]
    long = call(app, "GET", "/" + "x" * 5000, BEARER)
    assert len(long.data) < 400


@pytest.mark.parametrize("given", ["mine", "a" * 128, "A-1_b.c:d/e=f+g@h"])
def test_a_request_id_comes_back(app: ASGIApp, given: str) -> None:
    for path, headers in (("/v1/models", BEARER), ("/v1/models", {}), ("/health", {}), ("/nothing", BEARER)):
        assert call(app, "GET", path, headers | {"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\tb", "é", "<b>", "a;b"])
def test_an_id_of_other_characters_is_replaced(app: ASGIApp, given: str) -> None:
    first, second = (call(app, "GET", "/health", {"X-Request-Id": given}).headers["x-request-id"] for _ in range(2))
    assert first.startswith("req-")
    assert first != second


def test_every_answer_forbids_sniffing_and_none_names_the_server(app: ASGIApp) -> None:
    for path in ("/v1/models", "/health", "/nothing"):
        headers = call(app, "GET", path, BEARER).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_a_handlers_own_error_is_a_plain_500(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in state_of(tiny):
        monkeypatch.setattr(state.models, "get", lambda name: 1 / 0)
        answer = call(make_app(state), "POST", "/tokenize", JSON, [b'{"prompt": "a"}'])
        assert (answer.status, code(answer)) == (500, "internal_error")
        assert b"ZeroDivision" not in answer.data
        assert state.http.num_open == 0


# Over a socket.


@pytest.fixture
def server(tiny: LLM) -> Iterator[LiveServer]:
    llm, runner = gated(tiny, max_running=1, max_waiting=1)
    with live({"tiny": llm}, max_body_bytes=100_000) as server:
        yield server
        runner.open()


def test_a_chunked_body_is_refused_in_the_middle(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
        lines = (
            "POST /tokenize HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            "Transfer-Encoding: chunked",
        )
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        for _ in range(3):
            sock.sendall(b"c350\r\n" + b"x" * 50_000 + b"\r\n")
        answer = b""
        while part := sock.recv(65536):  # and the connection is closed
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer


def test_a_full_queue_is_429_and_says_when_to_come_again(server: LiveServer) -> None:
    engine = server.served.llm.engine
    engine.runner.close()  # type: ignore[attr-defined]
    body = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.ask, "POST", "/v1/completions", body)]
        wait_until(lambda: len(engine.scheduler.running) == 1)
        asked += [pool.submit(server.ask, "POST", "/v1/completions", body) for _ in range(2)]
        wait_until(lambda: server.served.async_llm._inbox.qsize() == 2)
        engine.runner.open()  # type: ignore[attr-defined]
        answers = [each.result() for each in asked]
    assert sorted(answer.status for answer in answers) == [200, 200, 429]
    (refused,) = [answer for answer in answers if answer.status == 429]
    assert code(refused) == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after"]) <= 120


def test_a_connection_serves_one_request_after_the_other(server: LiveServer) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    for path, kind, status in (
        ("/version", None, 200),
        ("/tokenize", "text/plain", 415),
        ("/tokenize", "application/json", 400),
        ("/version", None, 200),
    ):
        headers = {} if kind is None else {"Content-Type": kind}
        connection.request("GET" if kind is None else "POST", path, None if kind is None else b"{}", headers)
        sock = connection.sock
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
        assert connection.sock is sock
    connection.close()
