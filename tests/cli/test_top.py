"""`kvik top`: a real server watched on a terminal and as JSON, and frames of made-up states at several sizes."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import signal
import termios
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from rich.console import Console

from command_line import CTRL_C, Kvik, Terminal
from fake_server import FakeServer
from kvik.cache import MissReason
from kvik.cli.top_screen import told_once
from kvik.cli.top_view import WHY, Place, frame, map_cells
from kvik.client.completions import Server as Asked
from kvik.client.http import parse_url
from kvik.client.live import FREE, HELD, REUSABLE, SHARED
from kvik.client.watching import Watching
from kvik.engine.llm import LLM
from kvik.errors import RemoteError
from models import tiny_model
from server_process import Server, with_engine
from told import change, model, row, told

OTHER_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"
COLOUR = re.compile(r"\x1b\[[\d;]*\b(3[0-7]|9[0-7])[\d;]*m")
KEYS = {"key-of-anna": "anna", "key-of-bert": "bert"}
LONG = {"prompt": list(range(3, 90)), "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=8192).path
    return LLM(path, kv_memory="16MiB", threads=1)


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    with Server({"tiny": with_engine(llm), "other": with_engine(llm)}) as server:
        yield server


def once(kvik: Kvik, server: Server, *options: str) -> Any:
    result = kvik("top", "--url", server.url, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout
    return json.loads(result.stdout)


def problem(kvik: Kvik, *options: str) -> str:
    result = kvik("top", *options)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert len(result.stderr.splitlines()) == 2
    return result.stderr


def test_where_stdout_is_no_terminal_the_state_is_told_as_json(kvik: Kvik, server: Server) -> None:
    for _ in range(2):
        server.client.ok("/v1/completions", LONG)
    found = once(kvik, server)
    assert found.keys() == {
        "kind", "version", "server", "now_s", "sees_text", "model", "counters", "hit_rate", "misses", "requests",
    }  # fmt: skip
    assert (found["kind"], found["version"]) == ("kvik top", 1)
    assert found["server"] == {"url": server.url.removesuffix("/v1"), "models": ["tiny", "other"]}
    told_of = server.client.get("/v1/cache").body["models"][0]
    (group,) = found["model"]["groups"]
    assert found["model"]["id"] == "tiny"
    for name in ("held", "reusable", "free"):
        assert group["blocks"][name] == told_of["blocks"][name] == found["counters"][f"{name}_blocks"]
    assert sum(group["blocks"][name] for name in ("held", "reusable", "free")) == group["num_blocks"]
    assert found["counters"]["generated_tokens"] == 10
    assert isinstance(found["counters"]["generated_tokens"], int)
    assert found["hit_rate"] == found["counters"]["found_tokens"] / found["counters"]["queried_tokens"] > 0
    assert sum(found["misses"].values()) == 2
    assert once(kvik, server, "--json").keys() == found.keys()


def test_a_request_that_ran_before_anybody_looked_is_told(kvik: Kvik, llm: LLM) -> None:
    with Server({"tiny": with_engine(llm)}) as server:
        body = {**LONG, "max_tokens": 8000}
        with server.client.streaming("/v1/completions", body) as events:
            next(events)
            (told_of,) = once(kvik, server)["requests"]
        server.assert_idle()
    assert (told_of["phase"], told_of["num_prompt_tokens"], told_of["is_own"]) == ("decode", 87, True)
    assert told_of["num_blocks"] == sum(map(len, told_of["blocks"])) >= 3
    assert told_of["time_to_first_token_s"] > 0
    assert told_of["request_id"].startswith("req-")


def test_a_model_is_chosen_by_its_name(kvik: Kvik, server: Server) -> None:
    assert once(kvik, server, "--model", "other")["model"]["id"] == "other"
    assert once(kvik, server, "-m", "tiny")["model"]["id"] == "tiny"
    said = problem(kvik, "--url", server.url, "-m", "third")
    assert "has no model 'third'" in said
    assert "hint: choose one of 'tiny', 'other'" in said


def test_a_tenant_sees_his_own_and_text_is_told_to_nobody_who_must_not_see_it(kvik: Kvik, llm: LLM) -> None:
    with Server({"tiny": with_engine(llm)}, api_keys=KEYS, redact=True) as server:
        url = ("--url", server.url)
        assert "answers 401" in problem(kvik, *url)
        assert "KVIK_API_KEY" in problem(kvik, *url, "--api-key", "key-of-nobody")
        watching = Watching(parse_url(server.url), Asked("key-of-anna"), timeout_s=30)

        async def watch() -> None:
            news = watching.follow()
            await anext(news)
            for each in KEYS:
                body = {**LONG, "max_tokens": 2}
                await asyncio.to_thread(server.client.ok, "/v1/completions", body, **{"X-Api-Key": each})
            while watching.state.models["tiny"].counters["generated_tokens"] < 4:
                await anext(news)
            (own,) = watching.state.models["tiny"].requests.values()
            assert own.is_own
            assert own.prompt is own.written is None
            found = await told_once(Watching(parse_url(server.url), Asked("key-of-anna"), timeout_s=30), None)
            assert not found["sees_text"]
            assert [each["is_own"] for each in found["requests"]] == [True]
            await news.aclose()

        asyncio.run(watch())


def answering(status: int, kind: str, body: bytes) -> type[BaseHTTPRequestHandler]:
    """Any server, which answers every GET so."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Nobody reads it."""

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


