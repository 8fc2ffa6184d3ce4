"""The comparison with other engines: workers that answer, refuse, die and hang, and the table that comes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import against_peers
from against_peers import Case, Peer, Results, cases, prompt, report, table
from comparison import RATE, SECONDS
from document import replace_part
from peer_process import NoFigure, PeerProcess

BENCH = Path(against_peers.__file__).parent
WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(BENCH / "peers")!r})
from protocol import CannotDo, Worker, serve

class Fake(Worker):
    def __init__(self, model, threads):
        self.what = model
        print("chatter of a library")
        os.write(1, b"more of it\\n")

    def describe(self):
        return "fake " + self.what

    def first_token(self, prompt):
        if self.what == "hangs":
            time.sleep(60)
        if self.what == "dies":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        return 0.25 * len(prompt)

    def tokens(self, prompt, count):
        return prompt[:count]

    def decode(self, prompts, count):
        if len(prompts) > 1:
            raise CannotDo("one at a time")
        raise ValueError("bad luck")

serve(Fake)
"""


def fake(what: str) -> Peer:
    return Peer(what, (sys.executable, "-c", WORKER, what, "2"))


def test_a_worker_answers_and_says_what_it_cannot_do() -> None:
    process = fake("good").process()
    try:
        answer = process.ask({"do": "first_token", "prompt": [1, 2, 3]}, 60)
        assert answer["seconds"] == 0.75
        assert answer["peak_bytes"] > 1 << 20
        assert process.ask({"do": "repeated", "prompt": [1]}, 60)["seconds"] == 0.25
        assert process.ask({"do": "tokens", "prompt": [7, 8, 9], "count": 2}, 60)["tokens"] == [7, 8]
        for request, said in (
            ({"do": "decode", "prompts": [[1], [2]], "count": 3}, "cannot: one at a time"),
            ({"do": "decode", "prompts": [[1]], "count": 3}, "cannot: ValueError: bad luck"),
            ({"do": "dance"}, "cannot: no request is called 'dance'"),
        ):
            with pytest.raises(NoFigure, match=said):
                process.ask(request, 60)
        assert process.description == "fake good"
    finally:
        process.close()


def test_a_worker_that_hangs_is_killed_and_one_that_dies_is_quoted() -> None:
    for what, said in (("hangs", r"took more than 0\.2 s"), ("dies", "died with 3: out of luck")):
        process = fake(what).process()
        with pytest.raises(NoFigure, match=said):
            process.ask({"do": "first_token", "prompt": [1]}, 0.2 if what == "hangs" else 60)
        with pytest.raises(NoFigure, match="cannot: one at a time"):  # it is started anew
            process.ask({"do": "decode", "prompts": [[1], [2]], "count": 3}, 60)
        process.close()


def test_a_worker_that_is_not_there() -> None:
    with pytest.raises(NoFigure, match=r"is not built: bench/peers/build\.sh"):
        PeerProcess(["/nowhere/python"]).ask({"do": "first_token", "prompt": [1]}, 1)


def test_the_table_shows_medians_ratios_and_reasons() -> None:
    def measure(peer: Peer, process: PeerProcess, round_number: int) -> float:
        if peer.name == "slow":
            raise NoFigure("cannot: too slow")
        return {"kvik": [400.0, 380.0, 420.0], "other": [100.0, 90.0, 200.0]}[peer.name][round_number]

    rate, once = Case("decode", RATE, measure), Case("start", SECONDS, measure, once=True)
    results, process = Results(), PeerProcess(["none"])
    engines = [Peer("kvik", ()), Peer("other", ()), Peer("slow", ())]
    for round_number in range(3):
        for case in (rate, once):
            for peer in engines:
                results.run(case, peer, process, round_number)
    lines = table(results, [rate, once], [peer.name for peer in engines]).splitlines()
    assert lines == [
        "| | kvik | other | slow |",
        "|---|---|---|---|",
        "| decode, tok/s | 400 (380 … 420) | 100 (90 … 200) · **4 ×** | cannot: too slow |",  # noqa: RUF001
        "| start, s | 400.00 | 100.00 · **0.25 ×** | cannot: too slow |",  # noqa: RUF001
    ]
    text = report("A machine", results, [rate], {"kvik": process}, 3)
    assert text.startswith("A machine. Medians of the rounds (lowest … highest), 3 whole ones")
    assert text.endswith("* did not start")


def test_rows_and_prompts_are_the_same_for_all() -> None:
    names = [case.name for case in cases(Path("none.gguf"))]
    assert len(set(names)) == len(names) == 11
    assert prompt(5, "a") == prompt(5, "a") != prompt(5, "b")
    assert len(prompt(8000, "a")) == 8000


def test_a_part_of_a_document_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n")
    replace_part(path, "one", "new\nlines\n\n")
    assert path.read_text() == "before\n<!-- one: begin -->\nnew\nlines\n<!-- one: end -->\nafter\n"
    replace_part(path, "one", "newer")
    assert path.read_text() == "before\n<!-- one: begin -->\nnewer\n<!-- one: end -->\nafter\n"
    with pytest.raises(ValueError, match="no part named 'two'"):
        replace_part(path, "two", "text")
    assert list(tmp_path.iterdir()) == [path]
