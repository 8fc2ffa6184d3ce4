"""Models from the Hub: the real huggingface_hub against a stand-in on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from wheels import serving

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
REPOS = {
    "org/one": ["README.md", "one.gguf"],
    "org/many": ["a.gguf", "b.gguf"],
    "org/none": ["model.safetensors"],
    "org/evil": ["../../evil.gguf"],
    "org/private": ["p.gguf"],
}
REFUSALS = {"org/gated": (403, "GatedRepo"), "org/broken": (500, ""), "org/denied": (403, "")}


@dataclass
class FakeHub:
    """A stand-in for the Hub: the model API and file downloads, as huggingface_hub asks for them."""

    url: str
    requests: list[str]
    home: Path

    def run(self, *calls: tuple[object, ...], **environment: str) -> list[Any]:
        """Call functions of `store` in a fresh process: huggingface_hub reads its settings when it is imported."""
        code = """
import json, sys
from kvik.errors import KvikError
from kvik.models import store
def run(function, *arguments):
    seen = []
    keywords = {"progress": lambda *report: seen.append(report)} if function == "resolve" else {}
    try:
        result = getattr(store, function)(*arguments, **keywords)
    except KvikError as error:
        return [type(error).__name__, error.message, error.hint]
    return [result, [*dict.fromkeys(report[0] for report in seen)]] if seen else result
print(json.dumps([run(*call) for call in json.loads(sys.argv[1])], default=str))
"""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"} | environment
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        command = [sys.executable, "-c", code, json.dumps(calls)]
        done = subprocess.run(command, env=kept | settings, stdout=subprocess.PIPE, check=True, timeout=60)
        return list(json.loads(done.stdout))

    def snapshot(self, repo: str, revision: str = "main") -> Path:
        return self.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMITS[revision]


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[FakeHub]:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "")
            requests.append(f"{self.command} {self.path} {token}".strip())
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if is_api else parts[:2])
            revision = (parts[5:6] if is_api else parts[3:4]) or ["main"]
            commit = revision[0] if revision[0] in COMMITS.values() else COMMITS.get(revision[0])
            if repo in REFUSALS:
                self.answer(REFUSALS[repo][0], {"X-Error-Code": REFUSALS[repo][1]})
            elif repo not in REPOS or (repo == "org/private" and token != "Bearer hf_secret"):
                self.answer(401, {"X-Error-Code": "RepoNotFound"})
            elif commit is None:
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            elif is_api:
                siblings = [{"rfilename": name, "size": 7, "blobId": "0"} for name in REPOS[repo]]
                body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
                self.answer(200, {"Content-Type": "application/json"}, body)
            else:
                body = f"GGUF {commit[0]}\n".encode()
                etag = hashlib.sha256(body).hexdigest()
                self.answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with serving(Handler) as url:
        yield FakeHub(url, requests, tmp_path / "hf")


def test_hub_download_then_offline(hub: FakeHub) -> None:
    one, other = hub.snapshot("org/one") / "one.gguf", hub.snapshot("org/one", "v2") / "one.gguf"
    absent, downloaded, pinned_revision, again, named = hub.run(
        ("find", "org/one"),
        ("resolve", "org/one"),
        ("resolve", "org/one@v2"),
        ("pull", "org/one"),
        ("find", "org/one:one.gguf"),
    )
    assert absent[:2] == ["ModelNotFound", "org/one is not on this machine"]
    assert downloaded == [str(one), ["org/one: downloading one.gguf"]]
    assert pinned_revision[0] == str(other)
    assert (one.read_bytes(), other.read_bytes()) == (b"GGUF a\n", b"GGUF b\n")
    assert again == [str(one), "already here"]
    assert named == str(one)

    num_requests = len(hub.requests)
    offline = hub.run(("resolve", "org/one"), ("resolve", "org/one@v2"), ("resolve", "org/many"), HF_HUB_OFFLINE="1")
    assert offline[:2] == [str(one), str(other)]
    assert offline[2][:2] == ["DownloadError", "org/many is not in the Hugging Face cache, and offline mode is on"]
    at_commit = f"org/one@{COMMITS['main']}:one.gguf"
    assert hub.run(("resolve", at_commit)) == [str(one)]
    assert len(hub.requests) == num_requests

    cut_off = hub.run(("resolve", "org/one"), ("resolve", "org/many:a.gguf"), HF_ENDPOINT="http://127.0.0.1:9")
    assert cut_off[0] == [str(one), ["org/one: the Hub is out of reach, using the cached copy"]]
    assert cut_off[1][0] == "DownloadError"
    assert cut_off[1][1].startswith("org/many:a.gguf: http://127.0.0.1:9 is out of reach (")


def test_hub_cache_is_listed_and_removed(hub: FakeHub) -> None:
    before, _, _, after, two_files, freed, gone, left = hub.run(
        ("stored",),
        ("resolve", "org/one@v2"),
        ("resolve", "org/many:a.gguf"),
        ("find", "org/one@v2"),
        ("remove", "org/many:b.gguf"),
        ("remove", "org/one@v2"),
        ("remove", "org/one@v2"),
        ("find", "org/many"),
    )
    assert "Hugging Face cache" not in str(before)
    assert after == str(hub.snapshot("org/one", "v2") / "one.gguf")
    assert two_files[0] == "InvalidInput"
    assert freed == 7
    assert gone[:2] == ["ModelNotFound", "org/one@v2 is not in the Hugging Face cache"]
    assert left == str(hub.snapshot("org/many") / "a.gguf")
    assert not (hub.home / "hub" / "models--org--one").exists()
    assert "name='org/many:a.gguf', size_bytes=7" in str(hub.run(("stored",)))


def test_hub_errors(hub: FakeHub) -> None:
    expected = {
        "org/many": ("ModelNotFound", "org/many has 2 .gguf files: choose from a.gguf, b.gguf"),
        "org/many:c.gguf": ("ModelNotFound", "org/many has no file c.gguf: choose from a.gguf, b.gguf"),
        "org/none": ("ModelError", "org/none has no .gguf file"),
        "org/evil": ("ModelError", "org/evil has no .gguf file"),
        "org/one@v3": ("ModelNotFound", "org/one has no revision v3"),
        "org/absent": ("ModelNotFound", "org/absent is not on the Hub, or is private"),
        "org/private": ("ModelNotFound", "org/private is not on the Hub, or is private"),
        "org/gated": ("DownloadError", "org/gated is gated"),
        "org/broken": ("DownloadError", f"org/broken: {hub.url} answered with HTTP status 500"),
        "org/denied": ("DownloadError", f"org/denied: {hub.url} answered with HTTP status 403"),
        "org/a--b": ("ModelNotFound", "org/a--b is not a valid Hub id"),
    }
    answers = hub.run(*(("resolve", name) for name in expected))
    assert [tuple(answer[:2]) for answer in answers] == list(expected.values())
    assert "`kvik run -m org/many:a.gguf`" in answers[0][2]
    assert not any("Bearer" in request for request in hub.requests)


def test_hub_token_and_unusable_cache(hub: FakeHub) -> None:
    assert hub.run(("resolve", "org/private"), HF_TOKEN="hf_secret")[0][0] == str(
        hub.snapshot("org/private") / "p.gguf"
    )
    assert all(request.endswith("Bearer hf_secret") for request in hub.requests if "org/private" in request)

    hub.home = hub.home / "file"
    hub.home.write_text("where a folder should be")
    assert hub.run(("resolve", "org/one"))[0][1].startswith("org/one: Not a directory")