EVENTS = "text/event-stream"


@pytest.mark.parametrize(
    ("status", "kind", "body", "said"),
    [
        (200, "text/html", b"<html>", "has no events at /v1/events, but 'text/html'"),
        (405, "text/plain", b"no", "has no /v1/events: it answers 405"),
        (200, EVENTS, b"data: 1\n\n", "tells of itself in no way of kvik's"),
        (200, EVENTS, b"event: state\ndata: {}\n\n", "tells of itself in no way of kvik's"),
        (200, EVENTS, b"", "ended its events"),
        (503, "application/json", b'{"error": {"message": "loading"}}', "answers 503: loading"),
    ],
)
def test_a_server_that_cannot_be_watched(kvik: Kvik, status: int, kind: str, body: bytes, said: str) -> None:
    with FakeServer() as server:
        server._listener.RequestHandlerClass = answering(status, kind, body)
        assert said in problem(kvik, "--url", server.url)


def test_a_server_of_others_gives_a_hint(kvik: Kvik) -> None:
    with FakeServer() as server:
        said = problem(kvik, "--url", server.url)
    assert "has no /v1/events: it answers 404" in said
    assert "hint: see --url: servers that `kvik serve` starts can be watched" in said
    said = problem(kvik, "--url", server.url)
    assert "cannot be reached" in said
    assert "kvik serve" in said
    assert "--timeout is 0" in problem(kvik, "--timeout", "0")
    assert "--url" in problem(kvik, "--url", "nowhere")


def test_help_lists_it(kvik: Kvik) -> None:
    assert re.search(r"\btop +Watch a server", kvik("--help").stdout)
    assert "http://127.0.0.1:8000" in kvik("top", "--help").stdout


@pytest.mark.parametrize("ending", ["q", CTRL_C, "SIGTERM"])
def test_a_terminal_is_put_back_as_it_was(server: Server, ending: str) -> None:
    with Terminal("top", "--url", server.url, NO_COLOR="") as terminal:
        before = termios.tcgetattr(terminal._fd)
        shown = terminal.read_until("requests") + terminal.read_until("ended")
        assert OTHER_SCREEN in shown
        assert CURSOR_OFF in shown
        assert "tiny (1 of 2 models)" in shown
        server.client.ok("/v1/completions", LONG)
        terminal.read_until("length")
        assert termios.tcgetattr(terminal._fd) != before
        if ending == "SIGTERM":
            os.kill(terminal._process.pid, signal.SIGTERM)
        else:
            terminal.type(ending)
        rest, code = terminal.finish()
        assert termios.tcgetattr(terminal._fd) == before
    assert code == 0
    assert CURSOR_ON in rest
    assert rest.endswith(FIRST_SCREEN)
    assert COLOUR.search(shown)
    assert " free" in shown


