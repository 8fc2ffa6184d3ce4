"""`kvik explain`: what is written, what is printed, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvik
from gguf_files import tiny_llama
from kvik.cli.explain import number_list
from kvik.cli.terminal import INTERRUPTED
from kvik.engine.sequence import Sequence
from kvik.explain.run import TracedRun
from models import altered

SHORT = ("--max-tokens", "8")


def written(path: Path) -> dict[str, Any]:
    """What the page knows."""
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_page_and_a_trace_are_written(kvik: Kvik, tmp_path: Path) -> None:
    page, trace = tmp_path / "out.html", tmp_path / "out.json"
    result = kvik("explain", "hello there", *SHORT, "--html", str(page), "--trace", str(trace))
    assert result.exit_code == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert re.fullmatch(
        r"8 tokens after 6: 76 computed without the cache in .*, 13 with it in .*; the same to the last bit", first
    )
    assert second == f"{page}: {page.stat().st_size:,} bytes; attention of layers 0, 1, KV heads 0, 1"
    events = json.loads(trace.read_text())["traceEvents"]
    assert third == f"{trace}: {len(events):,} events; open it in ui.perfetto.dev"
    data = written(page)
    assert [len(data[name]) for name in ("tokens", "steps", "follow_ups")] == [14, 8, 2]
    assert [each["length"] for each in data["first_tokens"]] == [1, 8, 32, 128, 512]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


def test_a_trace_alone_needs_no_page(kvik: Kvik, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    result = kvik("explain", "hello", *SHORT, "--trace", str(trace), "--kv-dtype", "int8", "--activations", "int16")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert json.loads(trace.read_text())["otherData"]["is_same"] is True


def test_the_second_prompt_comes_first(kvik: Kvik, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    long = "hello there, this is a text of many letters"
    result = kvik(
        "explain",
        long,
        *SHORT,
        "--second",
        long[:30] + "XYZ",
        "--html",
        str(page),
        "--layers",
        "1",
        "--kv-heads",
        "1,0",
    )
    assert result.exit_code == 0, result.stderr
    assert "attention of layers 1, KV heads 1, 0" in result.stdout
    first = written(page)["follow_ups"][0]
    assert first["title"] == "The second prompt"
    assert 0 < first["num_copied_tokens"] + first["num_shared_tokens"] == first["num_common_tokens"]


def test_chat_goes_through_the_template(kvik: Kvik, base: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    raw, chat = (
        kvik("explain", "hello", *SHORT, *more, "--html", str(page)).stdout.splitlines()[0]
        for more in ((), ("--chat",))
    )
    assert int(chat.split()[3].rstrip(":")) > int(raw.split()[3].rstrip(":"))
    result = kvik("explain", "hello", "--chat", "--html", str(page), "-m", str(base))
    assert result.exit_code == 2
    assert "has no chat template" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "the prompt is empty"),
        (("hi", "--second", " "), "the prompt is empty"),
        (("hi", "--html"), "requires an argument"),
        (("hi",), "there is nothing to write"),
        (("hi", "--html", "out.txt"), "--html is out.txt"),
        (("hi", "--trace", "out.html"), "--trace is out.html"),
        (("hi", "--html", "missing/out.html"), "there is no folder"),
        (("hi", "--html", "."), "a folder"),
        (("hi", "--html", "o.html", "--max-tokens", "0"), "--max-tokens is 0"),
        (("hi", "--html", "o.html", "--max-tokens", "-3"), "--max-tokens is -3"),
        (("hi", "--html", "o.html", "--max-tokens", "1000000000"), "--max-tokens is 1,000,000,000"),
        (
            ("hi", "--html", "o.html", "--max-tokens", "256"),
            "prompt of . tokens and 256 to write are .*draws 256",
        ),
        (("x" * 400, "--html", "o.html"), "the page draws 256"),
        (("hi", "--html", "o.html", "--context", "32"), "the context holds 32"),
        (("hi", "--html", "o.html", "--second", "y" * 300), "301|30. tokens|the page draws 256"),
        (("hi", "--html", "o.html", "--layers", "2"), "there is no layer 2: the model has 2"),
        (("hi", "--html", "o.html", "--layers", "0,0"), "--layers is '0,0'"),
        (("hi", "--html", "o.html", "--layers", "-1"), "--layers has '-1' in it"),
        (("hi", "--html", "o.html", "--kv-heads", "7"), "there is no KV head 7: the model has 2"),
        (("hi", "--html", "o.html", "--kv-heads", "a"), "--kv-heads has 'a' in it"),
        (("hi", "--trace", "o.json", "--layers", "0"), "--layers is about the page"),
        (("hi", "--trace", "o.json", "--second", "ho"), "--second is about the page"),
        (("hi", "--html", "o.html", "-m", "smolm2"), "smollm2"),
        (("hi", "--html", "o.html", "--kv-dtype", "f8"), "f16"),
    ],
)
def test_bad_input_is_refused(
    kvik: Kvik, arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = kvik("explain", *arguments)
    assert result.exit_code == 2, result.stdout
    assert re.search(said, result.stderr), result.stderr
    assert "hint: " in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_told_before_any_work(
    kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    result = kvik("explain", "hi", "--html", str(tmp_path / "o.html"))
    assert result.exit_code == 2
    assert "may not be written" in result.stderr


def test_a_page_that_fails_on_the_way_leaves_the_old_one(
    kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "o.html"
    page.write_text("old")

    def full(path: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = kvik("explain", "hi", *SHORT, "--html", str(page))
    assert result.exit_code == 2
    assert f"{page} cannot be written: No space left on device" in result.stderr
    assert page.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [page]


def test_ctrl_c_writes_nothing(kvik: Kvik, interrupt_at: Callable[[int], None], tmp_path: Path) -> None:
    interrupt_at(5)
    result = kvik("explain", "hello there", *SHORT, "--html", str(tmp_path / "o.html"))
    assert result.exit_code == INTERRUPTED
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_exit_1_and_said(kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TracedRun, "is_same", property(lambda run: False))
    page = tmp_path / "o.html"
    result = kvik("explain", "hello there", *SHORT, "--html", str(page))
    assert result.exit_code == 1
    assert "NOT the same" in result.stdout
    assert written(page)["same"]["is_same"] is False


def test_a_text_that_ends_early_is_shorter(kvik: Kvik, tmp_path: Path) -> None:
    """What this model would write first ends its texts."""
    page = tmp_path / "o.html"
    source = tiny_llama(tmp_path / "a.gguf")
    assert kvik("explain", "hello", *SHORT, "--html", str(page), "-m", str(source)).exit_code == 0
    data = written(page)
    assert (len(data["steps"]), data["finish_reason"]) == (8, "length")
    ends = {"tokenizer.ggml.eos_token_id": data["steps"][0]["chosen"]["id"]}
    model = altered(source, tmp_path / "b.gguf", metadata=ends)
    assert kvik("explain", "hello", *SHORT, "--html", str(page), "-m", str(model)).exit_code == 0
    data = written(page)
    assert (len(data["steps"]), data["finish_reason"]) == (1, "stop")


def test_as_many_tokens_as_a_page_draws(kvik: Kvik, tmp_path: Path) -> None:
    """No room is left for another prompt that goes on: what has none is left out, and the page is written."""
    page = tmp_path / "o.html"
    result = kvik("explain", "hello there", "--max-tokens", "250", "--html", str(page))
    assert result.exit_code == 0, result.stderr
    data = written(page)
    assert len(data["tokens"]) == 256
    assert [each["title"] for each in data["follow_ups"]] == ["The same beginning, another end"]


def test_lanes_that_part_are_told_and_drawn_as_far_as_both_go(
    kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane without the cache chooses an end where the other one goes on."""

    accept = Sequence.accept

    def end_early(sequence: Sequence, token_id: int) -> None:
        early = not sequence.request.use_cache and sequence.num_completion_tokens == 3
        accept(sequence, min(sequence.request.stop_token_ids) if early else token_id)

    monkeypatch.setattr(Sequence, "accept", end_early)
    page, trace = tmp_path / "o.html", tmp_path / "o.json"
    result = kvik("explain", "hello there", *SHORT, "--html", str(page), "--trace", str(trace))
    assert result.exit_code == 1
    assert "NOT the same" in result.stdout
    data = written(page)
    assert (len(data["steps"]), data["same"]["is_same"]) == (4, False)
    assert data["same"]["num_same_kv_rows"] < data["same"]["num_kv_rows"]
    assert json.loads(trace.read_text())["otherData"]["is_same"] is False


def test_the_next_turn_of_a_chat_goes_through_the_template(kvik: Kvik, tmp_path: Path) -> None:
    page = tmp_path / "o.html"
    assert kvik("explain", "hello", "--max-tokens", "60", "--chat", "--html", str(page)).exit_code == 0
    turn, *_ = written(page)["follow_ups"]
    assert turn["title"] == "The next turn of the chat"
    assert sum(token["text"] == "<|im_start|>" for token in turn["tokens"]) >= 3
    assert turn["num_common_tokens"] > 10, "the first question in its template"


@pytest.mark.parametrize(
    ("numbers", "shown"), [((0,), "0"), ((0, 1), "0, 1"), ((0, 1, 2, 7, 9, 10, 11), "0-2, 7, 9-11"), ((3, 1), "3, 1")]
)
def test_runs_of_numbers_are_shown_by_their_ends(numbers: tuple[int, ...], shown: str) -> None:
    assert number_list(numbers) == shown
