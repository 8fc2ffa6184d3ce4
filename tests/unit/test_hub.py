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

from checkpoints import tiny_config
from wheels import serving

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
OTHERS = ["pytorch_model.bin", "modeling_llama.py", "README.md", "onnx/model.onnx", "original/model.safetensors"]

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
REPOS = {
    "org/one": ["README.md", "one.gguf"],
    "org/many": ["a.gguf", "b.gguf"],
    "org/none": ["README.md", "flax_model.msgpack"],
    "org/no-config": ["model.safetensors", "tokenizer.json"],
    "org/no-tokenizer": ["config.json", "model.safetensors", "vocab.json"],
    "org/pickled": ["config.json", "tokenizer.json", "pytorch_model.bin", "training_args.bin"],
    "org/adapter": ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
    "org/checkpoint": [*SMALL, "model.safetensors", *OTHERS],
    "org/shards": [*SMALL, INDEX, *SHARDS, "consolidated.safetensors", *OTHERS],
    "org/lost-shard": [*SMALL, INDEX, SHARDS[0]],
    "org/escaping": [*SMALL, INDEX],
    "org/awq": [*SMALL, "model.safetensors"],
    "org/code": [*SMALL, "model.safetensors", "modeling_code.py"],
    "org/huge": [*SMALL, "model.safetensors"],
    "org/both": [*SMALL, "model.safetensors", "both.gguf"],
    "org/both-many": [*SMALL, "model.safetensors", "a.gguf", "b.gguf"],
    "org/evil": ["../../evil.gguf"],
    "org/private": ["p.gguf"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "org/awq": {"quantization_config": {"quant_method": "awq"}},
    "org/code": {"model_type": "code", "auto_map": {"AutoModel": "modeling_code.Model"}},
}
SIZES = {"org/huge": 1 << 60}
REFUSALS = {"org/gated": (403, "GatedRepo"), "org/broken": (500, ""), "org/denied": (403, "")}


def content(repo: str, file: str, commit: str) -> bytes:
    """What a file holds: 7 bytes that tell the commit, or JSON where something reads it."""
    if file == "config.json":
        return json.dumps(tiny_config() | CONFIGS.get(repo, {})).encode()
    if file == INDEX:
        files = ["../evil.safetensors"] if repo == "org/escaping" else SHARDS
        return json.dumps({"weight_map": {f"t{index}": file for index, file in enumerate(files)}}).encode()
    return f"GGUF {commit[0]}\n".encode()


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
from kvik.hub import store
from kvik.models.loader import check_config_of
def run(function, *arguments):
    seen = []
    keywords = {"check_config": check_config_of} if function in ("resolve", "pull") else {}
    if function == "resolve":
        keywords["progress"] = lambda *report: seen.append(report)
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
                sizes = {name: SIZES.get(repo) or len(content(repo, name, commit)) for name in REPOS[repo]}
                siblings = [{"rfilename": name, "size": size, "blobId": "0"} for name, size in sizes.items()]
                body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
                self.answer(200, {"Content-Type": "application/json"}, body)
            else:
                body = content(repo, "/".join(parts[4:]), commit)
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
        "org/none": ("ModelError", "org/none has flax_model.msgpack, but no model.safetensors"),
        "org/evil": ("ModelError", "org/evil has no model.safetensors"),
        "org/no-config": ("ModelError", "org/no-config has weights, but no config.json"),
        "org/no-tokenizer": ("ModelError", "org/no-tokenizer has weights, but no tokenizer.json"),
        "org/pickled": (
            "ModelError",
            "org/pickled has its weights in pytorch_model.bin, pickled: reading that runs what the file says, so kvik"
            " does not",
        ),
        "org/adapter": ("ModelError", "org/adapter is an adapter (adapter_config.json), or a model beside one"),
        "org/one:safetensors": ("ModelError", "org/one:safetensors has one.gguf, but no model.safetensors"),
        "org/checkpoint:c.gguf": ("ModelNotFound", "org/checkpoint has no .gguf file, but a checkpoint"),
        "org/both-many": (
            "ModelNotFound",
            "org/both-many has 2 .gguf files: choose from a.gguf, b.gguf, or safetensors for its checkpoint",
        ),
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


def requested(hub: FakeHub) -> set[str]:
    """Names of the files that were asked for, without their repositories."""
    return {line.partition("/resolve/")[2].partition("/")[2] for line in hub.requests} - {""}


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_brought_and_nothing_beside_it(hub: FakeHub) -> None:
    folder = hub.snapshot("org/checkpoint")
    absent, downloaded, again, found = hub.run(
        ("find", "org/checkpoint"),
        ("resolve", "org/checkpoint"),
        ("pull", "org/checkpoint"),
        ("find", "org/checkpoint"),
    )
    assert absent[:2] == ["ModelNotFound", "org/checkpoint is not on this machine"]
    assert downloaded[0] == str(folder)
    assert downloaded[1][-1] == "org/checkpoint: downloading 5 files"  # and config.json, first of all
    assert again == [str(folder), "already here"]
    assert found == str(folder)
    assert files_below(folder) == requested(hub) == {*SMALL, "model.safetensors"}

    num_requests = len(hub.requests)
    at_commit = f"org/checkpoint@{COMMITS['main']}:safetensors"
    assert hub.run(("resolve", at_commit)) == [str(folder)]
    assert hub.run(("resolve", "org/checkpoint"), HF_HUB_OFFLINE="1") == [str(folder)]
    assert len(hub.requests) == num_requests
    cut_off = hub.run(("resolve", "org/checkpoint:safetensors"), HF_ENDPOINT="http://127.0.0.1:9")
    assert cut_off[0] == [str(folder), ["org/checkpoint:safetensors: the Hub is out of reach, using the cached copy"]]


def test_shards_are_those_of_the_index(hub: FakeHub) -> None:
    assert hub.run(("resolve", "org/shards@v2"))[0][0] == str(hub.snapshot("org/shards", "v2"))
    assert files_below(hub.snapshot("org/shards", "v2")) == requested(hub) == {*SMALL, INDEX, *SHARDS}


def test_what_an_interrupted_pull_left_is_completed(hub: FakeHub) -> None:
    folder = hub.snapshot("org/shards")
    hub.run(("resolve", "org/shards"))
    (folder / SHARDS[1]).unlink()
    hub.requests.clear()
    absent, whole = hub.run(("find", "org/shards"), ("pull", "org/shards"))
    assert absent[0] == "ModelNotFound"
    assert whole == [str(folder), "downloaded"]
    assert requested(hub) == {"config.json", SHARDS[1]}
    assert (
        hub.run(
            (
                "pull",
                "org/shards",
            )
        )[0][1]
        == "already here"
    )


def test_a_repository_with_both_kinds(hub: FakeHub) -> None:
    """Its only .gguf is what the bare name means; its checkpoint has to be asked for."""
    folder = hub.snapshot("org/both")
    gguf, checkpoint, many = hub.run(
        ("resolve", "org/both"), ("resolve", "org/both:safetensors"), ("resolve", "org/both-many:safetensors")
    )
    assert gguf[0] == str(folder / "both.gguf")
    assert checkpoint[0] == str(folder)
    assert many[0] == str(hub.snapshot("org/both-many"))
    listed, refused, removed, gone = hub.run(
        ("stored",), ("remove", "org/both:safetensors"), ("remove", "org/both"), ("find", "org/both:safetensors")
    )
    config_bytes = len(content("org/both", "config.json", "a"))
    size_bytes = 5 * 7 + config_bytes
    assert f"name='org/both:safetensors', size_bytes={size_bytes}" in str(listed)
    assert "name='org/both:both.gguf', size_bytes=7" in str(listed)
    assert refused[:2] == [
        "InvalidInput",
        "org/both:safetensors: a revision is deleted as a whole, and this one holds 7 files",
    ]
    assert removed == config_bytes + 7  # the others are alike, and lie there once
    assert gone[0] == "ModelNotFound"
    assert isinstance(hub.run(("remove", "org/both-many:safetensors"))[0], int)


def test_checkpoints_that_kvik_does_not_run_are_refused_before_their_weights_are_brought(hub: FakeHub) -> None:
    awq, code, escaping, lost, huge = hub.run(
        *(("resolve", f"org/{name}") for name in ("awq", "code", "escaping", "lost-shard", "huge"))
    )
    assert awq[0] == "ModelError"
    assert awq[1].endswith("config.json: the weights are quantised by 'awq'")
    assert "model_type 'code' is code that comes with the model (auto_map), which kvik never runs" in code[1]
    assert "is listed in '../evil.safetensors'" in escaping[1]
    assert lost[1] == f"org/lost-shard: {INDEX} names {SHARDS[1]}, which the repository does not have"
    assert huge[0] == "DownloadError"
    assert huge[1].startswith("org/huge: no space left in ")
    assert requested(hub) == {"config.json", INDEX}
    assert hub.run(("stored",)) == hub.run(("stored",), HF_HUB_OFFLINE="1")
    assert "org/awq" not in str(hub.run(("stored",)))


def test_hub_token_and_unusable_cache(hub: FakeHub) -> None:
    assert hub.run(("resolve", "org/private"), HF_TOKEN="hf_secret")[0][0] == str(
        hub.snapshot("org/private") / "p.gguf"
    )
    assert all(request.endswith("Bearer hf_secret") for request in hub.requests if "org/private" in request)

    hub.home = hub.home / "file"
    hub.home.write_text("where a folder should be")
    assert hub.run(("resolve", "org/one"))[0][1].startswith("org/one: Not a directory")