def test_a_terminal_that_changes_its_size_is_filled_anew(server: Server) -> None:
    with Terminal("top", "--url", server.url, COLUMNS="") as terminal:
        termios.tcsetwinsize(terminal._fd, (24, 60))
        terminal.read_until("ended")
        server.client.ok("/v1/completions", LONG)
        assert "req-" not in terminal.read_until("length")
        termios.tcsetwinsize(terminal._fd, (40, 120))
        terminal.read_until("req-")
        terminal.type("q")
        assert terminal.finish()[1] == 0


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(server: Server) -> None:
    with Terminal("top", "--url", server.url) as terminal:
        before = termios.tcgetattr(terminal._fd)
        terminal.read_until("ended")
        terminal.type("\x1a")
        terminal.read_until(FIRST_SCREEN)
        os.waitid(os.P_PID, terminal._process.pid, os.WSTOPPED | os.WNOWAIT)
        assert termios.tcgetattr(terminal._fd) == before
        os.kill(terminal._process.pid, signal.SIGCONT)
        terminal.read_until(OTHER_SCREEN)
        terminal.type("q")
        assert terminal.finish()[1] == 0


def test_no_colour_where_none_is_welcome(server: Server) -> None:
    with Terminal("top", "--url", server.url, "-m", "other", NO_COLOR="1") as terminal:
        shown = terminal.read_until("ended")
        terminal.type("q")
        terminal.finish()
    assert "other (2 of 2 models)" in shown
    assert not COLOUR.search(shown)
    assert "H 0 held" in shown


def test_a_terminal_that_cannot_be_drawn_over(server: Server) -> None:
    with Terminal("top", "--url", server.url, TERM="dumb") as terminal:
        shown, code = terminal.finish()
    assert code == 2
    assert "hint: add --json" in shown
    assert "\x1b" not in shown


def test_a_server_that_is_started_again_is_found_again(llm: LLM) -> None:
    first = Server({"tiny": with_engine(llm)})
    first.__enter__()
    with Terminal("top", "--url", first.url) as terminal:
        terminal.read_until("ended")
        first._server.handle_exit(signal.SIGTERM, None)
        assert "trying again: " in terminal.read_until("ended its events")
        first.__exit__(None, None, None)
        second = Server({"tiny": with_engine(llm)})
        second.config = dataclasses.replace(second.config, port=first.port)
        with second:
            while "trying again" in terminal.read_until("kvik top") + terminal.read_until("ended"):
                pass
            second.client.ok("/v1/completions", LONG)
            terminal.read_until("length")
            terminal.type("q")
            assert terminal.finish()[1] == 0


def test_a_server_that_turns_into_another_is_not_waited_for(llm: LLM) -> None:
    async def watch(server: Server, fake: FakeServer) -> None:
        watching = Watching(parse_url(server.url), Asked(), timeout_s=30)
        news = watching.follow()
        await anext(news)
        assert watching.lost is None
        watching.address = parse_url(fake.url)
        server._server.handle_exit(signal.SIGTERM, None)
        while watching.lost is None:
            await anext(news)
        assert watching.lost.kind == "disconnected"
        with pytest.raises(RemoteError, match="no /v1/events"):
            await anext(news)

    with FakeServer() as fake, Server({"tiny": with_engine(llm)}) as server:
        asyncio.run(watch(server, fake))


# Frames.

ROWS = [
    row(1, "done", num_prompt_tokens=77, finish_reason="length", blocks=[[]]),
    row(2, "decode", request_id="req-of-anna", written="once\x1b[2J upon\na time"),
    row(3, "queued", num_written_tokens=0, first_token_s=None, blocks=[[]]),
    row(4, "done", error="SlowReader", last_token_s=100.95, choice=1),
]
SOME_BLOCKS = bytes([2, 3, 4, 1] + [0] * 60)


def drawn(states: bytes = SOME_BLOCKS, rows: list[Any] = ROWS, *, width: int, height: int, **place: Any) -> list[str]:
    """The lines, none wider and not more than the terminal has."""
    found = told(model(states, rows))
    found.take(b"change", change(103.0))
    shown = Place(width, height, has_colours=False, url="http://h:1", clock="14:03:22")
    lines = frame(found, found.models["smol"], dataclasses.replace(shown, **place))
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    for line in lines:
        console.print(line)
    text = console.export_text().splitlines()
    assert len(text) == len(lines) <= height, "a line was wrapped, or there are too many"
    assert all(len(line) <= width for line in text)
    return text


def line_with(lines: list[str], text: str) -> str:
    (found,) = [line for line in lines if text in line]
    return found


def test_a_narrow_frame_has_what_matters() -> None:
    lines = drawn(width=60, height=24)
    assert lines[0] == f"{'kvik top · smol · http://h:1':<50}  14:03:22"
    text = "\n".join(lines)
    assert "computed 0 tok/s · cached 0 tok/s · written 0 tok/s" in text
    assert "hit rate 70 %" in text
    assert "cache 5.24 MB of 67.1 MB · evicted 3 · copied 2" in text
    assert "misses  differs 7 · unseen 2" in lines
    assert "requests  1 running · 1 waiting · 2 ended" in lines
    at = lines.index(line_with(lines, "phase "))
    assert lines[at].split() == ["phase", "prompt", "cached", "computed", "written", "TTFT", "a", "token"]
    assert [line.split()[0] for line in lines[at + 1 :]] == ["decode", "queued", "failed", "length"]
    assert lines[at + 1].split()[1:] == ["1,200", "1,024", "180", "5", "500", "ms", "100", "ms"]
    assert lines[at + 2].split()[-2:] == ["-", "-"]


def test_a_wider_frame_says_why_in_words_and_whose_requests_they_are() -> None:
    lines = drawn(width=100, height=30)
    assert line_with(lines, "7 the tokens differ from what is cached")
    assert line_with(lines, "blocks  H 3 held").index("why matches ended") > 40
    heads = line_with(lines, "phase ")
    assert heads.split()[-3:] == ["blocks", "KV", "request"]
    assert line_with(lines, "req-of-anna").split()[9:] == ["2", "3.15", "MB", "req-of-anna"]
    assert line_with(lines, "req-4 (2)")


def test_a_wide_frame_has_text_that_steers_nothing() -> None:
    lines = drawn(width=160, height=40)
    assert line_with(lines, "req-of-anna").endswith("req-of-anna  once\ufffd[2J upon a time")
    hidden = [{name: value for name, value in each.items() if name not in ("prompt", "written")} for each in ROWS]
    assert line_with(drawn(rows=hidden, width=160, height=40), "req-of-anna").endswith("req-of-anna")


@pytest.mark.parametrize("width", [1, 8, 20, 60, 100, 160, 300])
@pytest.mark.parametrize("height", [1, 3, 8, 12, 24, 60])
@pytest.mark.parametrize("num_blocks", [1, 4096])
def test_every_size_is_kept_to(width: int, height: int, num_blocks: int) -> None:
    rows = [row(key, "decode" if key < 30 else "done") for key in range(60)]
    lines = drawn(bytes(num_blocks), rows, width=width, height=height, lost="it is gone", has_colours=True)
    if height >= 24 and width >= 60:
        num_shown = sum(line.startswith(("decode", "stop")) for line in lines)
        assert num_shown >= height // 2 - 3
        assert line_with(lines, f"{60 - num_shown:,} not shown")


def test_blocks_are_letters_where_there_is_no_colour() -> None:
    lines = drawn(width=80, height=24)
    assert line_with(lines, "blocks  H") == "blocks  H 3 held · S 1 of them shared · r 1 reusable · . 60 free"
    assert "HHSr" + "." * 60 in lines
    lines = drawn(width=80, height=24, has_colours=True)
    assert "████" + "·" * 60 in lines


def test_several_blocks_are_a_character_where_there_are_more_than_fit() -> None:
    lines = drawn(bytes([2] * 512 + [0] * 1536), width=60, height=24)
    size = int(re.search(r"(\d+) a character", "\n".join(lines))[1])  # type: ignore[index]
    cells = "".join(line for line in lines if re.fullmatch(r"[HSr.]{2,}", line))
    assert len(cells) == -(-2048 // size)
    assert cells == "H" * -(-512 // size) + "." * (len(cells) - -(-512 // size))


def test_a_character_is_what_most_of_its_blocks_are() -> None:
    looks = bytes(
        [FREE, FREE, FREE, REUSABLE, REUSABLE, REUSABLE, HELD, FREE, HELD, SHARED, FREE, FREE, FREE, FREE, HELD]
    )
    assert map_cells(looks, 4) == bytes([REUSABLE, REUSABLE, SHARED, HELD])
    assert map_cells(looks, 1) == looks
    assert map_cells(bytes(9), 4) == bytes(3)


def test_each_group_of_layers_has_a_map() -> None:
    groups = [
        {"kind": "full", "layers": 4, "block_bytes": 10, "num_blocks": 4},
        {"kind": "window", "window": 512, "layers": 20, "block_bytes": 10, "num_blocks": 3},
    ]
    found = told(model(b"", []) | {"groups": groups, "states": ["AgMEAQ==", "AAEC"]})
    lines = [each.plain for each in frame(found, found.models["smol"], Place(80, 30, False, "u", "c"))]
    assert lines[lines.index("blocks  H 3 held · S 1 of them shared · r 1 reusable · . 0 free") + 1] == "HHSr"
    assert line_with(lines, "window of 512  H 1 held")
    assert ".rH" in lines


def test_a_server_that_is_gone_and_others_requests_are_said() -> None:
    lines = drawn(width=80, height=24, lost="http://h:1 cannot be reached: Connection refused")
    assert lines[1] == "trying again: http://h:1 cannot be reached: Connection refused"
    assert "of other keys" not in "\n".join(drawn(rows=ROWS[:1], width=80, height=24))
    assert line_with(drawn(rows=ROWS[:1], width=80, height=24, has_key=True), "requests").endswith("2 of other keys")


@pytest.mark.parametrize("width", [60, 160])
def test_nothing_that_a_server_says_steers_the_terminal(width: int) -> None:
    evil = "\x1b[2J\x9b1m\n" * 90
    names = ("request_id", "phase", "finish_reason", "error", "prompt", "written")
    rows = [row(at, "decode") | dict.fromkeys(names[:at], evil) for at in range(1, 7)]
    found = told(model(bytes(40), rows, name=evil, counters={f"miss_{evil}": 3}))
    for line in frame(found, found.models[evil], Place(width, 30, True, "u", "c", lost=evil)):
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line.plain)
        assert line.cell_len <= width


def test_stored_blocks_are_told_where_there_are_any() -> None:
    stored = {"disk_blocks": 1234, "miss_damaged": 2}
    found = told(model(bytes([0x81, 0x83, 0x84, 0]), [], counters=stored))
    lines = [each.plain for each in frame(found, found.models["smol"], Place(120, 24, False, "u", "c"))]
    assert "on disk 1,234" in line_with(lines, "evicted 0")
    assert line_with(lines, "2 the stored block is damaged")
    assert "H 2 held" in line_with(lines, "1 reusable"), "what is on disk looks like what is not"
    assert not [line for line in drawn(width=120, height=24) if "on disk" in line]


def test_every_reason_has_words() -> None:
    assert WHY.keys() == {reason.name.lower() for reason in MissReason}


def test_nothing_has_come_yet() -> None:
    found = told(model(bytes(8), [], counters={}))
    lines = [each.plain for each in frame(found, found.models["smol"], Place(80, 24, False, "u", "c"))]
    assert "misses  none yet" in lines
    assert line_with(lines, "hit rate -")
    assert lines[-1] == "requests  0 running · 0 waiting · 0 ended"
